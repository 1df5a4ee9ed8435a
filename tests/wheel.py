"""The built wheel, installed in a directory of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def pip(*arguments):
  done = subprocess.run(
    [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
  """The path of the built wheel."""
  folder = tmp_path_factory.mktemp("wheel")
  pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder, ROOT)
  (built,) = folder.glob("*.whl")
  return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
  """A directory that holds the installed wheel and nothing else."""
  target = tmp_path_factory.mktemp("installed")
  pip("install", "--no-deps", "--no-index", "--target", target, wheel)
  return target


@pytest.fixture
def python(installed, tmp_path):
  """Runs Python in an empty directory, with the installed wheel before everything else."""

  def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.fspath(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
      [sys.executable, *arguments],
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )

  return run
