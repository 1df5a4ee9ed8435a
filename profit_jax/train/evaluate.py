"""Accuracy on the evaluation set, every image counted exactly once."""

from typing import Any

import jax

from profit_jax.config import ConfigError, Settings
from profit_jax.data import Source
from profit_jax.train import interrupt
from profit_jax.train.programs import Programs, Who


def evaluate(
  programs: Programs,
  source: Source,
  settings: Settings,
  variables: Any,
  *,
  weight_bits: int | None = None,
  act_bits: int | None = None,
  who: Who = "student",
) -> tuple[dict[str, float], dict[str, float]]:
  """Evaluates variables at some bits (None is full precision), with running statistics.

  Args:
    programs: compiled steps.
    source: the data.
    settings: validated.
    variables: packed, on the devices.
    weight_bits: of the kernels.
    act_bits: of the activations.
    who: whose variables they are.

  Returns:
    `{top1, top5 (percent), loss (mean), examples}`, and the share of its input that each quantizer
    clips, by layer.
  """
  step = programs.eval_step(weight_bits is not None, act_bits is not None, who)
  bits = programs.student.bits.at(weight_bits, act_bits)
  results = []
  # All batches are sent before the first result is asked for; not on a CPU, where a run that is
  # asked to stop would wait.
  ahead = 2 if jax.default_backend() == "cpu" else None
  for batch in source.eval_batches(settings.train.eval_batch_size):
    interrupt.check()
    results.append(step(variables, programs.split(batch), bits))
    if ahead and len(results) > ahead:
      jax.block_until_ready(results[-1 - ahead])
  results = jax.device_get(results)
  total = jax.tree.map(lambda *values: float(sum(values)), *results)
  examples, clip_rate = total["examples"], total.pop("clip_rate")
  if not examples:
    raise ConfigError(
      f"None of the {source.info.eval_examples} evaluation images of {settings.data.name} can be "
      "decoded."
    )
  scores = {
    "top1": 100.0 * total["top1"] / examples,
    "top5": 100.0 * total["top5"] / examples,
    "loss": total["loss"] / examples,
    "examples": examples,
  }
  return scores, {layer: rate / examples for layer, rate in clip_rate.items()}
