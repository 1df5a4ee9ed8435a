"""Trains a grid of runs and compares them: python -m profit_jax.ablate --config configs/ablation_digits.py --workdir DIR.

Every cell is an ordinary run of `main.py`, in a directory of its own, with as many seeds as the grid says; the same command
goes on where it was stopped. Writes DIR/ablation.md, ablation.json and ablation.png.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from etils import epath

from profit_jax import ablation, paths
from profit_jax.settings import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent
_DEVICES = "import jax; print(jax.default_backend(), jax.local_device_count())"


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code: 1 where a run failed."""
  parser = argparse.ArgumentParser(
    prog="python -m profit_jax.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", required=True, help="a file with a function get_grid, as configs/ablation_digits.py")
  parser.add_argument("--workdir", required=True, help="where the runs and the table go, local or remote")
  parser.add_argument("--only", action="append", default=[], metavar="AXIS=LABEL", help="a part of the grid; repeatable")
  parser.add_argument("--seeds", type=int, help="runs of every cell, instead of the grid's number")
  parser.add_argument("--jobs", type=int, help="runs at once; by default one on every GPU, or one")
  parser.add_argument("--plan", action="store_true", help="print the commands and train nothing")
  options = parser.parse_args(arguments)
  try:
    grid = ablation.narrowed(ablation.read_grid(options.config), options.only, options.seeds)
    if options.jobs is not None and options.jobs < 1:
      raise ConfigError(f"--jobs={options.jobs} is not allowed: it must be 1 or more.")
    root = paths.opened("--workdir", options.workdir)
    runs = [(labels, seed) for seed in range(grid.seeds) for labels in grid.cells()]
    if not runs:
      raise ConfigError("The grid has no cell: --only, or the grid's keep, leaves nothing.")
    if options.plan:
      for labels, seed in runs:
        print(shlex.join(_command(grid, root, labels, seed)))
      return 0
    failed = train(grid, root, runs, options.jobs)
    report(grid, root)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  for labels, seed, log in failed:
    print(f"FAILED: {', '.join(labels)}, seed {seed}: see {log}", file=sys.stderr)
  return 1 if failed else 0


def _command(grid, root, labels, seed):
  directory = ablation.directory_of(root, labels, seed)
  return [sys.executable, "main.py", *grid.arguments(labels, seed), f"--workdir={directory}"]


def train(
  grid: ablation.Grid, root: epath.Path, runs: Sequence[tuple[ablation.Labels, int]], jobs: int | None
) -> list[tuple[ablation.Labels, int, pathlib.Path]]:
  """Trains the runs that have no result yet; returns those that failed, and their logs."""
  waiting = [run for run in runs if not (ablation.directory_of(root, *run) / "result.json").exists()]
  print(f"{len(runs)} runs, {len(waiting)} of them to be trained.", flush=True)
  if not waiting:
    return []
  devices: queue.Queue[dict[str, str]] = queue.Queue()
  environments = _environments(jobs)
  for environment in environments:
    devices.put(environment)
  logs = pathlib.Path(root if "://" not in os.fspath(root) else ".") / "logs"
  try:
    logs.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"{logs} cannot be written: {error}. Give another --workdir.") from error

  def run(labels, seed):
    log = logs / f"{ablation.directory_of(epath.Path('.'), labels, seed).name}.log"
    environment, start = devices.get(), time.perf_counter()
    try:
      with log.open("a") as opened:
        command = _command(grid, root, labels, seed)
        done = subprocess.run(
          command, cwd=ROOT, env={**os.environ, **environment}, stdout=opened, stderr=subprocess.STDOUT, check=False
        )
    finally:
      devices.put(environment)
    return done.returncode, time.perf_counter() - start, log

  failed = []
  with concurrent.futures.ThreadPoolExecutor(len(environments)) as pool:
    started = {pool.submit(run, *item): item for item in waiting}
    for number, future in enumerate(concurrent.futures.as_completed(started), 1):
      (labels, seed), (code, seconds, log) = started[future], future.result()
      told = "failed" if code else _top1(root, labels, seed)
      print(f"{number:>4}/{len(waiting)}  {', '.join(labels)}, seed {seed}: {told}, {seconds:.0f} s", flush=True)
      if code:
        failed.append((labels, seed, log))
  return failed


def _top1(root, labels, seed):
  final = json.loads((ablation.directory_of(root, labels, seed) / "result.json").read_text())["final"]
  return f"{final['top1']:.2f} %"


def _environments(jobs):
  """What each run that goes on at once adds to the environment: its GPU."""
  # In a process of its own: this one must not take the devices' memory.
  found = subprocess.run([sys.executable, "-c", _DEVICES], cwd=ROOT, capture_output=True, text=True, check=False)
  backend, count = found.stdout.split()[-2:] if found.returncode == 0 and found.stdout else ("cpu", "1")
  if backend in ("gpu", "cuda"):
    return [{"CUDA_VISIBLE_DEVICES": str(index % int(count))} for index in range(jobs or int(count))]
  return [{}] * (jobs or 1)


def report(grid: ablation.Grid, root: epath.Path) -> None:
  """Writes and prints the table of what has ended."""
  cells = ablation.read_cells(grid, root)
  compared = ablation.differences(grid, cells)
  text = ablation.markdown(grid, cells, compared)
  try:
    (root / "ablation.md").write_text(text)
    (root / "ablation.json").write_text(json.dumps(ablation.to_json(grid, cells, compared), indent=1) + "\n")
    with (root / "ablation.png").open("wb") as file:
      ablation.plot(grid, cells, file)
  except OSError as error:
    raise ConfigError(f"--workdir {root} cannot be written: {error}. The runs are kept; make room and repeat.") from error
  print(text, end="")
  print(f"Table and plot: {root}/ablation.md, ablation.json, ablation.png")


if __name__ == "__main__":
  sys.exit(main())
