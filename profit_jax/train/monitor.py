"""Watches a run's instability: the last steps of each epoch, of a moment that the loop moves on."""

from typing import Any

import jax

from profit_jax.schedule import Phase
from profit_jax.train import instability
from profit_jax.train.checkpoint import Moment, host_copy
from profit_jax.train.packing import unpack
from profit_jax.train.programs import Programs


class InstabilityMonitor:
  """Called around every step. What it has seen of an epoch is in the moment, and so in a
  checkpoint: a run that was stopped measures the same.
  """

  def __init__(self, programs: Programs, steps_per_epoch: int):
    """Args: programs, compiled; steps_per_epoch."""
    self._programs, self._steps = programs, steps_per_epoch
    self._statistics: Any = None

  def before_step(self, moment: Moment) -> None:
    """Keeps the running statistics that the epoch's last step is going to change."""
    if moment.progress.step + 1 == self._steps:
      self._statistics = host_copy(moment.state.batch_stats)

  def after_step(self, moment: Moment, phase: Phase) -> None:
    """Counts; at the epoch's end `progress.instability` is set. `progress.step` includes the step
    already.
    """
    progress = moment.progress
    if phase.trains_codes and progress.step >= self._steps - instability.WINDOW:
      if moment.window is None:
        moment.window = self._programs.replicate(instability.start(self._programs.student.kernels))
      bits = self._programs.student.bits.at(phase.weight_bits, None)
      moment.window = self._programs.observe()(moment.window, moment.state.params, bits)
    if progress.step == self._steps:
      progress.instability = {} if moment.window is None else instability.rates(moment.window)
      after = unpack(jax.device_get(moment.state.batch_stats))
      progress.instability["bn_distance"] = instability.bn_distances(
        self._statistics, after, self._programs.student.momenta
      )
      if moment.state.oscillation is not None:
        fixed = jax.device_get(moment.state.oscillation.fixed)
        progress.instability["fixed"] = {
          layer: float(codes.mean()) for layer, codes in sorted(fixed.items())
        }
      moment.window = None
