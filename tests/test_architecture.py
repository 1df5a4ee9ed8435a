"""The layout: a file imports only from packages above its own, and TensorFlow and clu stay in their
packages.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# The packages and modules of `profit_jax/`, each above those that may import it.
ORDER = [
  "fields",
  "config",
  "optional",
  "paths",
  "memory",
  "typing",
  "schedule",
  "devices",
  "distributed",
  "checkpoints",
  "kernels",
  "quant",
  "nn",
  "models",
  "weights",
  "data",
  "train",
  "export",
  "sensitivity",
  "report",
  "cli",
]
FILES = sorted(ROOT.glob("profit_jax/**/*.py"))
# Third-party libraries, by the only package that may import them.
CONFINED = {"tensorflow": "data", "tensorflow_datasets": "data", "clu": "report"}


def imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(path):
  return path.relative_to(ROOT / "profit_jax").parts[0].removesuffix(".py")


def test_every_file_is_in_a_package_of_the_order():
  assert {package(path) for path in FILES} == {*ORDER, "__init__", "__main__"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_upwards_only(path):
  if package(path) in ("__init__", "__main__"):
    return
  for name in imported(path):
    parts = name.split(".")
    if parts[0] == "profit_jax" and len(parts) > 1 and parts[1] != "__version__":
      assert ORDER.index(parts[1]) <= ORDER.index(package(path)), name
    assert CONFINED.get(parts[0], package(path)) == package(path), name
    # It has a backend for the whole process.
    assert name != "matplotlib.pyplot"
