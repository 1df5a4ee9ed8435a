"""What a phase of the plan means for a run that stands somewhere: who is frozen, what is
calibrated, which rates.
"""

import itertools
from typing import Any

import jax
import numpy as np

from profit_jax.config import Settings
from profit_jax.data import Source
from profit_jax.nn.spec import KERNEL, NORM, QUANT, WEIGHT, ModelSpec
from profit_jax.schedule import Phase
from profit_jax.train import aiwq, instability, interrupt, nonfinite, oscillation
from profit_jax.train.optimizer import FROZEN
from profit_jax.train.programs import Frozen, Programs
from profit_jax.train.progress import Best, EpochRecord, PhaseRecord, Progress
from profit_jax.train.state import TrainState


def ahead(phases: tuple[Phase, ...], progress: Progress) -> tuple[Phase, ...]:
  """The phases that are not finished, the one under way first."""
  finished = not progress.phase or progress.epoch == phases[progress.phase - 1].epochs
  return phases[progress.phase - (0 if finished else 1) :]


def frozen(phase: Phase, progress: Progress) -> Frozen:
  """The layers that a phase freezes, by the newest ranking."""
  return aiwq.frozen_layers(progress.ranking, phase.frozen_fraction)


def untrained(phase: Phase, progress: Progress, spec: ModelSpec) -> Frozen:
  """The weights that do not train, `block01/expand_conv/kernel`: the frozen ones, or all in a BN
  phase.
  """
  if phase.trains_kernels:
    return frozenset(f"{layer}/{KERNEL}" for layer in frozen(phase, progress))
  return frozenset("/".join(path) for path, group in spec.groups.items() if group == WEIGHT)


def learning_rates(
  phase: Phase, epoch: int, progress: Progress, settings: Settings
) -> dict[str, float]:
  """The rate of each optimizer group in an epoch (from 0) of a phase."""
  rate = phase.learning_rate_at(epoch) * progress.learning_rate_scale
  return {
    WEIGHT: rate if phase.trains_kernels else 0.0,
    NORM: rate,
    QUANT: rate * settings.train.quantizer_lr_scale,
    FROZEN: 0.0,
  }


def calibrate(
  phase: Phase, state: TrainState, programs: Programs, source: Source, settings: Settings, key
) -> TrainState:
  """New values of a and c where the phase begins with such, of the student and of its average."""
  if phase.calibrate is None:
    return state
  if phase.calibrate != "act":
    weights = (
      programs.calibrate_weights() if phase.calibrate == "weight" else programs.fit_weights()
    )
    bits = programs.student.bits.at(phase.weight_bits, None)
    state = state.replace(params=weights(state.params, bits))
    return (
      state
      if state.ema_params is None
      else state.replace(ema_params=weights(state.ema_params, bits))
    )
  # The same batch whenever it is asked for: epoch 0's first.
  batch = next(iter(source.train_batches(0, settings.train.batch_size)))
  image = programs.split({"image": batch["image"][:: settings.train.accumulation_steps]})["image"]
  acts, bits = programs.calibrate_acts(), programs.student.bits.at(None, phase.act_bits)
  state = state.replace(params=acts(state.variables, image, key, bits))
  if state.ema_params is None:
    return state
  return state.replace(ema_params=acts(state.ema_variables, image, key, bits))


def start(
  phase: Phase,
  before: Phase | None,
  state: TrainState,
  programs: Programs,
  settings: Settings,
  untrained: Frozen,
) -> TrainState:
  """The state with the optimizer of a phase's beginning. What iterative freezing knows stays from
  one to the next of those that train kernels at the same bits.
  """
  _, freezes = oscillation.active(
    settings.oscillation, phase.program.quantized_weights, phase.program.train_kernels
  )
  if not freezes:
    state = state.replace(oscillation=None)
  elif state.oscillation is None or before is None or before.weight_bits != phase.weight_bits:
    fresh = oscillation.start(programs.student.kernels)
    state = state.replace(oscillation=programs.replicate(fresh))
  return programs.fresh_optimizer(state, phase.program.train_kernels, untrained)


