"""AIWQ: activation instability induced by weight quantization (paper section 3.1), and the freeze
order it gives.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from profit_jax.nn.layers import NOISE_UNITS

Moments = tuple[jax.Array, jax.Array]

DECAY = 0.999  # of the running metric
LARGEST_KL = 1.0  # a step's value above it is dropped


class AiwqState(NamedTuple):
  """What the sampling phase carries from step to step; dictionaries by layer,
  `block01/expand_conv`.

  Attributes:
    metric: float32 scalars, the running AIWQ.
    previous: the codes of the quantized kernels of the step before.
    scale: of these codes, `[C]`.
    has_previous: bool scalar; False in the first step of an epoch, which has nothing to compare
      with.
  """

  metric: dict[str, jax.Array]
  previous: dict[str, jax.Array]
  scale: dict[str, jax.Array]
  has_previous: jax.Array


def kl_divergence(present: Moments, previous: Moments, noise: float | None = None) -> Any:
  """Mean over channels of `log(s_prev/s) + (s^2 + (m - m_prev)^2) / (2 s_prev^2) - 1/2` (paper
  equation 2).

  Args:
    present: per-channel mean m and unbiased standard deviation s of the output with the present
      quantized kernel; NumPy's arrays or JAX's.
    previous: the same with the previous step's kernel.
    noise: the largest s that rounding gives a constant channel, as a share of its m. The default is
      that of the arrays' type.

  Returns:
    A scalar. Channels whose s is 0 on either side, up to rounding, are left out; NaN if that leaves
    none.
  """
  (mean, std), (mean_prev, std_prev) = present, previous
  array = np if isinstance(std, np.ndarray) else jnp
  # A constant channel that is not 0 (negative padding makes such) has an s of 1e-17 by rounding,
  # and one of these makes the layer's KL 1e28. The authors' code compares with 0, and drops the
  # layer's value wherever it meets one.
  noise = NOISE_UNITS * jnp.finfo(std.dtype).eps if noise is None else noise
  alive = (std > noise * array.abs(mean)) & (std_prev > noise * array.abs(mean_prev))
  s, s_prev = array.where(alive, std, 1.0), array.where(alive, std_prev, 1.0)
  kl = array.log(s_prev / s) + (s**2 + (mean - mean_prev) ** 2) / (2 * s_prev**2) - 0.5
  with np.errstate(invalid="ignore"):  # NumPy warns of 0 / 0
    return array.sum(array.where(alive, kl, 0.0)) / array.sum(alive, dtype=kl.dtype)


def start(convs: Mapping[str, tuple[int, ...]], dtype: Any = np.float32) -> AiwqState:
  """The state of an epoch's beginning, on the host: every metric 0, no previous kernels.

  Args:
    convs: shapes of the convolutions' kernels by layer, `ModelSpec.convs`. Dense layers have no
      AIWQ.
    dtype: of the kernels.
  """
  return AiwqState(
    metric={layer: np.zeros((), dtype) for layer in convs},
    previous={layer: np.zeros(shape, dtype) for layer, shape in convs.items()},
    scale={layer: np.zeros(shape[-1], dtype) for layer, shape in convs.items()},
    has_previous=np.zeros((), bool),
  )


def update(state: AiwqState, moments: Mapping[str, Any], quantized: Mapping[str, Any]) -> AiwqState:
  """One step: `metric = 0.999 * metric + 0.001 * KL`, unless the KL is above 1 or has no channel.

  Args:
    state: before the step.
    moments: the layers' `moments` collection.
    quantized: the layers' `quantized` collection, which becomes the next step's `previous`. Without
      a scale, a kernel is its own values.
  """
  flat = traverse_util.flatten_dict(moments)
  metric = {}
  for layer, value in state.metric.items():
    path = tuple(layer.split("/"))
    kl = kl_divergence(flat[*path, "present"], flat[*path, "previous"]).astype(value.dtype)
    counts = state.has_previous & (kl <= LARGEST_KL)  # False for NaN
    metric[layer] = jnp.where(counts, DECAY * value + (1 - DECAY) * kl, value)
  flat, previous, scale = traverse_util.flatten_dict(quantized), {}, {}
  for layer in metric:
    path = tuple(layer.split("/"))
    previous[layer] = kernel = flat[*path, "kernel"]
    scale[layer] = flat.get((*path, "scale"), jnp.ones(kernel.shape[-1], kernel.dtype))
  return AiwqState(metric, previous, scale, jnp.ones((), bool))


def pooled(moments: Mapping[str, Any]) -> dict[str, Any]:
  """The `moments` collection of a whole batch from those of its equal parts, stacked along the
  first axis.

  The variance is the mean of the parts' and the variance of their means together; the factor
  n / (n - 1) apart, which the present and the previous output share.
  """
  flat = {}
  for path, (mean, std) in traverse_util.flatten_dict(moments).items():
    whole = jnp.mean(mean, 0)
    flat[path] = whole, jnp.sqrt(jnp.mean(jnp.square(std) + jnp.square(mean - whole), 0))
  return traverse_util.unflatten_dict(flat)


def previous_collection(state: AiwqState) -> dict[str, Any]:
  """The `previous` collection that the layers read."""
  flat = {
    (*layer.split("/"), name): leaf
    for name, leaves in (("kernel", state.previous), ("scale", state.scale))
    for layer, leaf in leaves.items()
  }
  return traverse_util.unflatten_dict(flat)


def rank(metric: Mapping[str, float]) -> tuple[str, ...]:
  """The layers by metric, largest first; equal ones by name."""
  return tuple(sorted(metric, key=lambda layer: (-metric[layer], layer)))


def frozen_layers(ranking: Sequence[str], fraction: float) -> frozenset[str]:
  """The top `int(len * fraction)` layers of a ranking, whose kernels freeze."""
  # 1e-9: a fraction such as 1/3 is not exact in binary, and 51 layers must give 17.
  return frozenset(ranking[: int(len(ranking) * fraction + 1e-9)])
