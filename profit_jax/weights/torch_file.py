"""Reads what `torch.save` wrote, without torch and without running anything that the file asks for.

Such a file is a pickle, and a pickle is a program for a small machine, which may call any function
that it names and change any object that it reaches. The machine here calls only the constructors of
tensors and a few plain types. Every other name gives a `StandIn`, which records what it was given
and does nothing. What the machine builds is measured against the size of the file, so that a small
file cannot fill the memory.

Read are the zip archive (torch 1.6 and later), the stream of pickles before it, in which older
files of torchvision and timm are published, and a plain pickle of tensors or NumPy arrays.
"""

import collections
import io
import math
import pickle
import reprlib
import zipfile
from collections.abc import Callable, Iterable, Mapping
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
  "ComplexFloatStorage": np.complex64,
  "ComplexDoubleStorage": np.complex128,
  # Of tensors that are not read, but may stand beside those that are.
  "QInt8Storage": np.int8,
  "QUInt8Storage": np.uint8,
  "QInt32Storage": np.int32,
}
# Tensors with attributes of Python, which need no code.
_PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_PLAIN_VALUES = (str, bool, int, float, dict)  # of attributes that are kept
_SHOWN = 100  # characters of a name that a file gives
# Of a pickle: the largest checkpoint of a net here, with its optimizer, has a twentieth of it.
_MOST_INSTRUCTIONS = 1_000_000
_MOST_IN_KEY = 1000  # elements of tuples, which may hold each other


class TorchFileError(ValueError):
  """The file is damaged, is no torch file, or asks for something that is not allowed."""


class _Storage(NamedTuple):
  """A flat piece of memory that tensors look into; the file has its content after the pickle."""

  key: str
  data: np.ndarray


class StandIn(dict):
  """What is in the place of a class or function that is not known here, and of what it makes. It
  never runs anything.

  As a dictionary it has the items that the file gives the object, and its attributes that are plain
  values: of an `argparse.Namespace` or an omegaconf configuration, the options.

  Attributes:
    name: of the class or function, `module.name`.
    arguments: with which the file would have called it.
    state: the object's attributes, as the file has them.
  """

  # By identity: the objects may be keys of dictionaries.
  __hash__ = object.__hash__
  __eq__ = object.__eq__

  def __init__(self, name: str, arguments: tuple[Any, ...] = ()):
    """Args: as the attributes."""
    super().__init__()
    self.name = name
    self.arguments = arguments
    self.state: Any = None

  @property
  def is_module(self) -> bool:
    """Whether it is a pickled `torch.nn.Module`."""
    return type(self.state) is dict and {"_parameters", "_modules"} <= self.state.keys()

  def take_state(self, state: Any) -> None:
    """Keeps the attributes, which are a dictionary, or two where the class has slots."""
    self.state = state
    for part in state if type(state) is tuple else (state,):
      if type(part) is dict:
        self.update({k: v for k, v in part.items() if type(k) is str and type(v) in _PLAIN_VALUES})
        self.update(_omegaconf_values(part.get("_content")))

  # Lists, queues and sets are filled by these.
  def extend(self, items: Any) -> None:
    """Drops what a pickle puts into a list."""

  append = add = extend


def _omegaconf_values(content: Any) -> dict[str, Any]:
  """The values in an omegaconf configuration, whose nodes have theirs as `_val`, and those in
  configurations within it.
  """
  if type(content) is not dict:
    return {}
  nodes = {key: node for key, node in content.items() if type(key) is str and type(node) is StandIn}
  return {
    key: node.get("_val", node) for key, node in nodes.items() if node.keys() & {"_val", "_content"}
  }


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
  *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
  *(pickle.BINBYTES8, pickle.BYTEARRAY8),
  *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
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
    pickle.NEWOBJ_EX,
    pickle.BUILD,
    pickle.BINPERSID,
  ),
)


class _Limited(dict):
  """The machine's instructions, which end after `_MOST_INSTRUCTIONS`."""

  left = _MOST_INSTRUCTIONS

  def __getitem__(self, code: int) -> Callable[..., None]:
    """See `dict`."""
    self.left -= 1
    if self.left < 0:
      raise TorchFileError(
        f"it has more than {_MOST_INSTRUCTIONS} instructions, as no weights need"
      )
    return super().__getitem__(code)


def _check_keys(keys: Iterable[Any]) -> None:
  """Tuples that hold each other many times would be hashed for ever."""
  for key in keys:
    left, seen = [key], 0
    while left:
      seen += 1
      if seen > _MOST_IN_KEY:
        raise TorchFileError(f"it has a key of more than {_MOST_IN_KEY} elements")
      if type(value := left.pop()) is tuple:
        left.extend(value)


def _ordered(items: Any = ()) -> collections.OrderedDict:
  items = list(items.items() if isinstance(items, Mapping) else items)
  _check_keys(key for key, _ in items)
  return collections.OrderedDict(items)


