"""Accuracy on the evaluation set, every image counted exactly once."""

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from profit_jax.config import ConfigError, Settings
from profit_jax.data import Source
from profit_jax.quant.bits import Bits
from profit_jax.schedule import Phase
from profit_jax.train import interrupt
from profit_jax.train.packing import Packed
from profit_jax.train.programs import Compiled, Programs
from profit_jax.train.tracer import Who

Scores = dict[str, float]


def evaluate(
  programs: Programs,
  source: Source,
  settings: Settings,
  variables: Any,
  *,
  weight_bits: int | None = None,
  act_bits: int | None = None,
  who: Who = "student",
) -> tuple[Scores, dict[str, float]]:
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
  batches = source.eval_batches(settings.train.eval_batch_size)
  total = summed(step, variables, map(programs.placement.split, batches), bits)
  clip_rate = total.pop("clip_rate")
  examples = total["examples"]
  if not examples:
    raise ConfigError(
      f"None of the {source.info.eval_examples} evaluation images of {settings.data.name} can be "
      "decoded."
    )
  return scores_of(total), {layer: rate / examples for layer, rate in clip_rate.items()}


def summed(step: Compiled, variables: Any, batches: Iterable[Any], bits: Bits) -> dict[str, Any]:
  """The sums of an evaluation step over batches.

  Args:
    step: of `Programs.eval_step`.
    variables: packed, on the devices.
    batches: on the devices.
    bits: of every layer.
  """
  results = []
  # All batches are sent before the first result is asked for; not on a CPU, where a run that is
  # asked to stop would wait.
  ahead = 2 if jax.default_backend() == "cpu" else None
  for batch in batches:
    interrupt.check()
    results.append(step(variables, batch, bits))
    if ahead and len(results) > ahead:
      jax.block_until_ready(results[-1 - ahead])
  return jax.tree.map(lambda *values: float(sum(values)), *jax.device_get(results))


def scores_of(total: Mapping[str, Any]) -> Scores:
  """Percentages and means, given the sums over at least one example."""
  examples = total["examples"]
  return {
    "top1": 100.0 * total["top1"] / examples,
    "top5": 100.0 * total["top5"] / examples,
    "loss": total["loss"] / examples,
    "examples": examples,
  }


class Evaluation(NamedTuple):
  """An evaluation at the end of an epoch.

  Attributes:
    variables: that were evaluated, packed, on the devices. Their batch statistics may be estimated
      anew.
    scores: of `evaluate`.
    clip_rate: likewise, by layer.
  """

  variables: Any
  scores: Scores
  clip_rate: dict[str, float]


class Evaluator:
  """Evaluates the variables of a run at the bits of a phase."""

  def __init__(self, programs: Programs, source: Source, settings: Settings, key: jax.Array):
    """Args:
    programs: compiled.
    source: the data.
    settings: validated.
    key: for dropout, where batch statistics are estimated anew.
    """
    self._given = programs, source, settings
    self._key = key

  def evaluate(self, phase: Phase, epoch: int, variables: Any) -> Evaluation:
    """Evaluates variables.

    Args:
      phase: under way.
      epoch: of the run, from 0; remedies see its batches.
      variables: packed, on the devices.
    """
    programs = self._given[0]
    for remedy in programs.remedies.acting(phase.program, "evaluation"):
      statistics = functools.partial(self._mean_statistics, phase, epoch, variables)
      variables = remedy.for_evaluation(variables, statistics)
    scores, clip_rate = evaluate(
      *self._given, variables, weight_bits=phase.weight_bits, act_bits=phase.act_bits
    )
    return Evaluation(variables, scores, clip_rate)

  def _mean_statistics(self, phase: Phase, epoch: int, variables: Any, count: int) -> Packed:
    """The mean batch statistics of an epoch's first `count` training batches, packed."""
    programs, source, settings = self._given
    program = phase.program
    add = programs.batch_statistics(program.quantized_weights, program.quantized_acts)
    bits, seen = programs.student.bits.at(phase.weight_bits, phase.act_bits), 0
    zeros = jax.tree.map(np.zeros_like, jax.device_get(variables["batch_stats"]))
    total = programs.placement.replicate(zeros)
    for batch in itertools.islice(source.train_batches(epoch, settings.train.batch_size), count):
      interrupt.check()
      # A part of it where training takes its batches in parts: the whole may exceed memory.
      image = programs.placement.split_part(batch, settings.train.accumulation_steps)
      total, seen = add(variables, image, bits, self._key, total), seen + 1
      jax.block_until_ready(total)
    return jax.tree.map(lambda leaf: leaf / seen, total)
