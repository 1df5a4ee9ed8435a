"""Reads the tensors of a weights file, by format. No format can run code."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from profit_jax import checkpoints, paths
from profit_jax.config import ConfigError
from profit_jax.weights import hub, torch_file
from profit_jax.weights.claims import SETTINGS_KEY, TORCH_SUFFIXES, safetensors_metadata

_FORMATS = (
  f".safetensors, .npz, {', '.join(TORCH_SUFFIXES)}, the --workdir of a run, or a name as "
  f"{hub.HUGGING_FACE}OWNER/NAME"
)
_SAFETENSORS_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
}
# Where training scripts put the weights among other things: the authors' and torchvision's; timm's
# and lightning's.
_STATE_KEYS = ("model", "state_dict", "model_state_dict")
# What wrappers put before every name: DataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
# Of all tensors of an .npz, unpacked; the largest model here has 0.2e9.
_LARGEST = 4_000_000_000


class Contents(NamedTuple):
  """What a file holds.

  Attributes:
    tensors: by the names that they have there.
    settings: section `model` of the configuration that they were trained with, where the file says
      so: a run of ours, or a file that one wrote. Else None.
    notes: what the user should know of how it was read.
    sha256: of the file; None for a run.
    published: what is published of the file; None where nothing is.
  """

  tensors: dict[str, np.ndarray]
  settings: dict[str, Any] | None = None
  notes: tuple[str, ...] = ()
  sha256: str | None = None
  published: hub.Published | None = None


def read_contents(path: str) -> Contents:
  """The content of a weights file, or of a run's best checkpoint.

  Args:
    path: of the file or the run, or a name that `hub` knows.

  Raises:
    ConfigError: nothing there, an unknown format, a damaged file, one that carries code, or one
      without tensors.
  """
  located = hub.locate(path)
  place = paths.opened("The weights file", located)
  is_directory = place.is_dir()
  if not place.exists():
    raise ConfigError(
      f"The weights file {path!r} does not exist. Give the path of one of {_FORMATS}."
    )
  readers = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    **dict.fromkeys(TORCH_SUFFIXES, _read_torch),
  }
  suffix = next((suffix for suffix in readers if located.endswith(suffix)), None)
  if suffix is None and not is_directory:
    raise ConfigError(
      f"The weights file {path!r} has an unknown format: it must be one of {_FORMATS}."
    )
  try:
    contents = _read_run(place) if is_directory else _read_file(place, readers[suffix], path)
  except ConfigError:
    raise
  # Damaged files raise whatever their parsers stumble over.
  except Exception as error:
    kind = "a run" if is_directory else suffix
    raise ConfigError(
      f"The weights file {path!r} cannot be read as {kind}: {str(error) or type(error).__name__}."
    ) from error
  if not contents.tensors:
    raise ConfigError(f"The weights file {path!r} holds no tensors.")
  return contents._replace(tensors=_unwrapped(contents.tensors))


def _read_file(place: epath.Path, reader: Callable[[bytes], Contents], name: str) -> Contents:
  content = place.read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  return reader(content)._replace(sha256=digest, published=hub.published(name))


def _unwrapped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  for prefix in _WRAPPERS:
    if all(name.startswith(prefix) for name in tensors):
      return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
  return tensors


def _read_npz(content: bytes) -> Contents:
  if zipfile.is_zipfile(io.BytesIO(content)):
    size = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(content)).infolist())
    if size > _LARGEST:
      raise ValueError(
        f"its tensors have {size} bytes, more than any model here ({_LARGEST} at most)"
      )
  # No pickles: a weights file must not be able to run code.
  file = np.load(io.BytesIO(content), allow_pickle=False)
  if not isinstance(file, np.lib.npyio.NpzFile):
    raise ValueError("it holds a single array without a name")
  with file:
    return Contents({name: file[name] for name in file.files})


def _read_safetensors(content: bytes) -> Contents:
  tensors = {}
  for name, entry in safetensors.deserialize(content):
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
    # Of a tensor in integers only the shape matters: it will be refused, or is a counter that
    # nobody reads.
    data = (
      np.zeros(entry["shape"], np.int8) if dtype is None else np.frombuffer(entry["data"], dtype)
    )
    tensors[name] = data.reshape(entry["shape"])
  settings = safetensors_metadata(io.BytesIO(content)).get(SETTINGS_KEY)
  return Contents(tensors, None if settings is None else dict(json.loads(settings)))


def _read_torch(content: bytes) -> Contents:
  tree = torch_file.read(content)
  if not isinstance(tree, Mapping):
    raise ValueError(f"it holds a {type(tree).__name__}, not a dictionary of tensors")
  notes = ()
  chosen = next((key for key in _STATE_KEYS if isinstance(tree.get(key), Mapping)), None)
  if chosen is not None:
    others = ", ".join(
      str(key) for key, value in tree.items() if key != chosen and value is not None
    )
    notes = (
      f"The weights are the entry {chosen!r} of the file; beside it stand: {others or 'none'}.",
    )
    tree = tree[chosen]
  odd = [
    f"{name!r} ({type(value).__name__})"
    for name, value in tree.items()
    if not isinstance(value, np.ndarray)
  ]
  if odd:
    raise ValueError(
      f"it holds more than tensors: {', '.join(odd)}; known places of tensors are "
      f"{', '.join(_STATE_KEYS)}"
    )
  return Contents({str(name): value for name, value in tree.items()}, None, notes)


def _read_run(workdir: epath.Path) -> Contents:
  """The best weights of a run of ours; it may still be going on."""
  notes: list[str] = []
  checkpoint = checkpoints.read_newest(workdir / "checkpoints", notes.append)
  best = {} if checkpoint is None else checkpoint.section("best")
  if not best:
    raise ConfigError(
      f"The directory {os.fspath(workdir)!r} holds no weights: it must be the --workdir of a run "
      "that has reached its "
      f"plan's last bits, or give a file, one of {_FORMATS}."
    )
  model = json.loads((workdir / "config.json").read_text())["model"]
  # Of a run of `Trainer`, the name of the class.
  return Contents(best, None if isinstance(model, str) else dict(model), tuple(notes))
