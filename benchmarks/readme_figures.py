"""Measures the figures that the README, the docs and the configurations print about the digits.

python benchmarks/readme_figures.py --workdir DIR [--only configs/digits_w4.py ...]

Trains every digits configuration with seed 0 and exports it, one process each and one after the
other. A run whose directory holds a `result.json` is not trained again, nor is one that diverged,
whose accuracies are null; one that was interrupted resumes. Programs are compiled into DIR, so that
the first run, the demo, starts from an empty cache. Its minutes are recorded: leave it the machine
to itself.

Writes `benchmarks/readme_figures.json`, which tests/test_readme.py compares with the texts, and
`docs/demo.png`, the accuracy plot of the demo. With `--only` the other runs keep their figures.
Cost: more than an hour on 2 CPU cores.
"""

import argparse
import datetime
import io
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import digits_w4

FIGURES = ROOT / "benchmarks" / "readme_figures.json"
PICTURE = ROOT / "docs" / "demo.png"
_NOT_FINITE = 3  # exit code of a run of main.py that diverged
DEMO = "configs/digits_w4.py"
OTHERS = [name for name in digits_w4.MODELS if name != "mobilenet_v2"]
# What `--config` takes, in the order in which they run.
CONFIGS = [
  DEMO,
  *(f"configs/digits_w4.py:{name}" for name in OTHERS),
  "configs/digits_w3.py",
  "configs/digits_w2.py",
  *(f"configs/digits_w2.py:{name}" for name in OTHERS),
]


def main() -> None:
  """Runs what is missing and writes the figures after every run."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, help="where the runs are kept")
  parser.add_argument(
    "--only", nargs="+", choices=CONFIGS, default=CONFIGS, help="some of the runs"
  )
  options = parser.parse_args()
  workdir = pathlib.Path(options.workdir).absolute()
  figures = json.loads(FIGURES.read_text())
  for config in options.only:
    directory = workdir / config.removeprefix("configs/").replace(".py", "").replace(":", "_")
    train_and_export(config, directory)
    diverged = directory / "diverged.txt"
    if diverged.exists():
      figures["runs"][config] = describe_diverged(config, diverged.read_text())
    else:
      figures["measured"], figures["runs"][config] = describe(config, directory)
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{config}: {figures['runs'][config]['final_line']}", flush=True)
    if config == DEMO:
      PICTURE.write_bytes(smaller((directory / "run" / "plots" / "accuracy.png").read_bytes()))


def train_and_export(config: str, directory: pathlib.Path) -> None:
  """Leaves `result.json`, `export.txt`, and `seconds.txt` unless the run was interrupted; or only
  `diverged.txt`.
  """
  run = directory / "run"
  if (directory / "diverged.txt").exists():
    return
  if not (run / "result.json").exists():
    interrupted = run.exists()
    start = time.perf_counter()
    allowed = (0, _NOT_FINITE)
    if execute(train_command(config, str(run)), directory, "train.txt", allowed) == _NOT_FINITE:
      (error,) = re.findall("^error: .*", (directory / "train.txt").read_text(), flags=re.M)
      (directory / "diverged.txt").write_text(error)
      return
    if not interrupted:
      (directory / "seconds.txt").write_text(f"{time.perf_counter() - start:.1f}")
  if not (directory / "export.txt").exists():
    execute(export_command(str(run)), directory, "export.unfinished.txt")
    (directory / "export.unfinished.txt").rename(directory / "export.txt")


def train_command(config: str, run: str) -> list[str]:
  """The command line without the interpreter."""
  return ["main.py", "--config", config, "--workdir", run]


def export_command(run: str) -> list[str]:
  """The command line without the interpreter."""
  return ["main.py", "--mode", "export", "--workdir", run]


def execute(
  command: list[str], directory: pathlib.Path, log: str, allowed: tuple[int, ...] = (0,)
) -> int:
  """Runs a command of this package; its output goes into the directory.

  Returns:
    The exit code; one that is not allowed ends this program.
  """
  directory.mkdir(parents=True, exist_ok=True)
  environment = {
    **os.environ,
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # see the Makefile
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "HOME": str(directory.parent / "home"),  # programs are cached in ~/.cache/profit_jax
  }
  with (directory / log).open("w") as file:
    done = subprocess.run(
      [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
    )
  if done.returncode not in allowed:
    sys.exit(f"{shlex.join(command)} failed with exit code {done.returncode}: {directory / log}")
  return done.returncode


def describe_diverged(config: str, error: str) -> dict[str, Any]:
  """A run that ended with an error, which has no figures."""
  return {
    "command": shlex.join(["python", *train_command(config, "RUN")]),
    "seed": 0,
    "top1": None,
    "top5": None,
    "full_precision_top1": None,
    "final_line": error,
    "export": {"lines": []},
  }


def describe(config: str, directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """What the run was measured on, and its figures as the commands print them."""
  from profit_jax.report.console import final_line

  result = json.loads((directory / "run" / "result.json").read_text())
  environment, final = result["environment"], result["final"]
  seconds = directory / "seconds.txt"
  machine = {
    "date": datetime.date.today().isoformat(),
    "machine": f"{len(os.sched_getaffinity(0))} cores of an {processor()}",
    "python": environment["python"],
    "packages": environment["packages"],
    "commit": environment["commit"],
  }
  run = {
    "command": shlex.join(["python", *train_command(config, "RUN")]),
    "seed": result["seed"],
    **{
      name: final[name] for name in ("top1", "top5", "weights", "full_precision_top1", "examples")
    },
    "final_line": final_line(result),
    "export": {
      "command": shlex.join(["python", *export_command("RUN")]),
      "lines": export_lines((directory / "export.txt").read_text()),
    },
  }
  if config == DEMO:
    run["minutes"] = round(float(seconds.read_text()) / 60, 1) if seconds.exists() else None
    run["table"] = table_lines(result)
  return machine, run


def table_lines(result: dict[str, Any]) -> list[str]:
  """The rows of the table that a run prints at its end."""
  from rich.console import Console

  from profit_jax.report.console import print_table

  text = io.StringIO()
  print_table(Console(file=text, width=100), result)
  return [line.rstrip() for line in text.getvalue().splitlines() if line.strip()[:1].isdigit()]


def export_lines(text: str) -> list[str]:
  """What an export prints about the code-domain net and each file."""
  return [line.strip() for line in text.splitlines() if "codes differ" in line]


def processor() -> str:
  """The name of the CPU."""
  for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
    if line.startswith("model name"):
      return line.split(":", 1)[1].strip()
  return platform.processor()


def smaller(png: bytes) -> bytes:
  """The same picture in 64 colours, so that it can be kept in the repository."""
  from PIL import Image

  image = Image.open(io.BytesIO(png)).convert("RGB")
  written = io.BytesIO()
  image.quantize(64, dither=Image.Dither.NONE).save(written, format="PNG", optimize=True)
  return written.getvalue()


if __name__ == "__main__":
  main()
