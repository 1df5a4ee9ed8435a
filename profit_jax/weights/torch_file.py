"""Reads what `torch.save` wrote, without torch and without running anything that the file asks for.

Such a file is a pickle, and a pickle is a program for a small machine, which may call any function
that it names and change any object that it reaches. The machine here knows only the instructions
that tensors need; it can name only what it has a stand-in for, none of which can be changed; and
what it builds is measured against the size of the file, so that a small file cannot fill the
memory.

Both formats are read: the zip archive (torch 1.6 and later) and the stream of pickles before it, in
which older files of torchvision and timm are published.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_PROTOCOL = 1001
# Tensors may share memory, and whoever reads them may copy each; more than this times the file is
# no honest sharing.
_LARGEST_GROWTH = 8
_DTYPES = {  # of storages; NumPy's dtypes cannot be changed
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


class _Storage(NamedTuple):
  """A flat piece of memory that tensors look into; the file has its content after the pickle."""

  key: str
  data: np.ndarray


class _Options(dict):
  """The options of a training script."""


class _Function(NamedTuple):
  """A function that a pickle may call."""

  call: Callable[..., Any]


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
  """Knows only `_OPCODES`, and these three in a form that cannot reach anything but `names`.

  Attributes:
    storages: that the pickle has referred to, by their names in the file; filled with zeros.
  """

  dispatch: ClassVar[dict[int, Callable[..., None]]] = {
    code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES
  }

  def __init__(self, file: io.BytesIO, limit: int):
    """Args: file: with the pickle; limit: bytes that storages and tensors may have."""
    super().__init__(file, encoding="utf-8")
    self.storages: dict[str, _Storage] = {}
    self._left = limit
    self._names = {
      ("collections", "OrderedDict"): _Function(collections.OrderedDict),
      ("torch", "Size"): _Function(tuple),
      ("torch._utils", "_rebuild_tensor"): _Function(self._tensor),
      ("torch._utils", "_rebuild_tensor_v2"): _Function(self._tensor),
      ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
      # The options that training scripts save beside the weights: only texts are kept.
      ("argparse", "Namespace"): _Function(lambda *_: _Options()),
      **{("torch", name): np.dtype(dtype) for name, dtype in _DTYPES.items()},
    }

  def find_class(self, module: str, name: str) -> Any:
    """See `pickle.Unpickler`."""
    if (module, name) not in self._names:
      raise TorchFileError(
        f"it asks to run {module}.{name}, which weights do not need and which is not run here. "
        f"In torch, save the plain weights: torch.save(model.state_dict(), FILE)"
      )
    return self._names[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    """See `pickle.Unpickler`: torch keeps storages outside of the pickle."""
    if not (
      type(pid) is tuple and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)
    ):
      raise TorchFileError("it refers to something that is not a tensor's storage")
    _, dtype, key, _, size, *view = pid
    if any(part is not None for part in view) or type(size) is not int or size < 0:
      raise TorchFileError(
        "it has views of storages, which torch stopped writing in version 0.4; save it again"
      )
    key = str(key)
    if key not in self.storages:
      self._take(size * dtype.itemsize)
      self.storages[key] = _Storage(key, np.zeros(size, dtype))
    storage = self.storages[key]
    if (storage.data.dtype, storage.data.size) != (dtype, size):
      raise TorchFileError(f"storage {key} is described in two ways")
    return storage

  def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    """What torch's constructors make; their other arguments are gradients, hooks and metadata."""
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
      raise TorchFileError("a tensor without a storage, a shape or strides")
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
      raise TorchFileError(f"a tensor with offset, shape and strides {numbers} makes no sense")
    data, size = storage.data, math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if size and (last >= data.size or size > data.size):
      raise TorchFileError(
        f"a tensor of shape {shape} reaches beyond its {data.size} stored elements"
      )
    self._take(size * data.itemsize)
    if not size:
      return np.zeros(shape, data.dtype)
    byte_strides = [stride * data.itemsize for stride in strides]
    # A view, because the storage's content is not there yet.
    return np.lib.stride_tricks.as_strided(data[offset:], shape, byte_strides, writeable=False)

  def _take(self, size: int) -> None:
    self._left -= size
    if self._left < 0:
      raise TorchFileError("its tensors are many times larger than the file")

  def _call(self) -> None:
    arguments, function = self.stack.pop(), self.stack.pop()
    if type(function) is not _Function or type(arguments) is not tuple:
      raise TorchFileError("it calls something that cannot be called")
    self.stack.append(function.call(*arguments))

  def _take_state(self) -> None:
    state, changed = self.stack.pop(), self.stack[-1]
    if type(changed) is _Options and type(state) is dict:
      changed.update({k: v for k, v in state.items() if type(k) is type(v) is str})
    # What torch hangs on a state dict, `_metadata`, is not needed.
    elif type(changed) not in (_Options, collections.OrderedDict):
      raise TorchFileError(f"it changes a {type(changed).__name__}")

  dispatch[pickle.REDUCE[0]] = _call
  dispatch[pickle.NEWOBJ[0]] = _call
  dispatch[pickle.BUILD[0]] = _take_state


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
    return _read_archive(content) if content[:4] == b"PK\x03\x04" else _read_stream(content)
  except TorchFileError:
    raise
  # A damaged pickle raises whatever its instructions stumble over.
  except Exception as error:
    raise TorchFileError(
      f"it is damaged, or was not written by torch.save ({type(error).__name__}: {error})"
    ) from error


def _read_archive(content: bytes) -> Any:
  archive = zipfile.ZipFile(io.BytesIO(content))
  if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
    raise TorchFileError("its entries are compressed, which torch never does")
  (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
  root = pickled.removesuffix("data.pkl")
  if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
    raise TorchFileError("it was written on a big-endian machine; save it again on another")
  machine = _Machine(io.BytesIO(archive.read(pickled)), _LARGEST_GROWTH * len(content))
  tree = machine.load()
  for storage in machine.storages.values():
    _fill(storage, archive.read(f"{root}data/{storage.key}"))
  return tree


def _read_stream(content: bytes) -> Any:
  file, limit = io.BytesIO(content), _LARGEST_GROWTH * len(content)
  if _Machine(file, limit).load() != _STREAM_MAGIC:
    raise TorchFileError("it does not begin as a file of torch.save does")
  protocol, system = _Machine(file, limit).load(), _Machine(file, limit).load()
  if protocol != _STREAM_PROTOCOL or not system.get("little_endian", True):
    raise TorchFileError(
      f"its version is {protocol}, on {system}: only {_STREAM_PROTOCOL}, little-endian, is known"
    )
  machine = _Machine(file, limit)
  tree, keys = machine.load(), [str(key) for key in _Machine(file, limit).load()]
  if machine.storages.keys() != set(keys):
    raise TorchFileError(f"its storages {keys} are not those of its tensors")
  for key in keys:
    size, data = int.from_bytes(file.read(8), "little"), machine.storages[key].data
    _fill(machine.storages[key], file.read(size * data.itemsize))
  return tree


def _fill(storage: _Storage, content: bytes) -> None:
  data = storage.data
  if len(content) != data.nbytes:
    raise TorchFileError(
      f"storage {storage.key} has {len(content)} bytes, {data.size} x {data.dtype} are expected"
    )
  data[:] = np.frombuffer(content, data.dtype)