def strengths(
  phases: tuple[Phase, ...],
  phase: Phase,
  progress: Progress,
  steps_per_epoch: int,
  settings: Settings,
) -> oscillation.Strengths | None:
  """Those of the remedies in the next step."""
  done = progress.epoch * steps_per_epoch + progress.step
  return oscillation.strengths(settings.oscillation, phases, phase, done, steps_per_epoch)


def for_evaluation(
  phase: Phase,
  epoch: int,
  variables: Any,
  programs: Programs,
  source: Source,
  settings: Settings,
  key: Any,
) -> Any:
  """The variables that an evaluation uses: with batch statistics estimated anew where that is on,
  as the mean of those of the epoch's first batches (Nagel et al., ICML 2022).
  """
  program, count = phase.program, settings.oscillation.bn_reestimation_batches
  if not count or not (program.quantized_weights or program.quantized_acts):
    return variables
  add = programs.batch_statistics(program.quantized_weights, program.quantized_acts)
  bits, seen = programs.bits(phase), 0
  total = programs.replicate(jax.tree.map(np.zeros_like, jax.device_get(variables["batch_stats"])))
  for batch in itertools.islice(source.train_batches(epoch, settings.train.batch_size), count):
    interrupt.check()
    # A part of it where training takes its batches in parts: the whole may be larger than memory.
    image = programs.split({"image": batch["image"][:: settings.train.accumulation_steps]})["image"]
    total, seen = add(variables, image, bits, key, total), seen + 1
    jax.block_until_ready(total)
  return {**variables, "batch_stats": jax.tree.map(lambda leaf: leaf / seen, total)}


def better(
  phase: Phase, progress: Progress, raw: dict[str, float], average: dict[str, float] | None
) -> Best:
  """The better evaluation of an epoch that is counted: of the raw weights, or of their average; raw
  if they are equal.
  """
  choices = [("raw", raw)] + ([("ema", average)] if average else [])
  weights, chosen = max(choices, key=lambda choice: choice[1]["top1"])
  return Best(
    epoch=progress.total_epochs,
    phase=phase.index,
    top1=chosen["top1"],
    top5=chosen["top5"],
    weights=weights,
    examples=int(chosen["examples"]),
  )


def epoch_record(
  progress: Progress,
  phase: Phase,
  raw: dict[str, float],
  average: dict[str, float] | None,
  clip_rate,
  params,
  spec: ModelSpec,
) -> EpochRecord:
  """What the plots know of an epoch whose last step is done; its loss is the mean of the steps.
  `params` are nested dictionaries.
  """
  bits = spec.bits.at(phase.weight_bits, phase.act_bits)
  by_layer = {
    **progress.instability,
    "clip_rate": clip_rate,
    "aiwq": progress.metric if phase.kind == "sampling" else {},
  }
  for name, value in nonfinite.quantizer_scalars(params).items():
    scalar, layer = name.split("/", 1)
    if spec.width_of(layer, bits) is not None:
      by_layer.setdefault(scalar, {})[layer] = value
  loss = progress.totals["loss"] / progress.step
  kept = {
    name: {layer: instability.rounded(value) for layer, value in values.items()}
    for name, values in by_layer.items()
  }
  return EpochRecord(phase.index, raw["top1"], average and average["top1"], loss, kept)


def phase_record(
  phase: Phase, progress: Progress, steps_per_epoch: int, frozen: Frozen
) -> PhaseRecord:
  """What `result.json` says of a phase whose last epoch is counted."""
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


def place(phases: tuple[Phase, ...], progress: Progress, steps_per_epoch: int) -> str:
  """Where a run stands: `in phase 3 of 22 (a8 ft), after 1 of its 4 epochs and 7 of 21 steps`."""
  phase = phases[progress.phase - 1]
  done = f"after {progress.epoch} of its {phase.epochs} epochs"
  steps = f" and {progress.step} of {steps_per_epoch} steps" if progress.step else ""
  return f"in phase {phase.index} of {len(phases)} ({phase.name}), {done}{steps}"
