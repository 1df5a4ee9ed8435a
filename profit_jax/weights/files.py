"""Reads the tensors of a weights file, whatever its format is. No format can run code."""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from profit_jax import checkpoints, paths
from profit_jax.config import ConfigError
from profit_jax.weights import containers, formats, hub, prefixes, torch_file
from profit_jax.weights.claims import SETTINGS_KEY, safetensors_metadata
from profit_jax.weights.formats import TORCH_SUFFIXES, RefusedError

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
# Only refused tensors and unused counters have these: their values do not matter.
_OTHER_DTYPES = {
  "I64": np.int64,
  "I32": np.int32,
  "U8": np.uint8,
  "BOOL": np.bool_,
  "C64": np.complex64,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
}
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})(\..*)")  # of a sharded file
# Modules of transformers' nets, which hold a convolution and its norm.
_TRANSFORMERS = re.compile(r"(.*\.)?(conv_stem|layer\.0|embedder|embeddings)\.(.*\.)?convolution\.")
_LONGEST = 300  # characters of an error of a parser
_MOST_TENSORS = 20_000  # of a net
_ENTRY = "config.init.entry"


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


def read_contents(path: str, entry: str = "", field: str = _ENTRY) -> Contents:
  """The content of a weights file, or of a run's best checkpoint.

  Args:
    path: of the file, of a directory with one, or of the run; or a name that `hub` knows.
    entry: of the file that is read, or what the names of its tensors begin with; "" takes the first
      known one, see `containers`.
    field: that has `entry`, for messages.

  Raises:
    ConfigError: nothing there, an unknown format, a damaged file, tensors that need code, or none.
  """
  place = paths.opened("The weights file", hub.locate(path))
  try:
    contents = _read(place, path, entry, field)
    if not contents.tensors:
      raise RefusedError("holds no tensors.")
    if len(contents.tensors) > _MOST_TENSORS:
      raise RefusedError(f"holds {len(contents.tensors)} tensors, more than any net here has.")
    tensors, notes = prefixes.tidied(contents.tensors)
    _refuse_transformers(tensors)
  except ConfigError:
    raise
  except RefusedError as error:
    raise ConfigError(f"The weights file {path!r} {error}") from error
  # Damaged files raise whatever their parsers stumble over.
  except Exception as error:
    raise ConfigError(f"The weights file {path!r} cannot be read: {_told(error)}.") from error
  return contents._replace(tensors=tensors, notes=contents.notes + notes)


def _read(place: epath.Path, name: str, entry: str, field: str) -> Contents:
  if not place.exists():
    if (place.parent / f"{place.name}.index").exists():
      raise RefusedError(formats.TENSORFLOW_CHECKPOINT)
    raise RefusedError(f"does not exist. Give the path of one of {_FORMATS}.")
  if not place.is_dir():
    return _read_file(place, name, entry, field)
  found = None if (place / "checkpoints").exists() else formats.weights_in(place)
  if found is not None:
    return _read_file(found, name, entry, field)
  return _below(_read_run(place), entry, field)


def _read_file(place: epath.Path, name: str, entry: str, field: str) -> Contents:
  content, whole = place.read_bytes(), entry
  digest = hashlib.sha256(content)
  found = formats.recognised(content, place.name)
  if found is None:
    raise RefusedError(f"has an unknown format: it must be one of {_FORMATS}.")
  _refuse_part(place)
  if found.kind == "index":
    contents = _read_parts(place, found.content, digest.update)
  elif found.kind == "torch":
    tree = _parsed(torch_file.read, found)
    taken = containers.chosen(tree, entry, field)
    contents = _below(Contents(taken.tensors, None, taken.notes), taken.rest, field, taken.entries)
    entry = ""
  else:
    reader = _read_npz if found.kind == "npz" else _read_safetensors
    contents = _parsed(reader, found)
  contents = _below(contents, entry, field)
  return contents._replace(sha256=digest.hexdigest(), published=hub.published(name, whole))


def _parsed(reader: Callable[[bytes], Any], found: formats.Recognised) -> Any:
  """What a reader gives; where it fails, the message says as which format."""
  try:
    return reader(found.content)
  except RefusedError:
    raise
  except Exception as error:
    raise RefusedError(
      f"cannot be read as {formats.CALLED[found.kind]}: {_told(error)}."
    ) from error


