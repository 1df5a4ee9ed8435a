"""Runs the fast tests with other versions than the pins of requirements.txt.

    python tools/try_versions.py lowest DIR                   # exactly the lower bounds
    python tools/try_versions.py newest DIR                   # the newest releases
    python tools/try_versions.py lowest DIR -- tests/quant    # these tests only

Makes a virtual environment in DIR with the Python that runs this script. `lowest` installs every
requirement of pyproject.toml at its lower bound; what these require in turn is the newest that
fits. The options behind `--` are pytest's.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What the fast tests need.
EXTRAS = ("digits", "onnx", "plots", "tensorboard", "tfds", "dev")
FAST = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow")
# Of packages among themselves: an older one may use what a newer one has deprecated.
WARNINGS = ("-o", "filterwarnings=", "-W", "ignore")


def requirements(versions: str) -> list[str]:
  """The package's requirements and those of `EXTRAS`, with `==` for `>=` where `versions` is
  `lowest`.
  """
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  found = [*project["dependencies"]]
  for extra in EXTRAS:
    found += project["optional-dependencies"][extra]
  if versions == "lowest":
    found = [re.sub(r"^([\w.\[\]-]+)>=", r"\1==", requirement) for requirement in found]
  return list(dict.fromkeys(found))


def main() -> int:
  """The command line; returns the exit code of the tests."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("versions", choices=("lowest", "newest"))
  parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
  parser.add_argument("pytest", nargs="*", help="options of pytest; the fast tests by default")
  options = parser.parse_args()
  venv.create(options.directory, with_pip=True)
  python = os.fspath(options.directory.resolve() / "bin" / "python")
  install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
  subprocess.run([*install, *requirements(options.versions)], check=True)
  subprocess.run([*install, "--no-deps", "--no-build-isolation", "--editable", ROOT], check=True)
  subprocess.run([python, "-m", "pip", "list", "--disable-pip-version-check"], check=True)
  # Other runs' variables must not choose other packages or programs.
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  command = [python, "-m", "pytest", *WARNINGS, *(options.pytest or FAST)]
  return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
  sys.exit(main())
