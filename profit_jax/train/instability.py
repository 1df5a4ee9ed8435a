"""How restless a net is, layer by layer: what one step of training changes, measured at the last step of every epoch.

It is computed from two copies of the state on the host, outside of the compiled steps, which stay as they are. A run that
was stopped measures the same: what stands between an epoch's last step and its end is in the checkpoint.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from profit_jax.plan import Phase
from profit_jax.quant.levels import levels
from profit_jax.settings import Settings
from profit_jax.train.state import TrainState

_DIGITS = 4  # significant ones that are kept


class Held(NamedTuple):
  """A state before its last step, on the host."""

  params: Any
  batch_stats: Any


def hold(state: TrainState) -> Held:
  """Copies what the step is going to change."""
  copied = jax.tree.map(np.array, jax.device_get((state.params, state.batch_stats)))
  return Held(*copied)


def measure(held: Held, state: TrainState, phase: Phase, settings: Settings) -> dict[str, dict[str, float]]:
  """What the step between the two states did.

  Returns:
    `flip_rate`: by kernel, the share of its codes that changed; empty where weights are not quantized or do not train.
    `bn_distance`: by batch normalization, how far the batch's statistics lie from the running ones before the step.
  """
  params, batch_stats = jax.device_get((state.params, state.batch_stats))
  flips = {}
  if phase.weight_bits is not None and phase.program.train_kernels:
    steps = levels(phase.weight_bits, None).weight
    flips = flip_rates(held.params, params, steps, settings.quant.method)
  distances = bn_distances(held.batch_stats, batch_stats, settings.model.bn_momentum)
  return {"flip_rate": flips, "bn_distance": distances}


def flip_rates(before: Any, after: Any, steps: float, method: str = "duq") -> dict[str, float]:
  """By layer, the share of a kernel's codes that differ between two params, at `steps` of its quantizer."""
  old, new = (traverse_util.flatten_dict(params) for params in (before, after))
  rates = {}
  for path in old:
    if path[-1] == "kernel":
      codes = [_CODES[method](flat[path], _scalars(flat, path[:-1]), steps) for flat in (old, new)]
      rates["/".join(path[:-1])] = float(f"{np.mean(codes[0] != codes[1]):.{_DIGITS}g}")
  return dict(sorted(rates.items()))


def _scalars(flat, layer):
  return {
    path[-1]: np.logaddexp(0.0, leaf) for path, leaf in flat.items() if path[:-1] == layer and path[-1].startswith("quant_")
  }


def _interval_codes(kernel, scalars, steps):
  return np.rint(np.clip(kernel / scalars["quant_a"], -1, 1) * steps)


def _pact_codes(kernel, scalars, steps):
  del scalars
  t = np.tanh(kernel)
  return np.rint((t / np.abs(t).max() / 2 + 0.5) * (2 * steps + 1))


def _qil_codes(kernel, scalars, steps):
  center, width = scalars["quant_center"], scalars["quant_width"]
  u = np.clip((np.abs(kernel) - center + width) / (2 * width), 0, 1)
  return np.sign(kernel) * np.rint(u ** scalars["quant_gamma"] * steps)


_CODES: dict[str, Callable[[np.ndarray, Mapping[str, np.ndarray], float], np.ndarray]] = {
  "duq": _interval_codes,
  "lsq": _interval_codes,
  "pact": _pact_codes,
  "qil": _qil_codes,
}


def bn_distances(before: Any, after: Any, momentum: float) -> dict[str, float]:
  """By normalization, the KL divergence of a batch's statistics from the running ones, as AIWQ's (paper equation 2).

  The batch's own follow from the update, `running = momentum * running + (1 - momentum) * batch`. Channels that are
  constant on either side have no part; a layer without any other is left out.
  """
  old, new = (traverse_util.flatten_dict(stats) for stats in (before, after))
  found = {}
  for path in old:
    if path[-1] != "mean":
      continue
    layer = path[:-1]
    running = [np.float64(old[*layer, name]) for name in ("mean", "var")]
    batch = [
      (np.float64(new[*layer, name]) - momentum * value) / (1 - momentum)
      for name, value in zip(("mean", "var"), running, strict=True)
    ]
    alive = (running[1] > 0) & (batch[1] > 0)
    if alive.any():
      (m, v), (m_run, v_run) = ([values[alive] for values in pair] for pair in (batch, running))
      kl = 0.5 * np.log(v_run / v) + (v + (m - m_run) ** 2) / (2 * v_run) - 0.5
      found["/".join(layer)] = float(f"{np.mean(kl):.{_DIGITS}g}")
  return dict(sorted(found.items()))
