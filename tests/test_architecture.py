"""The house: a file imports only from what stands above it, and TensorFlow and clu stay in their
rooms.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ORDER = [
  "fields",
  "settings",
  "paths",
  "plan",
  "distributed",
  "snapshots",
  "data",
  "lowering",
  "quant",
  "fused",
  "depthwise",
  "layers",
  "models",
  "weights",
  "train",
  "report",
  "export",
  "compare",
  "fork",
  "app",
  "ablation",
  "ablate",
  "to_torch",
]
FILES = sorted(ROOT.glob("profit_jax/**/*.py"))
ROOMS = {"tensorflow": "data", "tensorflow_datasets": "data", "clu": "report"}


def imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
  return path.relative_to(ROOT / "profit_jax").parts[0].removesuffix(".py")


def test_every_file_has_its_place():
  assert {room(path) for path in FILES} == {*ORDER, "__init__"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_upwards_only(path):
  if room(path) == "__init__":
    return
  for name in imported(path):
    parts = name.split(".")
    if parts[0] == "profit_jax" and len(parts) > 1:
      assert ORDER.index(parts[1]) <= ORDER.index(room(path)), name
    assert ROOMS.get(parts[0], room(path)) == room(path), name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_stay_readable_in_one_sitting(path):
  assert len(path.read_text().splitlines()) <= 350


def test_main_is_short():
  assert len((ROOT / "main.py").read_text().splitlines()) <= 70
