"""Compiled programs: one per `schedule.ProgramKey`, made in the background before need."""

import concurrent.futures
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from profit_jax import memory
from profit_jax.config import MAX_BITS, ConfigError, Settings
from profit_jax.data import DatasetInfo, normalization
from profit_jax.kernels import target
from profit_jax.nn.spec import ModelSpec
from profit_jax.quant.bits import Bits
from profit_jax.schedule import Phase, ProgramKey
from profit_jax.train import aiwq, instability, interrupt, optimizer, oscillation, steps
from profit_jax.train.packing import Packed, pack_variables, unpack
from profit_jax.train.state import TrainState, create_state

Frozen = frozenset[str]
# File: the student as its weights file's own code computes.
Who = Literal["student", "teacher", "file"]


def make_mesh(settings: Settings, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Devices on one axis, `data`.

  Args:
    settings: validated.
    devices: that the run uses; None is all, of every process.

  Raises:
    ConfigError: a batch that does not divide over them.
  """
  # Neighbours of one process side by side: its rows of a batch are its devices' rows. Their numbers
  # alone do not say so.
  devices = sorted(
    jax.devices() if devices is None else devices,
    key=lambda device: (device.process_index, device.id),
  )
  parts = settings.train.accumulation_steps
  if settings.train.batch_size % (parts * len(devices)):
    raise ConfigError(
      f"config.train.batch_size = {settings.train.batch_size} is not allowed: it must be a "
      "multiple of "
      f"{parts * len(devices)}: train.accumulation_steps = {parts} parts over {len(devices)} "
      "devices."
    )
  for name in ("batch_size", "eval_batch_size"):
    size = getattr(settings.train, name)
    if size % len(devices):
      raise ConfigError(
        f"config.train.{name} = {size} is not allowed: it must be a multiple of the number of "
        f"devices, {len(devices)}, "
        f"over which a batch is split."
      )
  return Mesh(np.asarray(devices), ("data",))


_PLATFORM_DTYPES = {"cpu": "float32", "gpu": "tfloat32", "tpu": "bfloat16"}


def default_dtype(platform: str) -> str:
  """The `train.dtype` that auto stands for on devices of a platform, given JAX's name of it."""
  return _PLATFORM_DTYPES[target.platform_of(platform)]


def _traced_for_devices(
  *, training: bool = False
) -> Callable[[Callable[..., jax.stages.Traced]], Callable[..., jax.stages.Traced]]:
  """Decorates a method of `Programs` that traces for the devices of its mesh, whatever JAX's
  default is.

  Products have the highest precision, but for those of codes and, in `training`, those of the
  reduced kinds of arithmetic.
  """

  def decorate(trace):
    @functools.wraps(trace)
    def traced(self, *args, **kwargs):
      reduced = training and self._settings.train.dtype in ("tfloat32", "bfloat16")
      with (
        target.tracing_for(self.target),
        jax.default_matmul_precision("default" if reduced else "highest"),
      ):
        return trace(self, *args, **kwargs)

    return traced

  return decorate


class Programs:
  """Builds, compiles and keeps the programs of a run.

  A program is compiled ahead of time for exact shapes and shardings, on a background thread in the
  order of `prefetch`, so that the programs of later phases are made while earlier ones train. One
  that no later phase needs is dropped.

  Attributes:
    mesh: over which batches are split; everything else is replicated.
    student: the model that is trained.
    target: what programs are traced for.
    waited_seconds: how long callers have waited for compilation, in all.
  """

  def __init__(  # noqa: PLR0913  one for each part
    self,
    settings: Settings,
    info: DatasetInfo,
    student: ModelSpec,
    teacher: ModelSpec | None,
    mesh: Mesh,
    file: ModelSpec | None = None,
    platform: target.Platform | None = None,
    *,
    image_dtype: Any = np.uint8,
    loss: steps.LossFunction | None = None,
    optimizer_factory: optimizer.OptimizerFactory | None = None,
  ):
    """Args:
    settings: validated.
    info: of the data set.
    student: the model that is trained.
    teacher: its teacher; None without one.
    mesh: of the devices.
    file: the student as its weights file's own code computes, where that is another.
    platform: that programs are traced for; None is the mesh's.
    image_dtype: of the batches: uint8, which is normalized, or float32.
    loss: of the labels; None is the cross-entropy.
    optimizer_factory: replaces SGD; see `optimizer.make_optimizer`.
    """
    self._image_dtype, self._loss, self._factory = image_dtype, loss, optimizer_factory
    self._settings, self._info = settings, info
    self.student = student
    self._specs: dict[Who, ModelSpec | None] = {
      "student": student,
      "teacher": teacher,
      "file": file,
    }
    own, others = (
      normalization(settings.data.normalization, info),
      normalization(settings.teacher.normalization, info),
    )
    # A teacher that is the student sees what the student sees.
    self._normalization, self._teacher_normalization = (
      own,
      own if settings.teacher.model == "self" else others,
    )
    self.mesh = mesh
    platform = platform or target.platform_of(mesh.devices.flat[0].platform)
    self.target = target.Target(platform, settings.train.kernels, mesh)
    if settings.train.dtype == "auto":
      settings = self._settings = settings.with_dtype(default_dtype(platform))
    self.waited_seconds = 0.0
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._split = NamedSharding(mesh, PartitionSpec("data"))
    # While XLA compiles a program, Python traces the next. XLA gets them one at a time, because it
    # takes 1.2 GB for a small MobileNet's step; and in the order of the requests, because the
    # processes of a run may tune kernels together.
    self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")
    self._turns = _Turns()
    self._closed = False
    self._made: dict[Any, concurrent.futures.Future] = {}

  def close(self) -> None:
    """Drops what is not being compiled yet."""
    self._closed = True
    self._pool.shutdown(wait=False, cancel_futures=True)

  def replicate(self, tree: Any) -> Any:
    """Puts a tree, the same on every process, on every device, as new arrays that a step may
    donate.
    """
    if jax.process_count() == 1:
      return jax.device_put(tree, self._replicated, may_alias=False)

    # There device_put would compare every array over the network first, with a program for each
    # shape.
    def put(leaf):
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
      value = np.array(leaf)
      return jax.make_array_from_callback(value.shape, self._replicated, lambda index: value[index])

    return jax.tree.map(put, tree)

  def fresh_optimizer(self, state: TrainState, train_kernels: bool, frozen: Frozen) -> TrainState:
    """The state with the optimizer of a phase's beginning."""
    start = self.optimizer(train_kernels, frozen).init(jax.device_get(state.params))
    return state.replace(opt_state=self.replicate(start))

  def split(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a batch on the devices, a part on each; every process gives its own rows."""
    return {
      name: jax.make_array_from_process_local_data(self._split, value)
      for name, value in batch.items()
    }

  def prefetch(
    self,
    phases: tuple[Phase, ...],
    evaluated: Sequence[Who] = (),
  ) -> None:
    """Starts compiling what the rest of a run needs, in order, and drops what it does not need.

    Args:
      phases: all those to come.
      evaluated: models whose full precision is evaluated before these phases.
    """
    needed = {("eval", who, False, False): self._trace_eval for who in evaluated}
    needed |= self._needed(phases)
    for key in self._made.keys() - needed.keys():
      dropped = self._made.pop(key)
      # Of several processes another may be compiling it already, and wait for this one.
      if jax.process_count() == 1:
        dropped.cancel()
    for key, trace in needed.items():
      self._request(key, trace)

  def _needed(
    self, phases: tuple[Phase, ...]
  ) -> Iterator[tuple[Any, Callable[..., jax.stages.Traced]]]:
    """Keys of programs and what traces them, in the order of their first use."""
    for phase in phases:
      if phase.calibrate:
        yield ("calibrate", phase.calibrate), self._trace_calibration
      yield ("train", phase.program), self.trace_train_step
      quantized = phase.program.quantized_weights, phase.program.quantized_acts
      if any(quantized) and self._settings.oscillation.bn_reestimation_batches:
        yield ("statistics", *quantized), self._trace_statistics
      yield ("eval", "student", *quantized), self._trace_eval
      if phase.trains_codes:  # needed last of these
        yield ("observe",), self._trace_observe

  def optimizer(self, train_kernels: bool, frozen: Frozen) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a phase; only its `init` depends on which kernels are frozen."""
    params = self._variables("student")["params"]
    train = self._settings.train
    sgd = optimizer.SgdSettings(
      weight_decay=train.weight_decay,
      momentum=train.momentum,
      quantizer_lr_scale=train.quantizer_lr_scale,
    )
    labels = optimizer.label_params(params, train_kernels=train_kernels)
    frozen = frozen if train_kernels else frozenset()
    return optimizer.make_optimizer(labels, sgd, frozen, self._factory)

  def train_step(self, program: ProgramKey) -> Callable[..., Any]:
    """The compiled step of `steps.make_train_step`; the state and the AIWQ state are donated."""
    return self._wait(("train", program), self.trace_train_step)

  def eval_step(
    self, quantized_weights: bool, quantized_acts: bool, who: Who = "student"
  ) -> Callable[..., Any]:
    """The compiled step of `steps.make_eval_step`, of packed variables."""
    return self._wait(("eval", who, quantized_weights, quantized_acts), self._trace_eval)

  def calibrate_acts(self) -> Callable[..., Any]:
    """The compiled `(variables, image, key, bits) -> params` of `steps.calibrate_acts`, packed."""
    return self._wait(("calibrate", "act"), self._trace_calibration)

  def calibrate_weights(self) -> Callable[..., Any]:
    """The compiled `(params, bits) -> params` of `steps.calibrate_weights`, packed."""
    return self._wait(("calibrate", "weight"), self._trace_calibration)

  def fit_weights(self) -> Callable[..., Any]:
    """The compiled `(params, bits) -> params` of `steps.fit_weights`, packed."""
    return self._wait(("calibrate", "fit"), self._trace_calibration)

  def observe(self) -> Callable[..., Any]:
    """The compiled `(window, params, bits) -> window` of `instability.observe`; the params are
    packed, and the window is donated.
    """
    return self._wait(("observe",), self._trace_observe)

  def batch_statistics(self, quantized_weights: bool, quantized_acts: bool) -> Callable[..., Any]:
    """The compiled `(variables, image, bits, key, total) -> total` that adds
    `steps.batch_statistics` to the total; both are packed.
    """
    return self._wait(("statistics", quantized_weights, quantized_acts), self._trace_statistics)

  def first_state(self, program: ProgramKey, frozen: Frozen) -> TrainState:
    """A state of a phase's beginning, on the host: all 0 but for what freezes kernels."""
    return jax.device_get(self._first_state(program, frozen))

  def _first_state(self, program: ProgramKey, frozen: Frozen) -> TrainState:
    tx = self.optimizer(program.train_kernels, frozen)
    _, freezes = oscillation.active(
      self._settings.oscillation, program.quantized_weights, program.train_kernels
    )

    zeros = jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype),
      self.student.shapes,
    )
    state = create_state(zeros, self.student, ema=self._settings.train.ema_rate > 0)
    return state.replace(
      opt_state=tx.init(state.params),
      oscillation=oscillation.start(self.student.kernels) if freezes else None,
    )

  def _request(
    self, key: Any, trace: Callable[..., jax.stages.Traced]
  ) -> concurrent.futures.Future:
    if key not in self._made:
      turn = self._turns.take()
      future = self._pool.submit(self._make, key, trace, turn)
      future.add_done_callback(lambda _: self._turns.end(turn))  # also where it is cancelled
      self._made[key] = future
    return self._made[key]

  def _make(
    self, key: Any, trace: Callable[..., jax.stages.Traced], turn: int
  ) -> Callable[..., Any]:
    """A compiled program; the memory that this took goes back to the system."""
    try:
      lowered = trace(*key[1:]).lower()
      self._turns.wait(turn)
      if self._closed:
        raise concurrent.futures.CancelledError
      compiled = lowered.compile(target.compiler_options(self.target.platform))
      memory.trim()  # before the next is compiled
      self._turns.end(turn)
      return compiled
    finally:
      memory.trim()

  def _wait(self, key: Any, trace: Callable[..., jax.stages.Traced]) -> Callable[..., Any]:
    start, request = time.perf_counter(), self._request(key, trace)
    # Python runs signal handlers in this thread only, and compilation can take minutes.
    while not concurrent.futures.wait([request], timeout=0.5).done:
      interrupt.check()
    compiled = request.result()
    self.waited_seconds += time.perf_counter() - start
    return compiled

  def _batch_shapes(self, size: int) -> dict[str, Any]:
    image = (size, *self.student.input_shape)
    shapes = {
      "image": jax.ShapeDtypeStruct(image, self._image_dtype),
      "label": jax.ShapeDtypeStruct((size,), np.int32),
      "mask": jax.ShapeDtypeStruct((size,), bool),
    }
    return _with_sharding(shapes, self._split)

  def _bits_shapes(self, quantized_weights: bool, quantized_acts: bool) -> Bits:
    bits = self.student.bits.at(
      MAX_BITS if quantized_weights else None, MAX_BITS if quantized_acts else None
    )
    return jax.tree.map(lambda _: jax.ShapeDtypeStruct((), np.int32), bits)

  def _variables(self, who: Who) -> dict[str, Packed]:
    """The shapes of a model's variables."""
    spec = self._specs[who]
    return jax.eval_shape(lambda variables: pack_variables(variables, spec), spec.shapes)

  @_traced_for_devices(training=True)
  def trace_train_step(self, program: ProgramKey) -> jax.stages.Traced:
    """`steps.make_train_step` for the phases of a program, traced and not lowered yet.

    It can be lowered for any platform, and its jaxpr shows what the step computes.

    Args:
      program: of the phases that it trains.
    """
    settings = self._settings
    teacher = distillation = None
    if program.distill:
      teacher = _with_sharding(self._specs["teacher"].shapes, self._replicated)
      distillation = steps.Distillation(
        self._specs["teacher"].model,
        batch_statistics=settings.teacher.batch_stats == "batch",
        normalization=self._teacher_normalization,
      )
    step = steps.make_train_step(
      self.student.model,
      self.optimizer(program.train_kernels, frozenset()),
      normalization=self._normalization,
      ema_rate=settings.train.ema_rate,
      distillation=distillation,
      accumulation_steps=settings.train.accumulation_steps,
      dtype=jnp.bfloat16 if settings.train.dtype == "bfloat16" else None,
      loss=self._loss,
      spec=self.student,
      oscillation_settings=settings.oscillation,
    )
    state = jax.eval_shape(lambda: self._first_state(program, frozenset()))
    state = _with_sharding(state, self._replicated)
    scalar = jax.ShapeDtypeStruct((), np.float32)
    applied = oscillation.active(
      settings.oscillation, program.quantized_weights, program.train_kernels
    )
    sampling = None
    if program.sampling:
      sampling = _with_sharding(aiwq.start(self.student.convs), self._replicated)
    jitted = jax.jit(step, donate_argnums=(0, 6), out_shardings=self._replicated)
    return jitted.trace(
      state,
      self._batch_shapes(settings.train.batch_size),
      self._bits_shapes(program.quantized_weights, program.quantized_acts),
      scalar,
      self._key_shape,
      teacher,
      sampling,
      oscillation.Strengths(*(scalar if on else None for on in applied)) if any(applied) else None,
    )

  @_traced_for_devices()
  def trace_eval_step(
    self, quantized_weights: bool, quantized_acts: bool, who: Who = "student"
  ) -> jax.stages.Traced:
    """`steps.make_eval_step`, traced and not lowered yet; arguments as `eval_step`'s."""
    settings, model = self._settings, self._specs[who].model
    seen = self._teacher_normalization if who == "teacher" else self._normalization
    of_tree = steps.make_eval_step(model, normalization=seen, num_classes=self._info.num_classes)

    def step(variables, batch, bits):
      return of_tree(unpack(variables), batch, bits)

    return jax.jit(step, out_shardings=self._replicated).trace(
      _with_sharding(self._variables(who), self._replicated),
      self._batch_shapes(settings.train.eval_batch_size),
      self._bits_shapes(quantized_weights, quantized_acts),
    )

  def _trace_eval(
    self, who: Who, quantized_weights: bool, quantized_acts: bool
  ) -> jax.stages.Traced:
    return self.trace_eval_step(quantized_weights, quantized_acts, who)

  @_traced_for_devices()
  def _trace_observe(self) -> jax.stages.Traced:
    window = _with_sharding(instability.start(self.student.kernels), self._replicated)
    params = _with_sharding(self._variables("student")["params"], self._replicated)

    def observe(window, params, bits):
      return instability.observe(window, self.student.kernel_codes(unpack(params), bits))

    jitted = jax.jit(observe, donate_argnums=0, out_shardings=self._replicated)
    return jitted.trace(window, params, self._bits_shapes(True, False))

  @_traced_for_devices()
  def _trace_statistics(self, quantized_weights: bool, quantized_acts: bool) -> jax.stages.Traced:
    settings = self._settings

    def add(variables, image, bits, key, total):
      of = (
        self.student.model,
        unpack(variables),
        image,
        self._normalization,
        bits,
        key,
        self.student,
      )
      return jax.tree.map(jnp.add, total, total.filled(steps.batch_statistics(*of)))

    variables = _with_sharding(self._variables("student"), self._replicated)
    jitted = jax.jit(add, donate_argnums=4, out_shardings=self._replicated)
    return jitted.trace(
      variables,
      self._batch_shapes(settings.train.batch_size // settings.train.accumulation_steps)["image"],
      self._bits_shapes(quantized_weights, quantized_acts),
      self._key_shape,
      variables["batch_stats"],
    )

  def bits(self, phase: Phase) -> Bits:
    """What a phase tells the student's layers."""
    return self.student.bits.at(phase.weight_bits, phase.act_bits)

  @property
  def _key_shape(self) -> Any:
    return _with_sharding(jax.eval_shape(lambda: jax.random.key(0)), self._replicated)

  @_traced_for_devices()
  def _trace_calibration(self, what: str) -> jax.stages.Traced:
    settings, sharded = self._settings, functools.partial(_with_sharding, sharding=self._replicated)
    variables = sharded(self._variables("student"))
    if what != "act":
      of = steps.fit_weights if what == "fit" else steps.calibrate_weights

      def calibrate_kernels(params, bits):
        return params.filled(of(unpack(params), bits, self.student))

      jitted = jax.jit(calibrate_kernels, out_shardings=self._replicated)
      return jitted.trace(variables["params"], self._bits_shapes(True, False))

    def calibrate(variables, image, key, bits):
      of = self.student.model, unpack(variables), image, self._normalization, key, bits
      return variables["params"].filled(steps.calibrate_acts(*of))

    image = self._batch_shapes(settings.train.batch_size // settings.train.accumulation_steps)[
      "image"
    ]
    jitted = jax.jit(calibrate, out_shardings=self._replicated)
    return jitted.trace(variables, image, self._key_shape, self._bits_shapes(False, True))


class _Turns:
  """One thread at a time, in the order in which the turns were taken."""

  def __init__(self):
    self._changed = threading.Condition()
    self._taken: list[int] = []
    self._numbers = itertools.count()

  def take(self) -> int:
    """A turn after all others."""
    with self._changed:
      self._taken.append(next(self._numbers))
      return self._taken[-1]

  def wait(self, turn: int) -> None:
    """Returns when all earlier turns have ended."""
    with self._changed:
      self._changed.wait_for(lambda: self._taken[0] == turn)

  def end(self, turn: int) -> None:
    """Ends a turn, whether it has come or not; once more does nothing."""
    with self._changed:
      if turn in self._taken:
        self._taken.remove(turn)
        self._changed.notify_all()


def _with_sharding(shapes: Any, sharding: NamedSharding) -> Any:
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
  )
