"""Measures a run's instability in the last steps of each epoch."""

from typing import Any

import jax

from profit_jax.schedule import Phase
from profit_jax.train import instability
from profit_jax.train.packing import unpack
from profit_jax.train.programs import Programs
from profit_jax.train.run_state import RunState, host_copy


class InstabilityMonitor:
  """Called around every step. What it has seen of an epoch is in the run state, and so in a
  checkpoint: a run that was stopped measures the same.
  """

  def __init__(self, programs: Programs, steps_per_epoch: int):
    """Args: programs, compiled; steps_per_epoch."""
    self._programs, self._steps = programs, steps_per_epoch
    self._statistics: Any = None

  def before_step(self, current: RunState) -> None:
    """Keeps the running statistics that the epoch's last step is going to change."""
    if current.progress.step + 1 == self._steps:
      self._statistics = host_copy(current.state.batch_stats)

  def after_step(self, current: RunState, phase: Phase) -> None:
    """Counts; at the epoch's end `progress.instability` is set. `progress.step` includes the step
    already.
    """
    progress = current.progress
    if phase.trains_codes and progress.step >= self._steps - instability.WINDOW:
      if current.window is None:
        start = instability.start(self._programs.student.kernels)
        current.window = self._programs.placement.replicate(start)
      bits = self._programs.student.bits.at(phase.weight_bits, None)
      current.window = self._programs.observe()(current.window, current.state.params, bits)
    if progress.step == self._steps:
      progress.instability = {} if current.window is None else instability.rates(current.window)
      after = unpack(jax.device_get(current.state.batch_stats))
      progress.instability["bn_distance"] = instability.bn_distances(
        self._statistics, after, self._programs.student.momenta
      )
      progress.instability |= self._programs.remedies.measured(current.state.oscillation)
      current.window = None
