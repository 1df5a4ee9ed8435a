"""Reads what `torch.save` wrote, without torch and without running anything that the file asks for.

Such a file is a pickle, and a pickle is a program for a small machine, which may call any function
that it names and change any object that it reaches. The machine here knows only the instructions
that tensors need; it can name only what `_NAMES` has, stand-ins that note what they are told and
cannot be changed; and what it builds is measured against the size of the file, so that a small file
cannot fill the memory.

Both formats are read: the zip archive (torch 1.6 and later) and the stream of pickles before it, in
which older files of torchvision and timm are published.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_PROTOCOL = 1001
# Tensors may share memory, and each becomes an array of its own; more than this times the file is
# no honest sharing.
_LARGEST_GROWTH = 8
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


class _StorageType(NamedTuple):
  """The name of a storage's type, a key of `_DTYPES`."""

  name: str


class _Storage(NamedTuple):
  """A flat piece of memory that tensors look into; its content comes after the pickle."""

  dtype: str
  key: str
  size: int


class _Tensor(NamedTuple):
  """What the pickle says of a tensor; nothing of it is checked yet."""

  storage: Any
  offset: Any
  shape: Any
  strides: Any


class _Function:
  """A callable that a pickle may use but not change."""

  __slots__ = ("_call",)

  def __init__(self, call: Callable[..., Any]):
    self._call = call

  def __call__(self, *args: Any) -> Any:
    return self._call(*args)


def _rebuild_tensor(storage, offset, shape, strides, *_):
  """Stands in for torch's constructors; their other arguments are gradients, hooks and metadata."""
  return _Tensor(storage, offset, shape, strides)


_NAMES: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): _Function(lambda items=(): collections.OrderedDict(items)),
  ("torch", "Size"): _Function(lambda shape=(): tuple(shape)),
  ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
  ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
  ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
  # The options that training scripts save beside the weights: what stands in it is not kept.
  ("argparse", "Namespace"): _Function(lambda *_: collections.OrderedDict()),
  **{("torch", name): _StorageType(name) for name in _DTYPES},
}

