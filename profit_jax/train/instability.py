"""How restless a net is, layer by layer: what the last steps of an epoch change.

Measured beside the compiled training steps, which stay as they are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from profit_jax.nn.layers import NOISE_UNITS
from profit_jax.nn.spec import split_path
from profit_jax.train.aiwq import kl_divergence

WINDOW = 8  # steps at the end of an epoch whose codes are watched
_DIGITS = 4  # significant ones that are kept

ByLayer = dict[str, dict[str, float]]


class Window(NamedTuple):
  """Weight codes over some steps; dictionaries by layer, `block01/expand_conv`.

  Attributes:
    codes: int8, the latest.
    direction: int8, -1 or 1, where each went when it changed last; 0 before it has.
    flips: float32 scalars, how many codes have changed, summed over the steps.
    reversals: likewise, how many of these changes went against the code's last one.
    observed: int32 scalar, how often the codes were looked at: a step more than steps are counted.
  """

  codes: dict[str, jax.Array]
  direction: dict[str, jax.Array]
  flips: dict[str, jax.Array]
  reversals: dict[str, jax.Array]
  observed: jax.Array


def start(kernels: Mapping[str, tuple[int, ...]]) -> Window:
  """A window that has seen nothing, on the host; `kernels` is `ModelSpec.kernels`."""

  def zeros(dtype, scalar=False):
    return {layer: np.zeros(() if scalar else shape, dtype) for layer, shape in kernels.items()}

  counts = zeros(np.float32, scalar=True), zeros(np.float32, scalar=True)
  return Window(zeros(np.int8), zeros(np.int8), *counts, np.zeros((), np.int32))


def observe(window: Window, codes: Mapping[str, jax.Array]) -> Window:
  """The window after another step, given its weight codes. The first look finds no changes."""
  first = window.observed == 0
  direction, flips, reversals = {}, {}, {}
  for layer, code in codes.items():
    moved, turned, direction[layer] = changes(
      window.codes[layer], window.direction[layer], code, ~first
    )
    flips[layer] = window.flips[layer] + jnp.sum(moved != 0, dtype=jnp.float32)
    reversals[layer] = window.reversals[layer] + jnp.sum(turned, dtype=jnp.float32)
  return Window(dict(codes), direction, flips, reversals, window.observed + 1)


def changes(
  before: jax.Array, direction: jax.Array, after: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """How a step changes codes.

  Args:
    before: the codes before it, int8.
    direction: -1 or 1, where each went when it changed last; 0 before it has.
    after: the codes after it.
    counts: bool scalar; False where there was no step before.

  Returns:
    moved: -1, 0 or 1 as int8, whether each has fallen, stayed or grown. The difference of two codes
      need not fit into 8 bits.
    turned: whether it moved against its last change.
    direction: after the step.
  """
  moves = (after > before).astype(jnp.int8) - (after < before).astype(jnp.int8)
  moved = jnp.where(counts, moves, jnp.int8(0))
  return moved, moved * direction == -1, jnp.where(moved == 0, direction, moved)


def rates(window: Window) -> ByLayer:
  """What a window has seen, per code and step.

  Returns:
    `flip_rate`: by kernel, the share of codes that a step changes; `oscillation_rate`: the share
    that a step changes against their last change within the window, at most `flip_rate` (after
    Nagel et al., arXiv 2203.11086, section 4, whose memory has no end). Empty where no step was
    seen.
  """
  window = jax.device_get(window)
  steps = int(window.observed) - 1
  if steps < 1:
    return {}

  def shares(counts):
    return {
      layer: rounded(count / (steps * window.codes[layer].size))
      for layer, count in sorted(counts.items())
    }

  return {"flip_rate": shares(window.flips), "oscillation_rate": shares(window.reversals)}


def rounded(value: Any) -> float:
  """To four significant digits."""
  return float(f"{value:.{_DIGITS}g}")


def bn_distances(before: Any, after: Any, momenta: Mapping[str, float]) -> dict[str, float]:
  """By normalization, the KL divergence of a batch's statistics from the running ones, as AIWQ's
  (paper equation 2).

  The batch's own follow from the update, `running = momentum * running + (1 - momentum) * batch`,
  which makes their rounding `1 / (1 - momentum)` times as large. Channels that are constant up to
  that on either side are excluded; a layer without any other is left out.

  Args:
    before: the running statistics before the batch, nested dictionaries.
    after: those after it.
    momenta: of the normalizations that are compared, by layer.
  """
  old, new = (traverse_util.flatten_dict(stats) for stats in (before, after))
  found = {}
  for name, momentum in momenta.items():
    layer = split_path(name)
    running = [np.float64(old[*layer, key]) for key in ("mean", "var")]
    batch = [
      (np.float64(new[*layer, key]) - momentum * value) / (1 - momentum)
      for key, value in zip(("mean", "var"), running, strict=True)
    ]
    noise = NOISE_UNITS * np.finfo(np.float32).eps / (1 - momentum)
    moments = [(mean, np.sqrt(np.maximum(var, 0))) for mean, var in (batch, running)]
    kl = kl_divergence(*moments, noise)
    if not np.isnan(kl):  # it is where all channels are constant
      found[name] = rounded(kl)
  return dict(sorted(found.items()))
