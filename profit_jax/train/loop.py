"""The run: phases in order, epochs in each, a checkpoint after every epoch."""

import collections
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from profit_jax.data import Source
from profit_jax.models import variable_shapes
from profit_jax.plan import Phase, target_phases
from profit_jax.quant.levels import levels
from profit_jax.settings import Settings
from profit_jax.train import aiwq
from profit_jax.train.checkpoint import Checkpoints
from profit_jax.train.evaluate import evaluate
from profit_jax.train.observer import EpochReport, Observer
from profit_jax.train.optimizer import FROZEN, NORM, QUANT, WEIGHT
from profit_jax.train.programs import Frozen, Programs
from profit_jax.train.progress import Best, EpochRecord, PhaseRecord, Progress
from profit_jax.train.start import Student, Teacher, evaluate_start, evaluated
from profit_jax.train.state import TrainState, create_state

# How many steps may be under way before the loop waits for the oldest one's numbers: enough that no device runs dry,
# few enough that the progress bar tells the present.
_STEPS_AHEAD = 8


class Loop:
  """Runs a plan from its beginning or from its newest checkpoint.

  Every random choice is a function of the seed, the epoch and the step, so that a stopped run ends with the numbers of an
  unstopped one.
  """

  def __init__(
    self,
    *,
    settings: Settings,
    phases: tuple[Phase, ...],
    source: Source,
    programs: Programs,
    checkpoints: Checkpoints,
    observer: Observer,
    student: Student,
    teacher: Teacher,
  ):
    """Args:
    settings: validated.
    phases: `plan(settings)`.
    source: the data.
    programs: compiled steps.
    checkpoints: where the run is kept.
    observer: told of everything.
    student: its module and first weights.
    teacher: its module and weights, as far as they exist.
    """
    self._settings, self._phases, self._source = settings, phases, source
    self._programs, self._checkpoints, self._observer = programs, checkpoints, observer
    self._student, self._first_teacher = student, teacher
    self._shapes = variable_shapes(student.model, settings.data.image_size)
    self._teacher = None if teacher.variables is None else programs.replicate(teacher.variables)
    self._targets = {phase.index for phase in target_phases(phases)}
    self._steps_per_epoch = source.facts.train_examples // settings.train.batch_size
    self._mark = time.perf_counter(), programs.waited_seconds
    self._key = programs.replicate(jax.random.key(settings.seed))

  def run(self) -> Progress:
    """Trains to the end of the plan; returns at once if it is there already."""
    progress = self._checkpoints.restore_progress() or Progress()
    # First of all: compilation goes on in the background while weights are made or read.
    if not progress.total_epochs:
      self._programs.prefetch_evaluation(*evaluated(self._student, self._first_teacher))
    finished = progress.total_epochs and progress.epoch == self._phases[progress.phase - 1].epochs
    ahead = self._phases[progress.phase - (0 if finished else 1) :]
    self._programs.prefetch(ahead, lambda phase: self._known_frozen(phase, progress))
    self._observer.run_started(self._phases, self._steps_per_epoch, progress)
    state = self._restore(progress)
    if not progress.total_epochs:
      self._evaluate_start(state, progress)
    for phase in self._phases[progress.phase - 1 :]:
      state = self._run_phase(phase, state, progress)
    self._checkpoints.wait()
    self._observer.run_done(progress, self._checkpoints.restore_best(self._shapes)["params"])
    return progress

  def _restore(self, progress: Progress) -> TrainState:
    if not progress.total_epochs:
      if self._teacher is not None and self._settings.teacher.model == "self":
        self._checkpoints.save_teacher(self._first_teacher.variables)  # a run that goes on does not read the file again
      state = create_state(self._student.make(), ema=self._settings.train.ema_rate > 0)
      return self._programs.replicate(state)
    phase = self._phases[progress.phase - 1]
    template = self._programs.state_shapes(phase.program.train_kernels, self._frozen(phase, progress))
    state = self._programs.replicate(self._checkpoints.restore_state(template))
    own_teacher = self._checkpoints.restore_teacher(self._shapes)
    if own_teacher is not None:
      self._teacher = self._programs.replicate(own_teacher)
    return state

  def _evaluate_start(self, state: TrainState, progress: Progress) -> None:
    """What came from files is evaluated before anything is spent on it."""
    student, teacher = self._student, self._first_teacher
    if not evaluated(student, teacher):
      return
    start = evaluate_start(self._programs, self._source, self._settings, student, teacher, state.variables)
    # A new classifier is no baseline, nor is a net that was trained quantized.
    if start.top1 is not None and not start.new_head and not start.quantized:
      top1 = max(start.top1, start.file_top1 or 0.0)
      progress.full_precision = Best(epoch=0, phase=0, top1=top1, top5=start.top5, weights="raw", examples=start.examples)
    progress.start = start
    self._observer.start_evaluated(start)

  def _run_phase(self, phase: Phase, state: TrainState, progress: Progress) -> TrainState:
    if progress.phase == phase.index and progress.epoch == phase.epochs:
      return state  # its last epoch was the newest checkpoint
    if progress.phase != phase.index:
      progress.phase, progress.epoch = phase.index, 0
      progress.phase_seconds = progress.phase_compile_seconds = 0.0
    self._observer.phase_started(phase, progress.epoch)
    self._mark = time.perf_counter(), self._programs.waited_seconds
    frozen = self._frozen(phase, progress)
    sampling = None
    if progress.epoch == 0:
      state = self._calibrate(phase, state)
      state = self._programs.fresh_optimizer(state, phase.program.train_kernels, frozen)
      if phase.kind == "sampling":
        progress.ranking, progress.metric = [], {}
    if phase.kind == "sampling":
      sampling = aiwq.start(state.params)
      metric = {layer: np.float32(value) for layer, value in progress.metric.items()}
      sampling = self._programs.replicate(sampling._replace(metric={**sampling.metric, **metric}))

    while progress.epoch < phase.epochs:
      state, sampling = self._run_epoch(phase, state, sampling, frozen, progress)
      if progress.epoch == phase.epochs:
        self._end_phase(phase, state, frozen, progress)
      self._checkpoints.save(state, progress)
    return state

  def _run_epoch(
    self, phase: Phase, state: TrainState, sampling: aiwq.AiwqState | None, frozen: Frozen, progress: Progress
  ) -> tuple[TrainState, aiwq.AiwqState | None]:
    if sampling is not None:
      sampling = sampling._replace(has_previous=self._programs.replicate(np.zeros((), bool)))
    state, sampling, train = self._train_epoch(phase, state, sampling, frozen, progress)
    progress.epoch += 1
    progress.total_epochs += 1
    if sampling is not None:
      progress.metric = {layer: float(value) for layer, value in jax.device_get(sampling.metric).items()}
    raw, clip_rate = self._evaluate(phase, state.variables)
    average = None if state.ema_params is None else self._evaluate(phase, state.ema_variables)[0]
    self._keep_best(phase, state, raw, average, progress)

    self._keep_time(progress)
    record = EpochRecord(phase=phase.index, top1=raw["top1"], top1_ema=average and average["top1"], loss=train["loss"])
    progress.epochs.append(record)
    self._observer.epoch_done(
      EpochReport(
        phase=phase,
        epoch=progress.epoch,
        step=int(state.step),
        train=train,
        evaluation=raw,
        evaluation_ema=average,
        learning_rates=self._learning_rates(phase, progress.epoch - 1),
        clip_rate=clip_rate,
        aiwq=dict(progress.metric) if phase.kind == "sampling" else {},
        params=state.params,
      )
    )
    return state, sampling

  def _evaluate(self, phase: Phase, variables: Any) -> tuple[dict[str, float], dict[str, float]]:
    bits = {"weight_bits": phase.weight_bits, "act_bits": phase.act_bits}
    return evaluate(self._programs, self._source, self._settings, variables, **bits)

  def _keep_time(self, progress: Progress) -> None:
    """Adds what has passed since the last call to the phase: calibration, training, evaluation, the last save."""
    now = time.perf_counter(), self._programs.waited_seconds
    progress.phase_seconds += now[0] - self._mark[0]
    progress.phase_compile_seconds += now[1] - self._mark[1]
    self._mark = now

  def _train_epoch(self, phase, state, sampling, frozen, progress):
    """The steps of one epoch, and the means of their metrics."""
    step = self._programs.train_step(phase.program, frozen)
    phase_levels = levels(phase.weight_bits, phase.act_bits)
    rate = np.float32(phase.learning_rate_at(progress.epoch))
    teacher = self._teacher if phase.distill else None
    batch_size = self._settings.train.batch_size
    pending, totals = collections.deque(), collections.Counter()
    start = time.perf_counter()

    def collect():
      metrics = {name: float(value) for name, value in jax.device_get(pending.popleft()).items()}
      metrics["top1"] = 100.0 * metrics.pop("correct") / metrics.pop("examples")
      totals.update(metrics)
      totals["steps"] += 1
      speed = totals["steps"] * batch_size / (time.perf_counter() - start)
      self._observer.step_done(phase, metrics, speed)

    for batch in self._source.train_batches(progress.total_epochs, batch_size):
      state, metrics, sampling = step(state, self._programs.split(batch), phase_levels, rate, self._key, teacher, sampling)
      pending.append(metrics)
      if len(pending) > _STEPS_AHEAD:
        collect()
    while pending:
      collect()
    steps = totals.pop("steps")
    return state, sampling, {name: total / steps for name, total in totals.items()}

  def _calibrate(self, phase: Phase, state: TrainState) -> TrainState:
    """First values of a and c where a kind is quantized for the first time, of the student and of its average."""
    if phase.calibrate is None:
      return state
    if phase.calibrate == "weight":
      calibrate = self._programs.calibrate_weights()
      state = state.replace(params=calibrate(state.params))
      return state if state.ema_params is None else state.replace(ema_params=calibrate(state.ema_params))
    # The same batch whenever it is asked for: epoch 0's first.
    batch = next(iter(self._source.train_batches(0, self._settings.train.batch_size)))
    part = {"image": batch["image"][:: self._settings.train.accumulation_steps]}
    image = self._programs.split(part)["image"]
    calibrate = self._programs.calibrate_acts()
    state = state.replace(params=calibrate(state.variables, image, self._key))
    if state.ema_params is None:
      return state
    return state.replace(ema_params=calibrate(state.ema_variables, image, self._key))

  def _keep_best(self, phase, state, raw, average, progress):
    """The better of the raw weights and their average counts; the first of equals stays."""
    full_precision, target = phase.kind == "full_precision", phase.index in self._targets
    choices = [("raw", raw)] + ([("ema", average)] if average else [])
    weights, chosen = max(choices, key=lambda choice: choice[1]["top1"])
    found = Best(
      epoch=progress.total_epochs,
      phase=phase.index,
      top1=chosen["top1"],
      top5=chosen["top5"],
      weights=weights,
      examples=int(chosen["examples"]),
    )
    if full_precision and (progress.full_precision is None or found.top1 > progress.full_precision.top1):
      progress.full_precision = found
    if target and (progress.best is None or found.top1 > progress.best.top1):
      progress.best = found
      self._checkpoints.save_best(found.epoch, state.ema_variables if weights == "ema" else state.variables)

  def _end_phase(self, phase: Phase, state: TrainState, frozen: Frozen, progress: Progress) -> None:
    last = progress.epochs[-1]
    if phase.kind == "sampling":
      progress.ranking = list(aiwq.rank(progress.metric))
      self._programs.prefetch(self._phases[phase.index :], lambda later: self._known_frozen(later, progress))
    if phase.kind == "full_precision" and self._teacher is None and any(p.distill for p in self._phases):
      better_ema = last.top1_ema is not None and last.top1_ema > last.top1
      own = state.ema_variables if better_ema else state.variables
      self._checkpoints.save_teacher(own)
      self._teacher = self._programs.replicate(own)
    record = PhaseRecord(
      index=phase.index,
      name=phase.name,
      kind=phase.kind,
      weight_bits=phase.weight_bits,
      act_bits=phase.act_bits,
      epochs=phase.epochs,
      steps=phase.epochs * self._steps_per_epoch,
      top1=last.top1,
      top1_ema=last.top1_ema,
      loss=last.loss,
      seconds=progress.phase_seconds,
      compile_seconds=progress.phase_compile_seconds,
      frozen=sorted(frozen),
    )
    progress.records.append(record)
    self._observer.phase_done(record)

  def _frozen(self, phase: Phase, progress: Progress) -> Frozen:
    return aiwq.frozen_layers(progress.ranking, phase.frozen_fraction)

  def _known_frozen(self, phase: Phase, progress: Progress) -> Frozen | None:
    """The frozen set of a phase to come; None while its sampling phase has not ended."""
    ranked_by = [p.index for p in self._phases[: phase.index - 1] if p.kind == "sampling"][-1:]
    under_way = ranked_by == [progress.phase] and not progress.ranking
    if phase.frozen_fraction and (under_way or ranked_by > [progress.phase]):
      return None
    return self._frozen(phase, progress)

  def _learning_rates(self, phase: Phase, epoch: int) -> dict[str, float]:
    rate = phase.learning_rate_at(epoch)
    return {
      WEIGHT: rate if phase.program.train_kernels else 0.0,
      NORM: rate,
      QUANT: rate * self._settings.train.quantizer_lr_scale,
      FROZEN: 0.0,
    }


def summary(progress: Progress, phases: tuple[Phase, ...]) -> dict[str, Any]:
  """The parts of `result.json` that the loop knows: phases, aiwq, final."""
  best = progress.best
  return {
    "phases": [dataclasses.asdict(record) for record in progress.records],
    "aiwq": [
      {"layer": layer, "metric": progress.metric[layer], "rank": rank} for rank, layer in enumerate(progress.ranking, 1)
    ],
    "final": {
      "weight_bits": phases[-1].weight_bits,
      "act_bits": phases[-1].act_bits,
      "top1": best.top1,
      "top5": best.top5,
      "weights": best.weights,
      "full_precision_top1": progress.full_precision and progress.full_precision.top1,
      "examples": best.examples,
    },
  }
