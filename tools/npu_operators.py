"""Compiles integer files for an NPU and prints which operators it takes.

    python -m venv /tmp/vela && /tmp/vela/bin/pip install ethos-u-vela
    python tools/npu_operators.py FILE.int8.tflite ... --vela=/tmp/vela/bin/vela

The compiler is Arm's Vela, for the Ethos-U NPUs. It needs its own environment, because it needs
other versions than this package. It counts after its own rewriting: a fused ReLU, and the parts of
a mean, are operators there. `CPU` are those that fall back to the processor beside the NPU. The
command ends with exit code 1 if there is one, or if a file cannot be compiled.

Nothing is executed: NPUs requantize in fixed point, so that a few codes can differ from LiteRT's
with XNNPACK, as they do with LiteRT's own kernels.
"""

import argparse
import collections
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ACCELERATORS = ("ethos-u55-128", "ethos-u65-256", "ethos-u85-256")


class NotCompiled(Exception):
  """Vela ended with an error; its last error is the message."""


def operators(vela: str, file: pathlib.Path, accelerator: str) -> dict[str, dict[str, int]]:
  """Numbers of operators by `NPU` and `CPU`, and by Vela's name of their kind.

  Raises:
    NotCompiled: Vela ended with an error.
  """
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(
      [
        *(vela, os.fspath(file), "--accelerator-config", accelerator),
        *("--show-cpu-operations", "--output-dir", folder),
      ],
      capture_output=True,
      text=True,
      check=False,
    )
  counts = dict(re.findall(r"^(CPU|NPU) operators = (\d+)", done.stdout, flags=re.M))
  if done.returncode or counts.keys() != {"CPU", "NPU"}:
    lines = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    raise NotCompiled([*lines, *errors][-1] if lines else f"exit code {done.returncode}")
  kinds = {who: collections.Counter[str]() for who in ("NPU", "CPU")}
  for who, kind in re.findall(r"^\s*(CPU|NPU): (\w+) =", done.stdout, flags=re.M):
    kinds[who][kind] += 1
  # Vela lists what it counts; if a version did not, the counts say it.
  for who, count in counts.items():
    if missing := int(count) - kinds[who].total():
      kinds[who]["not listed"] = missing
  return {who: dict(found.most_common()) for who, found in kinds.items()}


def main() -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
  parser.add_argument("--vela", default="vela", help="the program; by default that of the PATH")
  parser.add_argument("--accelerator", nargs="+", default=ACCELERATORS, metavar="NAME")
  options = parser.parse_args()
  failed = False
  for file in options.files:
    for accelerator in options.accelerator:
      try:
        found = operators(options.vela, file, accelerator)
      except NotCompiled as error:
        print(f"{file.name}  {accelerator}  not compiled: {error}")
        failed = True
        continue
      except FileNotFoundError:
        parser.error(f"{options.vela!r} does not exist: install ethos-u-vela and give --vela")
      failed |= bool(found["CPU"])
      texts = [
        f"{sum(kinds.values())} on the {who}"
        + (f" ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if kinds else "")
        for who, kinds in found.items()
      ]
      print(f"{file.name}  {accelerator}  {'; '.join(texts)}")
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