# The one in Python, not the fast one in C: its instructions can be taken away, and a place number
# of 2^32 in its memo does not reserve the memory for so many.
class _Machine(pickle._Unpickler):
  """Knows only `_OPCODES`, and those that call or change something in a form that only reaches the
  functions in `_names` and stand-ins.

  Attributes:
    storages: that the pickle has referred to, by their names in the file; filled with zeros.
  """

  dispatch: ClassVar[dict[int, Callable[..., None]]] = {
    code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES
  }

  def __init__(self, file: io.BytesIO, limit: int):
    """Args: file: with the pickle; limit: bytes that storages and tensors may have."""
    # Every byte is a character: Python 2 wrote the bytes of NumPy's scalars as text.
    super().__init__(file, encoding="latin1")
    self.dispatch = _Limited(self.dispatch)
    self.storages: dict[str, _Storage] = {}
    self._left = limit
    self._names = {
      ("collections", "OrderedDict"): _Function(_ordered),
      ("torch", "Size"): _Function(tuple),
      ("torch._utils", "_rebuild_tensor"): _Function(self._tensor),
      ("torch._utils", "_rebuild_tensor_v2"): _Function(self._tensor),
      ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
      ("torch._utils", "_rebuild_parameter_with_state"): _Function(lambda data, *_: data),
      ("torch._utils", "_rebuild_device_tensor_from_numpy"): _Function(lambda data, *_: data),
      ("torch._tensor", "_rebuild_from_type_v2"): _Function(self._tensor_with_attributes),
      ("torch.storage", "_load_from_bytes"): _Function(self._nested_storage),
      ("collections", "defaultdict"): _Function(lambda *_: {}),
      **{("torch", name): np.dtype(dtype) for name, dtype in _DTYPES.items()},
      **{(module, "UntypedStorage"): np.dtype(np.uint8) for module in ("torch", "torch.storage")},
    }

  def find_class(self, module: str, name: str) -> Any:
    """See `pickle.Unpickler`."""
    # One of a name: a pickle may name it a million times.
    if (module, name) not in self._names:
      full_name = "".join(c if c.isprintable() else "?" for c in f"{module}.{name}"[:_SHOWN])
      self._names[module, name] = StandIn(full_name)
    return self._names[module, name]

  def persistent_load(self, pid: Any) -> Any:
    """See `pickle.Unpickler`: torch keeps storages outside of the pickle."""
    if type(pid) is tuple and len(pid) > 1 and pid[0] == "module" and type(pid[1]) is StandIn:
      return pid[1]  # a class, with its source code
    if not (
      type(pid) is tuple and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)
    ):
      raise TorchFileError("it refers to something that is not a tensor's storage")
    _, dtype, key, _, size, *view = pid
    if any(part is not None for part in view) or type(size) is not int or size < 0:
      raise TorchFileError(
        "it has views of storages, which torch stopped writing in version 0.4; save it again"
      )
    if type(key) not in (str, int):
      raise TorchFileError("it has a storage whose name makes no sense")
    key = str(key)
    if key not in self.storages:
      self._take(size * dtype.itemsize)
      self.storages[key] = _Storage(key, np.zeros(size, dtype))
    storage = self.storages[key]
    if (storage.data.dtype, storage.data.size) != (dtype, size):
      raise TorchFileError(f"storage {key} is described in two ways")
    return storage

  def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
    """What torch's constructors make; their other arguments are gradients, hooks and metadata."""
    if type(storage) is StandIn:
      return StandIn(f"torch._utils._rebuild_tensor_v2({storage.name})")
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

  def _tensor_with_attributes(self, function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor of a class of its own, or with attributes that somebody has hung on it."""
    if type(kind) is not StandIn:
      raise TorchFileError("a tensor whose class makes no sense")
    if kind.name not in _PLAIN_TENSORS:
      return StandIn(f"torch._tensor._rebuild_from_type_v2({kind.name})")
    return self._called(function, arguments)

  def _nested_storage(self, content: Any) -> Any:
    """The storage in a pickle that `torch.save` did not write: a file in the file."""
    content = _buffer(content)
    if type(content) is not bytes:
      return StandIn("torch.storage._load_from_bytes")
    self._take(len(content))
    return _read_stream(content)

  def _called(self, function: Any, arguments: Any) -> Any:
    if type(function) not in (_Function, StandIn) or type(arguments) is not tuple:
      raise TorchFileError("it calls something that cannot be called")
    if type(function) is StandIn:
      return StandIn(function.name, arguments)
    return function.call(*arguments)

  def _call(self) -> None:
    arguments, function = self.stack.pop(), self.stack.pop()
    self.stack.append(self._called(function, arguments))

  def _call_with_names(self) -> None:
    self.stack.pop()  # arguments that have names
    self._call()

  def _take_state(self) -> None:
    state, changed = self.stack.pop(), self.stack[-1]
    if type(changed) is StandIn:
      changed.take_state(state)
    # What torch hangs on a state dict, `_metadata`, is not needed.
    elif type(changed) is not collections.OrderedDict:
      raise TorchFileError(f"it changes a {type(changed).__name__}")

  def _bytes(self) -> None:
    # Python's own reserves what the file says before it reads.
    self.append(self.read(int.from_bytes(self.read(8), "little")))

  def _checked_item(self) -> None:
    _check_keys(self.stack[-2:-1])
    self.load_setitem()

  def _checked_items(self) -> None:
    _check_keys(self.stack[::2])
    self.load_setitems()

  def _checked_members(self) -> None:
    _check_keys(self.stack)
    self.load_additems()

  def _checked_frozenset(self) -> None:
    _check_keys(self.stack)
    self.load_frozenset()

  dispatch[pickle.SETITEM[0]] = _checked_item
  dispatch[pickle.SETITEMS[0]] = _checked_items
  dispatch[pickle.ADDITEMS[0]] = _checked_members
  dispatch[pickle.FROZENSET[0]] = _checked_frozenset
  dispatch[pickle.BYTEARRAY8[0]] = _bytes
  dispatch[pickle.REDUCE[0]] = _call
  dispatch[pickle.NEWOBJ[0]] = _call
  dispatch[pickle.NEWOBJ_EX[0]] = _call_with_names
  dispatch[pickle.BUILD[0]] = _take_state


def read(content: bytes) -> Any:
  """What `torch.save` was given, its tensors as numpy arrays.

  Args:
    content: of the file.

  Returns:
    Dictionaries, lists, plain values, and a `StandIn` for everything else.

  Raises:
    TorchFileError: not a torch file, a damaged one, or one that asks for what no weights need.
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
  # macOS puts a directory __MACOSX beside what it packs.
  pickles = [
    name
    for name in archive.namelist()
    if name.rpartition("/")[2] == "data.pkl" and not name.startswith("__MACOSX/")
  ]
  if len(pickles) != 1:
    raise TorchFileError(f"it has {len(pickles)} files data.pkl, not one")
  root = pickles[0].removesuffix("data.pkl")
  if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
    raise TorchFileError("it was written on a big-endian machine; save it again on another")
  # torch never compresses, but who packs a file again does.
  size = sum(entry.file_size for entry in archive.infolist())
  machine = _Machine(io.BytesIO(archive.read(pickles[0])), _LARGEST_GROWTH * size)
  tree = machine.load()
  for storage in machine.storages.values():
    _fill(storage, archive.read(f"{root}data/{storage.key}"))
  return tree


def _read_stream(content: bytes) -> Any:
  file, limit = io.BytesIO(content), _LARGEST_GROWTH * len(content)
  first = _Machine(file, limit)
  magic = first.load()
  if type(magic) is not int or magic != _STREAM_MAGIC:
    if first.storages:
      raise TorchFileError("it has tensors without their values")
    return magic  # a plain pickle
  protocol, system = _Machine(file, limit).load(), _Machine(file, limit).load()
  if protocol != _STREAM_PROTOCOL or not system.get("little_endian", True):
    raise TorchFileError(
      f"its version is {reprlib.repr(protocol)}, on {reprlib.repr(system)}: only "
      f"{_STREAM_PROTOCOL}, little-endian, is known"
    )
  machine = _Machine(file, limit)
  tree, keys = machine.load(), _Machine(file, limit).load()
  keys = [str(key) for key in keys if type(key) in (str, int)]
  if machine.storages.keys() != set(keys):
    raise TorchFileError(f"its storages {keys} are not those of its tensors")
  for key in keys:
    size, data = int.from_bytes(file.read(8), "little"), machine.storages[key].data
    _fill(machine.storages[key], file.read(size * data.itemsize))
  return tree


def array_of(value: Any) -> np.ndarray | None:
  """A tensor, or a NumPy array that was pickled; None for everything else."""
  if isinstance(value, np.ndarray):
    return value
  if type(value) is not StandIn:
    return None
  try:
    return _numpy_array(value)
  except (TypeError, ValueError, AttributeError):  # no array, or one of objects
    return None


def _numpy_array(value: StandIn) -> np.ndarray | None:
  """NumPy's pickles of an array: made empty and then filled (to protocol 4), or from a buffer."""
  module, _, name = value.name.rpartition(".")
  if module.partition(".")[0] != "numpy":
    return None
  if name == "_reconstruct":
    _, shape, dtype, by_columns, data = value.state
  elif name == "_frombuffer":
    data, dtype, shape, order = value.arguments
    by_columns = order == "F"
  else:
    return None
  array = np.frombuffer(_buffer(data), _numpy_dtype(dtype))
  return array.reshape(shape, order="F" if by_columns else "C")


def _numpy_dtype(value: Any) -> np.dtype:
  # Its code, as f4, and in the state the order of its bytes.
  return np.dtype(value.arguments[0]).newbyteorder(value.state[1])


def _buffer(data: Any) -> Any:
  # Protocol 2 has no bytes: it has a call that encodes a text.
  if type(data) is StandIn and data.name == "_codecs.encode" and data.arguments[1] == "latin1":
    data = data.arguments[0]
  return data.encode("latin1") if type(data) is str else data


def _fill(storage: _Storage, content: bytes) -> None:
  data = storage.data
  if len(content) != data.nbytes:
    raise TorchFileError(
      f"storage {storage.key} has {len(content)} bytes, {data.size} x {data.dtype} are expected"
    )
  data[:] = np.frombuffer(content, data.dtype)
