"""Batch normalization, non-linearity and activation quantizer as one operation with one gradient.

Taken one by one, each keeps its input for the backward pass and each passes over it again. Together
they keep the convolution's output alone; the backward pass computes the rest again, twice: once for
the sums, once for the gradient.

The convolution's output is `sums * s + shift`, with a scale s (see `quant/quantized.py`). Neither
changes the normalized value but for epsilon, so that the gradient of s needs no sum over the
output: `dL/ds = gamma * dL/dgamma * epsilon / (s^2 var + epsilon) / s` for each channel, var being
that of the sums. In float32 a sum of `dL/doutput * sums` would be mostly rounding errors: its terms
cancel.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from profit_jax.kernels import target
from profit_jax.kernels.affine import Affine
from profit_jax.kernels.lowering import as_rows, channel_sums, computed_again, own_kernel
from profit_jax.nn import tracing
from profit_jax.quant import duq
from profit_jax.quant.quantized import Quantized

Activation = Literal["relu", "relu6", "hard_swish"]


class Normalized(NamedTuple):
  """A batch normalization in training, and the non-linearity after it, which are not computed yet.

  Attributes:
    x: input of the normalization, `[..., C]`, without its scale.
    s: its scale, a positive scalar or `[C]`.
    mean: of x over the batch, `[C]`.
    var: of x over the batch, biased, `[C]`.
    scale: `[C]`, learned.
    bias: `[C]`, learned.
    epsilon: added to the variance of `x * s`.
    activation: the non-linearity after it, or None.
  """

  x: jax.Array
  s: jax.Array
  mean: jax.Array
  var: jax.Array
  scale: jax.Array
  bias: jax.Array
  epsilon: float
  activation: Activation | None

  def value(self) -> jax.Array:
    """`activation((x - mean) * s / sqrt(s^2 * var + epsilon) * scale + bias)`, in x's dtype."""
    return _fused(*self[:6], None, None, _Rule(self.epsilon, self.activation))

  def quantized(self, by: duq.Interval, qmax: jax.Array, kind: duq.Kind) -> Quantized:
    """`by.quantized` of `value()`, in x's dtype; arguments as there."""
    rule = _Rule(self.epsilon, self.activation, kind, by.slope)
    codes = _fused(*self[:6], by.a, qmax, rule)
    source = None
    if _clips_only(rule) and target.current().is_tuned_for("gpu"):
      factor, bias, ends = _in_units(self.s, self.var, self.scale, self.bias, by.a, qmax, rule)
      source = lax.stop_gradient(Affine(self.x, self.mean, factor, bias, *ends))
    return Quantized(codes, by.scale, duq.OFFSET[kind], source)


class _Rule(NamedTuple):
  """What is static. Attributes: as `Normalized`'s and `duq.to_codes`'s; kind: None gives values."""

  epsilon: float
  activation: Activation | None
  kind: duq.Kind | None = None
  slope: duq.Slope = "interval"


def activate(x: jax.Array, activation: Activation | None) -> jax.Array:
  """The non-linearity; h-swish is `x * relu6(x + 3) / 6`."""
  if tracing.active():
    return tracing.activation(x, activation)
  if activation is None:
    return x
  if activation == "hard_swish":
    return x * jnp.clip(x + 3.0, 0.0, 6.0) / 6.0
  return jnp.clip(x, 0.0, 6.0) if activation == "relu6" else jnp.maximum(x, 0.0)


def activate_backward(
  z: jax.Array, upstream: jax.Array, activation: Activation | None
) -> jax.Array:
  """The gradient of `activate` at z, times `upstream`; 0 at the corners, as in the authors'
  PyTorch.
  """
  if activation is None:
    return upstream
  if activation == "hard_swish":
    return upstream * jnp.where(z >= 3.0, 1.0, jnp.where(z > -3.0, (2.0 * z + 3.0) / 6.0, 0.0))
  passes = z > 0.0
  return jnp.where(passes & (z < 6.0) if activation == "relu6" else passes, upstream, 0.0)


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Per-channel mean and biased variance of `[..., C]`, in two passes."""
  axes = tuple(range(x.ndim - 1))
  mean = jnp.mean(x, axis=axes)
  return mean, jnp.mean(jnp.square(x - mean), axis=axes)


def moments_near(x: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance of `[..., C]` in one pass, in the dtype of `near`.

  Args:
    x: any floating dtype.
    near: `[C]`. The error of the variance is rounding times `(mean - near)^2`, so that a running
      mean keeps it small.
  """
  count = x.size // x.shape[-1]
  away = as_rows(x).astype(near.dtype) - near
  first, second = (total / count for total in channel_sums([away, jnp.square(away)]))
  return near + first, jnp.maximum(second - jnp.square(first), 0.0)


# The statistics are arguments, so that the layer can keep them; as functions of x they have their
# part in x's gradient, and none of their own.
@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _fused(x, s, mean, var, scale, bias, a, qmax, rule):  # noqa: PLR0913  one for each operand
  def compute(x, s, mean, var, scale, bias, a, qmax):
    factor, bias, top = _in_units(s, var, scale, bias, a, qmax, rule)
    x_from, away = _from_origin(x, mean)
    z = x_from * factor + (bias - away * factor)
    if top is not None:
      return jnp.round(jnp.clip(z, *top)).astype(x.dtype)
    y = activate(z, rule.activation)
    if rule.kind is not None:
      y = duq.nearest(duq.ratio(y, a, rule.kind), qmax.astype(a.dtype), rule.kind)
    return y.astype(x.dtype)

  return own_kernel(compute, scale, x, s, mean, var, scale, bias, a, qmax)


