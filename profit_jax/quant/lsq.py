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

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from profit_jax.lowering import total_sums
from profit_jax.quant import duq

Params = Mapping[str, jax.Array]

LEAVES = ("quant_a",)


def quantize(x: jax.Array, params: Params, steps: jax.Array, kind: duq.Kind) -> jax.Array:
  """Fake-quantized activations `[N, ...]`; arguments as `duq.quantize`'s."""
  return _quantize(x, params["quant_a"], steps, kind, max(1, x.size // len(x)))


def quantize_kernel(kernel: jax.Array, params: Params, steps: jax.Array) -> jax.Array:
  """A fake-quantized kernel."""
  return _quantize(kernel, params["quant_a"], steps, "symmetric", kernel.size)


def first_interval(x: jax.Array, steps: jax.Array, kind: duq.Kind) -> jax.Array:
  """`n * 2 * mean|x - offset| / sqrt(n)`, the first a (scalar); 1e-3 where all are 0."""
  a = 2.0 * jnp.mean(jnp.abs(x - duq.OFFSET[kind])) * jnp.sqrt(steps.astype(x.dtype))
  return jnp.maximum(a, 1e-3).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _quantize(x, raw_a, steps, kind, count):
  q, _ = duq.grid(x, raw_a, steps, kind)
  return (jax.nn.softplus(raw_a) * q + duq.OFFSET[kind]).astype(x.dtype)


def _forward(x, raw_a, steps, kind, count):
  return _quantize(x, raw_a, steps, kind, count), (x, raw_a, steps)


def _backward(kind, count, residuals, upstream):
  x, raw_a, steps = residuals
  q, v = duq.grid(x, raw_a, steps, kind)  # both in units of n
  upstream, inside = upstream.astype(q.dtype), duq.inside(v, kind)
  # dy/da = (dy/ds) / n, and q and v are codes over n already.
  (moved,) = total_sums([upstream * jnp.where(inside, q - v, q)])
  scale = 1.0 / (math.sqrt(count) * jnp.sqrt(steps.astype(q.dtype)))
  d_raw_a = scale * moved * jax.nn.sigmoid(raw_a)
  return jnp.where(inside, upstream, 0.0).astype(x.dtype), d_raw_a, None


_quantize.defvjp(_forward, _backward)
