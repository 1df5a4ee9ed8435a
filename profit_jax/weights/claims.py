"""Which published net a weights file says it is, by more than its tensors: nets of the same tensors
may compute different things.
"""

import json
import re
import types
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY, published_nets
from profit_jax.weights import formats, torch_file

# In the header of a .safetensors that we wrote: section `model`, as JSON.
SETTINGS_KEY = "profit_jax.model"
_LARGEST_HEADER = 100_000_000  # bytes, that of the safetensors library
_OPTIONS = "args"  # of a training script, in torchvision's and timm's checkpoints
_NET_OPTIONS = ("model", "arch")
# Of timm's `model_kwargs`, what changes nothing in evaluation.
_HARMLESS_OPTIONS = ("num_classes", "drop_rate", "drop_path_rate", "bn_momentum")
# Files that have the name of their directory.
_NAMELESS = ("model", "pytorch_model", "checkpoint", "weights")


class Claim(NamedTuple):
  """What a file says of its net.

  Attributes:
    net: its name, as its codebase has it.
    origin: what gives it.
    settings: of `config.model`, that the training had in place of the net's own.
  """

  net: str
  origin: str
  settings: Mapping[str, Any] = types.MappingProxyType({})


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

  Raises:
    ConfigError: the training script changed the net in a way that is not supported.
  """
  tree = _checkpoint(path)
  for name in _named_in(tree):
    if name in published_nets():
      return Claim(name, "the options saved in it", _trained_settings(tree, name, path))
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


def _name_at_start(text: str) -> str | None:
  # torchvision's file of mnasnet0_5 is called mnasnet0.5_top1_67.823-3ffadce67e.pth.
  text, published = text.replace(".", "_"), published_nets()
  # Our own names keep a file of mobilenet_v2_110d from being torchvision's mobilenet_v2.
  found = [
    name
    for name in published | REGISTRY.keys()
    if re.match(rf"{re.escape(name.replace('.', '_'))}(?![A-Za-z0-9])", text)
  ]
  longest = max(found, key=len, default=None)
  return longest if longest in published else None


def _checkpoint(path: epath.Path) -> Mapping[str, Any]:
  """What a checkpoint of PyTorch holds."""
  try:
    found = formats.recognised(path.read_bytes(), path.name)
    tree = torch_file.read(found.content) if found and found.kind == "torch" else None
  # What is damaged or something else, reading the weights says.
  except Exception:
    return {}
  return tree if isinstance(tree, Mapping) else {}


def _options(tree: Mapping[str, Any]) -> Mapping[str, Any]:
  """Of a training script, in a checkpoint."""
  options = tree.get(_OPTIONS)
  # An object's attributes, where the reader keeps those that are no plain values apart.
  attributes = getattr(options, "state", None)
  found = attributes if isinstance(attributes, Mapping) else options
  return found if isinstance(found, Mapping) else {}


def _named_in(tree: Mapping[str, Any]) -> list[str]:
  """The nets that a checkpoint names, beside its weights."""
  found = [place.get(key) for place in (_options(tree), tree) for key in _NET_OPTIONS]
  return [name for name in found if isinstance(name, str)]


def _trained_settings(tree: Mapping[str, Any], net: str, path: epath.Path) -> dict[str, Any]:
  """The settings of `config.model` that the options of timm's training script give a net."""
  options = _options(tree)
  changed = options.get("model_kwargs")
  changed = changed if isinstance(changed, Mapping) else {}
  if others := {key: value for key, value in changed.items() if key not in _HARMLESS_OPTIONS}:
    raise ConfigError(
      f"{path} is not a plain {net}: its training changed the net by model_kwargs = "
      f"{str(others)[:200]}, which is not supported. Use other weights."
    )
  epsilon = options.get("bn_eps")
  return {"bn_epsilon": float(epsilon)} if isinstance(epsilon, int | float) else {}