def _from_origin(x, mean):
  """The input from some origin, in the dtype of the mean; and the mean from there.

  Subtracting the mean first keeps a channel exact whose mean is far above its deviation. What is
  stored in bfloat16 is not that exact, and an operation an element less lets XLA on TPUs compute
  gradients again where they are used.
  """
  x_wide = x.astype(mean.dtype)
  if x.dtype == jnp.bfloat16:
    return x_wide, mean
  return x_wide - mean, jnp.zeros_like(mean)


def _in_units(s, var, scale, bias, a, qmax, rule):
  """Factor and bias `[C]` of the centred x, and the two ends of the codes.

  Codes of a quantizer without offset, behind no non-linearity or one that only clips, are
  `round(clip(z, *ends))` of a z in units of codes. For others the ends are None, and z is the
  normalized value.
  """
  factor = scale * s * lax.rsqrt(jnp.square(s) * var + rule.epsilon)
  if not _clips_only(rule):
    return factor, bias, None
  n = qmax.astype(a.dtype)
  low = duq.LOWER[rule.kind] * n if rule.activation is None else jnp.zeros_like(n)
  high = jnp.minimum(n, 6.0 * n / a) if rule.activation == "relu6" else n
  return factor * (n / a), bias * (n / a), (low, high)


def _clips_only(rule):
  return rule.kind is not None and not duq.OFFSET[rule.kind] and rule.activation != "hard_swish"


def _forward(x, s, mean, var, scale, bias, a, qmax, rule):  # noqa: PLR0913  as `_fused`
  residuals = x, s, mean, var, scale, bias, a, qmax
  return _fused(*residuals, rule), residuals


def _backward(rule, residuals, upstream):
  x, s, mean, var, scale, bias, a, qmax = residuals
  count, epsilon = x.size // x.shape[-1], rule.epsilon
  spread = jnp.square(s) * var + epsilon
  inverse = lax.rsqrt(spread)
  # Codes in a normalized value's unit: what comes back to z wants this factor.
  unit = 1.0 if rule.kind is None else qmax.astype(a.dtype) / a

  def rows(x, upstream):
    """The input from its origin; what comes back to z but for `unit`; what moves a."""
    upstream = as_rows(upstream).astype(scale.dtype)
    x_from, _ = _from_origin(as_rows(x), mean)
    return x_from, *_into_normalized(x_from, away, upstream, residuals[1:], rule)

  x, away = computed_again(x), _from_origin(x, mean)[1]
  x_from, dz, moved = rows(x, upstream)
  # Where the interval alone clips, dz is all that passes and v = z/a: their product is summed
  # already.
  derived = _clips_only(rule) and rule.slope == "interval" and rule.activation != "relu6"
  d_bias, product, *sums = channel_sums(
    [dz, dz * x_from] + ([] if derived or rule.kind is None else [moved])
  )
  product = product - away * d_bias
  if derived:
    sums = [-unit * (scale * s * inverse * product + bias * d_bias)]
  # Sums by channel first, as the others', whose pass over memory they share.
  d_a = None if rule.kind is None else jnp.sum(lax.optimization_barrier(sums[0])) / a
  d_bias, d_scale = unit * d_bias, unit * s * inverse * product
  d_s = scale * d_scale * epsilon / spread / s
  d_s = d_s if jnp.ndim(s) else jnp.sum(d_s)

  slope = scale * s * inverse
  through, along, common = (
    slope * unit,
    slope * s * inverse * d_scale / count,
    slope * d_bias / count,
  )
  common = common - away * along

  def input_gradient(x, upstream, through, along, common):
    x_from, dz, _ = rows(x, upstream)
    return (dz * through - x_from * along - common).reshape(x.shape).astype(x.dtype)

  dx = own_kernel(input_gradient, scale, computed_again(x), upstream, through, along, common)
  return dx, d_s, None, None, d_scale, d_bias, d_a, None


def _into_normalized(x_from, away, upstream, operands, rule):
  """What comes back through quantizer and non-linearity, and what moves a (None without a)."""
  s, _, var, scale, bias, a, qmax = operands
  factor, bias, ends = _in_units(s, var, scale, bias, a, qmax, rule)
  z = x_from * factor + (bias - away * factor)
  if rule.kind is None:
    return activate_backward(z, upstream, rule.activation), None
  n = qmax.astype(a.dtype)
  if ends is None:
    v = duq.ratio(activate(z, rule.activation), a, rule.kind)
    through = jnp.where(duq.inside(v, rule.kind), upstream, 0.0)
    through = activate_backward(z, through, rule.activation)
  else:
    through = jnp.where((z > ends[0]) & (z < ends[1]), upstream, 0.0)
    code = z if rule.activation is None else jnp.clip(z, *ends)  # before it is rounded
    if rule.slope == "interval":
      within = (code > duq.LOWER[rule.kind] * n) & (code < n)
      return through, upstream * jnp.where(within, -code, 0.0)
    v = code / n
  return through, upstream * duq.moved_by_interval(v, n, rule.kind, rule.slope)


_fused.defvjp(_forward, _backward)