def _told(error: Exception) -> str:
  """An error in one line; some have whole files in them."""
  return " ".join(str(error).split())[:_LONGEST] or type(error).__name__


def _below(contents: Contents, prefix: str, field: str, entries: Collection[str] = ()) -> Contents:
  if not prefix:
    return contents
  return contents._replace(tensors=prefixes.below(contents.tensors, prefix, field, entries))


def _refuse_part(place: epath.Path) -> None:
  part = _PART.fullmatch(place.name)
  if part and int(part[2]) > 1:
    index = f"{part[1]}{part[3]}.index.json"
    raise RefusedError(
      f"is one of {int(part[2])} parts of a file. Give the index that names them all, "
      f"{os.fspath(place.parent / index)!r}."
    )


def _read_parts(place: epath.Path, index: bytes, update: Callable[[bytes], None]) -> Contents:
  """The tensors of a sharded file, whose parts are beside its index; `update` is given their
  bytes.
  """
  where = json.loads(index)["weight_map"]
  parts = sorted(set(where.values()))
  # Parts are never somewhere else.
  absent = [name for name in parts if "/" in name or not (place.parent / name).exists()]
  if absent:
    raise RefusedError(
      f"needs its {len(parts)} parts in the same directory; missing: {formats.some(absent)}. Fetch "
      "them too."
    )
  tensors: dict[str, np.ndarray] = {}
  for name in parts:
    content = (place.parent / name).read_bytes()
    update(content)
    found = formats.recognised(content, name)
    if found is None or found.kind == "index":
      raise RefusedError(f"has a part that is no weights file, {name}. Fetch it again.")
    if found.kind == "torch":
      tensors |= containers.chosen(_parsed(torch_file.read, found), "", _ENTRY).tensors
    else:
      tensors |= _parsed(_read_npz if found.kind == "npz" else _read_safetensors, found).tensors
  missing = sorted(where.keys() - tensors.keys())
  if missing:
    raise RefusedError(
      f"names {len(missing)} tensors that its parts do not have, as {missing[0]}. Fetch all parts "
      "again."
    )
  return Contents(tensors)


def _refuse_transformers(tensors: Mapping[str, np.ndarray]) -> None:
  found = next(filter(_TRANSFORMERS.match, tensors), None)
  if found is not None:
    raise RefusedError(
      f"has the names of the transformers library, as {found}, which are not read: its nets are "
      "others (MobileNets pad as TensorFlow does). Use timm's or torchvision's weights, as "
      "hf:timm/mobilenetv2_100.ra_in1k."
    )


def _read_npz(content: bytes) -> Contents:
  # No pickles: a weights file must not be able to run code.
  file = np.load(io.BytesIO(content), allow_pickle=False)
  tensors, skipped = {}, []
  with file:
    for name in file.files:
      try:
        tensors[name] = file[name]
      except ValueError as error:
        if "allow_pickle" not in str(error):
          raise
        skipped.append(name)
  if skipped and not tensors:
    raise ValueError(f"it holds objects, which need code, as {skipped[0]!r}")
  notes = (
    (f"Passed over beside the tensors: {formats.some(skipped)} (objects).",) if skipped else ()
  )
  return Contents(tensors, None, notes)


def _read_safetensors(content: bytes) -> Contents:
  tensors = {}
  for name, entry in safetensors.deserialize(content):
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
      tensors[name] = np.zeros(entry["shape"], _OTHER_DTYPES.get(entry["dtype"], np.int8))
    else:
      tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
  settings = safetensors_metadata(io.BytesIO(content)).get(SETTINGS_KEY)
  return Contents(tensors, None if settings is None else dict(json.loads(settings)))


def _read_run(workdir: epath.Path) -> Contents:
  """The best weights of a run of ours; it may still be going on."""
  notes: list[str] = []
  checkpoint = checkpoints.read_newest(workdir / "checkpoints", notes.append)
  best = {} if checkpoint is None else checkpoint.section("best")
  if not best:
    told = formats.told_of_directory(workdir)
    if told:
      raise RefusedError(told)
    raise ConfigError(
      f"The directory {os.fspath(workdir)!r} holds no weights: it has no checkpoint at the last "
      f"bits of a run's plan. Give one of {_FORMATS}."
    )
  model = json.loads((workdir / "config.json").read_text())["model"]
  # Of a run of `Trainer`, the name of the class.
  return Contents(best, None if isinstance(model, str) else dict(model), tuple(notes))
