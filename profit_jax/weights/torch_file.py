"""Reads what `torch.save` wrote, without torch and without running anything that the file asks for.

Such a file is a pickle, and a pickle is a program: it may call any function that it names. Here it can name only those of
`_ALLOWED`: a dictionary type, and stand-ins for torch's tensor constructors that note what they are told. Everything else
is refused before it is looked up.

Both formats are read: the zip archive (torch 1.6 and later) and the stream of pickles before it, in which torchvision's and
timm's older files are published.
"""

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_PROTOCOL = 1001
_DTYPES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}


class TorchFileError(ValueError):
  """The file is damaged, is no torch file, or asks for something that is not allowed."""


@dataclasses.dataclass
class _Storage:
  """A flat piece of memory that tensors look into; `data` comes after the pickle."""

  dtype: np.dtype
  key: str
  size: int
  data: np.ndarray | None = None


@dataclasses.dataclass
class _Tensor:
  """What the pickle says of a tensor."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def to_numpy(self) -> np.ndarray:
    """A copy of its own."""
    numbers = (self.offset, *self.shape, *self.strides)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(self.shape) != len(self.strides):
      raise TorchFileError(f"a tensor with offset, shape and strides {numbers} makes no sense")
    last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
    if math.prod(self.shape) and last >= self.storage.data.size:
      raise TorchFileError(f"a tensor of shape {self.shape} reaches beyond its {self.storage.data.size} stored elements")
    start = self.storage.data[self.offset :]
    strides = [stride * self.storage.dtype.itemsize for stride in self.strides]
    return np.lib.stride_tricks.as_strided(start, self.shape, strides, writeable=False).copy()


def _rebuild_tensor(storage, offset, shape, strides, *_):
  """Stands in for torch's constructors; their further arguments are gradients, hooks and metadata."""
  if not isinstance(storage, _Storage):
    raise TorchFileError("a tensor without a storage")
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_):
  return data


def _size(shape=()):
  return tuple(shape)


_ALLOWED: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch", "Size"): _size,
  ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
  ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
  # A storage's type is only ever a name, see `_Unpickler.persistent_load`.
  **{("torch", name): np.dtype(dtype) for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
  """Finds only what `_ALLOWED` has."""

  def __init__(self, file: io.BytesIO, storages: dict[str, _Storage]):
    super().__init__(file, encoding="utf-8")
    self._storages = storages

  def find_class(self, module: str, name: str) -> Any:
    """See `pickle.Unpickler`."""
    found = _ALLOWED.get((module, name))
    if found is None:
      raise TorchFileError(
        f"it asks to run {module}.{name}, which weights do not need and which is not run here. "
        f"In torch, save the plain weights: torch.save(model.state_dict(), FILE)"
      )
    return found

  def persistent_load(self, pid: Any) -> _Storage:
    """See `pickle.Unpickler`: torch keeps storages outside of the pickle."""
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)):
      raise TorchFileError("it refers to something that is not a tensor's storage")
    _, dtype, key, _, size, *view = pid
    if any(part is not None for part in view) or not isinstance(size, int):
      raise TorchFileError("it has views of storages, which torch stopped writing in version 0.4; save it again")
    return self._storages.setdefault(str(key), _Storage(dtype, str(key), size))


def read(content: bytes) -> Any:
  """What `torch.save` was given, its tensors as numpy arrays.

  Args:
    content: of the file.

  Returns:
    Dictionaries, lists and plain values.

  Raises:
    TorchFileError: not a torch file, a damaged one, or one that asks for more than tensors.
  """
  try:
    return _with_arrays(_read_archive(content) if content[:4] == b"PK\x03\x04" else _read_stream(content))
  except TorchFileError:
    raise
  # A damaged pickle raises whatever its instructions stumble over.
  except Exception as error:
    raise TorchFileError(f"it is damaged, or was not written by torch.save ({type(error).__name__}: {error})") from error


def _read_archive(content: bytes) -> Any:
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
    root = pickled.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
      raise TorchFileError("it was written on a big-endian machine; save it again on another")
    storages: dict[str, _Storage] = {}
    tree = _Unpickler(io.BytesIO(archive.read(pickled)), storages).load()
    for storage in storages.values():
      _fill(storage, archive.read(f"{root}data/{storage.key}"))
  return tree


def _read_stream(content: bytes) -> Any:
  file, storages = io.BytesIO(content), {}

  def load():
    return _Unpickler(file, storages).load()

  if load() != _STREAM_MAGIC:
    raise TorchFileError("it does not begin as a file of torch.save does")
  protocol, system = load(), load()
  if protocol != _STREAM_PROTOCOL or not system.get("little_endian", True):
    raise TorchFileError(f"its version is {protocol}, on {system}: only {_STREAM_PROTOCOL}, little-endian, is known")
  tree = load()
  for key in load():
    storage = storages[str(key)]
    size = int.from_bytes(file.read(8), "little")
    if size != storage.size:
      raise TorchFileError(f"storage {key} has {size} elements, its tensors expect {storage.size}")
    _fill(storage, file.read(size * storage.dtype.itemsize))
  return tree


def _fill(storage: _Storage, data: bytes) -> None:
  if len(data) != storage.size * storage.dtype.itemsize:
    raise TorchFileError(f"storage {storage.key} has {len(data)} bytes, {storage.size} x {storage.dtype} are expected")
  storage.data = np.frombuffer(data, storage.dtype)


def _with_arrays(tree: Any) -> Any:
  """The tree with arrays in place of tensors."""
  convert: Callable[[Any], Any] = _with_arrays
  if isinstance(tree, _Tensor):
    if tree.storage.data is None:
      raise TorchFileError(f"storage {tree.storage.key} is not in the file")
    return tree.to_numpy()
  if isinstance(tree, Mapping):
    return {key: convert(value) for key, value in tree.items()}
  return type(tree)(map(convert, tree)) if type(tree) in (list, tuple) else tree
