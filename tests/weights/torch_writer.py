"""Writes what `torch.save` writes, without torch."""

import io
import pickle
import zipfile
from typing import Any, NamedTuple

import numpy as np

STORAGES = {
  np.dtype(np.float32): "FloatStorage",
  np.dtype(np.float64): "DoubleStorage",
  np.dtype(np.int64): "LongStorage",
}


class Global(NamedTuple):
  """A class or function, which need not exist."""

  module: str
  name: str

  def __call__(self):
    """Pickles only call what can be called."""


class Made(NamedTuple):
  """What a call of a global makes."""

  by: Global
  arguments: tuple[Any, ...] = ()
  state: Any = None
  items: tuple[tuple[Any, Any], ...] = ()


class Tensor(NamedTuple):
  """An array that is saved as a tensor."""

  array: np.ndarray


class Storage(NamedTuple):
  """The values of a tensor, which are outside of the pickle."""

  key: str
  array: np.ndarray


class _Writer(pickle._Pickler):
  def __init__(self, file, protocol):
    super().__init__(file, protocol)
    self.storages = []

  def persistent_id(self, obj):
    """See `pickle.Pickler`."""
    if not isinstance(obj, Storage):
      return None
    kind = Global("torch", STORAGES[obj.array.dtype])
    return ("storage", kind, obj.key, "cpu", obj.array.size)

  def save(self, obj, save_persistent_id=True):
    """See `pickle.Pickler`; an override of reducers is not asked about tuples, as these are."""
    if isinstance(obj, Tensor):
      array = np.asarray(obj.array, order="C")
      storage = Storage(str(len(self.storages)), array.reshape(-1))
      self.storages.append(storage)
      strides = tuple(stride // array.itemsize for stride in array.strides)
      rebuild = Global("torch._utils", "_rebuild_tensor_v2")
      obj = Made(rebuild, (storage, 0, array.shape, strides, False, {}))
    if isinstance(obj, Global):
      return self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
    if isinstance(obj, Made):
      items = iter(obj.items) if obj.items else None
      return self.save_reduce(obj.by, obj.arguments, obj.state, None, items)
    return super().save(obj, save_persistent_id)


def pickled(tree: Any, protocol: int = 2) -> tuple[bytes, list[Storage]]:
  """The pickle of a tree, and its storages."""
  file = io.BytesIO()
  writer = _Writer(file, protocol)
  writer.dump(tree)
  return file.getvalue(), writer.storages


def torch_file(
  tree: Any, protocol: int = 2, compression: int = zipfile.ZIP_STORED, root: str = "archive/"
) -> bytes:
  """The archive that `torch.save` writes of a tree, which may have `Tensor`, `Made`, `Global`."""
  content, storages = pickled(tree, protocol)
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", compression) as archive:
    archive.writestr(f"{root}data.pkl", content)
    for storage in storages:
      archive.writestr(f"{root}data/{storage.key}", storage.array.tobytes())
  return file.getvalue()
