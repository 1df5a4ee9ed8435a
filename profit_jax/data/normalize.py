"""Normalization of images, inside the compiled step: batches travel to the device as uint8."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Normalization(NamedTuple):
  """`(x / 255 - mean) / std` per channel.

  Attributes:
    mean: of each channel, in 0..1.
    std: of each channel, in 0..1.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]


def normalize(image: jax.Array, normalization: Normalization) -> jax.Array:
  """Normalizes uint8 images `[N, H, W, C]` to float32; floats are taken as already normalized and
  pass as they are.
  """
  if image.dtype != jnp.uint8:
    return image
  mean, std = (jnp.asarray(value, jnp.float32) for value in (normalization.mean, normalization.std))
  return (image.astype(jnp.float32) / 255.0 - mean) / std
