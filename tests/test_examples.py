"""The examples run as a user runs them: from an installed wheel, in an empty directory."""

import gzip
import json
import pathlib
import re
import time

import numpy as np
import pytest

from tests.data.test_fashion_mnist import idx
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


def test_the_example_with_pretrained_weights_runs(python, tmp_path):
  """With few random images, and a shorter plan: each of its programs takes a minute to compile."""
  source = (EXAMPLES / "finetune_pretrained.py").read_text()
  removed, epochs = (
    "bn_epochs=1, sampling_epochs=1, ",
    "full_precision_epochs=6, finetune_epochs=2,",
  )
  assert removed in source
  assert epochs in source
  source = source.replace(removed, "stabilize=False, profit_bits=(), ")
  source = source.replace(epochs, "full_precision_epochs=1, finetune_epochs=1,")
  (tmp_path / "example.py").write_text(source)
  images = np.random.default_rng(0).integers(0, 256, (128, 28, 28), np.uint8)
  labels = np.arange(128, dtype=np.uint8) % 10
  for split in ("train", "t10k"):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
      (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
  done = python("example.py", ".", "lite0", "128")
  assert done.returncode == 0, done.stderr
  assert re.search(r"W4A4 [\d.]+ %.* 0 of [\d,]+ codes differ .*top-1 equal", done.stdout)
