"""What a run keeps of its epochs and phases: records for reports, and the best variables."""

from collections.abc import Mapping

from profit_jax.nn.spec import ModelSpec
from profit_jax.schedule import Phase
from profit_jax.train import instability
from profit_jax.train.evaluate import Evaluation
from profit_jax.train.optimizer import Frozen
from profit_jax.train.progress import Best, EpochRecord, PhaseRecord, Progress
from profit_jax.train.run_state import RunState, host_copy


def epoch_record(
  progress: Progress,
  phase: Phase,
  raw: Evaluation,
  average: Evaluation | None,
  scalars: Mapping[str, float],
  spec: ModelSpec,
) -> EpochRecord:
  """The record of an epoch whose last step is done; its loss is the mean of the steps.

  Args:
    progress: before the epoch is counted.
    phase: under way.
    raw: of the student's weights.
    average: of their average, or None.
    scalars: `nonfinite.quantizer_scalars` of the student.
    spec: of the student.
  """
  bits = spec.bits.at(phase.weight_bits, phase.act_bits)
  by_layer = {
    **progress.instability,
    "clip_rate": raw.clip_rate,
    "aiwq": progress.metric if phase.kind == "sampling" else {},
  }
  for name, value in scalars.items():
    scalar, layer = name.split("/", 1)
    if spec.width_of(layer, bits) is not None:
      by_layer.setdefault(scalar, {})[layer] = value
  kept = {
    name: {layer: instability.rounded(value) for layer, value in values.items()}
    for name, values in by_layer.items()
  }
  return EpochRecord(
    phase=phase.index,
    top1=raw.scores["top1"],
    top1_ema=average and average.scores["top1"],
    loss=progress.means()["loss"],
    instability=kept,
  )


def phase_record(
  phase: Phase, progress: Progress, steps_per_epoch: int, frozen: Frozen
) -> PhaseRecord:
  """The record of a phase whose last epoch is counted, for `result.json`."""
  last = progress.epochs[-1]
  return PhaseRecord(
    index=phase.index,
    name=phase.name,
    kind=phase.kind,
    weight_bits=phase.weight_bits,
    act_bits=phase.act_bits,
    epochs=phase.epochs,
    steps=phase.epochs * steps_per_epoch,
    top1=last.top1,
    top1_ema=last.top1_ema,
    loss=last.loss,
    seconds=progress.phase_seconds,
    compile_seconds=progress.phase_compile_seconds,
    frozen=sorted(frozen),
  )


def keep_best(
  current: RunState, phase: Phase, raw: Evaluation, average: Evaluation | None, *, is_target: bool
) -> None:
  """Keeps the better of an epoch's evaluations where it is the best so far; of equals, the first.

  Args:
    current: the epoch is counted.
    phase: under way.
    raw: of the student's weights.
    average: of their average, or None.
    is_target: whether the phase has the plan's last bits, of which the variables are kept.
  """
  progress = current.progress
  weights, better = "raw", raw
  if average is not None and average.scores["top1"] > raw.scores["top1"]:
    weights, better = "ema", average
  found = Best(
    epoch=progress.total_epochs,
    phase=phase.index,
    top1=better.scores["top1"],
    top5=better.scores["top5"],
    weights=weights,
    examples=int(better.scores["examples"]),
  )
  if phase.kind == "full_precision" and _exceeds(found, progress.full_precision):
    progress.full_precision = found
  if is_target and _exceeds(found, progress.best):
    progress.best = found
    current.best = host_copy(better.variables)


def _exceeds(found: Best, best: Best | None) -> bool:
  return best is None or found.top1 > best.top1
