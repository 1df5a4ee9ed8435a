"""What a phase of the schedule means where a run stands: which layers are frozen, which rates."""

from profit_jax.config import Settings
from profit_jax.nn.spec import KERNEL, NORM, QUANT, WEIGHT, ModelSpec
from profit_jax.schedule import Phase
from profit_jax.train import aiwq
from profit_jax.train.optimizer import FROZEN, Frozen
from profit_jax.train.progress import Progress


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


def learning_rate(phase: Phase, progress: Progress) -> float:
  """The learning rate of the weights in the epoch under way."""
  return phase.learning_rate_at(progress.epoch) * progress.learning_rate_scale


def learning_rates(phase: Phase, progress: Progress, settings: Settings) -> dict[str, float]:
  """The learning rate of each optimizer group in the epoch under way."""
  rate = learning_rate(phase, progress)
  return {
    WEIGHT: rate if phase.trains_kernels else 0.0,
    NORM: rate,
    QUANT: rate * settings.train.quantizer_lr_scale,
    FROZEN: 0.0,
  }


def place(phases: tuple[Phase, ...], progress: Progress, steps_per_epoch: int) -> str:
  """Where a run stands: `in phase 3 of 22 (a8 ft), after 1 of its 4 epochs and 7 of 21 steps`."""
  phase = phases[progress.phase - 1]
  done = f"after {progress.epoch} of its {phase.epochs} epochs"
  steps = f" and {progress.step} of {steps_per_epoch} steps" if progress.step else ""
  return f"in phase {phase.index} of {len(phases)} ({phase.name}), {done}{steps}"
