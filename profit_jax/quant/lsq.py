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

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from profit_jax.quant import duq
from profit_jax.quant.quantized import Quantized

Params = Mapping[str, jax.Array]

LEAVES = ("quant_a",)


def quantize(x: jax.Array, params: Params, steps: jax.Array, kind: duq.Kind) -> Quantized:
  """Fake-quantized activations `[N, ...]`; arguments as `duq.quantize`'s."""
  return interval(params, steps, max(1, x.size // len(x))).quantized(x, steps, kind)


def quantize_kernel(kernel: jax.Array, params: Params, steps: jax.Array) -> Quantized:
  """A fake-quantized kernel."""
  return interval(params, steps, kernel.size).quantized(kernel, steps, "symmetric")


def interval(params: Params, steps: jax.Array, count: int) -> duq.Interval:
  """The quantizer of a kernel of `count` weights, or of activations with `count` features."""
  raw_a = params["quant_a"]
  n = steps.astype(raw_a.dtype)
  a = _with_gradient_scaled(jax.nn.softplus(raw_a), 1.0 / jnp.sqrt(count * n))
  return duq.Interval(a, jax.lax.stop_gradient(a) / n, "step")


def first_interval(x: jax.Array, steps: jax.Array, kind: duq.Kind) -> jax.Array:
  """`n * 2 * mean|x - offset| / sqrt(n)`, the first a (scalar); 1e-3 where all are 0."""
  a = 2.0 * jnp.mean(jnp.abs(x - duq.OFFSET[kind])) * jnp.sqrt(steps.astype(x.dtype))
  return jnp.maximum(a, 1e-3).astype(x.dtype)


def _with_gradient_scaled(x, factor):
  return jax.lax.stop_gradient(x - x * factor) + x * jax.lax.stop_gradient(factor)
