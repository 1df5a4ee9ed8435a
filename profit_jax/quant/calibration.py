"""First values of the quantizers' a and c, taken just before the first quantized phase of each
kind.
"""

import jax
import jax.numpy as jnp

from profit_jax.quant.base import HSWISH_MINIMUM, Kind

WEIGHT_FRACTION = 0.9  # of max|w|
SMALLEST_INTERVAL = 1e-3  # where nothing is positive
_SHARES = 40


def weight_interval(kernel: jax.Array) -> jax.Array:
  """`0.9 * max|w|`, the first a and c of a kernel's quantizer (scalar); 1e-3 if it is all zeros."""
  largest = jnp.max(jnp.abs(kernel))
  return jnp.where(largest > 0, WEIGHT_FRACTION * largest, SMALLEST_INTERVAL).astype(kernel.dtype)


def fitted_interval(kernel: jax.Array, qmax: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The a and c (scalars) whose quantized kernel `c * q(a)` is nearest to the kernel, in the sum of
  squares.

  For a given a the best c is `<w, q> / <q, q>`, which leaves `<w, w> - <w, q>^2 / <q, q>`; a is the
  best of 40 shares of `max|w|`, from 1/40 to 1. Both 1e-3 for a kernel of zeros.

  Args:
    kernel: any shape.
    qmax: scalar, n of the symmetric quantizer.
  """
  largest = jnp.max(jnp.abs(kernel))

  def products(share):
    a = jnp.where(largest > 0, share * largest, 1.0)
    q = jnp.round(jnp.clip(kernel / a, -1.0, 1.0) * qmax.astype(kernel.dtype))
    return jnp.sum(kernel * q), jnp.sum(q * q)

  shares = jnp.arange(1, _SHARES + 1, dtype=kernel.dtype) / _SHARES
  wq, qq = jax.lax.map(products, shares)
  # The largest weight has a code that is not 0 at every share, but for kernels of zeros.
  best = jnp.argmax(jnp.where(qq > 0, wq * wq / jnp.maximum(qq, 1.0), 0.0))
  a, c = shares[best] * largest, wq[best] / jnp.maximum(qq[best], 1.0) * qmax.astype(kernel.dtype)
  a, c = (jnp.where(largest > 0, each, SMALLEST_INTERVAL).astype(kernel.dtype) for each in (a, c))
  return a, c


def act_interval(x: jax.Array, kind: Kind, largest: float | None = None) -> jax.Array:
  """The 95th percentile of the positive part of a quantizer's input, its first a and c (scalar).

  Sort the positive elements of |x| (symmetric), x (unsigned) or x + 3/8 (h-swish) and take the one
  at index `int(count * 0.95)`. The authors' code looks before the non-linearity and, through a
  slip, takes neither |x| nor x + 3/8; this looks at the input of the quantizer itself and does
  both.

  Args:
    x: the input of the quantizer, any shape.
    kind: which quantizer.
    largest: upper bound of the result (6 after a ReLU6), or None.
  """
  if kind == "symmetric":
    x = jnp.abs(x)
  elif kind == "hswish":
    x = x - HSWISH_MINIMUM
  positive = jnp.sort(jnp.where(x > 0, x, jnp.inf).ravel())
  count = jnp.sum(x > 0)
  # floor(count * 19/20) in integers that cannot overflow: an activation of ImageNet size has 3e8
  # elements.
  index = count - (count + 19) // 20
  interval = jnp.where(count > 0, positive[index], SMALLEST_INTERVAL)
  return interval if largest is None else jnp.minimum(interval, largest)
