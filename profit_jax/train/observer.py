"""What the loop tells its observers: terminal, TensorBoard, plots. The loop prints nothing."""

import dataclasses
from collections.abc import Iterable

from etils import epath

from profit_jax.schedule import Phase
from profit_jax.train.progress import PhaseRecord, Progress, Start
from profit_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochReport:
  """The end of an epoch.

  Attributes:
    phase: the phase it belongs to.
    epoch: in the phase, from 1.
    step: global step after it.
    train: means over the epoch: `loss`, `ce`, `kd` (with a teacher), `top1` in percent.
    evaluation: `top1`, `top5` in percent, and `loss`, of the raw weights.
    evaluation_ema: the same of their average, or None.
    learning_rates: by optimizer group.
    clip_rate: by quantizer, the share of its input it clips.
    aiwq: by convolution, in the sampling phase; else empty.
    instability: `flip_rate`, `oscillation_rate`, `fixed` by kernel, `bn_distance` by normalization;
      see `train/monitor.py`.
    quantizer_scalars: by scalar and layer, as `quant_a/block01/quant`; positive, of several the
      mean.
    params: the student's, on the host.
  """

  phase: Phase
  epoch: int
  step: int
  train: dict[str, float]
  evaluation: dict[str, float]
  evaluation_ema: dict[str, float] | None
  learning_rates: dict[str, float]
  clip_rate: dict[str, float]
  aiwq: dict[str, float]
  instability: dict[str, dict[str, float]]
  quantizer_scalars: dict[str, float]
  params: Params


class Observer:
  """Base of the observers; every method may be left as it is."""

  def opened(self, workdir: epath.Path) -> None:
    """Before everything else, in a run of the library: where it is kept."""

  def run_started(
    self, phases: tuple[Phase, ...], steps_per_epoch: int, progress: Progress
  ) -> None:
    """Before the first phase; progress is not empty in a run that resumes."""

  def start_evaluated(self, start: Start) -> None:
    """In a fresh run with weights files, before training."""

  def warned(self, text: str) -> None:
    """Something that the user should know of now."""

  def phase_started(self, phase: Phase, steps_done: int) -> None:
    """Before a phase's programs are waited for; steps_done is not 0 in a run that resumes
    within the phase.
    """

  def stop_point(self, number: int) -> None:
    """The run can be saved and stopped here: before every step, and after an epoch's last one.

    Args:
      number: of the checkpoint that the run would write here. An exception raised here ends the
        run at once, and nothing more is saved.
    """

  def step_done(self, phase: Phase, metrics: dict[str, float], images_per_second: float) -> None:
    """After a step: `loss` and `top1` (percent) of the latest step whose numbers have arrived."""

  def epoch_done(self, report: EpochReport) -> None:
    """After an epoch's evaluation."""

  def phase_done(self, record: PhaseRecord) -> None:
    """After a phase's last epoch."""

  def run_done(self, progress: Progress, params: Params) -> None:
    """After the last phase; params are those of the best weights."""

  def close(self) -> None:
    """Always, at the end, also after an error."""


class Observers(Observer):
  """Passes every event to several."""

  def __init__(self, observers: Iterable[Observer]):
    """Args: observers: called in this order."""
    self._observers = tuple(observers)

  def run_started(
    self, phases: tuple[Phase, ...], steps_per_epoch: int, progress: Progress
  ) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.run_started(phases, steps_per_epoch, progress)

  def start_evaluated(self, start: Start) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.start_evaluated(start)

  def warned(self, text: str) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.warned(text)

  def phase_started(self, phase: Phase, steps_done: int) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.phase_started(phase, steps_done)

  def stop_point(self, number: int) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.stop_point(number)

  def step_done(self, phase: Phase, metrics: dict[str, float], images_per_second: float) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.step_done(phase, metrics, images_per_second)

  def epoch_done(self, report: EpochReport) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.epoch_done(report)

  def phase_done(self, record: PhaseRecord) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.phase_done(record)

  def run_done(self, progress: Progress, params: Params) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.run_done(progress, params)

  def close(self) -> None:
    """See `Observer`."""
    for observer in self._observers:
      observer.close()
