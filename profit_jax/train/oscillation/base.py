"""What a remedy is, the registry, and the remedies of a run."""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import jax
import numpy as np
import optax
from flax import struct, traverse_util

from profit_jax.config import OscillationSettings
from profit_jax.nn.spec import KERNEL, ModelSpec, split_path
from profit_jax.quant.bits import Bits
from profit_jax.schedule import Phase, ProgramKey
from profit_jax.train.optimizer import NotSaved
from profit_jax.train.packing import Packed

Stage = Literal["training", "evaluation"]
Strengths = dict[str, Any]
# `count -> batch_stats`: the mean batch statistics of an epoch's first training batches, packed.
MeanStatistics = Callable[[int], Packed]


class AddedLoss(NotSaved):
  """The state of a transformation that adds the gradient of a loss term.

  Attributes:
    value: the weighted loss term of the latest step, a float32 scalar.
    name: of its metric.
  """

  value: jax.Array
  name: str = struct.field(pytree_node=False)


def added_losses(opt_state: Any) -> dict[str, jax.Array]:
  """The loss terms of a step that an optimizer's transformations have added, by name."""
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AddedLoss))
  return {node.name: node.value for node in nodes if isinstance(node, AddedLoss)}


class Remedy(abc.ABC):
  """A remedy and its settings. A remedy overrides the methods of its stage that it needs.

  Attributes:
    name: key of its strength, of its state and of its loss term.
    stage: whether it acts in training steps or before evaluations.
  """

  name: ClassVar[str]
  stage: ClassVar[Stage] = "training"

  def __init__(self, settings: OscillationSettings):
    """Args: settings: those of all remedies."""
    self._settings = settings

  @property
  @abc.abstractmethod
  def is_on(self) -> bool:
    """Whether the settings ask for it."""

  @abc.abstractmethod
  def summary(self) -> str:
    """What it does in this run, for the report."""

  def acts_in(self, program: ProgramKey) -> bool:
    """Whether it acts in the phases of a program; by default, where quantized kernels train."""
    return program.quantized_weights and program.train_kernels

  def strength(self, weight_bits: int, left: float) -> float:
    """Its strength in a step.

    Args:
      weight_bits: of the phase.
      left: falls from 1 to 0 as a half cosine over all phases that train codes of these bits.
    """
    del weight_bits, left
    return 0.0

  def of_gradient(self, spec: ModelSpec) -> optax.GradientTransformationExtraArgs | None:
    """A transformation of the kernels' gradient, the first one of the weight group.

    Its `update` gets `tree` (the nested params before the step), `bits` and `strengths`.
    """
    del spec
    return None

  def of_params(self, spec: ModelSpec) -> optax.GradientTransformationExtraArgs | None:
    """A projection: a transformation whose updates are the packed params after the step.

    Its `update` gets `bits` and `strengths`. Phases of equal weight bits hand on its state.
    """
    del spec
    return None

  def measured(self, state: Any) -> dict[str, dict[str, float]]:
    """What the state of `of_params` shows at the end of an epoch, by name and layer."""
    del state
    return {}

  def for_evaluation(
    self, variables: Mapping[str, Packed], statistics: MeanStatistics
  ) -> Mapping[str, Packed]:
    """The variables that an evaluation uses; for the stage `evaluation`."""
    del statistics
    return variables


REMEDIES: dict[str, type[Remedy]] = {}
Kind = TypeVar("Kind", bound=type[Remedy])


def register(remedy: Kind) -> Kind:
  """Registers a remedy by its name; a class decorator."""
  REMEDIES[remedy.name] = remedy
  return remedy


class Remedies:
  """The remedies of a run that are on."""

  def __init__(self, settings: OscillationSettings):
    """Args: settings: section `oscillation`."""
    known = (kind(settings) for kind in REMEDIES.values())
    # Those of training first.
    self._on = sorted((r for r in known if r.is_on), key=lambda r: r.stage, reverse=True)

  def acting(self, program: ProgramKey, stage: Stage) -> list[Remedy]:
    """Those that act in the phases of a program."""
    return [r for r in self._on if r.stage == stage and r.acts_in(program)]

  def of_gradient(
    self, program: ProgramKey, spec: ModelSpec
  ) -> list[optax.GradientTransformationExtraArgs]:
    """Their transformations of the kernels' gradient, in order."""
    made = (remedy.of_gradient(spec) for remedy in self.acting(program, "training"))
    return [transformation for transformation in made if transformation is not None]

  def of_params(
    self, program: ProgramKey, spec: ModelSpec
  ) -> dict[str, optax.GradientTransformationExtraArgs]:
    """Their projections by name, in order."""
    made = {r.name: r.of_params(spec) for r in self.acting(program, "training")}
    return {name: projection for name, projection in made.items() if projection is not None}

  def strengths(
    self, phases: tuple[Phase, ...], phase: Phase, step: int, steps_per_epoch: int
  ) -> Strengths | None:
    """Those of a step (from 0) of a phase, float32 scalars by name; None where no remedy acts.

    They are annealed over all phases that train codes of the same bits, sampling and ft1 to ft3
    together.
    """
    acting = self.acting(phase.program, "training")
    if not acting:
      return None
    same = [p for p in phases if p.trains_codes and p.weight_bits == phase.weight_bits]
    before = sum(p.epochs for p in same if p.index < phase.index) * steps_per_epoch + step
    left = (1 + math.cos(math.pi * before / (sum(p.epochs for p in same) * steps_per_epoch))) / 2
    return {r.name: np.float32(r.strength(phase.weight_bits, left)) for r in acting}

  def measured(self, states: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the states of the projections show, by name and layer."""
    found: dict[str, dict[str, float]] = {}
    for remedy in self._on:
      if remedy.name in states:
        found |= remedy.measured(states[remedy.name])
    return found

  def summary(self) -> str:
    """What they do, for the report; `none` without any."""
    return "; ".join(remedy.summary() for remedy in self._on) or "none"


def kernels_and_steps(
  params: Mapping[str, Any], bits: Bits, spec: ModelSpec
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Each kernel and the step size of its quantizer, without a gradient; by layer.

  The quantizer has one interval, `quant_a`, as DuQ and LSQ.
  """
  flat, found = traverse_util.flatten_dict(params), {}
  for layer in spec.kernels:
    path = split_path(layer)
    interval = jax.nn.softplus(jax.lax.stop_gradient(flat[*path, "quant_a"]))
    found[layer] = flat[*path, KERNEL], interval / bits.kernel_qmax(layer)
  return found
