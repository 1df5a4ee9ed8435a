"""Trains any model made of `profit_jax.nn` on any batches.

    trainer = Trainer(Net(), profit_schedule(weight_bits=(8, 4), act_bits=(8, 4)), "runs/net")
    result = trainer.fit(data)

`train` is the part that the command line shares; `Trainer` is the library's side.
"""

import contextlib
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from profit_jax import __version__, checkpoints, distributed, paths
from profit_jax.config import (
  CheckpointSettings,
  ConfigError,
  DataSettings,
  OscillationSettings,
  QuantSettings,
  RecoverySettings,
  Settings,
  TrainSettings,
  check_rules,
  check_training,
)
from profit_jax.data.base import HostShard
from profit_jax.data.batches import BatchSource, Data
from profit_jax.data.normalize import Normalization
from profit_jax.fields import as_lists, listed
from profit_jax.nn.rules import Rule, policy_quantizer, with_rules
from profit_jax.nn.spec import ModelSpec, describe, never_quantized
from profit_jax.quant import Bits, DuQ, Quantizer
from profit_jax.schedule import Phase, with_separate_bn_programs
from profit_jax.train import run_directory
from profit_jax.train.loop import Loop
from profit_jax.train.mesh import default_dtype, make_mesh
from profit_jax.train.observer import Observer, Observers
from profit_jax.train.optimizer import OptimizerFactory
from profit_jax.train.programs import Programs
from profit_jax.train.progress import EpochRecord, PhaseRecord
from profit_jax.train.run import Run
from profit_jax.train.run_state import RunState, SavedRun, opened
from profit_jax.train.start import Student, Teacher
from profit_jax.train.steps import LossFunction

Variables = dict[str, Any]


def claim(
  workdir: epath.Path,
  identity: run_directory.Identity,
  keep: int,
  closing: contextlib.ExitStack,
) -> checkpoints.Writer:
  """Makes a directory a run's, until `closing`; gives the writer of its checkpoints.

  Args:
    workdir: the directory.
    identity: of the run.
    keep: checkpoints that stay.
    closing: releases the directory, after the last checkpoints are written.

  Raises:
    ConfigError: the directory is in use or another run's, or cannot be written.
  """

  def claim_it():
    # In this order: of two that start together, the second must not find the first one's files half
    # written.
    closing.enter_context(run_directory.hold(workdir))
    run_directory.claim_workdir(workdir, identity)

  distributed.on_first_host(claim_it)
  # A directory that only the first process sees.
  distributed.on_all_hosts(lambda: run_directory.read_data(workdir))
  writer = checkpoints.Writer(workdir / "checkpoints", keep=keep)

  def close(error, *_):
    # After an error in this process alone, closing would wait for the others; and the first error
    # is the one to tell.
    if error is None:
      writer.close()
    elif jax.process_count() == 1:
      with contextlib.suppress(Exception):
        writer.close()

  closing.push(close)
  return writer


