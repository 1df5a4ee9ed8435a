"""The examples run as a user runs them: from an installed wheel, in an empty directory."""

import json
import pathlib
import re
import time

import pytest

from tests.wheel import installed, python, wheel

__all__ = ["installed", "python", "wheel"]
ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def code_of(notebook):
  cells = json.loads(notebook.read_text())["cells"]
  return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_the_example():
  install, *cells = code_of(EXAMPLES / "own_model.ipynb")
  # As in the README, until the repository has an address.
  address = re.search(r"git clone (\S+)", (ROOT / "README.md").read_text())[1]
  assert install == f'%pip install --quiet "profit_jax[onnx,digits] @ git+{address}"'
  example = (EXAMPLES / "own_model.py").read_text().partition('"""\n')[2]
  # In a notebook the command line is the notebook's.
  example = example.replace('sys.argv[1] if len(sys.argv) > 1 else "own"', '"own"')
  example = example.replace("import sys\n\n", "")
  assert [line for cell in cells for line in cell.split("\n") if line] == [
    line for line in example.split("\n") if line
  ]


def test_an_own_model_in_less_than_60_lines():
  assert len((EXAMPLES / "own_model.py").read_text().splitlines()) < 60


@pytest.mark.parametrize(
  ("name", "least", "files"),
  [
    ("own_model.py", 85.0, ["own.onnx", "own.onnx.json", "own.onnx.md", "own/checkpoints"]),
    ("own_data_tfdata.py", 85.0, ["own_data/checkpoints"]),
  ],
)
def test_an_example_runs_without_a_checkout(python, tmp_path, name, least, files):
  start = time.monotonic()
  done = python(str(EXAMPLES / name))
  assert done.returncode == 0, done.stderr
  assert time.monotonic() - start < 600  # hangs; it takes a minute
  top1 = float(re.search(r"W4A4 ([\d.]+) %", done.stdout)[1])
  assert top1 > least
  for file in files:
    assert (tmp_path / file).exists(), file
  if "own.onnx" in files:
    assert "codes differ" in done.stdout
    assert "top-1 equal" in done.stdout
