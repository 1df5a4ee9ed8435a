"""LSQ, learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153).

One scalar per tensor. The paper learns the step s; here stands the interval `a = n * s`, stored raw
like DuQ's, so that it stays positive and keeps its meaning where the bits change. With
`v = (x - offset) / s`:

    y     = s * round(clip(v, low, n)) + offset
    dy/ds = round(v) - v inside, low or n where v is clipped                  (equation 3)
    dy/dx = 1 inside, 0 outside                                               (equation 5)

The gradient of s is scaled by `g = 1 / sqrt(N * n)`, N the number of weights, or of features of one
example (section 2.2), and s starts at `2 * mean|v| / sqrt(n)` (section 2.1). `low` is -n for
kernels and signed activations: the paper's range has one code more below, which no method has here.
After h-swish, offset is -3/8.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from profit_jax.quant import duq
from profit_jax.quant.base import OFFSET, Kind, Quantizer, Scalars, register
from profit_jax.quant.quantized import Quantized


@register
class LSQ(Quantizer):
  """Learned step size quantization.

  Attributes:
    per_channel: as `Quantizer`'s.
  """

  method: ClassVar[str] = "lsq"
  kernel_scalars: ClassVar[tuple[str, ...]] = ("quant_a",)
  act_scalars: ClassVar[tuple[str, ...]] = ("quant_a",)
  one_interval: ClassVar[bool] = True

  def quantize_kernel(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> Quantized:
    """See `Quantizer`."""
    return self.act_interval(scalars, qmax, kernel.size).quantized(kernel, qmax, "symmetric")

  def quantize_act(self, x: jax.Array, scalars: Scalars, qmax: jax.Array, kind: Kind) -> Quantized:
    """See `Quantizer`."""
    return self.act_interval(scalars, qmax, max(1, x.size // len(x))).quantized(x, qmax, kind)

  def act_interval(self, scalars: Scalars, qmax: jax.Array, features: int) -> duq.Interval:
    """See `Quantizer`; of a kernel, `features` is the number of its weights."""
    raw_a = scalars["quant_a"]
    n = qmax.astype(raw_a.dtype)
    a = _with_gradient_scaled(jax.nn.softplus(raw_a), 1.0 / jnp.sqrt(features * n))
    return duq.Interval(a, jax.lax.stop_gradient(a) / n, "step")

  def kernel_codes(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> jax.Array:
    """See `Quantizer`."""
    return duq.codes(kernel, scalars["quant_a"], qmax, "symmetric")

  def kernel_clipped(self, kernel: jax.Array, scalars: Scalars) -> jax.Array:
    """See `Quantizer`."""
    return duq.clipped(kernel, scalars["quant_a"], "symmetric")

  def act_clipped(self, x: jax.Array, scalars: Scalars, kind: Kind) -> jax.Array:
    """See `Quantizer`."""
    return duq.clipped(x, scalars["quant_a"], kind)

  def first_kernel(self, kernel: jax.Array, qmax: jax.Array) -> dict[str, jax.Array]:
    """See `first_interval`."""
    return {"quant_a": first_interval(kernel, qmax, "symmetric")}

  def first_act(
    self, x: jax.Array, qmax: jax.Array, kind: Kind, largest: float | None
  ) -> dict[str, jax.Array]:
    """See `first_interval`."""
    del largest
    return {"quant_a": first_interval(x, qmax, kind)}


def first_interval(x: jax.Array, qmax: jax.Array, kind: Kind) -> jax.Array:
  """`n * 2 * mean|x - offset| / sqrt(n)`, the first a (scalar); 1e-3 where all are 0."""
  a = 2.0 * jnp.mean(jnp.abs(x - OFFSET[kind])) * jnp.sqrt(qmax.astype(x.dtype))
  return jnp.maximum(a, 1e-3).astype(x.dtype)


def _with_gradient_scaled(x, factor):
  return jax.lax.stop_gradient(x - x * factor) + x * jax.lax.stop_gradient(factor)
