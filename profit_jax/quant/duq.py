"""DuQ, the differentiable and unified quantizer (paper section 3.2), with straight-through
gradients.

Two positive scalars per tensor, the interval `a` and the output scale `c`; both are learned, and
stored raw: the value is `softplus(raw)`.

| kind      | value, n being qmax                              | n at b bits   |
|-----------|--------------------------------------------------|---------------|
| symmetric | `c * round(clip(x/a, -1, 1) * n) / n`            | `2^(b-1) - 1` |
| unsigned  | `c * round(clip(x/a, 0, 1) * n) / n`             | `2^b - 1`     |
| hswish    | `c * round(clip((x+3/8)/a, 0, 1) * n) / n - 3/8` | `2^b - 1`     |

Symmetric is used on kernels and signed activations, unsigned after ReLU / ReLU6, hswish after
h-swish (minimum -3/8).

Rounding is half to even, and its derivative is taken as 1.
"""

import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from profit_jax.kernels.lowering import computed_again, total_sums
from profit_jax.quant import calibration
from profit_jax.quant.base import LOWER, OFFSET, Kind, Quantizer, Scalars, Slope, register
from profit_jax.quant.quantized import Quantized


def inverse_softplus(value: jax.Array) -> jax.Array:
  """The raw parameter of a positive value: `log(exp(v) - 1)`, in the form that does not overflow
  for large v.
  """
  return value + jnp.log(-jnp.expm1(-value))


class Interval(NamedTuple):
  """A uniform quantizer, whose codes are those of `to_codes`.

  Attributes:
    a: scalar, positive.
    scale: of the codes, scalar.
    slope: as `to_codes`'s.
  """

  a: jax.Array
  scale: jax.Array
  slope: Slope = "interval"

  def quantized(self, x: jax.Array, qmax: jax.Array, kind: Kind) -> Quantized:
    """A tensor with these codes; arguments as `quantize`'s."""
    return Quantized(to_codes(x, self.a, qmax, kind, self.slope), self.scale, OFFSET[kind])


def interval(raw_a: jax.Array, raw_c: jax.Array, qmax: jax.Array) -> Interval:
  """DuQ's; arguments as `quantize`'s."""
  return Interval(jax.nn.softplus(raw_a), jax.nn.softplus(raw_c) / qmax.astype(raw_c.dtype))


def quantize(
  x: jax.Array, raw_a: jax.Array, raw_c: jax.Array, qmax: jax.Array, kind: Kind
) -> jax.Array:
  """Fake-quantizes a tensor: the values of its codes.

  Args:
    x: any shape, floating point.
    raw_a: scalar, inverse softplus of the interval.
    raw_c: scalar, inverse softplus of the output scale.
    qmax: scalar, n of the table above; carries no gradient.
    kind: which row of the table.

  Returns:
    A tensor of x's shape and dtype. The arithmetic is done in the dtype of `raw_a`.
  """
  return interval(raw_a, raw_c, qmax).quantized(x, qmax, kind).value()


def to_codes(
  x: jax.Array, a: jax.Array, qmax: jax.Array, kind: Kind, slope: Slope = "interval"
) -> jax.Array:
  """The codes of a tensor, `round(clip((x - offset)/a) * n)`, in x's dtype; straight-through.

  The gradient of x is `n/a` inside the interval and 0 outside. That of a is, with
  `v = (x - offset)/a` and k the code:

  | slope    | inside          | outside | what else a decides                               |
  |----------|-----------------|---------|---------------------------------------------------|
  | interval | `-v * n/a`      | 0       | nothing, or the scale's gradient adds its part    |
  | step     | `(k - v * n)/a` | `k/a`   | the scale `a/n`, whose gradient this includes     |
  | clip     | 0               | `k/a`   | likewise, where inside both parts are to cancel   |

  Args:
    x: any shape.
    a: scalar, positive, the interval.
    qmax: scalar, n; carries no gradient.
    kind: which row of the table above.
    slope: which row of this table.
  """
  return _to_codes(x, a, qmax, kind, slope)


def moved_by_interval(v: jax.Array, n: jax.Array, kind: Kind, slope: Slope) -> jax.Array:
  """The gradient of a, times a, element by element: a row of `to_codes`'s table."""
  within = inside(v, kind)
  if slope == "interval":
    return jnp.where(within, -v * n, 0.0)
  k = nearest(v, n, kind)
  return jnp.where(within, k - v * n if slope == "step" else 0.0, k)


def codes(x: jax.Array, raw_a: jax.Array, qmax: jax.Array, kind: Kind) -> jax.Array:
  """The integer codes of a tensor, `round(clip((x - offset)/a) * n)`, as int32 of x's shape."""
  a = jax.nn.softplus(raw_a)
  ratio = jnp.clip((x.astype(a.dtype) - OFFSET[kind]) / a, LOWER[kind], 1.0)
  return jnp.round(ratio * qmax.astype(a.dtype)).astype(jnp.int32)


