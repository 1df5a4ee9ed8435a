"""What a kernel computes codes from as it reads."""

from typing import NamedTuple

import jax


class Affine(NamedTuple):
  """An activation whose codes are `round(clip((x - mean) * factor + bias, low, high))`.

  The arithmetic is float32, halves are rounded to even, and NaN gives NaN.

  Attributes:
    x: `[N, H, W, C]`, of any floating dtype.
    mean: `[C]`.
    factor: `[C]`.
    bias: `[C]`.
    low: scalar.
    high: scalar.
  """

  x: jax.Array
  mean: jax.Array
  factor: jax.Array
  bias: jax.Array
  low: jax.Array
  high: jax.Array
