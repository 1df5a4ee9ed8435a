"""Weights files for models that are given as modules: what `Trainer` starts from and ends with."""

import os

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY
from profit_jax.nn.spec import describe
from profit_jax.quant import Bits, DuQ, Quantizer
from profit_jax.typing import Variables
from profit_jax.weights.files import read_contents
from profit_jax.weights.load import Loaded, differing_settings, load_variables
from profit_jax.weights.save import write_safetensors

_SHOWN = 5  # names in a message


def save_weights(variables: Variables, path: str | os.PathLike[str]) -> None:
  """Writes variables as a `.safetensors` file, each under its path, `params/conv/kernel`.

  Args:
    variables: `params` and `batch_stats`, as `Result.variables`.
    path: of the file, local or remote.

  Raises:
    ConfigError: a path that does not end in .safetensors, or that cannot be written.
  """
  flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
  tensors = {name: np.asarray(value, order="C") for name, value in flat.items()}
  write_safetensors(os.fspath(path), tensors, {})


def load_weights(
  path: str | os.PathLike[str],
  model: nn.Module,
  image_shape: tuple[int, ...],
  *,
  quantizer: Quantizer = DuQ(),
  entry: str = "",
) -> Variables:
  """Reads a model's variables from a file; nothing is guessed, and nothing is left over.

  Args:
    path: a file of `save_weights`, or a run's directory. Of a registered model, also a file under
      the names of torchvision, timm or the authors.
    model: whose variables they are.
    image_shape: `(H, W, C)` of its images.
    quantizer: of its layers, as the file has it. A registered model's file in full precision lacks
      the scalars: they are 1.
    entry: which of the weights in the file, as `init.entry`.

  Returns:
    `params` and `batch_stats`, for `Trainer(variables=...)` or `model.apply`.

  Raises:
    ConfigError: no such file, a damaged one, tensors that are not this model's, or a file that
      names a net which computes something else.
  """
  spec = describe(model, image_shape, Bits(quantizer=quantizer))
  name = _registered_name(model)
  if name is not None:
    loaded = load_variables(os.fspath(path), name, spec.shapes, entry=entry)
    _refuse_other_settings(path, loaded, model)
    return loaded.variables
  expected = traverse_util.flatten_dict(spec.shapes, sep="/")
  found = read_contents(os.fspath(path), entry, "entry").tensors
  problems = [
    *(f"{name} is missing" for name in expected.keys() - found.keys()),
    *(f"{name} is not in the model" for name in found.keys() - expected.keys()),
    *(
      f"{name} has the shape {found[name].shape}, not {leaf.shape}"
      for name, leaf in expected.items()
      if name in found and found[name].shape != leaf.shape
    ),
  ]
  if problems:
    more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ConfigError(
      f"{os.fspath(path)} does not hold the weights of {type(model).__name__}: "
      f"{'; '.join(sorted(problems)[:_SHOWN])}{more}. Give the file of this model, with its image "
      "shape and quantizer."
    )
  arrays = {name: np.asarray(found[name], leaf.dtype) for name, leaf in expected.items()}
  return {"batch_stats": {}, **traverse_util.unflatten_dict(arrays, sep="/")}


def _registered_name(model: nn.Module) -> str | None:
  """The name of a registered model: of several with its class, the one that fixes the most."""
  found = [
    name
    for name, entry in REGISTRY.items()
    if entry.module is type(model)
    and all(getattr(model, field) == value for field, value in entry.fixed.items())
  ]
  return max(found, key=lambda name: len(REGISTRY[name].fixed), default=None)


def _refuse_other_settings(path: str | os.PathLike[str], loaded: Loaded, model: nn.Module) -> None:
  """Refuses a file that names its net where the model computes something else. The padding after
  h-swish is a choice.
  """
  if loaded.published is None:
    return
  told = {
    name: value for name, value in loaded.settings.items() if name not in ("pad_value", "strides")
  }
  differing = differing_settings(told, model)
  if differing:
    settings = ", ".join(
      f"{name}={theirs!r} (not {ours!r})" for name, (theirs, ours) in differing.items()
    )
    raise ConfigError(
      f"{os.fspath(path)} is {loaded.published.architecture}, which computes with {settings}. Make "
      f"the {type(model).__name__} with that."
    )
