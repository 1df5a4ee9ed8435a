"""The models, by the name that `config.model.name` takes."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from profit_jax.models.mobilenet_v2 import MobileNetV2
from profit_jax.settings import ModelSettings

REGISTRY: dict[str, Callable[..., nn.Module]] = {"mobilenet_v2": MobileNetV2}


def build(name: str, settings: ModelSettings, num_classes: int, **changes: Any) -> nn.Module:
  """The module of a registered model, `changes` replacing settings."""
  options = {"width": settings.width, "activation": settings.activation, "dropout": settings.dropout}
  return REGISTRY[name](num_classes=num_classes, strides=settings.strides, **(options | changes))


def init_variables(module: nn.Module, key: jax.Array, image_size: int) -> dict[str, Any]:
  """A model's `params` and `batch_stats`, drawn from `key`; images are `[N, image_size, image_size, 3]`."""
  image = np.zeros((1, image_size, image_size, 3), np.float32)
  return jax.jit(lambda key: module.init(key, image, mutable=["params", "batch_stats"]))(key)


@functools.cache
def variable_shapes(module: nn.Module, image_size: int) -> dict[str, Any]:
  """The shapes of a model's `params` and `batch_stats`, without computing them; read-only, since it is cached."""
  return jax.eval_shape(lambda key: init_variables(module, key, image_size), jax.random.key(0))
