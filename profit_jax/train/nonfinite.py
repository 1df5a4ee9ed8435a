"""Numbers that are not finite: what is known when a run meets them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from profit_jax.config import ProfitError
from profit_jax.nn.spec import QUANT, ModelSpec

# Of a and c, after softplus. Inputs of quantizers are of the order of 1 behind batch normalization,
# kernels of 0.01 to 1.
SANE = (1e-4, 1e3)
# Of running variances: those of float32 overflow at 3e38, of activations around 1e19.
_LARGE_VARIANCE = 1e12
_SHOWN = 8


class NotFinite(ProfitError):
  """A training step whose loss, gradient or batch statistics are not finite; the command ends with
  exit code 3.
  """

  code, everywhere = 3, True


def quantizer_scalars(params: Mapping[str, Any], spec: ModelSpec) -> dict[str, float]:
  """`quant_a/{layer}` and so on of every quantizer, as positive values (after softplus); of
  several, their mean.

  Args:
    params: of the model, nested.
    spec: of the model.
  """
  raw = {
    f"{path[-1]}/{'/'.join(path[:-1])}": leaf
    for path, leaf in traverse_util.flatten_dict(params).items()
    if spec.groups[path] == QUANT
  }
  return {
    name: float(np.mean(np.logaddexp(value, 0.0))) for name, value in jax.device_get(raw).items()
  }


def describe(
  where: str,
  loss: float,
  rates: Mapping[str, float],
  scalars: Mapping[str, float],
  batch_stats: Mapping[str, Any],
) -> str:
  """What happened, in sentences.

  Args:
    where: phase, epoch and step.
    loss: the step's.
    rates: learning rates by optimizer group.
    scalars: `quantizer_scalars` after the last steps that were finite; empty in full precision,
      which uses no quantizers.
    batch_stats: the running statistics then.
  """
  what = f"The loss is {loss}"
  if np.isfinite(loss):
    what = f"The loss is {loss:.4g}, but its gradient, or the mean or variance of a batch in some "
    what += "layer, is not finite"
  used = ", ".join(f"{group} {rate:.3g}" for group, rate in rates.items() if rate)
  odd = {name: value for name, value in scalars.items() if not SANE[0] <= value <= SANE[1]}
  # The farthest out first, on a scale of factors.
  odd = sorted(
    odd.items(),
    key=lambda entry: -abs(np.log(max(entry[1], 1e-30))) if np.isfinite(entry[1]) else -np.inf,
  )
  text = f"{what} in {where}. Learning rates: {used}.{_large_variances(batch_stats)}"
  if odd:
    listed = ", ".join(f"{name} = {value:.3g}" for name, value in odd[:_SHOWN])
    more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    return (
      f"{text} Quantizers whose a or c lies outside {SANE[0]:g} to {SANE[1]:g}: {listed}{more}."
    )
  if not scalars:
    return text
  low, high = min(scalars, key=scalars.get), max(scalars, key=scalars.get)
  return (
    f"{text} Every quantizer's a and c lie within {SANE[0]:g} to {SANE[1]:g}, from {low} = "
    f"{scalars[low]:.3g} to "
    f"{high} = {scalars[high]:.3g}."
  )


def _large_variances(batch_stats: Mapping[str, Any]) -> str:
  """A sentence on layers whose activations are about to overflow; empty where there are none."""
  flat = jax.device_get(traverse_util.flatten_dict(batch_stats))
  largest = {
    "/".join(path[:-1]): float(np.max(leaf)) for path, leaf in flat.items() if path[-1] == "var"
  }
  large = sorted(
    (name for name in largest if largest[name] > _LARGE_VARIANCE), key=largest.get, reverse=True
  )
  if not large:
    return ""
  listed = ", ".join(f"{name} {largest[name]:.3g}" for name in large[:_SHOWN])
  more = f" and {len(large) - _SHOWN} more" if len(large) > _SHOWN else ""
  return f" Running variances above {_LARGE_VARIANCE:g}: {listed}{more}."


def gives_up(error: NotFinite, retries: int, factor: float) -> NotFinite:
  """The end of a run that has tried `retries` times; factor: `recovery.learning_rate_factor`."""
  tried = f" after {retries} retries" if retries else ""
  return NotFinite(
    f"{error} The run stops{tried}; its last checkpoint stays. The same command with "
    "--config.recovery.retries="
    f"{retries + 1} begins there and, when it comes to this again, goes back and on with "
    f"{factor:g} times the learning "
    f"rates."
  )
