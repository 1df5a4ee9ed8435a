"""The way back: a model's variables as a `.safetensors` under another code's names."""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import safetensors.numpy
from flax import traverse_util

from profit_jax import paths
from profit_jax.config import ConfigError, ModelSettings
from profit_jax.typing import Variables
from profit_jax.weights.claims import SETTINGS_KEY
from profit_jax.weights.naming import QUANTIZER_LEAVES, namings


def named_tensors(model: str, variables: Variables, source: str) -> dict[str, np.ndarray]:
  """The tensors of a model under a source's names and in its layout; the values stay bit-identical.

  Args:
    model: a name of the registry.
    variables: `params` and `batch_stats`.
    source: `authors` and `profit_jax` include the quantizers' scalars; `torchvision` and `timm`
      have no place for them.

  Raises:
    ConfigError: a source that does not have the model.
  """
  known = namings(model)
  if source not in known:
    raise ConfigError(f"--names={source} is not allowed: {model} has names in {', '.join(known)}.")
  naming, leaves = known[source], traverse_util.flatten_dict(variables)
  return {
    name: naming.write(path, np.asarray(leaves[path]))
    for path, name in naming.tensor_names(leaves).items()
  }


def leaves_quantizers_out(tensors: Mapping[str, np.ndarray], variables: Variables) -> bool:
  """Whether tensors from `named_tensors` lack the quantizer scalars that the variables have."""
  scalars = [path for path in traverse_util.flatten_dict(variables) if path[-1] in QUANTIZER_LEAVES]
  return bool(scalars) and len(tensors) < len(traverse_util.flatten_dict(variables))


def settings_metadata(model: ModelSettings) -> dict[str, str]:
  """The header's entry from which `files.read_contents` knows how weights were trained."""
  return {SETTINGS_KEY: json.dumps(dataclasses.asdict(model))}


def write_safetensors(
  path: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
  """Writes tensors; `metadata` is text that people and tools find in the file's header.

  Raises:
    ConfigError: a name that does not end in .safetensors, or a place that cannot be written.
  """
  if not path.endswith(".safetensors"):
    raise ConfigError(f"The file {path!r} must be called .safetensors.")
  place = paths.opened("The file", path)
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that nobody finds half a file.
    unfinished = place.parent / f"{place.name}.tmp"
    unfinished.write_bytes(safetensors.numpy.save(dict(tensors), {"format": "pt", **metadata}))
    unfinished.replace(place)
  except OSError as error:
    raise ConfigError(f"The file {path!r} cannot be written: {error}.") from error