_OPCODES = (
  *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
  *(
    pickle.NONE,
    pickle.NEWTRUE,
    pickle.NEWFALSE,
    pickle.INT,
    pickle.BININT,
    pickle.BININT1,
    pickle.BININT2,
  ),
  *(pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT),
  *(
    pickle.STRING,
    pickle.BINSTRING,
    pickle.SHORT_BINSTRING,
    pickle.BINBYTES,
    pickle.SHORT_BINBYTES,
  ),
  *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
  *(pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
  *(pickle.LIST, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
  *(pickle.DICT, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
  *(
    pickle.GET,
    pickle.BINGET,
    pickle.LONG_BINGET,
    pickle.PUT,
    pickle.BINPUT,
    pickle.LONG_BINPUT,
    pickle.MEMOIZE,
  ),
  *(
    pickle.GLOBAL,
    pickle.STACK_GLOBAL,
    pickle.REDUCE,
    pickle.NEWOBJ,
    pickle.BUILD,
    pickle.BINPERSID,
  ),
)


# The one in Python, not the fast one in C: its instructions can be taken away, and a place number
# of 2^32 in its memo does not reserve the memory for so many.
class _Machine(pickle._Unpickler):
  """Knows only `_OPCODES`, and these three in a form that cannot reach anything but `_NAMES`."""

  dispatch: ClassVar[dict[int, Callable[..., None]]] = {
    code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES
  }

  def __init__(self, file: io.BytesIO):
    super().__init__(file, encoding="utf-8")

  def find_class(self, module: str, name: str) -> Any:
    """See `pickle.Unpickler`."""
    found = _NAMES.get((module, name))
    if found is None:
      raise TorchFileError(
        f"it asks to run {module}.{name}, which weights do not need and which is not run here. "
        f"In torch, save the plain weights: torch.save(model.state_dict(), FILE)"
      )
    return found

  def persistent_load(self, pid: Any) -> _Storage:
    """See `pickle.Unpickler`: torch keeps storages outside of the pickle."""
    if not (
      type(pid) is tuple and len(pid) >= 5 and pid[0] == "storage" and type(pid[1]) is _StorageType
    ):
      raise TorchFileError("it refers to something that is not a tensor's storage")
    _, kind, key, _, size, *view = pid
    if any(part is not None for part in view) or type(size) is not int or size < 0:
      raise TorchFileError(
        "it has views of storages, which torch stopped writing in version 0.4; save it again"
      )
    return _Storage(kind.name, str(key), size)

  def _call(self) -> None:
    arguments, function = self.stack.pop(), self.stack.pop()
    if type(function) is not _Function or type(arguments) is not tuple:
      raise TorchFileError("it calls something that cannot be called")
    self.stack.append(function(*arguments))

  def _forget_state(self) -> None:
    # What torch hangs on a state dict, `_metadata`, is not needed.
    self.stack.pop()
    if type(self.stack[-1]) is not collections.OrderedDict:
      raise TorchFileError(f"it changes a {type(self.stack[-1]).__name__}")

  dispatch[pickle.REDUCE[0]] = _call
  dispatch[pickle.NEWOBJ[0]] = _call
  dispatch[pickle.BUILD[0]] = _forget_state


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
    tree, storages = (
      _read_archive(content) if content[:4] == b"PK\x03\x04" else _read_stream(content)
    )
    return _Arrays(storages, limit=_LARGEST_GROWTH * len(content)).replace(tree)
  except TorchFileError:
    raise
  # A damaged pickle raises whatever its instructions stumble over.
  except Exception as error:
    raise TorchFileError(
      f"it is damaged, or was not written by torch.save ({type(error).__name__}: {error})"
    ) from error


def _read_archive(content: bytes) -> tuple[Any, Callable[[_Storage], bytes]]:
  archive = zipfile.ZipFile(io.BytesIO(content))
  if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
    raise TorchFileError("its entries are compressed, which torch never does")
  (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
  root = pickled.removesuffix("data.pkl")
  if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
    raise TorchFileError("it was written on a big-endian machine; save it again on another")
  tree = _Machine(io.BytesIO(archive.read(pickled))).load()
  return tree, lambda storage: archive.read(f"{root}data/{storage.key}")


def _read_stream(content: bytes) -> tuple[Any, Callable[[_Storage], bytes]]:
  file = io.BytesIO(content)

  def load():
    return _Machine(file).load()

  if load() != _STREAM_MAGIC:
    raise TorchFileError("it does not begin as a file of torch.save does")
  protocol, system = load(), load()
  if protocol != _STREAM_PROTOCOL or not system.get("little_endian", True):
    raise TorchFileError(
      f"its version is {protocol}, on {system}: only {_STREAM_PROTOCOL}, little-endian, is known"
    )
  tree, keys = load(), [str(key) for key in load()]
  # Only a tensor tells how many bytes an element of a storage has.
  places, rest = {}, content[file.tell() :]
  item_sizes = {
    storage.key: np.dtype(_DTYPES[storage.dtype]).itemsize for storage in _storages_of(tree, set())
  }
  position = 0
  for key in keys:
    size = int.from_bytes(rest[position : position + 8], "little") * item_sizes[key]
    places[key] = slice(position + 8, position + 8 + size)
    position += 8 + size
  return tree, lambda storage: rest[places[storage.key]]


def _storages_of(tree: Any, seen: set[int]) -> Any:
  if isinstance(tree, (dict, list, tuple)) and id(tree) not in seen:
    seen.add(id(tree))
    if type(tree) is _Storage:
      yield tree
    else:
      for value in tree.values() if isinstance(tree, dict) else tree:
        yield from _storages_of(value, seen)


class _Arrays:
  """Puts arrays in place of tensors; every object once, however often the file refers to it."""

  def __init__(self, content: Callable[[_Storage], bytes], *, limit: int):
    self._content, self._left = content, limit
    self._storages: dict[str, tuple[_Storage, np.ndarray]] = {}
    self._made: dict[int, Any] = {}

  def replace(self, tree: Any) -> Any:
    if id(tree) not in self._made:
      if type(tree) is _Tensor:
        self._made[id(tree)] = self._array(tree)
      elif isinstance(tree, Mapping):
        self._made[id(tree)] = {key: self.replace(value) for key, value in tree.items()}
      elif type(tree) in (list, tuple):
        self._made[id(tree)] = type(tree)(self.replace(value) for value in tree)
      else:
        return tree
    return self._made[id(tree)]

  def _array(self, tensor: _Tensor) -> np.ndarray:
    storage, offset, shape, strides = tensor
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
      raise TorchFileError("a tensor without a storage, a shape or strides")
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
      raise TorchFileError(f"a tensor with offset, shape and strides {numbers} makes no sense")
    data = self._data(storage)
    size = math.prod(shape)
    last = offset + sum(
      (length - 1) * stride for length, stride in zip(shape, strides, strict=True)
    )
    if size and (last >= data.size or size > data.size):
      raise TorchFileError(
        f"a tensor of shape {shape} reaches beyond its {data.size} stored elements"
      )
    self._take(size * data.itemsize)
    if not size:
      return np.zeros(shape, data.dtype)
    byte_strides = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(
      data[offset:], shape, byte_strides, writeable=False
    ).copy()

  def _data(self, storage: _Storage) -> np.ndarray:
    if storage.key not in self._storages:
      data = self._content(storage)
      self._take(len(data))
      dtype = np.dtype(_DTYPES[storage.dtype])
      if len(data) != storage.size * dtype.itemsize:
        raise TorchFileError(
          f"storage {storage.key} has {len(data)} bytes, {storage.size} x {dtype} are expected"
        )
      self._storages[storage.key] = storage, np.frombuffer(data, dtype)
    known, data = self._storages[storage.key]
    if known != storage:
      raise TorchFileError(f"storage {storage.key} is described in two ways")
    return data

  def _take(self, size: int) -> None:
    self._left -= size
    if self._left < 0:
      raise TorchFileError("its tensors are many times larger than the file")
