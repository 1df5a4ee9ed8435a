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

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from profit_jax.quant import duq
from profit_jax.quant.pact import round_through

Params = Mapping[str, jax.Array]

LEAVES = ("quant_center", "quant_width")
KERNEL_LEAVES = (*LEAVES, "quant_gamma")


def quantize(x: jax.Array, params: Params, steps: jax.Array, kind: duq.Kind) -> jax.Array:
  """Fake-quantized activations; arguments as `duq.quantize`'s."""
  shifted = x.astype(params["quant_center"].dtype) - duq.OFFSET[kind]
  y = _transformed(shifted, params, steps, None, signed=kind == "symmetric")
  return (y + duq.OFFSET[kind]).astype(x.dtype)


def quantize_kernel(kernel: jax.Array, params: Params, steps: jax.Array) -> jax.Array:
  """A fake-quantized kernel."""
  return _transformed(kernel, params, steps, jax.nn.softplus(params["quant_gamma"]), signed=True)


def kernel_codes(kernel: jax.Array, params: Params, steps: jax.Array) -> jax.Array:
  """The codes of a kernel, -n to n."""
  largest = jax.nn.softplus(params["quant_center"]) + jax.nn.softplus(params["quant_width"])
  return jnp.round(quantize_kernel(kernel, params, steps) / largest * steps.astype(kernel.dtype))


def clipped(x: jax.Array, params: Params, kind: duq.Kind) -> jax.Array:
  """Whether each element lies above the interval (what lies below is pruned, not clipped): bool."""
  shifted = x.astype(params["quant_center"].dtype) - duq.OFFSET[kind]
  magnitude = jnp.abs(shifted) if kind == "symmetric" else shifted
  return magnitude > jax.nn.softplus(params["quant_center"]) + jax.nn.softplus(
    params["quant_width"]
  )


def _transformed(x, params, steps, gamma, *, signed):
  center, width = jax.nn.softplus(params["quant_center"]), jax.nn.softplus(params["quant_width"])
  u = ((jnp.abs(x) if signed else x) - center + width) / (2.0 * width)
  inside = (u > 0.0) & (u < 1.0)
  if gamma is not None:
    # Where it is not used, a base whose logarithm is finite.
    u = jnp.where(inside, jnp.where(inside, u, 0.5) ** gamma, u)
  # Not jnp.clip, which passes half of the gradient at its ends.
  u = jnp.where(inside, u, jax.lax.stop_gradient(jnp.clip(u, 0.0, 1.0)))
  n = steps.astype(u.dtype)
  y = jax.lax.stop_gradient(center + width) * round_through(u * n) / n
  return jnp.sign(x) * y if signed else y
