"""The run: phases in order, epochs in each, checkpoints on the way."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from profit_jax import checkpoints
from profit_jax.schedule import Phase, target_phases
from profit_jax.train import aiwq, interrupt, nonfinite, phases, records, resume, run_state
from profit_jax.train.calibration import calibrate
from profit_jax.train.evaluate import Evaluator
from profit_jax.train.monitor import InstabilityMonitor
from profit_jax.train.observer import EpochReport, Observer
from profit_jax.train.optimizer import Frozen
from profit_jax.train.packing import unpack
from profit_jax.train.programs import Programs
from profit_jax.train.progress import Progress
from profit_jax.train.run import Run
from profit_jax.train.run_state import RunState, SavedRun
from profit_jax.train.saving import Saver
from profit_jax.train.start import baseline, evaluate_start, evaluated
from profit_jax.train.step_metrics import StepMetrics
from profit_jax.train.tracer import Who


class Loop:
  """Runs a plan from its beginning or from a checkpoint.

  Every random choice is a function of the seed, the epoch and the step, and a checkpoint has
  everything else, so that a stopped run ends with the numbers of an unstopped one. It can stop
  wherever `interrupt.check` or `_stop_point` is called: the run state is whole there, because it
  changes only between such places.
  """

  def __init__(
    self,
    run: Run,
    programs: Programs,
    writer: checkpoints.Writer,
    observer: Observer,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Args:
    run: what is trained.
    programs: compiled steps.
    writer: of checkpoints.
    observer: told of everything.
    clock: in seconds; decides when `checkpoint.minutes` are over.
    """
    settings, source = run.settings, run.source
    self._run, self._programs, self._observer = run, programs, observer
    self._targets = {phase.index for phase in target_phases(run.phases)}
    self._steps_per_epoch = source.info.train_examples // settings.train.batch_size
    self._key = programs.placement.replicate(jax.random.key(settings.seed))
    self._monitor = InstabilityMonitor(programs, self._steps_per_epoch)
    self._evaluator = Evaluator(programs, source, settings, self._key)
    self._metrics = StepMetrics(settings, run.phases, programs.student, observer)
    self._saver = Saver(writer, self._steps_per_epoch, settings.checkpoint.minutes, clock)
    self._stops = interrupt.StopPoints()
    self._stopwatch = _Stopwatch(programs)

  def run(self, saved: SavedRun | None) -> RunState:
    """Trains to the end of the plan; returns at once if it is there already.

    Args:
      saved: where to resume; None begins.

    Returns:
      The end.

    Raises:
      Stopped: by a signal; everything is saved.
      NotFinite: a loss or gradient, more often than `recovery.retries` allows.
      ConfigError: a checkpoint could not be written or does not fit.
    """
    with interrupt.graceful():
      try:
        self._begin(saved)
        while not self._to_the_end():
          self._go_back()
        self._saver.wait()
      except interrupt.Stopped as stopped:
        raise stopped.told(self._save_at_last()) from None
      except nonfinite.NotFinite:
        self._saver.wait()  # for an earlier checkpoint that is being written
        raise
    self._observer.run_done(self._current.progress, self._current.best["params"])
    return self._current

  def _to_the_end(self) -> bool:
    """False if a number was not finite and the run may go back."""
    try:
      for phase in phases.ahead(self._run.phases, self._current.progress):
        self._run_phase(phase)
      return True
    except nonfinite.NotFinite as error:
      retries, recovery = self._current.progress.retries, self._run.settings.recovery
      if retries >= recovery.retries:
        raise nonfinite.gives_up(error, retries, recovery.learning_rate_factor) from None
      self._observer.warned(
        f"{error} The run goes back to its last checkpoint, retry {retries + 1} of "
        f"{recovery.retries}."
      )
      return False

  def _begin(self, saved: SavedRun | None, bad: Progress | None = None) -> None:
    """Sets the run state: the schedule's beginning, or a checkpoint's.

    Args:
      saved: where to resume; None begins.
      bad: where a run that was not finite stopped; its retries count.
    """
    run, fresh = self._run, saved is None
    progress = Progress() if saved is None else saved.progress
    if bad is not None:
      progress.count_retry(bad, run.settings.recovery.learning_rate_factor)
    # First of all: programs compile in the background while weights are made or read.
    self._prefetch(progress, evaluated(run.student, run.teacher) if fresh else ())
    self._observer.run_started(run.phases, self._steps_per_epoch, progress)
    self._current = (
      resume.begun(run, self._programs, progress)
      if saved is None
      else resume.resumed(run, self._programs, saved)
    )
    own = self._current.teacher
    teacher = run.teacher.variables if own is None else own
    self._teacher = None if teacher is None else self._programs.placement.replicate(teacher)
    self._stop_point()
    if fresh:
      self._evaluate_start()

  def _prefetch(self, progress: Progress, evaluated_models: Sequence[Who] = ()) -> None:
    """Has the programs of the phases ahead compiled, and the others dropped."""
    self._programs.prefetch(phases.ahead(self._run.phases, progress), evaluated_models)

  def _evaluate_start(self) -> None:
    """What came from files is evaluated before training."""
    run, progress = self._run, self._current.progress
    if not evaluated(run.student, run.teacher):
      return
    variables = self._current.state.variables
    start = evaluate_start(
      self._programs, run.source, run.settings, run.student, run.teacher, variables
    )
    progress.start, progress.full_precision = start, baseline(start)
    self._observer.start_evaluated(start)

  def _go_back(self) -> None:
    """Back to the last checkpoint, or the beginning without one, with lower learning rates."""
    self._metrics.drop()
    self._begin(self._saver.read_newest(self._observer.warned), self._current.progress)
    if self._current.progress.begun:
      self._save()  # at once, so that the retry counts whatever happens to the run

  def _run_phase(self, phase: Phase) -> None:
    progress = self._current.progress
    under_way = progress.phase == phase.index
    self._observer.phase_started(
      phase, progress.epoch * self._steps_per_epoch + progress.step if under_way else 0
    )
    self._stopwatch.start()
    frozen = phases.frozen(phase, progress)
    if not under_way:
      self._enter(phase)
    while progress.epoch < phase.epochs:
      self._train_epoch(phase)
      self._end_epoch(phase, frozen)

  def _enter(self, phase: Phase) -> None:
    current, progress, programs = self._current, self._current.progress, self._programs
    run = self._run
    state = calibrate(phase, current.state, programs, run.source, run.settings, self._key)
    before = run.phases[progress.phase - 1] if progress.phase else None
    untrained = phases.untrained(phase, progress, programs.student)
    current.state = programs.states.entered(state, phase, before, untrained)
    current.sampling = None
    if phase.kind == "sampling":
      current.sampling = programs.placement.replicate(aiwq.start(programs.student.convs))
    progress.begin_phase(phase)

  def _train_epoch(self, phase: Phase) -> None:
    """The steps of one epoch that are not done yet."""
    current, progress, programs = self._current, self._current.progress, self._programs
    step = programs.train_step(phase.program)
    if current.sampling is not None and not progress.step:
      current.sampling = current.sampling._replace(
        has_previous=programs.placement.replicate(np.zeros((), bool))
      )
    bits = programs.student.bits.at(phase.weight_bits, phase.act_bits)
    rate = np.float32(phases.learning_rate(phase, progress))
    teacher = self._teacher if phase.distill else None
    self._metrics.epoch_started(progress.step)
    for batch in self._run.source.train_batches(
      progress.total_epochs, self._run.settings.train.batch_size, progress.step
    ):
      self._stop_point()
      self._monitor.before_step(current)
      done = progress.epoch * self._steps_per_epoch + progress.step
      strengths = programs.remedies.strengths(self._run.phases, phase, done, self._steps_per_epoch)
      rows = programs.placement.split(batch)
      current.state, metrics, current.sampling = step(
        current.state, rows, bits, rate, self._key, teacher, current.sampling, strengths
      )
      progress.step += 1
      self._monitor.after_step(current, phase)
      self._metrics.add(current, metrics)
      # At an epoch's last step, the evaluation should be part of it.
      if progress.step < self._steps_per_epoch and self._saver.is_due(progress.step):
        self._save()
    self._metrics.collect_all(current)
    self._stop_point()

  def _stop_point(self) -> None:
    """Stops where a signal asks for it, several processes at the same step, or where a checkpoint
    could not be written.
    """
    self._observer.stop_point(self._current.number(self._steps_per_epoch))
    self._stops.check()
    self._saver.check()

  def _save(self) -> None:
    """Begins to save the run state; what is not finite is never saved."""
    self._metrics.collect_all(self._current)
    self._stopwatch.add_to(self._current.progress)
    self._saver.save(self._current)

  def _save_at_last(self) -> str:
    """Saves, waits for it, and says where the run stands."""
    progress = self._current.progress
    if not progress.begun:
      return "before its first step; the same command begins again"
    try:
      self._save()
    except nonfinite.NotFinite as error:
      return (
        f"where numbers are not finite: {error} The same command resumes from the last checkpoint"
      )
    self._saver.wait()
    place = phases.place(self._run.phases, progress, self._steps_per_epoch)
    return f"{place}; everything is saved, and the same command resumes from there"

  def _end_epoch(self, phase: Phase, frozen: Frozen) -> None:
    """Evaluates; then, with nothing that could stop it half-way, counts the epoch."""
    current, progress = self._current, self._current.progress
    epoch, state = progress.total_epochs, current.state
    raw = self._evaluator.evaluate(phase, epoch, state.variables)
    average = None
    if state.ema_params is not None:
      average = self._evaluator.evaluate(phase, epoch, state.ema_variables)
    if current.sampling is not None:
      progress.metric = {
        layer: float(value) for layer, value in jax.device_get(current.sampling.metric).items()
      }
    spec, params = self._programs.student, unpack(jax.device_get(state.params))
    scalars = nonfinite.quantizer_scalars(params, spec)
    report = EpochReport(
      phase=phase,
      epoch=progress.epoch + 1,
      step=int(state.step),
      train=progress.means(),
      evaluation=raw.scores,
      evaluation_ema=average and average.scores,
      learning_rates=phases.learning_rates(phase, progress, self._run.settings),
      clip_rate=raw.clip_rate,
      aiwq=dict(progress.metric) if phase.kind == "sampling" else {},
      instability=progress.instability,
      quantizer_scalars=scalars,
      params=params,
    )
    progress.count_epoch(records.epoch_record(progress, phase, raw, average, scalars, spec))
    records.keep_best(current, phase, raw, average, is_target=phase.index in self._targets)
    self._stopwatch.add_to(progress)
    self._observer.epoch_done(report)
    ends = progress.epoch == phase.epochs
    if ends:
      self._end_phase(phase, frozen)
    if ends or self._saver.is_due(progress.step):
      self._save()

  def _end_phase(self, phase: Phase, frozen: Frozen) -> None:
    current, progress = self._current, self._current.progress
    if phase.kind == "sampling":
      progress.ranking = list(aiwq.rank(progress.metric))
    self._prefetch(progress)
    if (
      phase.kind == "full_precision"
      and self._teacher is None
      and any(p.distill for p in self._run.phases)
    ):
      current.teacher = _better_variables(current)
      self._teacher = self._programs.placement.replicate(current.teacher)
    record = records.phase_record(phase, progress, self._steps_per_epoch, frozen)
    progress.records.append(record)
    self._observer.phase_done(record)


def _better_variables(current: RunState) -> dict[str, Any]:
  """The student or its average, whichever the last epoch has found better; on the host."""
  last, state = current.progress.epochs[-1], current.state
  better_ema = last.top1_ema is not None and last.top1_ema > last.top1
  return run_state.host_copy(state.ema_variables if better_ema else state.variables)


class _Stopwatch:
  """Measures the time of a phase: calibration, training, evaluation, saves but for the last."""

  def __init__(self, programs: Programs):
    self._programs = programs
    self.start()

  def start(self) -> None:
    """Counts from here."""
    self._mark = time.perf_counter(), self._programs.waited_seconds

  def add_to(self, progress: Progress) -> None:
    """Adds what has passed since the last call."""
    before, waited_before = self._mark
    self.start()
    now, waited = self._mark
    progress.phase_seconds += now - before
    progress.phase_compile_seconds += waited - waited_before
