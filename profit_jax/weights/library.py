"""Weights files for models that are given as modules: what `Trainer` starts from and ends with."""

import os
import warnings

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
from profit_jax.weights.load import VARIANCE, Loaded, load_variables, problem_of
from profit_jax.weights.save import write_safetensors
from profit_jax.weights.variants import ASSUMED, BY_TENSORS, differing_settings

_SHOWN = 5  # names in a message
# What a model may have otherwise on purpose: negative padding, and fewer strides for small images.
_CHOSEN = ("pad_value", "strides")


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
  variant: str = "",
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
    variant: which net a file of another codebase is, by timm's or torchvision's name, where neither
      the file nor its name says it.

  Returns:
    `params` and `batch_stats`, for `Trainer(variables=...)` or `model.apply`.

  Raises:
    ConfigError: no such file, a damaged one, tensors that are not this model's, or a file that
      names a net, or records settings, with which it computes something else.

  Warns:
    UserWarning: other strides or padding than the file was trained with; or nothing says which of
      several nets the file is.
  """
  spec = describe(model, image_shape, Bits(quantizer=quantizer))
  name = _registered_name(model)
  if name is not None:
    loaded = load_variables(
      os.fspath(path),
      name,
      spec.shapes,
      role="library",
      entry=entry,
      variant=variant,
      settings=model,
    )
    for note in loaded.notes:
      warnings.warn(note, stacklevel=2)
    if told := _other_settings(path, loaded, name, model):
      warnings.warn(told, stacklevel=2)
    return loaded.variables
  if variant:
    raise ConfigError(
      f"variant = {variant!r} is not allowed for {type(model).__name__}, which is not registered: "
      "no other codebase has names for it."
    )
  expected = traverse_util.flatten_dict(spec.shapes, sep="/")
  found = read_contents(os.fspath(path), entry, "entry").tensors
  problems = [f"unexpected: {name}" for name in found.keys() - expected.keys()]
  for name, leaf in expected.items():
    variance = name.startswith("batch_stats/") and name.endswith(f"/{VARIANCE}")
    if problem := problem_of(name, found.get(name), tuple(leaf.shape), variance=variance):
      problems.append(str(problem))
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


def _other_settings(
  path: str | os.PathLike[str], loaded: Loaded, name: str, model: nn.Module
) -> str:
  """A line on settings that the model has otherwise than the file; "" where there are none.

  Raises:
    ConfigError: the file says what it is, and they are no choice.
  """
  differing = differing_settings(name, loaded.settings, model)
  of = f"is {loaded.variant}, which computes" if loaded.variant else "was trained"
  certain = loaded.told_by not in (None, BY_TENSORS, ASSUMED)
  wrong = [setting for setting in differing if setting not in _CHOSEN] if certain else []
  told = ", ".join(
    f"{setting}={differing[setting][0]!r} (not {differing[setting][1]!r})"
    for setting in wrong or differing
  )
  if wrong:
    raise ConfigError(
      f"{os.fspath(path)} {of} with {told}. Make the {type(model).__name__} with that."
    )
  by = loaded.told_by or f"its {loaded.source} names"
  return told and f"{os.fspath(path)} {of} with {told}, by {by}."
