"""Batch normalization, non-linearity and activation quantizer as one operation with one gradient.

Taken one by one, each keeps its input for the backward pass and each passes over it again. Together
they keep the convolution's output alone; the backward pass computes the rest again, twice: once for
the sums, once for the gradient.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from profit_jax.lowering import channel_sums, own_kernel
from profit_jax.quant import duq

Activation = Literal["relu", "relu6", "hard_swish"]


class Normalized(NamedTuple):
  """A batch normalization in training, and the non-linearity after it, which are not computed yet.

  Attributes:
    x: input of the normalization, `[..., C]`.
    mean: of the batch, `[C]`.
    var: of the batch, biased, `[C]`.
    scale: `[C]`, learned.
    bias: `[C]`, learned.
    epsilon: added to the variance.
    activation: the non-linearity after it, or None.
  """

  x: jax.Array
  mean: jax.Array
  var: jax.Array
  scale: jax.Array
  bias: jax.Array
  epsilon: float
  activation: Activation | None

  def value(self) -> jax.Array:
    """`activation((x - mean) / sqrt(var + epsilon) * scale + bias)`, in x's dtype."""
    return _fused(*self[:5], None, None, None, self.epsilon, self.activation, None)

  def quantized(
    self, raw_a: jax.Array, raw_c: jax.Array, steps: jax.Array, kind: duq.Kind
  ) -> jax.Array:
    """`duq.quantize` of `value()`, in x's dtype; arguments as there."""
    return _fused(*self[:5], raw_a, raw_c, steps, self.epsilon, self.activation, kind)


def activate(x: jax.Array, activation: Activation | None) -> jax.Array:
  """The non-linearity; h-swish is `x * relu6(x + 3) / 6`."""
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
  """Per-channel mean and biased variance of `[..., C]`."""
  axes = tuple(range(x.ndim - 1))
  mean = jnp.mean(x, axis=axes)
  return mean, jnp.mean(jnp.square(x - mean), axis=axes)


# The statistics are arguments, so that the layer can keep them; as functions of x they have their
# part in x's gradient, and none of their own.
@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10))
def _fused(  # noqa: PLR0913  a custom_vjp takes one argument per operand
  x, mean, var, scale, bias, raw_a, raw_c, steps, epsilon, activation, kind
):
  def compute(x, mean, var, scale, bias, raw_a, raw_c, steps):
    # Subtracting first keeps a channel exact whose mean is far above its deviation.
    z = (x.astype(scale.dtype) - mean) * (scale * lax.rsqrt(var + epsilon)) + bias
    y = activate(z, activation)
    return (y if kind is None else duq.quantize(y, raw_a, raw_c, steps, kind)).astype(x.dtype)

  return own_kernel(compute, scale, x, mean, var, scale, bias, raw_a, raw_c, steps)


def _forward(  # noqa: PLR0913  the same arguments as `_fused`
  x, mean, var, scale, bias, raw_a, raw_c, steps, epsilon, activation, kind
):
  residuals = x, mean, var, scale, bias, raw_a, raw_c, steps
  return _fused(*residuals, epsilon, activation, kind), residuals


def _backward(epsilon, activation, kind, residuals, upstream):
  x, mean, var, scale, bias, raw_a, raw_c, steps = residuals
  channels, inverse = x.shape[-1], lax.rsqrt(var + epsilon)
  ratio = 1.0 if kind is None else jax.nn.softplus(raw_c) / jax.nn.softplus(raw_a)

  def rows(x, upstream):
    """The normalized input and what comes back to it, `[N*H*W, C]`; the quantizer's factor c/a is
    left to the end.
    """
    upstream = upstream.reshape(-1, channels).astype(scale.dtype)
    centred = x.reshape(-1, channels).astype(scale.dtype) - mean
    z = centred * (scale * inverse) + bias
    if kind is None:
      return centred, activate_backward(z, upstream, activation), []
    # The quantizer's own gradient, see duq.py.
    q, v = duq.grid(activate(z, activation), raw_a, steps, kind)
    through = jnp.where(duq.inside(v, kind), upstream, 0.0)
    return centred, activate_backward(z, through, activation), [upstream * q, through * v]

  centred, dz, quantizer = rows(x, upstream)
  # Without a corner beyond the interval's own, dz is all that passes and v = z/a: their product is
  # summed already.
  derived = activation in (None, "relu") and kind is not None and not duq.OFFSET[kind]
  d_bias, product, *sums = channel_sums(
    [dz, dz * centred, *(quantizer[:1] if derived else quantizer)]
  )
  d_raw_a = d_raw_c = None
  if kind is not None:
    if derived:
      sums.append((scale * inverse * product + bias * d_bias) / jax.nn.softplus(raw_a))
    d_raw_c = jax.nn.sigmoid(raw_c) * jnp.sum(sums[0])
    d_raw_a = -ratio * jax.nn.sigmoid(raw_a) * jnp.sum(sums[1])
  d_bias, d_scale = ratio * d_bias, ratio * inverse * product

  def input_gradient(x, upstream):
    (centred, dz, _), count = rows(x, upstream), x.size // channels
    dx = (scale * inverse) * (ratio * dz - d_bias / count - centred * (inverse * d_scale / count))
    return dx.reshape(x.shape).astype(x.dtype)

  dx = own_kernel(input_gradient, scale, x, upstream)
  return dx, None, None, d_scale, d_bias, d_raw_a, d_raw_c, None


_fused.defvjp(_forward, _backward)
