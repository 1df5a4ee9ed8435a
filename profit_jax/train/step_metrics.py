"""The metrics of training steps, which arrive while later steps are under way."""

import collections
import time
from typing import Any

import jax

from profit_jax.config import Settings
from profit_jax.nn.spec import ModelSpec
from profit_jax.schedule import Phase
from profit_jax.train import nonfinite, phases
from profit_jax.train.observer import Observer
from profit_jax.train.packing import unpack
from profit_jax.train.run_state import RunState

# How many steps may be under way before the oldest one's metrics are waited for: enough that no
# device runs dry, few enough that the progress bar tells the present. On a CPU they take long, and
# a run that is asked to stop waits.
_STEPS_AHEAD = {"cpu": 2}


class StepMetrics:
  """Adds the metrics of steps to `Progress.totals`, in the order of the steps."""

  def __init__(
    self, settings: Settings, plan: tuple[Phase, ...], spec: ModelSpec, observer: Observer
  ):
    """Args:
    settings: validated.
    plan: the phases of the run.
    spec: of the student.
    observer: told of every step.
    """
    self._settings, self._plan = settings, plan
    self._spec, self._observer = spec, observer
    self._pending: collections.deque[dict[str, Any]] = collections.deque()
    self.epoch_started(0)

  def epoch_started(self, steps_done: int) -> None:
    """Images per second are counted from here; `steps_done` of the epoch's steps are done."""
    self._started = time.perf_counter(), steps_done

  def add(self, current: RunState, metrics: dict[str, Any]) -> None:
    """Adds those of the latest step; `current` is after it.

    Raises:
      NotFinite: the metrics of a step, this or an earlier one, say so.
    """
    self._pending.append(metrics)
    if len(self._pending) > _STEPS_AHEAD.get(jax.default_backend(), 8):
      self._collect(current)

  def collect_all(self, current: RunState) -> None:
    """Waits for all steps under way; raises as `add`."""
    while self._pending:
      self._collect(current)

  def drop(self) -> None:
    """Forgets the steps under way."""
    self._pending.clear()

  def _collect(self, current: RunState) -> None:
    """Adds the metrics of the oldest step under way."""
    progress = current.progress
    metrics = {
      name: float(value) for name, value in jax.device_get(self._pending.popleft()).items()
    }
    step = progress.step - len(self._pending)
    phase = self._plan[progress.phase - 1]
    if not metrics.pop("finite"):
      raise self._not_finite(current, phase, step, metrics["loss"])
    metrics["top1"] = 100.0 * metrics.pop("correct") / metrics.pop("examples")
    progress.add(metrics)
    start, steps_before = self._started
    speed = (step - steps_before) * self._settings.train.batch_size / (time.perf_counter() - start)
    self._observer.step_done(phase, metrics, speed)

  def _not_finite(
    self, current: RunState, phase: Phase, step: int, loss: float
  ) -> nonfinite.NotFinite:
    epoch = current.progress.epoch
    where = f"phase {phase.index} ({phase.name}), epoch {epoch + 1} of {phase.epochs}, step {step}"
    rates = phases.learning_rates(phase, current.progress, self._settings)
    state = current.state
    params, batch_stats = unpack(jax.device_get((state.params, state.batch_stats)))
    scalars = {}
    if phase.weight_bits or phase.act_bits:
      scalars = nonfinite.quantizer_scalars(params, self._spec)
    return nonfinite.NotFinite(nonfinite.describe(where, loss, rates, scalars, batch_stats))
