"""DuQ, the differentiable and unified quantizer (paper section 3.2), with straight-through
gradients.

Two positive scalars per tensor, the interval `a` and the output scale `c`; both are learned, and
stored raw: the value is `softplus(raw)`.

| kind      | value at n steps                                 | n at b bits   |
|-----------|--------------------------------------------------|---------------|
| symmetric | `c * round(clip(x/a, -1, 1) * n) / n`            | `2^(b-1) - 1` |
| unsigned  | `c * round(clip(x/a, 0, 1) * n) / n`             | `2^b - 1`     |
| hswish    | `c * round(clip((x+3/8)/a, 0, 1) * n) / n - 3/8` | `2^b - 1`     |

Symmetric is used on kernels and signed activations, unsigned after ReLU / ReLU6, hswish after
h-swish (minimum -3/8).

Rounding is half to even, and its derivative is taken as 1.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from profit_jax.lowering import total_sums

Kind = Literal["symmetric", "unsigned", "hswish"]

# h-swish has its minimum, -3/8, at x = -3/2. A convolution whose input is quantized after h-swish
# pads with this value, which is code 0 of its quantizer ("negative padding", paper section 3.3).
HSWISH_MINIMUM = -3.0 / 8.0

# Per kind: the lower clip end in units of `a`, and the offset of the input.
LOWER = {"symmetric": -1.0, "unsigned": 0.0, "hswish": 0.0}
OFFSET = {"symmetric": 0.0, "unsigned": 0.0, "hswish": HSWISH_MINIMUM}


def inverse_softplus(value: jax.Array) -> jax.Array:
  """The raw parameter of a positive value: `log(exp(v) - 1)`, in the form that does not overflow
  for large v.
  """
  return value + jnp.log(-jnp.expm1(-value))


def quantize(
  x: jax.Array, raw_a: jax.Array, raw_c: jax.Array, steps: jax.Array, kind: Kind
) -> jax.Array:
  """Fake-quantizes a tensor: values on the grid that `kind` and `steps` define, in the tensor's own
  dtype.

  Args:
    x: any shape, floating point.
    raw_a: scalar, inverse softplus of the interval.
    raw_c: scalar, inverse softplus of the output scale.
    steps: scalar, the number of steps n of the table above; carries no gradient.
    kind: which row of the table.

  Returns:
    An array of x's shape and dtype. The arithmetic is done in the dtype of `raw_a`.
  """
  return _quantize(x, raw_a, raw_c, steps, kind)


def codes(x: jax.Array, raw_a: jax.Array, steps: jax.Array, kind: Kind) -> jax.Array:
  """The integer codes of a tensor, `round(clip((x - offset)/a) * n)`, as int32 of x's shape."""
  a = jax.nn.softplus(raw_a)
  ratio = jnp.clip((x.astype(a.dtype) - OFFSET[kind]) / a, LOWER[kind], 1.0)
  return jnp.round(ratio * steps.astype(a.dtype)).astype(jnp.int32)


def clipped(x: jax.Array, raw_a: jax.Array, kind: Kind) -> jax.Array:
  """Whether each element lies beyond the interval, where it is clipped: bool, of x's shape.

  An element exactly at 0 of an unsigned or h-swish quantizer is represented exactly and does not
  count.
  """
  ratio = (x.astype(raw_a.dtype) - OFFSET[kind]) / jax.nn.softplus(raw_a)
  return (ratio > 1.0) | (ratio < LOWER[kind])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _quantize(x, raw_a, raw_c, steps, kind):
  q, _ = grid(x, raw_a, steps, kind)
  return (jax.nn.softplus(raw_c) * q + OFFSET[kind]).astype(x.dtype)


def grid(
  x: jax.Array, raw_a: jax.Array, steps: jax.Array, kind: Kind
) -> tuple[jax.Array, jax.Array]:
  """The pair `q = round(clip(v) * n) / n` and `v = (x - offset) / a`, in the dtype of `raw_a`."""
  a, n = jax.nn.softplus(raw_a), steps.astype(raw_a.dtype)
  v = (x.astype(a.dtype) - OFFSET[kind]) / a
  return jnp.round(jnp.clip(v, LOWER[kind], 1.0) * n) / n, v


def inside(v: jax.Array, kind: Kind) -> jax.Array:
  """Where the gradient passes to the input: within the interval. The ends pass nothing; jnp.clip
  would pass half there.
  """
  return (v > LOWER[kind]) & (v < 1.0)


def _forward(x, raw_a, raw_c, steps, kind):
  return _quantize(x, raw_a, raw_c, steps, kind), (x, raw_a, raw_c, steps)


def _backward(kind, residuals, upstream):
  # dy/dx = c/a inside,  dy/da = -c*v/a inside,  dy/dc = q,  and d softplus(r)/dr = sigmoid(r).
  # Only the input is kept from the forward pass; the rest is cheaper to compute again than to
  # store.
  x, raw_a, raw_c, steps = residuals
  q, v = grid(x, raw_a, steps, kind)
  upstream = upstream.astype(q.dtype)
  ratio = jax.nn.softplus(raw_c) / jax.nn.softplus(raw_a)
  through = jnp.where(inside(v, kind), upstream, 0.0)
  moved, scaled = total_sums([through * v, upstream * q])
  d_raw_a, d_raw_c = -ratio * jax.nn.sigmoid(raw_a) * moved, jax.nn.sigmoid(raw_c) * scaled
  return (through * ratio).astype(x.dtype), d_raw_a, d_raw_c, None


_quantize.defvjp(_forward, _backward)
