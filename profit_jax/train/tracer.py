"""What each program of a run computes, traced for exact shapes and shardings."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from profit_jax.config import MAX_BITS, Settings
from profit_jax.data import DatasetInfo, normalization
from profit_jax.kernels import target
from profit_jax.nn.spec import ModelSpec
from profit_jax.quant.bits import Bits
from profit_jax.schedule import ProgramKey
from profit_jax.train import aiwq, instability, steps
from profit_jax.train.mesh import Placement, shapes_on
from profit_jax.train.oscillation import Remedies
from profit_jax.train.packing import Packed, pack_variables, unpack
from profit_jax.train.phase_state import PhaseStates

# File: the student as its weights file's own code computes.
Who = Literal["student", "teacher", "file"]
Calibrated = Literal["act", "weight", "fit"]


def _traced_for_devices(
  *, training: bool = False
) -> Callable[[Callable[..., jax.stages.Traced]], Callable[..., jax.stages.Traced]]:
  """Decorates a method of `Tracer` that traces for the devices of its mesh, whatever JAX's
  default is.

  Products have the highest precision, but for those of codes and, in `training`, those of the
  reduced kinds of arithmetic.
  """

  def decorate(trace):
    @functools.wraps(trace)
    def traced(self, *args, **kwargs):
      reduced = training and self._settings.train.dtype in ("tfloat32", "bfloat16")
      with (
        target.tracing_for(self._target),
        jax.default_matmul_precision("default" if reduced else "highest"),
      ):
        return trace(self, *args, **kwargs)

    return traced

  return decorate


class Tracer:
  """Traces the programs of a run and compiles nothing.

  A traced program can be lowered for any platform, and its jaxpr shows what it computes.
  """

  def __init__(  # noqa: PLR0913  one for each part
    self,
    settings: Settings,
    info: DatasetInfo,
    specs: Mapping[Who, ModelSpec | None],
    placement: Placement,
    for_target: target.Target,
    states: PhaseStates,
    remedies: Remedies,
    *,
    image_dtype: Any = np.uint8,
    loss: steps.LossFunction | None = None,
  ):
    """Args:
    settings: validated, with a `train.dtype` that is not auto.
    info: of the data set.
    specs: the models, None where there is none.
    placement: on the devices.
    for_target: what programs are traced for.
    states: of the phases.
    remedies: that are on.
    image_dtype: of the batches: uint8, which is normalized, or float32.
    loss: of the labels; None is the cross-entropy.
    """
    self._settings, self._info, self._specs = settings, info, specs
    self._student = specs["student"]
    self._placement, self._target = placement, for_target
    self._states, self._remedies = states, remedies
    self._image_dtype, self._loss = image_dtype, loss
    own = normalization(settings.data.normalization, info)
    others = normalization(settings.teacher.normalization, info)
    # A teacher that is the student sees what the student sees.
    self._seen = {
      "student": own,
      "file": own,
      "teacher": own if settings.teacher.model == "self" else others,
    }

  @_traced_for_devices(training=True)
  def train_step(self, program: ProgramKey) -> jax.stages.Traced:
    """`steps.make_train_step` for the phases of a program."""
    settings = self._settings
    teacher = distillation = None
    if program.distill:
      spec = self._specs["teacher"]
      teacher = self._replicated(spec.shapes)
      distillation = steps.Distillation(
        spec.model,
        batch_statistics=settings.teacher.batch_stats == "batch",
        normalization=self._seen["teacher"],
        bits=spec.bits,
      )
    step = steps.make_train_step(
      self._student.model,
      self._states.optimizer(program),
      normalization=self._seen["student"],
      ema_rate=settings.train.ema_rate,
      distillation=distillation,
      accumulation_steps=settings.train.accumulation_steps,
      dtype=jnp.bfloat16 if settings.train.dtype == "bfloat16" else None,
      loss=self._loss,
      projections=self._states.projections(program),
    )
    state = self._replicated(jax.eval_shape(lambda: self._states.first(program)))
    scalar = jax.ShapeDtypeStruct((), np.float32)
    acting = self._remedies.acting(program, "training")
    strengths = {remedy.name: scalar for remedy in acting} or None
    sampling = None
    if program.sampling:
      sampling = self._replicated(aiwq.start(self._student.convs))
    return self._jitted(step, donated=(0, 6)).trace(
      state,
      self._batch(settings.train.batch_size),
      self._bits(program.quantized_weights, program.quantized_acts),
      scalar,
      self._key(),
      teacher,
      sampling,
      strengths,
    )

  @_traced_for_devices()
  def eval_step(
    self, quantized_weights: bool, quantized_acts: bool, who: Who = "student"
  ) -> jax.stages.Traced:
    """`steps.make_eval_step`, of packed variables."""
    of_tree = steps.make_eval_step(
      self._specs[who].model,
      normalization=self._seen[who],
      num_classes=self._info.num_classes,
    )

    def step(variables, batch, bits):
      return of_tree(unpack(variables), batch, bits)

    return self._jitted(step).trace(
      self._variables(who),
      self._batch(self._settings.train.eval_batch_size),
      self._bits(quantized_weights, quantized_acts),
    )

  @_traced_for_devices()
  def observe(self) -> jax.stages.Traced:
    """`(window, params, bits) -> window` of `instability.observe`, of packed params."""

    def observe(window, params, bits):
      return instability.observe(window, self._student.kernel_codes(unpack(params), bits))

    window = self._replicated(instability.start(self._student.kernels))
    params = self._variables("student")["params"]
    return self._jitted(observe, donated=(0,)).trace(window, params, self._bits(True, False))

  @_traced_for_devices()
  def batch_statistics(self, quantized_weights: bool, quantized_acts: bool) -> jax.stages.Traced:
    """`(variables, image, bits, key, total) -> total` that adds `steps.batch_statistics` to the
    total; both are packed.
    """

    def add(variables, image, bits, key, total):
      of = (
        self._student.model,
        unpack(variables),
        image,
        self._seen["student"],
        bits,
        key,
        self._student,
      )
      return jax.tree.map(jnp.add, total, total.filled(steps.batch_statistics(*of)))

    variables = self._variables("student")
    return self._jitted(add, donated=(4,)).trace(
      variables,
      self._part_of_a_batch(),
      self._bits(quantized_weights, quantized_acts),
      self._key(),
      variables["batch_stats"],
    )

  @_traced_for_devices()
  def calibration(self, what: Calibrated) -> jax.stages.Traced:
    """The first values of quantizers' scalars, of packed params.

    `act`: `(variables, image, key, bits) -> params` of `steps.calibrate_acts`. `weight`, `fit`:
    `(params, bits) -> params` of `steps.calibrate_weights` and `steps.fit_weights`.
    """
    variables = self._variables("student")
    if what != "act":
      of = steps.fit_weights if what == "fit" else steps.calibrate_weights

      def calibrate_kernels(params, bits):
        return params.filled(of(unpack(params), bits, self._student))

      return self._jitted(calibrate_kernels).trace(variables["params"], self._bits(True, False))

    def calibrate(variables, image, key, bits):
      of = self._student.model, unpack(variables), image, self._seen["student"], key, bits
      return variables["params"].filled(steps.calibrate_acts(*of))

    return self._jitted(calibrate).trace(
      variables, self._part_of_a_batch(), self._key(), self._bits(False, True)
    )

  def _jitted(self, function: Callable[..., Any], donated: tuple[int, ...] = ()) -> Any:
    return jax.jit(function, donate_argnums=donated, out_shardings=self._placement.replicated)

  def _replicated(self, tree: Any) -> Any:
    return shapes_on(self._placement.replicated, tree)

  def _batch(self, size: int) -> dict[str, Any]:
    """The shapes of a batch."""
    image = (size, *self._student.input_shape)
    shapes = {
      "image": jax.ShapeDtypeStruct(image, self._image_dtype),
      "label": jax.ShapeDtypeStruct((size,), np.int32),
      "mask": jax.ShapeDtypeStruct((size,), bool),
    }
    return shapes_on(self._placement.split_rows, shapes)

  def _part_of_a_batch(self) -> Any:
    """The images that a training step computes at once."""
    train = self._settings.train
    return self._batch(train.batch_size // train.accumulation_steps)["image"]

  def _bits(self, quantized_weights: bool, quantized_acts: bool) -> Bits:
    bits = self._student.bits.at(
      MAX_BITS if quantized_weights else None, MAX_BITS if quantized_acts else None
    )
    return jax.tree.map(lambda _: jax.ShapeDtypeStruct((), np.int32), bits)

  def _variables(self, who: Who) -> dict[str, Packed]:
    spec = self._specs[who]
    return self._replicated(
      jax.eval_shape(lambda variables: pack_variables(variables, spec), spec.shapes)
    )

  def _key(self) -> Any:
    return self._replicated(jax.eval_shape(lambda: jax.random.key(0)))
