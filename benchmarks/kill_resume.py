"""Kills a run with SIGKILL at random instants, lets it go on, and compares its end with that of a
run that nobody killed.

    python benchmarks/kill_resume.py 50

The run takes a small MobileNet-v1 on scikit-learn's digits to 4 bits in ten phases, with a
checkpoint every second. Each trial starts it anew, kills it once at an instant drawn uniformly from
its steps (in every second trial, while the next checkpoint after that instant is being written),
starts the same command again, and lets it finish. It has survived when `result.json` is equal apart
from times, and so is everything in the last checkpoint, to the bit.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CONFIG = [
  "--config=configs/digits_w4.py:mobilenet_v1",
  "--config.data.image_size=16",
  "--config.model.strides=(1, 1, 2, 2, 2, 1)",
  "--config.plan.weight_bits=(4,)",
  "--config.plan.act_bits=(4,)",
  "--config.plan.full_precision_epochs=4",
  "--config.plan.finetune_epochs=2",
]


class Run:
  """One command, started as often as it is killed."""

  def __init__(self, workdir: pathlib.Path, minutes: float, more: list[str] = ()):
    """Args: workdir: of the run; minutes: between two checkpoints; more: arguments."""
    self.workdir = workdir
    self._command = [
      sys.executable,
      "main.py",
      *CONFIG,
      f"--workdir={workdir}",
      f"--config.checkpoint.minutes={minutes}",
      *more,
    ]

  def start(self) -> subprocess.Popen:
    """Starts the command, its output beside the workdir."""
    with open(f"{self.workdir}.log", "a") as log:
      environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
      return subprocess.Popen(self._command, cwd=ROOT, env=environment, stdout=log, stderr=log)

  def finish(self) -> None:
    """Starts it and waits; ends the benchmark if it fails."""
    if self.start().wait() != 0:
      sys.exit(f"{' '.join(self._command)} failed: see {self.workdir}.log")

  def wait_for(self, process: subprocess.Popen, *pattern: str) -> float:
    """When one of these files of the workdir is there; ends the benchmark if the process does
    before.
    """
    while not any(next(self.workdir.glob(name), None) for name in pattern):
      if process.poll() is not None:
        sys.exit(f"{self.workdir} ended without {pattern}: see {self.workdir}.log")
      time.sleep(0.002)
    return time.monotonic()

  def outcome(self) -> tuple:
    """What must be equal."""
    from profit_jax import checkpoints

    last = checkpoints.read_newest(self.workdir / "checkpoints", sys.exit)
    arrays = {path: array.tobytes() for path, array in last.arrays.items()}
    return (
      without_times(json.loads((self.workdir / "result.json").read_text())),
      without_times(last.values),
      arrays,
    )


def without_times(tree):
  """A tree of plain values without the seconds that things took."""
  if isinstance(tree, dict):
    return {key: without_times(value) for key, value in tree.items() if "seconds" not in key}
  return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def trial(run: Run, instant: int, minutes: float, in_save: bool) -> str:
  """Kills the run once, soon after the checkpoint with that number, and lets it finish; says where
  it was killed.
  """
  process, checkpoints = run.start(), run.workdir / "checkpoints"
  run.wait_for(process, "checkpoints")
  while process.poll() is None and max(numbers(checkpoints), default=0) < instant:
    time.sleep(0.001)
  time.sleep(random.uniform(0, 60 * minutes))
  if in_save:
    while process.poll() is None and not list(checkpoints.glob("*tmp*")):
      time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.03))
  unfinished = list(checkpoints.glob("*tmp*"))
  process.kill()
  done = process.wait() == 0
  newest = max(numbers(checkpoints), default=0)
  run.finish()
  if done:
    return "after its end"
  return f"after checkpoint {newest:>4}{', in a save' if unfinished else ''}"


def numbers(checkpoints: pathlib.Path) -> list[int]:
  """The checkpoints that are there."""
  return [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()]


def main() -> None:
  """Prints a line per trial and the count."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("trials", type=int, help="how many")
  parser.add_argument("--seed", type=int, default=0, help="of the instants")
  parser.add_argument("--minutes", type=float, default=0.02, help="between two checkpoints")
  options = parser.parse_args()
  random.seed(options.seed)
  with tempfile.TemporaryDirectory(prefix="kill_resume_") as directory:
    root = pathlib.Path(directory)
    Run(root / "warm", options.minutes).finish()  # compiles
    reference = Run(root / "reference", options.minutes)
    start = time.monotonic()
    reference.finish()
    seconds = time.monotonic() - start
    expected = reference.outcome()
    last = max(numbers(reference.workdir / "checkpoints"))
    top1 = expected[0]["final"]["top1"]
    print(
      f"undisturbed: {seconds:.1f} s, {last} steps and epochs, W4A4 top-1 {top1:.2f} %; "
      f"{options.trials} kills",
      flush=True,
    )
    identical = in_saves = 0
    for number in range(1, options.trials + 1):
      run = Run(root / f"trial{number}", options.minutes)
      where = trial(run, random.randrange(last), options.minutes, in_save=number % 2 == 0)
      same = run.outcome() == expected
      identical += same
      in_saves += "in a save" in where
      print(f"{number:>4}  killed {where}: {'identical' if same else 'DIFFERENT'}", flush=True)
      if same:
        shutil.rmtree(run.workdir)
      else:
        sys.exit(f"kept: {shutil.copytree(run.workdir, tempfile.mkdtemp() + '/run')}")
    print(
      f"{identical} of {options.trials} ended identical to the bit; {in_saves} were killed while "
      "a checkpoint was written"
    )


if __name__ == "__main__":
  main()
