"""Accuracy on the evaluation set, every image counted exactly once."""

from typing import Any

import jax

from profit_jax.data import Source
from profit_jax.plan import Phase
from profit_jax.quant.levels import levels
from profit_jax.settings import Settings
from profit_jax.train.programs import Programs


def evaluate(
  programs: Programs, source: Source, settings: Settings, phase: Phase, variables: Any
) -> tuple[dict[str, float], dict[str, float]]:
  """Evaluates variables at a phase's bits, with running statistics.

  Returns:
    `{top1, top5 (percent), loss (mean), examples}`, and the share of its input that each quantizer clips, by layer.
  """
  step = programs.eval_step(phase.program.quantized_weights, phase.program.quantized_acts)
  phase_levels = levels(phase.weight_bits, phase.act_bits)
  batches = source.eval_batches(settings.train.eval_batch_size)
  # All batches are sent before the first result is asked for.
  results = jax.device_get([step(variables, programs.split(batch), phase_levels) for batch in batches])
  total = jax.tree.map(lambda *values: float(sum(values)), *results)
  examples, clip_rate = total["examples"], total.pop("clip_rate")
  scores = {
    "top1": 100.0 * total["top1"] / examples,
    "top5": 100.0 * total["top5"] / examples,
    "loss": total["loss"] / examples,
    "examples": examples,
  }
  return scores, {layer: rate / examples for layer, rate in clip_rate.items()}
