"""QIL, quantization interval learning (Jung et al., CVPR 2019, arXiv 1808.05779).

Each tensor has an interval, of center and half width d, all stored raw like DuQ's scalars; below it
magnitudes are pruned, above it they are clipped. Kernels also have an exponent gamma. With
`p = center - d` and `t = center + d`:

    u = clip((|x| - p) / (2 d), 0, 1)
    y = sign(x) * t * round(u^gamma * n) / n

(equations 3 to 5; gamma is 1 for activations). Rounding passes its gradient on; through u it
reaches x, center, d, and gamma where `0 < u < 1`. The paper gives values in [-1, 1] and leaves
their scale to batch normalization. The factor t is ours, for the classifier, which has none behind
it; no gradient goes through it. So are the offset -3/8 after h-swish, and that unsigned activations
stand for |x|.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from profit_jax.quant import calibration
from profit_jax.quant.base import OFFSET, Kind, Quantizer, Scalars, register
from profit_jax.quant.pact import round_through
from profit_jax.quant.quantized import Quantized


@register
class QIL(Quantizer):
  """Quantization interval learning.

  Attributes:
    per_channel: as `Quantizer`'s.
  """

  method: ClassVar[str] = "qil"
  kernel_scalars: ClassVar[tuple[str, ...]] = ("quant_center", "quant_width", "quant_gamma")
  act_scalars: ClassVar[tuple[str, ...]] = ("quant_center", "quant_width")
  unscaled: ClassVar[tuple[str, ...]] = ("quant_gamma",)

  def quantize_kernel(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> Quantized:
    """See `Quantizer`."""
    gamma = jax.nn.softplus(scalars["quant_gamma"])
    return Quantized(_codes(kernel, scalars, qmax, gamma, signed=True), _scale(scalars, qmax))

  def quantize_act(self, x: jax.Array, scalars: Scalars, qmax: jax.Array, kind: Kind) -> Quantized:
    """See `Quantizer`."""
    shifted = x.astype(scalars["quant_center"].dtype) - OFFSET[kind]
    codes = _codes(shifted, scalars, qmax, None, signed=kind == "symmetric")
    return Quantized(codes.astype(x.dtype), _scale(scalars, qmax), OFFSET[kind])

  def kernel_codes(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> jax.Array:
    """See `Quantizer`."""
    return self.quantize_kernel(kernel, scalars, qmax).codes

  def kernel_clipped(self, kernel: jax.Array, scalars: Scalars) -> jax.Array:
    """Whether each element lies above the interval; what lies below is pruned, not clipped."""
    return self.act_clipped(kernel, scalars, "symmetric")

  def act_clipped(self, x: jax.Array, scalars: Scalars, kind: Kind) -> jax.Array:
    """As `kernel_clipped`."""
    shifted = x.astype(scalars["quant_center"].dtype) - OFFSET[kind]
    magnitude = jnp.abs(shifted) if kind == "symmetric" else shifted
    return magnitude > _largest(scalars)

  def act_line(
    self, scalars: Scalars, qmax: jax.Array, kind: Kind
  ) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """See `Quantizer`; signed values near 0 have the code 0, whatever the step."""
    if kind == "symmetric":
      return None
    center, width = (jax.nn.softplus(scalars[name]) for name in self.act_scalars)
    return OFFSET[kind] + center - width, 2.0 * width, _scale(scalars, qmax)

  def first_kernel(self, kernel: jax.Array, qmax: jax.Array) -> dict[str, jax.Array]:
    """From 0 to DuQ's first interval: nothing is pruned at first."""
    del qmax
    halves = _halves(calibration.weight_interval(kernel))
    return {**halves, "quant_gamma": jnp.ones((), kernel.dtype)}

  def first_act(
    self, x: jax.Array, qmax: jax.Array, kind: Kind, largest: float | None
  ) -> dict[str, jax.Array]:
    """As `first_kernel`."""
    del qmax
    return _halves(calibration.act_interval(x, kind, largest))


def _halves(interval):
  return {"quant_center": interval / 2.0, "quant_width": interval / 2.0}


def _largest(scalars):
  return jax.nn.softplus(scalars["quant_center"]) + jax.nn.softplus(scalars["quant_width"])


def _scale(scalars, qmax):
  largest = _largest(scalars)
  return jax.lax.stop_gradient(largest) / qmax.astype(largest.dtype)


def _codes(x, scalars, qmax, gamma, *, signed):
  center, width = jax.nn.softplus(scalars["quant_center"]), jax.nn.softplus(scalars["quant_width"])
  u = ((jnp.abs(x) if signed else x) - center + width) / (2.0 * width)
  inside = (u > 0.0) & (u < 1.0)
  if gamma is not None:
    # Where it is not used, a base whose logarithm is finite.
    u = jnp.where(inside, jnp.where(inside, u, 0.5) ** gamma, u)
  # Not jnp.clip, which passes half of the gradient at its ends.
  u = jnp.where(inside, u, jax.lax.stop_gradient(jnp.clip(u, 0.0, 1.0)))
  codes = round_through(u * qmax.astype(u.dtype))
  return jnp.sign(x) * codes if signed else codes
