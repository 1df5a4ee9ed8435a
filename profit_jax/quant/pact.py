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

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from profit_jax.lowering import total_sums
from profit_jax.quant import duq

Params = Mapping[str, jax.Array]

LEAVES = ("quant_a",)


def quantize(x: jax.Array, params: Params, steps: jax.Array, kind: duq.Kind) -> jax.Array:
  """Fake-quantized activations; arguments as `duq.quantize`'s."""
  return _quantize(x, params["quant_a"], steps, kind)


def quantize_kernel(kernel: jax.Array, params: Params, steps: jax.Array) -> jax.Array:
  """A fake-quantized kernel; `params` is empty."""
  del params
  t, most = jnp.tanh(kernel), 2.0 * steps.astype(kernel.dtype) + 1.0
  t = t / jnp.maximum(jnp.max(jnp.abs(t)), jnp.finfo(t.dtype).tiny)
  return 2.0 * round_through((t / 2.0 + 0.5) * most) / most - 1.0


def kernel_codes(kernel: jax.Array, params: Params, steps: jax.Array) -> jax.Array:
  """Which of the 2^b values each element has, from the lowest, `-(n + 1)`, to `n`."""
  values = quantize_kernel(kernel, params, steps)
  n = steps.astype(values.dtype)
  return jnp.round((values + 1.0) / 2.0 * (2.0 * n + 1.0)) - (n + 1.0)


@jax.custom_vjp
def round_through(x: jax.Array) -> jax.Array:
  """Rounds half to even; the gradient passes as it is."""
  return jnp.round(x)


round_through.defvjp(lambda x: (jnp.round(x), None), lambda _, upstream: (upstream,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _quantize(x, raw_a, steps, kind):
  q, _ = duq.grid(x, raw_a, steps, kind)
  return (jax.nn.softplus(raw_a) * q + duq.OFFSET[kind]).astype(x.dtype)


def _forward(x, raw_a, steps, kind):
  return _quantize(x, raw_a, steps, kind), (x, raw_a, steps)


def _backward(kind, residuals, upstream):
  x, raw_a, steps = residuals
  _, v = duq.grid(x, raw_a, steps, kind)
  upstream = upstream.astype(v.dtype)
  beyond = jnp.where(v >= 1.0, 1.0, 0.0) - (
    jnp.where(v <= -1.0, 1.0, 0.0) if kind == "symmetric" else 0.0
  )
  (moved,) = total_sums([upstream * beyond])
  d_raw_a = moved * jax.nn.sigmoid(raw_a)
  return jnp.where(duq.inside(v, kind), upstream, 0.0).astype(x.dtype), d_raw_a, None


_quantize.defvjp(_forward, _backward)
