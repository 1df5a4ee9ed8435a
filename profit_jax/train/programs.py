"""The programs of a run: compiled in the background, each before its first use."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from profit_jax.config import Settings
from profit_jax.data import DatasetInfo
from profit_jax.kernels import target
from profit_jax.nn.spec import ModelSpec
from profit_jax.schedule import Phase, ProgramKey
from profit_jax.train import steps
from profit_jax.train.compiler import Compiler
from profit_jax.train.mesh import Placement, default_dtype
from profit_jax.train.optimizer import OptimizerFactory
from profit_jax.train.oscillation import Remedies
from profit_jax.train.phase_state import PhaseStates
from profit_jax.train.tracer import Calibrated, Tracer, Who

Compiled = Callable[..., Any]
# A method of `Tracer`, and its arguments.
_Key = tuple[Any, ...]


class Programs:
  """Which programs the phases of a run need.

  They are compiled ahead of time for exact shapes and shardings, in the order of `prefetch`, so
  that the programs of later phases are made while earlier ones train. One that no later phase needs
  is dropped. A method that gives a program waits until it is compiled.

  Attributes:
    student: the model that is trained.
    placement: on the devices.
    remedies: that are on.
    states: the states at the beginnings of phases.
    tracer: says what each program computes.
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
    optimizer_factory: OptimizerFactory | None = None,
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
    platform = platform or target.platform_of(mesh.devices.flat[0].platform)
    if settings.train.dtype == "auto":
      settings = settings.with_dtype(default_dtype(platform))
    self.student, self.placement = student, Placement(mesh)
    self.remedies = Remedies(settings.oscillation)
    self.states = PhaseStates(settings, student, self.placement, self.remedies, optimizer_factory)
    self.tracer = Tracer(
      settings,
      info,
      {"student": student, "teacher": teacher, "file": file},
      self.placement,
      target.Target(platform, settings.train.kernels, mesh),
      self.states,
      self.remedies,
      image_dtype=image_dtype,
      loss=loss,
    )
    self._compiler = Compiler(self._trace, target.compiler_options(platform))

  def close(self) -> None:
    """Drops what is not being compiled yet."""
    self._compiler.close()

  @property
  def waited_seconds(self) -> float:
    """How long callers have waited for compilation, in all."""
    return self._compiler.waited_seconds

  def prefetch(self, phases: tuple[Phase, ...], evaluated: Sequence[Who] = ()) -> None:
    """Starts compiling what the rest of a run needs, in order, and drops what it does not need.

    Args:
      phases: all those to come.
      evaluated: models whose full precision is evaluated before these phases.
    """
    first = [("eval_step", False, False, who) for who in evaluated]
    self._compiler.prefetch([*first, *self._needed(phases)])

  def train_step(self, program: ProgramKey) -> Compiled:
    """The step of `steps.make_train_step`; the state and the AIWQ state are donated."""
    return self._compiler.get(("train_step", program))

  def eval_step(
    self, quantized_weights: bool, quantized_acts: bool, who: Who = "student"
  ) -> Compiled:
    """The step of `steps.make_eval_step`, of packed variables."""
    return self._compiler.get(("eval_step", quantized_weights, quantized_acts, who))

  def calibration(self, what: Calibrated) -> Compiled:
    """The program of `Tracer.calibration`."""
    return self._compiler.get(("calibration", what))

  def observe(self) -> Compiled:
    """The program of `Tracer.observe`; the window is donated."""
    return self._compiler.get(("observe",))

  def batch_statistics(self, quantized_weights: bool, quantized_acts: bool) -> Compiled:
    """The program of `Tracer.batch_statistics`; the total is donated."""
    return self._compiler.get(("batch_statistics", quantized_weights, quantized_acts))

  def _trace(self, key: _Key) -> Any:
    method, *arguments = key
    return getattr(self.tracer, method)(*arguments)

  def _needed(self, phases: tuple[Phase, ...]) -> Iterator[_Key]:
    """Keys of programs, in the order of their first use."""
    for phase in phases:
      if phase.calibrate:
        yield "calibration", phase.calibrate
      yield "train_step", phase.program
      quantized = phase.program.quantized_weights, phase.program.quantized_acts
      if self.remedies.acting(phase.program, "evaluation"):
        yield "batch_statistics", *quantized
      yield "eval_step", *quantized, "student"
      if phase.trains_codes:  # needed last of these
        yield ("observe",)
