"""Which pinned requirements cannot be installed on which platform.

    python -m pip install uv
    python tools/check_resolution.py                         # requirements.txt
    python tools/check_resolution.py requirements*.txt       # with those of extras

Asks the package index for the metadata of every requirement and of what it requires in turn, for
each platform and Python, and downloads nothing else. Packages are only accepted as wheels, except
for those in `SOURCE_ONLY`. pip cannot answer this: it evaluates environment markers for the machine
that it runs on, whatever its `--platform` says. uv evaluates them for the target.

Prints a Markdown table of what is missing, then the reasons; `(marker)` is behind what the
requirement's own marker leaves out. Exit code 1 if anything else is missing.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLATFORMS = {
  "Linux x86-64": "x86_64-manylinux_2_31",
  "Linux aarch64": "aarch64-manylinux_2_31",
  "macOS 14 arm64": "aarch64-apple-darwin",
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# Pure Python that its authors publish as source only; tensorflow-datasets requires it.
SOURCE_ONLY = ("promise",)
_LEFT_OUT = "its marker leaves it out"


def read(file: pathlib.Path) -> list[str]:
  """The lines of a requirements file, without comments."""
  lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
  return [line for line in lines if line]


def resolve(requirements: list[str], platform: str, python: str) -> tuple[str, str]:
  """Looks for versions that can be installed together.

  Args:
    requirements: lines of a requirements file.
    platform: a value of `PLATFORMS`.
    python: version, as `3.11`.

  Returns:
    The versions found, as lines of a requirements file; and why there are none, or "".
  """
  command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "-"]
  command += ["--python-platform", platform, "--python-version", python]
  command += ["--no-annotate", "--only-binary", ":all:"]
  for name in SOURCE_ONLY:
    command += ["--no-binary", name]
  done = subprocess.run(
    command,
    input="\n".join(requirements),
    env={**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"},
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode == 0:
    return done.stdout, ""
  lines = [line.strip() for line in done.stderr.splitlines() if "cause:" in line]
  return "", (lines or done.stderr.strip().splitlines())[-1].removeprefix("cause: ")


def missing(requirements: list[str], platform: str, python: str) -> dict[str, str]:
  """The requirements that cannot be installed, or that a marker leaves out there, and why; all
  others can be installed together.

  Args: as `resolve`.
  """
  versions, problem = resolve(requirements, platform, python)
  absent = {}
  if problem:
    reasons = {line: resolve([line], platform, python)[1] for line in requirements}
    absent = {line: reason for line, reason in reasons.items() if reason}
    rest = [line for line in requirements if line not in absent]
    versions, problem = resolve(rest, platform, python)
  if problem:
    return absent | {"together": problem}
  found = set(re.findall(r"^([\w.-]+)==", versions, flags=re.M))
  for line in requirements:
    name = re.match(r"[\w.-]+", line).group().lower().replace("_", "-")
    if name not in found and line not in absent:
      absent[line] = _LEFT_OUT
  return absent


def _cell(line: str, reason: str) -> str:
  return re.split("[;=]", line)[0] + (" (marker)" if reason == _LEFT_OUT else "")


def main() -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("files", nargs="*", type=pathlib.Path, default=[ROOT / "requirements.txt"])
  requirements = [line for file in parser.parse_args().files for line in read(file)]
  found = {
    (name, python): missing(requirements, platform, python)
    for name, platform in PLATFORMS.items()
    for python in PYTHONS
  }
  print("| cannot be had | " + " | ".join(f"Python {python}" for python in PYTHONS) + " |")
  print("|:--" * (len(PYTHONS) + 1) + "|")
  for name in PLATFORMS:
    cells = (", ".join(_cell(*item) for item in found[name, p].items()) for p in PYTHONS)
    print(f"| {name} | " + " | ".join(cell or "-" for cell in cells) + " |")
  for (name, python), absent in found.items():
    for line, reason in absent.items():
      if reason != _LEFT_OUT:
        print(f"\n{name}, Python {python}: {line}: {reason}")
  return int(any({*absent.values()} - {_LEFT_OUT} for absent in found.values()))


if __name__ == "__main__":
  sys.exit(main())
