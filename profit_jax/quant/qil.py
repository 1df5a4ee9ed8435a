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
from profit_jax.quant.quantized import Quantized

Params = Mapping[str, jax.Array]

LEAVES = ("quant_center", "quant_width")
KERNEL_LEAVES = (*LEAVES, "quant_gamma")


def quantize(x: jax.Array, params: Params, steps: jax.Array, kind: duq.Kind) -> Quantized:
  """Fake-quantized activations; arguments as `duq.quantize`'s."""
  shifted = x.astype(params["quant_center"].dtype) - duq.OFFSET[kind]
  codes = _codes(shifted, params, steps, None, signed=kind == "symmetric")
  return Quantized(codes.astype(x.dtype), _scale(params, steps), duq.OFFSET[kind])


def quantize_kernel(kernel: jax.Array, params: Params, steps: jax.Array) -> Quantized:
  """A fake-quantized kernel."""
  gamma = jax.nn.softplus(params["quant_gamma"])
  return Quantized(_codes(kernel, params, steps, gamma, signed=True), _scale(params, steps))


def line(
  params: Params, steps: jax.Array, kind: duq.Kind
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Activations that are not negative as an affine map: where code 0 ends, the width of all codes,
  and their scale.

  `round(clip((x - begin) / width, 0, 1) * n)` are the codes of `quantize`.
  """
  center, width = jax.nn.softplus(params["quant_center"]), jax.nn.softplus(params["quant_width"])
  return duq.OFFSET[kind] + center - width, 2.0 * width, _scale(params, steps)


def kernel_codes(kernel: jax.Array, params: Params, steps: jax.Array) -> jax.Array:
  """The codes of a kernel, -n to n."""
  return quantize_kernel(kernel, params, steps).codes


def clipped(x: jax.Array, params: Params, kind: duq.Kind) -> jax.Array:
  """Whether each element lies above the interval (what lies below is pruned, not clipped): bool."""
  shifted = x.astype(params["quant_center"].dtype) - duq.OFFSET[kind]
  magnitude = jnp.abs(shifted) if kind == "symmetric" else shifted
  return magnitude > jax.nn.softplus(params["quant_center"]) + jax.nn.softplus(
    params["quant_width"]
  )


def _scale(params, steps):
  largest = jax.nn.softplus(params["quant_center"]) + jax.nn.softplus(params["quant_width"])
  return jax.lax.stop_gradient(largest) / steps.astype(largest.dtype)


def _codes(x, params, steps, gamma, *, signed):
  center, width = jax.nn.softplus(params["quant_center"]), jax.nn.softplus(params["quant_width"])
  u = ((jnp.abs(x) if signed else x) - center + width) / (2.0 * width)
  inside = (u > 0.0) & (u < 1.0)
  if gamma is not None:
    # Where it is not used, a base whose logarithm is finite.
    u = jnp.where(inside, jnp.where(inside, u, 0.5) ** gamma, u)
  # Not jnp.clip, which passes half of the gradient at its ends.
  u = jnp.where(inside, u, jax.lax.stop_gradient(jnp.clip(u, 0.0, 1.0)))
  codes = round_through(u * steps.astype(u.dtype))
  return jnp.sign(x) * codes if signed else codes
