"""The run: phases in order, epochs in each, checkpoints on the way."""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from profit_jax import checkpoints, distributed
from profit_jax.schedule import Phase, target_phases
from profit_jax.train import aiwq, instability, interrupt, nonfinite, phases, run_state
from profit_jax.train.evaluate import evaluate
from profit_jax.train.monitor import InstabilityMonitor
from profit_jax.train.observer import EpochReport, Observer
from profit_jax.train.packing import unpack
from profit_jax.train.programs import Frozen, Programs, Who
from profit_jax.train.progress import Progress
from profit_jax.train.run import Run
from profit_jax.train.start import baseline, evaluate_start, evaluated
from profit_jax.train.state import create_state

# How many steps may be under way before the loop waits for the oldest one's numbers: enough that no
# device runs dry, few enough that the progress bar tells the present. On a CPU they take long, and
# a run that is asked to stop waits.
_STEPS_AHEAD = {"cpu": 2}
# Several processes ask the first one's clock whether to save; not at every step, because the answer
# is sent around.
_STEPS_BETWEEN_CLOCKS = 32
Scores = dict[str, float]


class Loop:
  """Runs a plan from its beginning or from a checkpoint.

  Every random choice is a function of the seed, the epoch and the step, and a checkpoint has
  everything else, so that a stopped run ends with the numbers of an unstopped one. It can stop
  wherever `interrupt.check` or `_stop_point` is called: the moment is whole there, because it
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
    self._settings, self._phases, self._source = settings, run.phases, source
    self._programs, self._writer, self._observer = programs, writer, observer
    self._student, self._first_teacher = run.student, run.teacher
    self._spec = programs.student
    self._targets = {phase.index for phase in target_phases(self._phases)}
    self._steps_per_epoch = source.info.train_examples // settings.train.batch_size
    self._watch = InstabilityMonitor(programs, self._steps_per_epoch)
    self._key = programs.replicate(jax.random.key(settings.seed))
    self._pending: collections.deque = collections.deque()
    self._mark = time.perf_counter(), programs.waited_seconds
    self._clock = clock
    self._saved_at = clock()
    self._meetings = 0

  def run(self, checkpoint: checkpoints.Checkpoint | None) -> run_state.RunState:
    """Trains to the end of the plan; returns at once if it is there already.

    Args:
      snapshot: where to go on; None begins.

    Returns:
      The end.

    Raises:
      Stopped: by a signal; everything is saved.
      NotFinite: a loss or gradient, more often than `recovery.retries` allows.
      ConfigError: a checkpoint could not be written or does not fit.
    """
    with interrupt.graceful():
      try:
        self._begin(checkpoint)
        while not self._to_the_end():
          self._go_back()
        self._writer.wait()
      except interrupt.Stopped as stopped:
        raise stopped.told(self._save_at_last()) from None
      except nonfinite.NotFinite:
        self._writer.wait()  # for a moment before it that is under way
        raise
    self._observer.run_done(self._run_state.progress, self._run_state.best["params"])
    return self._run_state

  def _to_the_end(self) -> bool:
    """False if a number was not finite and the run may go back."""
    try:
      for phase in phases.ahead(self._phases, self._run_state.progress):
        self._run_phase(phase)
      return True
    except nonfinite.NotFinite as error:
      retries, recovery = self._run_state.progress.retries, self._settings.recovery
      if retries >= recovery.retries:
        raise nonfinite.gives_up(error, retries, recovery.learning_rate_factor) from None
      self._observer.warned(
        f"{error} The run goes back to its last checkpoint, retry {retries + 1} of "
        f"{recovery.retries}."
      )
      return False

  def _begin(self, checkpoint: checkpoints.Checkpoint | None, bad: Progress | None = None) -> None:
    """Sets the run state: the schedule's beginning, or a checkpoint's.

    Args:
      checkpoint: where to resume; None begins.
      bad: where a run that was not finite stopped; its retries count.
    """
    progress = Progress() if checkpoint is None else run_state.progress_of(checkpoint)
    if bad is not None:
      progress.count_retry(bad, self._settings.recovery.learning_rate_factor)
    # First of all: compilation goes on in the background while weights are made or read.
    self._prepare(
      progress, evaluated(self._student, self._first_teacher) if checkpoint is None else ()
    )
    self._observer.run_started(self._phases, self._steps_per_epoch, progress)
    given = self._first_teacher.variables
    if checkpoint is None:
      state = self._programs.replicate(
        create_state(self._student.make(), self._spec, ema=self._settings.train.ema_rate > 0)
      )
      # A teacher of its own goes into every checkpoint: a run that goes on does not read the file
      # again.
      own = given if self._first_teacher.is_student else None
      self._run_state = run_state.RunState(progress, state, teacher=own)
    else:
      phase = self._phases[progress.phase - 1]
      untrained = phases.untrained(phase, progress, self._spec)
      state = self._programs.first_state(phase.program, untrained)
      sampling = aiwq.start(self._spec.convs) if phase.kind == "sampling" else None
      window = instability.start(self._spec.kernels)
      self._run_state = current = run_state.restore(
        checkpoint, run_state.Shapes(state, sampling, self._spec.shapes, window)
      )
      current.progress = progress
      arrays = self._programs.replicate((current.state, current.sampling, current.window))
      current.state, current.sampling, current.window = arrays
    teacher = given if self._run_state.teacher is None else self._run_state.teacher
    self._teacher = None if teacher is None else self._programs.replicate(teacher)
    self._stop_point()
    if checkpoint is None:
      self._evaluate_start()

  def _prepare(self, progress: Progress, evaluated_models: Sequence[Who] = ()) -> None:
    """Has the programs of what is to come compiled, and the others dropped."""
    ahead = phases.ahead(self._phases, progress)
    self._programs.prefetch(ahead, evaluated_models)

  def _evaluate_start(self) -> None:
    """What came from files is evaluated before anything is spent on it."""
    student, teacher, current = self._student, self._first_teacher, self._run_state
    if not evaluated(student, teacher):
      return
    variables = current.state.variables
    start = evaluate_start(
      self._programs, self._source, self._settings, student, teacher, variables
    )
    current.progress.start, current.progress.full_precision = start, baseline(start)
    self._observer.start_evaluated(start)

  def _go_back(self) -> None:
    """To the last checkpoint, or to the beginning where there is none, and on with lower learning
    rates.
    """
    self._pending.clear()
    self._begin(self._writer.read_newest(self._observer.warned), self._run_state.progress)
    if self._run_state.progress.begun:
      self._save()  # at once, so that the retry counts whatever happens to the run

  def _run_phase(self, phase: Phase) -> None:
    progress = self._run_state.progress
    under_way = progress.phase == phase.index
    self._observer.phase_started(
      phase, progress.epoch * self._steps_per_epoch + progress.step if under_way else 0
    )
    self._mark = time.perf_counter(), self._programs.waited_seconds
    frozen = phases.frozen(phase, progress)
    if not under_way:
      self._enter(phase)
    while progress.epoch < phase.epochs:
      self._train_epoch(phase)
      self._end_epoch(phase, frozen)

  def _enter(self, phase: Phase) -> None:
    current, progress = self._run_state, self._run_state.progress
    state = phases.calibrate(
      phase, current.state, self._programs, self._source, self._settings, self._key
    )
    before = self._phases[progress.phase - 1] if progress.phase else None
    untrained = phases.untrained(phase, progress, self._spec)
    current.state = phases.start(phase, before, state, self._programs, self._settings, untrained)
    progress.phase, progress.epoch, progress.step, progress.totals = phase.index, 0, 0, {}
    progress.phase_seconds = progress.phase_compile_seconds = 0.0
    current.sampling = None
    if phase.kind == "sampling":
      current.sampling = self._programs.replicate(aiwq.start(self._spec.convs))
      progress.ranking, progress.metric = [], {}

  def _train_epoch(self, phase: Phase) -> None:
    """The steps of one epoch that are not done yet."""
    current, progress = self._run_state, self._run_state.progress
    step = self._programs.train_step(phase.program)
    if current.sampling is not None and not progress.step:
      current.sampling = current.sampling._replace(
        has_previous=self._programs.replicate(np.zeros((), bool))
      )
    bits = self._programs.bits(phase)
    rate = np.float32(phase.learning_rate_at(progress.epoch) * progress.learning_rate_scale)
    self._epoch_started = time.perf_counter(), progress.step
    for batch in self._source.train_batches(
      progress.total_epochs, self._settings.train.batch_size, progress.step
    ):
      self._stop_point()
      self._watch.before_step(current)
      strengths = phases.strengths(
        self._phases, phase, progress, self._steps_per_epoch, self._settings
      )
      given = (
        self._programs.split(batch),
        bits,
        rate,
        self._key,
        self._teacher if phase.distill else None,
      )
      current.state, metrics, current.sampling = step(
        current.state, *given, current.sampling, strengths
      )
      progress.step += 1
      self._watch.after_step(current, phase)
      self._pending.append(metrics)
      if len(self._pending) > _STEPS_AHEAD.get(jax.default_backend(), 8):
        self._collect()
      # At an epoch's last step, what its evaluation finds should be part of it.
      if progress.step < self._steps_per_epoch and self._save_is_due():
        self._save()
    self._collect_all()
    self._stop_point()

  def _stop_point(self) -> None:
    """Stops where a signal asks for it; several processes at the same step."""
    self._observer.stop_point(self._number)
    interrupt.check()
    # All processes have met as often, and JAX wants numbers that follow on each other from 1.
    self._meetings += 1
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._meetings):
      raise interrupt.Stopped(interrupt.PREEMPTED)

  def _collect(self) -> None:
    """Adds the numbers of the oldest step under way to the epoch's."""
    progress = self._run_state.progress
    metrics = {
      name: float(value) for name, value in jax.device_get(self._pending.popleft()).items()
    }
    step = progress.step - len(self._pending)
    phase = self._phases[progress.phase - 1]
    if not metrics.pop("finite"):
      where = f"phase {phase.index} ({phase.name}), epoch {progress.epoch + 1} of {phase.epochs}, "
      where += f"step {step}"
      state, rates = (
        self._run_state.state,
        phases.learning_rates(phase, progress.epoch, progress, self._settings),
      )
      params, batch_stats = unpack(jax.device_get((state.params, state.batch_stats)))
      quantized = params if phase.weight_bits or phase.act_bits else {}
      raise nonfinite.NotFinite(
        nonfinite.describe(where, metrics["loss"], rates, quantized, batch_stats)
      )
    metrics["top1"] = 100.0 * metrics.pop("correct") / metrics.pop("examples")
    for name, value in metrics.items():
      progress.totals[name] = progress.totals.get(name, 0.0) + value
    start, steps_before = self._epoch_started
    speed = (step - steps_before) * self._settings.train.batch_size / (time.perf_counter() - start)
    self._observer.step_done(phase, metrics, speed)

  def _collect_all(self) -> None:
    while self._pending:
      self._collect()

  @property
  def _number(self) -> int:
    return self._run_state.number(self._steps_per_epoch)

  def _save_is_due(self) -> bool:
    """Whether the time between two saves is over; the same in all processes."""
    if jax.process_count() > 1 and self._run_state.progress.step % _STEPS_BETWEEN_CLOCKS:
      return False
    return distributed.on_first_host(
      lambda: self._clock() - self._saved_at >= 60.0 * self._settings.checkpoint.minutes
    )

  def _save(self) -> None:
    """Begins to save the moment; what is not finite is never saved."""
    self._collect_all()
    self._keep_time()
    run_state.save(self._writer, self._run_state, self._number)
    self._saved_at = self._clock()

  def _save_at_last(self) -> str:
    """Saves, waits for it, and says where the run stands."""
    progress = self._run_state.progress
    if not progress.begun:
      return "before its first step; the same command begins again"
    try:
      self._save()
    except nonfinite.NotFinite as error:
      return f"at a bad moment: {error} The same command goes on from the last checkpoint"
    self._writer.wait()
    place = phases.place(self._phases, progress, self._steps_per_epoch)
    return f"{place}; everything is saved, and the same command goes on from there"

  def _end_epoch(self, phase: Phase, frozen: Frozen) -> None:
    """Evaluates; then, with nothing that could stop it half-way, counts the epoch."""
    current, progress = self._run_state, self._run_state.progress
    variables, raw, clip_rate = self._evaluate(phase, current.state.variables)
    averaged = average = None
    if current.state.ema_params is not None:
      averaged, average, _ = self._evaluate(phase, current.state.ema_variables)
    if current.sampling is not None:
      progress.metric = {
        layer: float(value) for layer, value in jax.device_get(current.sampling.metric).items()
      }
    params = unpack(jax.device_get(current.state.params))
    record = phases.epoch_record(progress, phase, raw, average, clip_rate, params, self._spec)
    train, measured = (
      {name: total / progress.step for name, total in progress.totals.items()},
      progress.instability,
    )
    progress.epoch, progress.total_epochs = progress.epoch + 1, progress.total_epochs + 1
    progress.step, progress.totals, progress.instability = 0, {}, {}
    self._keep_best(phase, raw, average, {"raw": variables, "ema": averaged})
    self._keep_time()
    progress.epochs.append(record)
    self._observer.epoch_done(
      EpochReport(
        phase=phase,
        epoch=progress.epoch,
        step=int(current.state.step),
        train=train,
        evaluation=raw,
        evaluation_ema=average,
        learning_rates=phases.learning_rates(phase, progress.epoch - 1, progress, self._settings),
        clip_rate=clip_rate,
        aiwq=dict(progress.metric) if phase.kind == "sampling" else {},
        instability=measured,
        params=params,
      )
    )
    if progress.epoch == phase.epochs:
      self._end_phase(phase, frozen)
      self._save()
    elif self._save_is_due():
      self._save()

  def _evaluate(self, phase: Phase, variables: Any) -> tuple[Any, Scores, dict[str, float]]:
    """What was evaluated, too: its batch statistics may be estimated anew."""
    given, epoch = (
      (self._programs, self._source, self._settings),
      self._run_state.progress.total_epochs,
    )
    variables = phases.for_evaluation(phase, epoch, variables, *given, self._key)
    return variables, *evaluate(
      *given, variables, weight_bits=phase.weight_bits, act_bits=phase.act_bits
    )

  def _keep_time(self) -> None:
    """Adds what has passed since the last call to the phase: calibration, training, evaluation, the
    last save.
    """
    progress, now = self._run_state.progress, (time.perf_counter(), self._programs.waited_seconds)
    progress.phase_seconds += now[0] - self._mark[0]
    progress.phase_compile_seconds += now[1] - self._mark[1]
    self._mark = now

  def _keep_best(
    self, phase: Phase, raw: Scores, average: Scores | None, variables: dict[str, Any]
  ) -> None:
    """The first of equals stays; variables are those that were evaluated."""
    current, progress = self._run_state, self._run_state.progress
    full_precision, target = phase.kind == "full_precision", phase.index in self._targets
    found = phases.better(phase, progress, raw, average)
    if full_precision and (
      progress.full_precision is None or found.top1 > progress.full_precision.top1
    ):
      progress.full_precision = found
    if target and (progress.best is None or found.top1 > progress.best.top1):
      progress.best = found
      current.best = run_state.host_copy(variables[found.weights])

  def _end_phase(self, phase: Phase, frozen: Frozen) -> None:
    current, progress = self._run_state, self._run_state.progress
    last = progress.epochs[-1]
    if phase.kind == "sampling":
      progress.ranking = list(aiwq.rank(progress.metric))
    self._prepare(progress)
    if (
      phase.kind == "full_precision"
      and self._teacher is None
      and any(p.distill for p in self._phases)
    ):
      better_ema = last.top1_ema is not None and last.top1_ema > last.top1
      current.teacher = run_state.host_copy(
        current.state.ema_variables if better_ema else current.state.variables
      )
      self._teacher = self._programs.replicate(current.teacher)
    record = phases.phase_record(phase, progress, self._steps_per_epoch, frozen)
    progress.records.append(record)
    self._observer.phase_done(record)
