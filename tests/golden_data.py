"""Reads `tests/golden` and makes the tensors that its numbers were computed from."""

import hashlib
import json
import pathlib
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load(name):
  """A golden file: arrays of an .npz, or the content of a .json."""
  path = GOLDEN / name
  if path.suffix == ".json":
    return json.loads(path.read_text())
  with np.load(path) as file:
    return {key: file[key] for key in file.files}


def inverse_softplus(value):
  return np.log(np.expm1(value))


def normal(name, shape):
  """The standard normal numbers that belong to a name."""
  return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def images(name, shape):
  """Input images: made as NCHW, returned as NHWC."""
  return normal(name, shape).transpose(0, 2, 3, 1)


def variant_image(key):
  """The image of a variant, `SOURCE:NAME`, NHWC; some layers see odd numbers of pixels."""
  return images(f"input:{key}", (1, 3, 60, 52))


def digest(shapes):
  """A short digest of tensors' names and shapes, in any order."""
  lines = sorted(f"{name} {tuple(map(int, shape))}" for name, shape in shapes.items())
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def labels(index, count):
  return (
    np.random.RandomState(zlib.crc32(f"labels:{index}".encode()))
    .randint(0, 10, count)
    .astype(np.int32)
  )


def tensors(shapes, prefix=""):
  """Tensors under the authors' names; each kernel's a is 0.9 and c 0.8 of its largest element."""
  made = {name: _tensor(prefix + name, shape) for name, shape in shapes.items()}
  for name, value in list(made.items()):
    if name.endswith(".weight") and value.ndim > 1:
      layer, largest = name.removesuffix("weight"), np.abs(value).max()
      made[layer + "a"] = np.full(1, inverse_softplus(0.9 * largest))
      made[layer + "c"] = np.full(1, inverse_softplus(0.8 * largest))
  return made


def full_precision_tensors(shapes):
  """Tensors of code without quantizers."""
  return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name, shape):
  x, leaf = normal(name, shape), name.rsplit(".", 1)[-1]
  if leaf in ("a", "c"):
    return 2 + 0.3 * x
  if leaf == "running_mean":
    return 0.1 * x
  if leaf == "running_var":
    return 1 + 0.2 * np.abs(x)
  if leaf == "bias":
    return 0.1 * x
  if len(shape) == 1:
    return 1 + 0.1 * x
  return x * np.sqrt(2 / np.prod(shape[1:]))
