"""PACT (Choi et al., 2018, arXiv 1805.06085), with the weight quantizer that it takes from
DoReFa-Net (arXiv 1606.06160).

Activations are clipped at a learned alpha, here `quant_a`, stored raw like DuQ's scalars:

    y         = alpha * round(clip((x - offset)/alpha, low, 1) * n) / n + offset
    dy/dalpha = 1 where x is clipped above, else 0                             (equation 3)
    dy/dx     = 1 inside, 0 outside

The paper has unsigned activations only; for signed ones `low` is -1 and a value clipped below gives
-1, and after h-swish the offset is -3/8: both ours. Its L2 penalty on alpha is left out, as decay
is for all of our quantizers' scalars.

A kernel has no scalar:

    t = tanh(w) / max|tanh(w)|
    y = 2 * round((t/2 + 1/2) * m) / m - 1,   m = 2^b - 1 = 2n + 1

so that there are 2^b values in [-1, 1], none of them 0; rounding passes its gradient on.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from profit_jax.quant import calibration, duq
from profit_jax.quant.base import Kind, Quantizer, Scalars, register
from profit_jax.quant.quantized import Quantized


@register
class PACT(Quantizer):
  """PACT for activations, DoReFa-Net's quantizer for kernels.

  Attributes:
    per_channel: as `Quantizer`'s; kernels are then scaled by the largest weight of each channel.
  """

  method: ClassVar[str] = "pact"
  act_scalars: ClassVar[tuple[str, ...]] = ("quant_a",)

  def quantize_kernel(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> Quantized:
    """A kernel whose codes are the odd numbers from -m to m; it has no scalars."""
    del scalars
    t, most = jnp.tanh(kernel), 2.0 * qmax.astype(kernel.dtype) + 1.0
    t = t / jnp.maximum(jnp.max(jnp.abs(t)), jnp.finfo(t.dtype).tiny)
    return Quantized(2.0 * round_through((t / 2.0 + 0.5) * most) - most, 1.0 / most)

  def quantize_act(self, x: jax.Array, scalars: Scalars, qmax: jax.Array, kind: Kind) -> Quantized:
    """See `Quantizer`."""
    return self.act_interval(scalars, qmax, 0).quantized(x, qmax, kind)

  def act_interval(self, scalars: Scalars, qmax: jax.Array, features: int) -> duq.Interval:
    """See `Quantizer`."""
    del features
    a = jax.nn.softplus(scalars["quant_a"])
    return duq.Interval(a, jax.lax.stop_gradient(a) / qmax.astype(a.dtype), "clip")

  def kernel_codes(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> jax.Array:
    """Which of the 2^b values each element has, from the lowest, `-(n + 1)`, to `n`."""
    # An odd number 2i - m for the i-th value; m is 2n + 1.
    return (self.quantize_kernel(kernel, scalars, qmax).codes - 1.0) / 2.0

  def kernel_clipped(self, kernel: jax.Array, scalars: Scalars) -> jax.Array:
    """Nothing is."""
    del scalars
    return jnp.zeros(kernel.shape, bool)

  def act_clipped(self, x: jax.Array, scalars: Scalars, kind: Kind) -> jax.Array:
    """See `Quantizer`."""
    return duq.clipped(x, scalars["quant_a"], kind)

  def first_kernel(self, kernel: jax.Array, qmax: jax.Array) -> dict[str, jax.Array]:
    """There are none."""
    del kernel, qmax
    return {}

  def first_act(
    self, x: jax.Array, qmax: jax.Array, kind: Kind, largest: float | None
  ) -> dict[str, jax.Array]:
    """DuQ's first interval. The paper starts high and lets its penalty bring alpha down."""
    del qmax
    return {"quant_a": calibration.act_interval(x, kind, largest)}


@jax.custom_vjp
def round_through(x: jax.Array) -> jax.Array:
  """Rounds half to even; the gradient passes as it is."""
  return jnp.round(x)


round_through.defvjp(lambda x: (jnp.round(x), None), lambda _, upstream: (upstream,))
