"""Which published net a weights file says it is, by more than its tensors: nets of the same tensors
may compute different things.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from profit_jax.models import REGISTRY
from profit_jax.weights import formats, torch_file

# In the header of a .safetensors that we wrote: section `model`, as JSON.
SETTINGS_KEY = "profit_jax.model"
_LARGEST_HEADER = 100_000_000  # bytes, that of the safetensors library
_OPTIONS = "args"  # of a training script, in torchvision's and timm's checkpoints
_NET_OPTIONS = ("model", "arch")
# Files that have the name of their directory.
_NAMELESS = ("model", "pytorch_model", "checkpoint", "weights")


class Claim(NamedTuple):
  """A net's name, as its codebase has it, and what gives it."""

  net: str
  origin: str


def is_nameless(path: epath.Path) -> bool:
  """Whether a file has a name that many files have: its directory names the net."""
  return path.name.partition(".")[0] in _NAMELESS


def claim_of(path: epath.Path, called: str | None = None) -> Claim | None:
  """What a file says of its net: in a training script's options, or by its name.

  Only names of published nets count that a registered model knows. Of several, the longest does:
  `mobilenetv4_conv_small_035.safetensors` is no mobilenetv4_conv_small.

  Args:
    path: of the file.
    called: what names it; None is its own name, or its directory's if it is nameless.
  """
  for name in _named_in(path):
    if name in _published():
      return Claim(name, "the options saved in it")
  if called is None:
    called = path.parent.name if is_nameless(path) else path.name
  name = _name_at_start(called)
  return None if name is None else Claim(name, "its name")


def is_own(path: epath.Path) -> bool:
  """Whether a file is a .safetensors of ours, which records the settings that count for it."""
  try:
    with path.open("rb") as file:
      return SETTINGS_KEY in safetensors_metadata(file)
  except (OSError, ValueError, RecursionError):
    return False  # reading the weights says so


def safetensors_metadata(file: BinaryIO) -> Mapping[str, Any]:
  """The metadata in the header of a .safetensors.

  Raises:
    ValueError: a damaged header.
  """
  size = int.from_bytes(file.read(8), "little")
  if size > _LARGEST_HEADER:
    raise ValueError("it is no .safetensors")
  header = json.loads(file.read(size))
  metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
  if not isinstance(metadata, dict):
    raise ValueError("its header is damaged")
  return metadata


def _published() -> set[str]:
  namings = [naming for entry in REGISTRY.values() for naming in entry.names]
  return {name for naming in namings for name in (*naming.variants, *naming.unsupported)}


def _name_at_start(text: str) -> str | None:
  # torchvision's file of mnasnet0_5 is called mnasnet0.5_top1_67.823-3ffadce67e.pth.
  text, published = text.replace(".", "_"), _published()
  # Our own names keep a file of mobilenet_v2_110d from being torchvision's mobilenet_v2.
  found = [
    name
    for name in published | REGISTRY.keys()
    if re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", text)
  ]
  longest = max(found, key=len, default=None)
  return longest if longest in published else None


def _named_in(path: epath.Path) -> list[str]:
  """The nets that a checkpoint of PyTorch names, beside its weights."""
  try:
    found = formats.recognised(path.read_bytes(), path.name)
    tree = torch_file.read(found.content) if found and found.kind == "torch" else None
  # What is damaged or something else, reading the weights says.
  except Exception:
    return []
  if not isinstance(tree, Mapping):
    return []
  options = tree.get(_OPTIONS)
  places: list[Mapping[str, Any]] = [options] if isinstance(options, Mapping) else []
  found = [place.get(key) for place in (*places, tree) for key in _NET_OPTIONS]
  return [name for name in found if isinstance(name, str)]
