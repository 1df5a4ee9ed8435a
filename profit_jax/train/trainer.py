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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from profit_jax import __version__, checkpoints, devices, distributed, paths
from profit_jax.config import (
  CheckpointSettings,
  ConfigError,
  DataSettings,
  Dtype,
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
from profit_jax.nn.spec import QUANT, ModelSpec, check_training_pass, describe, never_quantized
from profit_jax.quant import Bits, DuQ, Quantizer
from profit_jax.schedule import Phase, with_separate_bn_programs
from profit_jax.train import run_directory
from profit_jax.train.loop import Loop
from profit_jax.train.mesh import default_dtype, make_mesh
from profit_jax.train.observer import Observer, Observers
from profit_jax.train.optimizer import OptimizerFactory, check_factory
from profit_jax.train.programs import Programs
from profit_jax.train.progress import EpochRecord, PhaseRecord
from profit_jax.train.run import Run
from profit_jax.train.run_state import RunState, SavedRun, opened
from profit_jax.train.start import Student, Teacher
from profit_jax.train.steps import LossFunction
from profit_jax.typing import Variables
from profit_jax.weights.load import Loaded, is_first_scalar

_SHOWN = 5  # names in a message


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
    start_top1: of the given `variables` before training, in full precision; None without.
    full_precision_top1: the best of the full-precision phase and of given `variables` that are
      whole and were not trained quantized; None without either.
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
  start_top1: float | None
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
    optimizer: `learning_rate -> optax.GradientTransformation`, as `optax.adamw`. It updates the
      weights and, separately, the norms; the quantizers keep their own. It starts anew in each
      phase. The learning rate is an array, which the schedule sets in each epoch. None is SGD with
      Nesterov momentum.
    teacher: a model and its variables, in full precision; the student also learns its outputs.
    variables: first `params` and `batch_stats`; what is left out is drawn. They are evaluated
      before training; see `Result.start_top1`.
    callbacks: told of every event, in every process.
    options: everything else.

    Raises:
      ConfigError: an argument of another type, no schedule, a directory that cannot be reached, or
        rules that are none.
    """
    _require_types(schedule, quantizer, teacher, callbacks, options)
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
      ConfigError: a model, data, directory or device that cannot be used.
      NotFinite: a loss or gradient, more often than `options.recovery` allows.
      Stopped: by SIGINT or SIGTERM; everything is saved.
    """
    if not isinstance(data, Data):
      raise ConfigError(
        f"Trainer.fit was given a {type(data).__name__}: it takes batches as Data(train=..., "
        "eval=..., steps_per_epoch=...)."
      )
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
      raise ConfigError(
        f"seed = {seed!r} is not allowed: it must be a whole number, 0 to 2^32 - 1."
      )
    devices.require()
    options = self._options
    host = HostShard(jax.process_index(), jax.process_count())
    source = distributed.on_all_hosts(lambda: BatchSource(data, host))
    distributed.require_equal("batches (shape, dtype or steps_per_epoch)", source.described())
    bits = Bits(quantizer=self._quantizer, aiwq_every=options.sampling_every)
    spec = describe(self._model, source.image_shape, bits)
    spec = with_rules(spec, self._rules, self._policy, "Trainer's rules")
    source.num_classes = spec.outputs
    _check_layers(spec, self._phases)
    check_training_pass(spec)
    if self._optimizer is not None:
      check_factory(self._optimizer, spec)
    settings = self._settings(seed, source)
    _check_options(dataclasses.replace(options, train=settings.train), self._quantizer)
    _check_batch_size(source, settings, options.devices)
    student = self._student(spec, seed)
    teacher = Teacher(None, None, None)
    if self._teacher is not None:
      model, variables = self._teacher
      teacher_spec = describe(model, source.image_shape, bits)
      if teacher_spec.outputs != spec.outputs:
        raise ConfigError(
          f"The teacher has {teacher_spec.outputs} outputs, the model {spec.outputs}: both must "
          "have the same classes."
        )
      given = _checked_variables(teacher_spec, variables, "teacher")
      teacher = Teacher(teacher_spec, _filled(teacher_spec, given, {}), None)
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
    distributed.require_equal(
      "arguments of Trainer", json.dumps(identity, sort_keys=True, default=str)
    )
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
    dtype: Dtype = options.train.dtype
    if dtype == "auto":
      config = self._workdir / "config.json"
      devices = options.devices or jax.devices()
      dtype = default_dtype(devices[0].platform)
      if config.exists():  # a run keeps what it began with
        dtype = run_directory.read_config(self._workdir).get("train", {}).get("dtype", dtype)
    train_settings = dataclasses.replace(options.train, batch_size=size, eval_batch_size=size)
    return Settings(
      seed=int(seed),
      data=DataSettings(name="Data.eval"),
      train=train_settings,
      oscillation=options.oscillation,
      checkpoint=options.checkpoint,
      recovery=options.recovery,
    ).with_dtype(dtype)

  def _student(self, spec: ModelSpec, seed: int) -> Student:
    def drawn() -> Variables:
      return jax.device_get(spec.init(jax.random.key(seed)))

    if self._variables is None:
      return Student(spec, drawn, None, None)
    given = _checked_variables(spec, self._variables, "variables")
    names = traverse_util.flatten_dict(spec.shapes, sep="/").keys()
    scalars = {"/".join(("params", *path)) for path, of in spec.groups.items() if of == QUANT}
    loaded = Loaded(
      {},
      "own",
      {},
      quantizers=not all(is_first_scalar(given[name]) for name in scalars & given.keys()),
      incomplete=bool(names - scalars - given.keys()),
    )
    return Student(spec, lambda: _filled(spec, given, drawn()), loaded, None)

  def _identity(
    self, settings: Settings, spec: ModelSpec, source: BatchSource
  ) -> run_directory.Identity:
    shapes = traverse_util.flatten_dict(spec.shapes["params"], sep="/")
    config = {
      "library": __version__,
      "model": type(self._model).__name__,
      "images": [source.image_dtype.name, *source.image_shape],
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
    progress, last, best = end.progress, self._phases[-1], end.progress.best
    start, full_precision = progress.start, progress.full_precision
    assert best is not None  # the last phase has the last bits
    return Result(
      top1=best.top1,
      top5=best.top5,
      start_top1=None if start is None else start.top1,
      full_precision_top1=None if full_precision is None else full_precision.top1,
      weights=best.weights,
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


def _checked_variables(spec: ModelSpec, given: Variables, what: str) -> dict[str, np.ndarray]:
  """Given variables by path, `params/conv/kernel`, in the model's dtypes.

  Raises:
    ConfigError: a variable that the model does not have, or has in another shape.
  """
  if not isinstance(given, Mapping):
    raise ConfigError(
      f"{what} is a {type(given).__name__}: it must be a dictionary of params and batch_stats, as "
      "model.init and Result.variables."
    )
  shapes = traverse_util.flatten_dict(spec.shapes, sep="/")
  found = traverse_util.flatten_dict(jax.device_get(nn.unbox(dict(given))), sep="/")
  problems = [
    f"{name} is not in the model"
    if name not in shapes
    else f"{name} has the shape {np.shape(value)}, not {shapes[name].shape}"
    for name, value in sorted(found.items())
    if name not in shapes or np.shape(value) != shapes[name].shape
  ]
  if problems:
    more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ConfigError(
      f"{what} does not fit {type(spec.model).__name__}: {'; '.join(problems[:_SHOWN])}{more}. "
      "Give variables of this model, as model.init and Result.variables have them."
    )
  return {name: np.asarray(value, shapes[name].dtype) for name, value in found.items()}


def _filled(spec: ModelSpec, given: dict[str, np.ndarray], drawn: Variables) -> Variables:
  """Given variables, and drawn ones for what they lack.

  Raises:
    ConfigError: one that is nowhere.
  """
  found = traverse_util.flatten_dict(drawn, sep="/") | given
  missing = sorted(traverse_util.flatten_dict(spec.shapes, sep="/").keys() - found.keys())
  if missing:
    more = f", and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    raise ConfigError(
      f"teacher lacks {', '.join(missing[:_SHOWN])}{more}. Give all variables of the model."
    )
  return {"batch_stats": {}, **traverse_util.unflatten_dict(found, sep="/")}


def _require_types(
  schedule: Sequence[Phase],
  quantizer: Quantizer,
  teacher: tuple[nn.Module, Variables] | None,
  callbacks: Sequence[Observer],
  options: Options,
) -> None:
  """Names the first argument of `Trainer` that has another type; a class instead of an instance is
  the usual slip.
  """
  expected: list[tuple[str, object, type, str]] = [
    ("quantizer", quantizer, Quantizer, "DuQ()"),
    ("options", options, Options, "Options(...)"),
    *(("schedule", phase, Phase, "profit_schedule(...)") for phase in schedule),
    *(("callbacks", callback, Observer, "[TensorBoard()]") for callback in callbacks),
  ]
  for name, value, kind, example in expected:
    if not isinstance(value, kind):
      of = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
      raise ConfigError(
        f"Trainer's {name} has {of} where a {kind.__name__} belongs. Give {name}={example}."
      )
  if teacher is not None and not (isinstance(teacher, tuple) and len(teacher) == 2):
    raise ConfigError(
      f"Trainer's teacher is a {type(teacher).__name__}. Give teacher=(model, variables)."
    )


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


def _check_batch_size(
  source: BatchSource, settings: Settings, devices: Sequence[jax.Device] | None
) -> None:
  """Checks what `make_mesh` checks, under the names of `Data`."""
  parts, count = settings.train.accumulation_steps, len(devices or jax.devices())
  if source.batch_size % (parts * count):
    of = f" from {jax.process_count()} processes" if jax.process_count() > 1 else ""
    raise ConfigError(
      f"The first training batch has {source.batch_size} examples{of}: it must have a multiple of "
      f"{parts * count}, for {count} devices and accumulation_steps = {parts}. Make batches of "
      "another size, or give Options.devices."
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
