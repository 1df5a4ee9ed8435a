"""When a run is saved, and where it resumes."""

from collections.abc import Callable

import jax

from profit_jax import checkpoints, distributed
from profit_jax.train import run_state
from profit_jax.train.run_state import RunState, SavedRun

# Several processes ask the first one's clock whether to save; not at every step, because the answer
# is sent around.
_STEPS_BETWEEN_CLOCKS = 32


class Saver:
  """Saves a run at the ends of phases, and when some minutes are over."""

  def __init__(
    self,
    writer: checkpoints.Writer,
    steps_per_epoch: int,
    minutes: float,
    clock: Callable[[], float],
  ):
    """Args:
    writer: of checkpoints.
    steps_per_epoch: of the run.
    minutes: between two checkpoints.
    clock: in seconds.
    """
    self._writer, self._steps_per_epoch = writer, steps_per_epoch
    self._seconds, self._clock = 60.0 * minutes, clock
    self._saved_at = clock()

  def is_due(self, step: int) -> bool:
    """Whether the minutes are over after a step of an epoch; the same in all processes."""
    if jax.process_count() > 1 and step % _STEPS_BETWEEN_CLOCKS:
      return False
    return distributed.on_first_host(lambda: self._clock() - self._saved_at >= self._seconds)

  def save(self, current: RunState) -> None:
    """Begins to save; raises as `Writer.save`."""
    run_state.save(self._writer, current, current.number(self._steps_per_epoch))
    self._saved_at = self._clock()

  def check(self) -> None:
    """Raises as `Writer.save` where the last checkpoint could not be written."""
    self._writer.check()

  def wait(self) -> None:
    """Until everything is on disk; raises as `Writer.save`."""
    self._writer.wait()

  def read_newest(self, warn: checkpoints.Warn) -> SavedRun | None:
    """Where the run would resume; None without a checkpoint. Raises as `Writer.read_newest`."""
    return run_state.opened(self._writer.read_newest(warn))
