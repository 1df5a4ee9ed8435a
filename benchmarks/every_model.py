"""Takes every quantized model through the whole plan on digits, and prints what it ends with.

python benchmarks/every_model.py [--models mobilenet_v1,mobilenet_v2] [--workdir DIR]
                                 [--results FILE.json]

Each model is an ordinary run, `main.py --config configs/digits_w4.py:MODEL`, after the other; a run
found in DIR resumes. FILE keeps the results of other models that it has. Exit code 1 if a model
ends below 97 % in full precision, or at W4A4 more than 1.5 points below its full precision.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import digits_w4

LOWEST_FULL_PRECISION = 97.0
LARGEST_LOSS = 1.5  # points


def run(model: str, workdir: pathlib.Path) -> dict:
  """One run from the command line; returns its `result.json` and the seconds that it took."""
  command = [
    sys.executable,
    "main.py",
    "--config",
    f"configs/digits_w4.py:{model}",
    "--workdir",
    str(workdir),
  ]
  # See the Makefile for what this does on a CPU.
  environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
  start = time.perf_counter()
  with (workdir.parent / f"{model}.log").open("w") as log:
    subprocess.run(
      command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True
    )
  return {
    "seconds": time.perf_counter() - start,
    **json.loads((workdir / "result.json").read_text()),
  }


def figures(model: str, result: dict) -> dict:
  """What the table and the file of results have of a run."""
  final, environment = result["final"], result["environment"]
  return {
    "width": digits_w4.MODELS[model][0],
    "strides": digits_w4.MODELS[model][1],
    "seed": result["seed"],
    "phases": len(result["phases"]),
    "full_precision_top1": final["full_precision_top1"],
    "w4a4_top1": final["top1"],
    "loss_points": final["full_precision_top1"] - final["top1"],
    "weights": final["weights"],
    "minutes_since_last_start": result["seconds"] / 60,
    "environment": f"jax {environment['packages']['jax']} on {environment['devices']} x "
    f"{environment['device']}",
  }


def write(path: pathlib.Path, model: str, row: dict) -> None:
  """Puts a model's figures into a file, beside those of others."""
  rows = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps({**rows, model: row}, indent=2) + "\n")


def main() -> int:
  """Runs the models and prints a line for each; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--models", default=",".join(digits_w4.MODELS), help="names, separated by commas"
  )
  parser.add_argument("--workdir", help="where the runs are kept; a temporary directory by default")
  parser.add_argument("--results", type=pathlib.Path, help="a JSON file for the figures")
  options = parser.parse_args()
  root = pathlib.Path(options.workdir or tempfile.mkdtemp(prefix="every_model_")).absolute()
  root.mkdir(parents=True, exist_ok=True)
  print(
    f"{'model':23} {'width':>5} {'phases':>6} {'fp top-1':>9} {'W4A4':>8} {'loss':>6} "
    f"{'weights':>7} {'minutes':>7}",
    flush=True,
  )
  missed = []
  for model in options.models.split(","):
    row = figures(model, run(model, root / model))
    print(
      f"{model:23} {row['width']:>5} {row['phases']:>6} {row['full_precision_top1']:>8.2f}% "
      f"{row['w4a4_top1']:>7.2f}% {row['loss_points']:>6.2f} {row['weights']:>7} "
      f"{row['minutes_since_last_start']:>7.1f}",
      flush=True,
    )
    if options.results:
      write(options.results, model, row)
    if row["full_precision_top1"] < LOWEST_FULL_PRECISION or row["loss_points"] > LARGEST_LOSS:
      missed.append(model)
  print(f"seed {row['seed']}; {row['environment']}; runs in {root}")
  print(
    f"below {LOWEST_FULL_PRECISION:.0f} % in full precision, or more than {LARGEST_LOSS} points "
    f"below it at W4A4: {', '.join(missed) or 'none'}"
  )
  return 1 if missed else 0


if __name__ == "__main__":
  sys.exit(main())