def clipped(x: jax.Array, raw_a: jax.Array, kind: Kind) -> jax.Array:
  """Whether each element lies beyond the interval, where it is clipped: bool, of x's shape.

  An element exactly at 0 of an unsigned or h-swish quantizer is represented exactly and does not
  count.
  """
  ratio = (x.astype(raw_a.dtype) - OFFSET[kind]) / jax.nn.softplus(raw_a)
  return (ratio > 1.0) | (ratio < LOWER[kind])


def ratio(x: jax.Array, a: jax.Array, kind: Kind) -> jax.Array:
  """`v = (x - offset) / a`, in the dtype of a."""
  return (x.astype(a.dtype) - OFFSET[kind]) / a


def inside(v: jax.Array, kind: Kind) -> jax.Array:
  """Where the gradient passes to the input: within the interval. The ends pass nothing; jnp.clip
  would pass half there.
  """
  return (v > LOWER[kind]) & (v < 1.0)


def nearest(v: jax.Array, n: jax.Array, kind: Kind) -> jax.Array:
  """The code of `v` on a grid of n steps."""
  return jnp.round(jnp.clip(v, LOWER[kind], 1.0) * n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _to_codes(x, a, qmax, kind, slope):
  return nearest(ratio(x, a, kind), qmax.astype(a.dtype), kind).astype(x.dtype)


def _forward(x, a, qmax, kind, slope):
  return _to_codes(x, a, qmax, kind, slope), (x, a, qmax)


def _backward(kind, slope, residuals, upstream):
  # Only the input is kept from the forward pass; the rest is cheaper to compute again than to
  # store.
  x, a, qmax = residuals
  x = computed_again(x)
  v, n, upstream = ratio(x, a, kind), qmax.astype(a.dtype), upstream.astype(a.dtype)
  (moved,) = total_sums([upstream * moved_by_interval(v, n, kind, slope)])
  dx = jnp.where(inside(v, kind), upstream * (n / a), 0.0)
  return dx.astype(x.dtype), moved / a, None


_to_codes.defvjp(_forward, _backward)


@register
class DuQ(Quantizer):
  """The paper's quantizer: an interval a and an output scale c for each tensor, both learned.

  Attributes:
    per_channel: as `Quantizer`'s.
  """

  method: ClassVar[str] = "duq"
  kernel_scalars: ClassVar[tuple[str, ...]] = ("quant_a", "quant_c")
  act_scalars: ClassVar[tuple[str, ...]] = ("quant_a", "quant_c")
  one_interval: ClassVar[bool] = True

  def quantize_kernel(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> Quantized:
    """See `Quantizer`."""
    return self.act_interval(scalars, qmax, 0).quantized(kernel, qmax, "symmetric")

  def quantize_act(self, x: jax.Array, scalars: Scalars, qmax: jax.Array, kind: Kind) -> Quantized:
    """See `Quantizer`."""
    return self.act_interval(scalars, qmax, 0).quantized(x, qmax, kind)

  def act_interval(self, scalars: Scalars, qmax: jax.Array, features: int) -> Interval:
    """See `Quantizer`."""
    del features
    return interval(scalars["quant_a"], scalars["quant_c"], qmax)

  def kernel_codes(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> jax.Array:
    """See `Quantizer`."""
    return codes(kernel, scalars["quant_a"], qmax, "symmetric")

  def kernel_clipped(self, kernel: jax.Array, scalars: Scalars) -> jax.Array:
    """See `Quantizer`."""
    return clipped(kernel, scalars["quant_a"], "symmetric")

  def act_clipped(self, x: jax.Array, scalars: Scalars, kind: Kind) -> jax.Array:
    """See `Quantizer`."""
    return clipped(x, scalars["quant_a"], kind)

  def first_kernel(self, kernel: jax.Array, qmax: jax.Array) -> dict[str, jax.Array]:
    """`0.9 * max|w|` for both; see `calibration.weight_interval`."""
    del qmax
    first = calibration.weight_interval(kernel)
    return {"quant_a": first, "quant_c": first}

  def first_act(
    self, x: jax.Array, qmax: jax.Array, kind: Kind, largest: float | None
  ) -> dict[str, jax.Array]:
    """The 95th percentile for both; see `calibration.act_interval`."""
    del qmax
    first = calibration.act_interval(x, kind, largest)
    return {"quant_a": first, "quant_c": first}

  def fit_kernel(self, kernel: jax.Array, qmax: jax.Array) -> dict[str, jax.Array]:
    """Least squares; see `calibration.fitted_interval`."""
    a, c = calibration.fitted_interval(kernel, qmax)
    return {"quant_a": a, "quant_c": c}
