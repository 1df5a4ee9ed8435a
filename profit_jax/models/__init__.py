"""The models, by the name that `config.model.name` takes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from profit_jax.config import ConfigError, ModelSettings, QuantSettings, Settings
from profit_jax.models import mobilenet_v1, mobilenet_v2, mobilenet_v3, resnet

REGISTRY: dict[str, Callable[..., nn.Module]] = {
  "mobilenet_v1": mobilenet_v1.MobileNetV1,
  "mobilenet_v2": mobilenet_v2.MobileNetV2,
  "mobilenet_v3_large": functools.partial(mobilenet_v3.MobileNetV3, "large"),
  "mobilenet_v3_small": functools.partial(mobilenet_v3.MobileNetV3, "small"),
  "resnet18": functools.partial(resnet.ResNet, 18),
  "resnet50": functools.partial(resnet.ResNet, 50),
  "resnet101": functools.partial(resnet.ResNet, 101),
}
# The published strides, which `strides = ()` stands for; another list must be as long.
STRIDES: dict[str, tuple[int, ...]] = {
  "mobilenet_v1": mobilenet_v1.IMAGENET_STRIDES,
  "mobilenet_v2": mobilenet_v2.IMAGENET_STRIDES,
  "mobilenet_v3_large": mobilenet_v3.VARIANTS["large"].strides,
  "mobilenet_v3_small": mobilenet_v3.VARIANTS["small"].strides,
  "resnet18": resnet.IMAGENET_STRIDES,
  "resnet50": resnet.IMAGENET_STRIDES,
  "resnet101": resnet.IMAGENET_STRIDES,
}
# They have no quantizers and no width multiplier.
TEACHERS_ONLY = frozenset({"resnet18", "resnet50", "resnet101"})


def check(settings: Settings) -> None:
  """Checks what only the models know of their settings.

  Raises:
    ConfigError: strides of another number, or too many of them for the image; a width where there
      is none; bits for a model without quantizers.
  """
  _check_shape(settings.model, settings.data.image_size, "model")
  if settings.teacher.model in REGISTRY:
    _check_shape(settings.teacher.as_model(), settings.data.image_size, "teacher")
  name, plan = settings.model.name, settings.plan
  if name in TEACHERS_ONLY and (plan.weight_bits or plan.act_bits):
    raise ConfigError(
      f"config.model.name = {name!r} is not allowed with config.plan.weight_bits = "
      f"{plan.weight_bits!r} and "
      f"config.plan.act_bits = {plan.act_bits!r}: {name} has no quantizers. Set both to () to "
      "train it in full precision, "
      f"as a teacher, or choose one of {', '.join(sorted(REGISTRY.keys() - TEACHERS_ONLY))}."
    )


def _check_shape(model: ModelSettings, image_size: int, section: str) -> None:
  strides, published = model.strides, STRIDES.get(model.name, ())
  if strides and published and len(strides) != len(published):
    raise ConfigError(
      f"config.{section}.strides = {strides!r} is not allowed: {model.name} takes "
      f"{len(published)} numbers, the stem's "
      f"and the stages', published as {published!r}; () stands for these."
    )
  reduction = math.prod(strides or published)
  if image_size < reduction:
    raise ConfigError(
      f"config.{section}.strides = {strides!r} is not allowed: the product of "
      f"{strides or published!r} must be at most "
      f"data.image_size = {image_size}; it is {reduction}, use fewer 2s."
    )
  if model.name in TEACHERS_ONLY and model.width != 1:
    raise ConfigError(
      f"config.{section}.width = {model.width!r} is not allowed: {model.name} has no width "
      "multiplier, it must be 1.0."
    )


def build(
  settings: ModelSettings, num_classes: int, quant: QuantSettings | None = None
) -> nn.Module:
  """The module that the settings describe, with these quantizers; a model takes the fields that it
  has.
  """
  known = options(settings.name)
  chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name in known}
  if quant is not None and settings.name not in TEACHERS_ONLY and quant != QuantSettings():
    chosen["quant"] = quant
  return REGISTRY[settings.name](num_classes=num_classes, **chosen)


def options(name: str) -> frozenset[str]:
  """The fields of `ModelSettings` that a registered model has."""
  make = REGISTRY[name]
  own = {field.name for field in dataclasses.fields(getattr(make, "func", make))}
  return frozenset(own & {field.name for field in dataclasses.fields(ModelSettings)} - {"name"})


def init_variables(module: nn.Module, key: jax.Array, image_size: int) -> dict[str, Any]:
  """A model's `params` and `batch_stats`, drawn from `key`; images are
  `[N, image_size, image_size, 3]`.
  """
  return _initializer(module, image_size)(key)


@functools.cache
def _initializer(module: nn.Module, image_size: int) -> Callable[[jax.Array], dict[str, Any]]:
  # Kept, so that a process compiles it once: 11 s of CPU time for MobileNet-v2 (720 small kernels).
  image = np.zeros((1, image_size, image_size, 3), np.float32)
  return jax.jit(lambda key: module.init(key, image, mutable=["params", "batch_stats"]))


@functools.cache
def variable_shapes(module: nn.Module, image_size: int) -> dict[str, Any]:
  """The shapes of a model's `params` and `batch_stats`, without computing them; read-only, since it
  is cached.
  """
  return jax.eval_shape(lambda key: init_variables(module, key, image_size), jax.random.key(0))
