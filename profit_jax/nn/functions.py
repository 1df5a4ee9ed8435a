"""Non-linearities and means for use between layers, in the form that export knows.

They take what layers return, and compute plain arrays.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from profit_jax.nn import tracing
from profit_jax.quant.quantized import Tensor, value_of


def relu(x: Tensor) -> jax.Array:
  """`max(x, 0)`."""
  return tracing.activation(x, "relu") if tracing.active() else nn.relu(value_of(x))


def relu6(x: Tensor) -> jax.Array:
  """`min(max(x, 0), 6)`."""
  return tracing.activation(x, "relu6") if tracing.active() else nn.relu6(value_of(x))


def hard_swish(x: Tensor) -> jax.Array:
  """`x * relu6(x + 3) / 6`."""
  return tracing.activation(x, "hard_swish") if tracing.active() else nn.hard_swish(value_of(x))


def hard_sigmoid(x: Tensor) -> jax.Array:
  """`relu6(x + 3) / 6`."""
  return tracing.activation(x, "hard_sigmoid") if tracing.active() else nn.hard_sigmoid(value_of(x))


def spatial_mean(x: Tensor) -> jax.Array:
  """The mean over height and width: `[N, H, W, C]` -> `[N, C]`."""
  return tracing.mean(x) if tracing.active() else jnp.mean(value_of(x), axis=(1, 2))
