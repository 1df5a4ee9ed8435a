"""How many steps a quantizer has: values of the forward pass, so that 8 -> 5 -> 4 bits never
recompiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from profit_jax.config import MAX_BITS, MIN_BITS, QuantSettings

# What every model calls its first and its last layer with a kernel.
FIRST_LAYER, LAST_LAYER = "stem_conv", "classifier"


class Levels(NamedTuple):
  """The number of quantization steps of each kind of tensor, as traced scalars.

  `None` stands for full precision. It is part of the tree's structure, so whether a kind is
  quantized at all is static (one program each) while the number of bits is a value (the same
  program).

  Attributes:
    weight: float32 scalar, `2^(b-1) - 1` steps on each side of 0, for kernels; or None.
    act: float32 scalar, `2^b - 1` steps above 0, for activations; or None. A symmetric activation
      quantizer derives its own number from it, see `symmetric_steps`.
    quant: which quantizers, as a model puts it here for its layers; None is DuQ. Callers leave it
      alone: it is no array.
  """

  weight: jax.Array | None = None
  act: jax.Array | None = None
  quant: QuantSettings | None = None

  def first(self) -> "Levels":
    """Those of the first layer."""
    return (
      self
      if self.quant is None
      else self._replace(weight=_at_least(self.weight, self.quant.first_bits - 1))
    )

  def last(self) -> "Levels":
    """Those of the classifier, and of the quantizer before it."""
    if self.quant is None:
      return self
    bits = self.quant.last_bits
    return self._replace(weight=_at_least(self.weight, bits - 1), act=_at_least(self.act, bits))


def _at_least(steps: jax.Array | None, exponent: int) -> jax.Array | None:
  """`max(steps, 2^exponent - 1)`; as it is where its kind is in full precision or the exponent
  stands for nothing.
  """
  return steps if steps is None or exponent < 1 else jnp.maximum(steps, 2.0**exponent - 1)


def kernel_steps(layer: str, steps: jax.Array, quant: QuantSettings) -> jax.Array:
  """The steps of a layer's kernel (`block01/expand_conv`) where `steps` are those of all: more in
  first and last.
  """
  of_all = Levels(weight=steps, quant=quant)
  return (
    of_all.first() if layer == FIRST_LAYER else of_all.last() if layer == LAST_LAYER else of_all
  ).weight


def levels(weight_bits: int | None, act_bits: int | None) -> Levels:
  """Levels for bit widths from 2 to 8; None is full precision.

  Raises:
    ValueError: a bit width outside 2..8.
  """
  for bits in (weight_bits, act_bits):
    if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
      raise ValueError(f"bits must lie in {MIN_BITS}..{MAX_BITS}, got {bits}")
  return Levels(
    weight=None if weight_bits is None else np.float32(2 ** (weight_bits - 1) - 1),
    act=None if act_bits is None else np.float32(2**act_bits - 1),
  )


def symmetric_steps(act_steps: jax.Array) -> jax.Array:
  """Steps on each side of 0 for signed activations: `2^(b-1) - 1`, from the `2^b - 1` of the
  unsigned ones.
  """
  return jnp.floor(act_steps / 2)
