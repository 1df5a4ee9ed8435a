"""The examples run as a user runs them: from an installed wheel, in an empty directory."""

import gzip
import json
import pathlib
import re
import time

import numpy as np
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


def write_idx(path, array):
  """A compressed idx file of bytes, as Fashion-MNIST's."""
  header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
  path.write_bytes(gzip.compress(header + array.tobytes()))


def test_pretrained_weights_are_finetuned_and_exported(python, tmp_path):
  random = np.random.default_rng(0)
  for split in ("train", "t10k"):
    images = random.integers(256, size=(64, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.arange(64, dtype=np.uint8) % 10)
  done = python(str(EXAMPLES / "finetune_pretrained.py"), str(tmp_path), "lite0", "64")
  assert done.returncode == 0, done.stderr
  # 64 images of noise teach nothing: what counts is that the whole way works.
  assert re.search(r"full precision [\d.]+ %, W4A4 [\d.]+ %", done.stdout)
  assert "top-1 equal" in done.stdout
  assert (tmp_path / "lite0.onnx").exists()
