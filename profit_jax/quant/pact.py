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

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from profit_jax.quant import duq
from profit_jax.quant.quantized import Quantized

Params = Mapping[str, jax.Array]

LEAVES = ("quant_a",)


def quantize(x: jax.Array, params: Params, steps: jax.Array, kind: duq.Kind) -> Quantized:
  """Fake-quantized activations; arguments as `duq.quantize`'s."""
  return interval(params, steps).quantized(x, steps, kind)


def interval(params: Params, steps: jax.Array) -> duq.Interval:
  """The quantizer of activations."""
  a = jax.nn.softplus(params["quant_a"])
  return duq.Interval(a, jax.lax.stop_gradient(a) / steps.astype(a.dtype), "clip")


def quantize_kernel(kernel: jax.Array, params: Params, steps: jax.Array) -> Quantized:
  """A fake-quantized kernel, whose codes are the odd numbers from -m to m; `params` is empty."""
  del params
  t, most = jnp.tanh(kernel), 2.0 * steps.astype(kernel.dtype) + 1.0
  t = t / jnp.maximum(jnp.max(jnp.abs(t)), jnp.finfo(t.dtype).tiny)
  return Quantized(2.0 * round_through((t / 2.0 + 0.5) * most) - most, 1.0 / most)


def kernel_codes(kernel: jax.Array, params: Params, steps: jax.Array) -> jax.Array:
  """Which of the 2^b values each element has, from the lowest, `-(n + 1)`, to `n`."""
  # An odd number 2i - m for the i-th value; m is 2n + 1.
  return (quantize_kernel(kernel, params, steps).codes - 1.0) / 2.0


@jax.custom_vjp
def round_through(x: jax.Array) -> jax.Array:
  """Rounds half to even; the gradient passes as it is."""
  return jnp.round(x)


round_through.defvjp(lambda x: (jnp.round(x), None), lambda _, upstream: (upstream,))
