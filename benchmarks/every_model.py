"""Takes every quantized model through the whole plan on digits, and prints what it ends with.

python benchmarks/every_model.py [--models mobilenet_v1,mobilenet_v2] [--workdir DIR]

Each model is an ordinary run, `main.py --config configs/digits_w4.py:MODEL`, after the other; a run
found in DIR goes on. Exit code 1 if a model ends below 95 % at W4A4.
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

LOWEST_TOP1 = 95.0


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


def main() -> int:
  """Runs the models and prints a line for each; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--models", default=",".join(digits_w4.MODELS), help="names, separated by commas"
  )
  parser.add_argument("--workdir", help="where the runs are kept; a temporary directory by default")
  options = parser.parse_args()
  root = pathlib.Path(options.workdir or tempfile.mkdtemp(prefix="every_model_")).absolute()
  root.mkdir(parents=True, exist_ok=True)
  print(
    f"{'model':20} {'width':>5} {'phases':>6} {'fp top-1':>9} {'W4A4':>7} {'weights':>7} "
    f"{'minutes':>7}",
    flush=True,
  )
  lowest = 100.0
  for model in options.models.split(","):
    result = run(model, root / model)
    final = result["final"]
    print(
      f"{model:20} {digits_w4.MODELS[model][0]:>5} {len(result['phases']):>6} "
      f"{final['full_precision_top1']:>8.2f}% "
      f"{final['top1']:>6.2f}% {final['weights']:>7} {result['seconds'] / 60:>7.1f}",
      flush=True,
    )
    lowest = min(lowest, final["top1"])
  environment = result["environment"]
  print(
    f"seed {result['seed']}; jax {environment['packages']['jax']} on {environment['devices']} x "
    f"{environment['device']}"
  )
  print(f"lowest W4A4 top-1: {lowest:.2f} %, required: {LOWEST_TOP1:.0f} %; runs in {root}")
  return 0 if lowest >= LOWEST_TOP1 else 1


if __name__ == "__main__":
  sys.exit(main())
