"""Which published net a weights file says it is, by more than its tensors: nets of the same tensors
may compute different things.
"""

import json
import re
import reprlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY, published_nets
from profit_jax.weights import containers, formats, torch_file

# In the header of a .safetensors that we wrote: section `model`, as JSON.
SETTINGS_KEY = "profit_jax.model"
_LARGEST_HEADER = 100_000_000  # bytes, that of the safetensors library
# Where checkpoints have the options of their training: torchvision's and timm's, Lightning's, and
# those of others.
_OPTIONS = ("args", "hyper_parameters", "hparams", "config", "cfg", "opt", "options")
_NET_OPTIONS = ("model", "arch", "model_name", "architecture", "net", "network", "backbone")
# What a section of options calls it: {"model": {"name": NET}}.
_NAME = "name"
# Of a distillation, for the weights of its teacher.
_TEACHER = "teacher"
_TEACHER_OPTIONS = ("teacher_model", "teacher_arch", "teacher_name", _TEACHER)
# timm's of normalization as TensorFlow has it, and the epsilon that it stands for.
_TENSORFLOW_NORM, _TENSORFLOW_EPSILON = "bn_tf", 1e-3
# timm's of the last pooling: the average, by its names.
_POOLING, _AVERAGE = "gp", ("avg", "fast", "fastavg")
# Only torchvision's script for quantization-aware training has it. Its `model` names the net
# without quantization, which may compute something else.
_QUANTIZATION = "num_calibration_batches"
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


def claim_of(path: epath.Path, called: str | None = None, entry: str = "") -> Claim | None:
  """What a file says of its net: in a training script's options, or by its name.

  Only names of published nets count that a registered model knows. Of several, the longest does:
  `mobilenetv4_conv_small_035.safetensors` is no mobilenetv4_conv_small.

  Args:
    path: of the file.
    called: what names it; None is its own name, or its directory's if it is nameless.
    entry: which of the weights in it, as `containers.chosen` has it.

  Raises:
    ConfigError: the training script changed the net in a way that is not supported.
  """
  tree = _checkpoint(path)
  of_teacher = _TEACHER in re.split(r"[/.]", entry)
  # What stands nearest to the weights says it.
  for place in reversed(containers.places(tree, entry)):
    for options, name in _named_in(place, of_teacher):
      return Claim(name, "the options saved in it", _trained_settings(options, name, path))
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


def _options(value: Any) -> Mapping[str, Any]:
  """Of a training script: a dictionary, or an object with attributes or items."""
  if not isinstance(value, Mapping):
    return {}
  # Attributes that are no plain values are no items of it; private ones are no options.
  state = getattr(value, "state", None)
  attributes = state if isinstance(state, Mapping) else {}
  return {k: v for k, v in {**value, **attributes}.items() if not str(k).startswith("_")}


def _named_in(
  place: Mapping[str, Any], of_teacher: bool
) -> Iterator[tuple[Mapping[str, Any], str]]:
  """The nets that a checkpoint names, beside its weights, each with the options that do."""
  keys = (*(_TEACHER_OPTIONS if of_teacher else ()), *_NET_OPTIONS)
  found = [_options(place.get(key)) for key in _OPTIONS]
  named = [(options, options.get(key)) for key in keys for options in (*found, place)]
  # Of entries of the checkpoint, these are the weights.
  sections = [_options(options.get(key)) for options in found for key in keys]
  named += [(each, each.get(key)) for each in sections for key in (_NAME, *keys)]
  # The options describe the architecture beside them.
  first = next(filter(None, found), {})
  for options, text in named:
    name = net_named(text)
    if name is not None:
      of = first if options is place else options
      quantizable = f"quantization.{name}"
      yield of, quantizable if _QUANTIZATION in of and quantizable in published_nets() else name


def net_named(text: Any) -> str | None:
  """The published net that a text names, as timm takes it: `hf_hub:timm/NAME.TAG`; None where it
  names none.
  """
  if not isinstance(text, str):
    return None
  known, name = published_nets(), re.sub(r"^(hf[-_]hub:)?(timm/)?", "", text)
  return next((each for each in (name, name.partition(".")[0]) if each in known), None)


def _trained_settings(options: Mapping[str, Any], net: str, path: epath.Path) -> dict[str, Any]:
  """The settings of `config.model` that the options of timm's training script give a net."""
  changed = dict(_options(options.get("model_kwargs")))
  epsilon = changed.pop("bn_eps", None) or options.get("bn_eps")
  pooling = options.get(_POOLING)
  if isinstance(pooling, str) and pooling not in _AVERAGE:
    changed[_POOLING] = pooling
  if others := {key: value for key, value in changed.items() if key not in _HARMLESS_OPTIONS}:
    raise ConfigError(
      f"{path} is not a plain {net}: its training changed the net by "
      f"{reprlib.repr(others)[:200]}, which is not supported. Use other weights."
    )
  if epsilon is None and options.get(_TENSORFLOW_NORM) is True:
    epsilon = _TENSORFLOW_EPSILON
  return {"bn_epsilon": float(epsilon)} if isinstance(epsilon, int | float) else {}