def train(
  run: Run,
  writer: checkpoints.Writer,
  saved: SavedRun | None,
  mesh: Mesh,
  observers: Sequence[Observer],
  clock: Callable[[], float] = time.monotonic,
) -> RunState:
  """Trains to the end of the schedule.

  Args:
    run: what is trained.
    writer: of checkpoints.
    saved: where to resume; None begins.
    mesh: of the devices.
    observers: told of everything, and closed.
    clock: in seconds; decides when `checkpoint.minutes` are over.

  Returns:
    The end. Raises as `Loop.run`.
  """
  observer = Observers(observers)
  with contextlib.ExitStack() as closing:
    closing.callback(observer.close)
    programs = Programs(
      run.settings,
      run.source.info,
      run.student.spec,
      run.teacher.spec,
      mesh,
      run.student.file_spec,
      image_dtype=run.image_dtype,
      loss=run.loss,
      optimizer_factory=run.optimizer,
    )
    closing.callback(programs.close)
    return Loop(run, programs, writer, observer, clock).run(saved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Settings of a run other than its schedule; the defaults are the command line's.

  Attributes:
    train: SGD, average of the weights, arithmetic. Batch sizes and learning rates are those of the
      data and of the schedule.
    oscillation: remedies for weights that oscillate.
    checkpoint: how many stay, and how often one is written.
    recovery: retries after numbers that are not finite.
    sampling_every: AIWQ is measured on every n-th image of a batch.
    devices: that the run uses; None is all.
    clock: in seconds; decides when the minutes between two checkpoints are over.
  """

  train: TrainSettings = TrainSettings()
  oscillation: OscillationSettings = OscillationSettings()
  checkpoint: CheckpointSettings = CheckpointSettings()
  recovery: RecoverySettings = RecoverySettings()
  sampling_every: int = 1
  devices: Sequence[jax.Device] | None = None
  clock: Callable[[], float] = time.monotonic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What a run ended with.

  Attributes:
    top1: in percent, the best evaluation of the phases at the last bits.
    top5: likewise, among the five highest outputs, or all if there are fewer.
    full_precision_top1: the best of the full-precision phase; None without one.
    weights: which of them it was, `raw` or `ema`.
    variables: these, on the host: `params` and `batch_stats`.
    bits: widths and quantizer of the last phases, for `model.apply(variables, x, bits)`.
    spec: the model, and what its layers say of themselves.
    phases: the finished phases.
    epochs: every epoch's evaluation, and what was measured in it.
    class_names: of the data; empty without.
    normalization: of uint8 images; None where images are floats.
    seed: of the run.
    train_examples: of an epoch.
    workdir: of the run.
  """

  top1: float
  top5: float
  full_precision_top1: float | None
  weights: str
  variables: Variables
  bits: Bits
  spec: ModelSpec
  phases: tuple[PhaseRecord, ...]
  epochs: tuple[EpochRecord, ...]
  class_names: tuple[str, ...]
  normalization: Normalization | None
  seed: int
  train_examples: int
  workdir: epath.Path


class Trainer:
  """A model, a schedule, and where the run is kept."""

  def __init__(  # noqa: PLR0913  all but three have defaults
    self,
    model: nn.Module,
    schedule: Sequence[Phase],
    workdir: str | os.PathLike[str],
    *,
    quantizer: Quantizer = DuQ(),
    rules: Sequence[Rule] = (),
    policy: str = QuantSettings.policy,
    loss: LossFunction | None = None,
    optimizer: OptimizerFactory | None = None,
    teacher: tuple[nn.Module, Variables] | None = None,
    variables: Variables | None = None,
    callbacks: Sequence[Observer] = (),
    options: Options = Options(),
  ):
    """Args:
    model: `model(x, bits, train)`: one array `[N, H, W, C]` to one array `[N, classes]`.
    schedule: of `profit_schedule`.
    workdir: the run's directory, local or remote. A run that is there is resumed.
    quantizer: of all layers.
    rules: bits of single layers, as `(("head", 8, 8), (r".*depthwise.*", 8, None))`: a regular
      expression of a layer's whole path, the bits of its kernel, and those of the quantizer that
      feeds it. 2 to 8 are least bits; None is as the schedule says; "float" never quantizes.
    policy: rules by name, after `rules`: "profit" (none), "lsq_paper" (first and last layer at 8
      bits) or "brevitas" (first layer at 8 bits, kernels with scalars for each channel).
    loss: `(logits [N, classes], labels [N]) -> losses [N]`; None is the cross-entropy.
    optimizer: `learning_rate -> optax.GradientTransformation`, as `optax.adamw`, for weights and
      norms; None is SGD with Nesterov momentum. The schedule gives the learning rate, each epoch.
    teacher: a model and its variables, in full precision; the student also learns its outputs.
    variables: first `params` and `batch_stats`; what is left out is drawn.
    callbacks: told of every event, in every process.
    options: everything else.

    Raises:
      ConfigError: no schedule, a directory that cannot be reached, or rules that are none.
    """
    check_rules(rules, "Trainer's rules")
    policies = get_args(get_type_hints(QuantSettings)["policy"])
    if policy not in policies:
      raise ConfigError(
        f"policy = {policy!r} is not allowed: it must be one of {listed(policies)}."
      )
    # Own and joined schedules are numbered anew: a run counts its phases.
    phases = tuple(
      dataclasses.replace(phase, index=index) for index, phase in enumerate(schedule, 1)
    )
    if not phases:
      raise ConfigError("The schedule has no phase. Use profit_schedule(...).")
    distills = any(phase.distill for phase in phases)
    if teacher is None and distills:
      raise ConfigError(
        "The schedule has phases with a teacher, but Trainer was given none. Give teacher=(model, "
        "variables), or make the schedule without teacher=True."
      )
    if teacher is not None and not distills:
      phases = tuple(dataclasses.replace(phase, distill=True) for phase in phases)
    if options.oscillation.in_training:
      phases = with_separate_bn_programs(phases)
    self._model, self._phases = model, phases
    self._workdir = paths.opened("workdir", os.fspath(workdir))
    self._quantizer = policy_quantizer(policy, quantizer)
    self._rules, self._policy = tuple(map(tuple, rules)), policy
    self._loss, self._optimizer = loss, optimizer
    self._teacher, self._variables = teacher, variables
    self._callbacks, self._options = tuple(callbacks), options

  def fit(self, data: Data, seed: int = 0) -> Result:
    """Trains to the end of the schedule, and resumes if the run has begun.

    A run that was stopped and resumed ends with the same bits as one that was not, on the same
    machine and with the same batches.

    Args:
      data: the batches.
      seed: of first weights and dropout.

    Raises:
      ConfigError: a model, data or directory that cannot be used.
      NotFinite: a loss or gradient, more often than `options.recovery` allows.
      Stopped: by SIGINT or SIGTERM; everything is saved.
    """
    options = self._options
    host = HostShard(jax.process_index(), jax.process_count())
    source = distributed.on_all_hosts(lambda: BatchSource(data, host))
    bits = Bits(quantizer=self._quantizer, aiwq_every=options.sampling_every)
    spec = describe(self._model, source.image_shape, bits)
    spec = with_rules(spec, self._rules, self._policy, "Trainer's rules")
    source.num_classes = spec.outputs
    _check_layers(spec, self._phases)
    settings = self._settings(seed, source)
    _check_options(dataclasses.replace(options, train=settings.train), self._quantizer)
    student = Student(spec, lambda: self._first_variables(spec, seed), None, None)
    teacher = Teacher(None, None, None)
    if self._teacher is not None:
      model, variables = self._teacher
      teacher_spec = describe(model, source.image_shape, bits)
      if teacher_spec.outputs != spec.outputs:
        raise ConfigError(
          f"The teacher has {teacher_spec.outputs} outputs, the model {spec.outputs}: both must "
          "have the same classes."
        )
      teacher = Teacher(teacher_spec, _filled(teacher_spec, variables, "teacher", {}), None)
    run = Run(
      settings,
      self._phases,
      source,
      student,
      teacher,
      source.image_dtype,
      self._loss,
      self._optimizer,
    )
    identity = self._identity(settings, spec, source)
    distributed.require_equal("run", json.dumps(identity, sort_keys=True, default=str))
    with distributed.peers_needed(), contextlib.ExitStack() as closing:
      writer = claim(self._workdir, identity, options.checkpoint.keep, closing)
      saved = opened(writer.read_newest(lambda text: warnings.warn(text, stacklevel=2)))
      for callback in self._callbacks:
        callback.opened(self._workdir)
      mesh = make_mesh(settings, options.devices)
      end = train(run, writer, saved, mesh, self._callbacks, options.clock)
    return self._result(end, spec, data, source, seed)

  def _settings(self, seed: int, source: BatchSource) -> Settings:
    options, size = self._options, source.batch_size
    dtype = options.train.dtype
    if dtype == "auto":
      config = self._workdir / "config.json"
      devices = options.devices or jax.devices()
      dtype = default_dtype(devices[0].platform)
      if config.exists():  # a run keeps what it began with
        dtype = run_directory.read_config(self._workdir).get("train", {}).get("dtype", dtype)
    train_settings = dataclasses.replace(
      options.train, batch_size=size, eval_batch_size=size, dtype=dtype
    )
    return Settings(
      seed=seed,
      data=DataSettings(name="Data.eval"),
      train=train_settings,
      oscillation=options.oscillation,
      checkpoint=options.checkpoint,
      recovery=options.recovery,
    )

  def _first_variables(self, spec: ModelSpec, seed: int) -> Variables:
    drawn = jax.device_get(spec.init(jax.random.key(seed)))
    return drawn if self._variables is None else _filled(spec, self._variables, "variables", drawn)

  def _identity(
    self, settings: Settings, spec: ModelSpec, source: BatchSource
  ) -> run_directory.Identity:
    shapes = traverse_util.flatten_dict(spec.shapes["params"], sep="/")
    config = {
      "library": __version__,
      "model": type(self._model).__name__,
      "params": {name: list(leaf.shape) for name, leaf in shapes.items()},
      "quantizer": {
        "method": self._quantizer.method,
        **dataclasses.asdict(self._quantizer),
        "rules": self._rules,
        "policy": self._policy,
        "sampling_every": self._options.sampling_every,
      },
      "schedule": [dataclasses.asdict(phase) for phase in self._phases],
      "loss": self._loss is not None,
      "optimizer": self._optimizer is not None,
      "teacher": self._teacher is not None,
      "seed": settings.seed,
      "train": dataclasses.asdict(settings.train),
      "oscillation": dataclasses.asdict(settings.oscillation),
      "checkpoint": dataclasses.asdict(settings.checkpoint),
      "recovery": dataclasses.asdict(settings.recovery),
    }
    plain = json.loads(json.dumps(as_lists(config), default=_plain))
    return run_directory.Identity(plain, run_directory.data_identity(source))

  def _result(
    self, end: RunState, spec: ModelSpec, data: Data, source: BatchSource, seed: int
  ) -> Result:
    progress, last = end.progress, self._phases[-1]
    full_precision = progress.full_precision
    return Result(
      top1=progress.best.top1,
      top5=progress.best.top5,
      full_precision_top1=full_precision and full_precision.top1,
      weights=progress.best.weights,
      variables=end.best,
      bits=spec.bits.at(last.weight_bits, last.act_bits),
      spec=spec,
      phases=tuple(progress.records),
      epochs=tuple(progress.epochs),
      class_names=tuple(data.class_names),
      normalization=source.info.normalization if source.image_dtype == np.uint8 else None,
      seed=seed,
      train_examples=source.info.train_examples,
      workdir=self._workdir,
    )


def _plain(value: Any) -> Any:
  """NumPy's numbers, for JSON."""
  return value.item() if isinstance(value, np.generic) else str(value)


def _filled(spec: ModelSpec, given: Variables, what: str, drawn: Variables) -> Variables:
  """Given variables, and drawn ones for what they lack.

  Raises:
    ConfigError: a variable that the model does not have, or has in another shape; one that is
      nowhere.
  """
  shapes = traverse_util.flatten_dict(spec.shapes, sep="/")
  found = traverse_util.flatten_dict(drawn, sep="/")
  for name, value in traverse_util.flatten_dict(jax.device_get(dict(given)), sep="/").items():
    if name not in shapes or np.shape(value) != shapes[name].shape:
      shape = shapes[name].shape if name in shapes else "no such variable"
      raise ConfigError(
        f"{what} has {name} of the shape {np.shape(value)}, but the model has {shape}. Give "
        "variables of this model, as model.init and trained results have them."
      )
    found[name] = np.asarray(value, shapes[name].dtype)
  if missing := sorted(shapes.keys() - found.keys()):
    raise ConfigError(f"{what} lacks {', '.join(missing[:5])}. Give all variables of the model.")
  return {"batch_stats": {}, **traverse_util.unflatten_dict(found, sep="/")}


def _check_options(options: Options, quantizer: Quantizer) -> None:
  """Checks what a configuration's parser checks, under the names of `Options`."""
  try:
    check_training(
      options.train,
      options.oscillation,
      options.checkpoint,
      options.recovery,
      options.sampling_every,
    )
  except ConfigError as error:
    raise ConfigError(str(error).replace("config.", "Options.")) from None
  if options.oscillation.in_training and not quantizer.one_interval:
    raise ConfigError(
      f"Options.oscillation is not allowed with {type(quantizer).__name__}: it needs a quantizer "
      "whose codes come from one interval, as DuQ or LSQ."
    )


def _check_layers(spec: ModelSpec, phases: Sequence[Phase]) -> None:
  """Checks that there is something to quantize where a schedule does."""
  kinds = {layer.kind for layer in spec.layers.values()}
  name = type(spec.model).__name__
  if any(phase.weight_bits for phase in phases) and not kinds & {"conv", "dense"}:
    raise ConfigError(
      f"{name} never quantizes its weights: it has no QuantConv or QuantDense. Use them instead of "
      "nn.Conv and nn.Dense, or give the schedule weight_bits=()."
    )
  if any(phase.act_bits for phase in phases) and "act" not in kinds:
    raise ConfigError(
      f"{name} never quantizes its activations: it has no QuantAct. Put one before each QuantConv "
      "and QuantDense, or give the schedule act_bits=()."
    )
  weights = any(phase.weight_bits for phase in phases)
  acts = any(phase.act_bits for phase in phases)
  if (weights or acts) and (silent := never_quantized(spec, weights, acts)):
    raise ConfigError(
      f"The layer {silent[0]} is called without bits, so that it is never quantized. Call it with "
      "bits, as layer(x, bits); or use nn.Conv or nn.Dense."
    )
