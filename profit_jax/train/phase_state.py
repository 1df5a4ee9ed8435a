"""The training state at the beginning of a phase: its optimizer, and what its remedies carry."""

from typing import Any

import jax
import numpy as np
import optax

from profit_jax.config import Settings
from profit_jax.nn.spec import ModelSpec
from profit_jax.schedule import Phase, ProgramKey
from profit_jax.train import optimizer
from profit_jax.train.mesh import Placement
from profit_jax.train.optimizer import Frozen
from profit_jax.train.oscillation import Remedies
from profit_jax.train.packing import pack_variables
from profit_jax.train.state import TrainState, create_state


class PhaseStates:
  """Makes the optimizer of each phase, and the state that a phase begins with."""

  def __init__(
    self,
    settings: Settings,
    spec: ModelSpec,
    placement: Placement,
    remedies: Remedies,
    factory: optimizer.OptimizerFactory | None = None,
  ):
    """Args:
    settings: validated.
    spec: of the student.
    placement: on the devices.
    remedies: that are on.
    factory: replaces SGD; see `optimizer.make_optimizer`.
    """
    self._settings, self._spec, self._placement = settings, spec, placement
    self._remedies, self._factory = remedies, factory

  def optimizer(
    self, program: ProgramKey, frozen: Frozen = frozenset()
  ) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a phase; only its `init` depends on which kernels are frozen.

    Args:
      program: of the phase.
      frozen: kernels, as `block01/expand_conv/kernel`.
    """
    shapes = jax.eval_shape(lambda tree: pack_variables(tree, self._spec), self._spec.shapes)
    train = self._settings.train
    sgd = optimizer.SgdSettings(
      weight_decay=train.weight_decay,
      momentum=train.momentum,
      quantizer_lr_scale=train.quantizer_lr_scale,
    )
    labels = optimizer.label_params(shapes["params"], train_kernels=program.train_kernels)
    return optimizer.make_optimizer(
      labels,
      sgd,
      frozen if program.train_kernels else frozenset(),
      self._factory,
      self._remedies.of_gradient(program, self._spec),
    )

  def projections(self, program: ProgramKey) -> dict[str, optax.GradientTransformationExtraArgs]:
    """The remedies that project the params after each step of a phase, by name."""
    return self._remedies.of_params(program, self._spec)

  def first(self, program: ProgramKey, frozen: Frozen = frozenset()) -> TrainState:
    """A state of a phase's beginning: all 0 but for what freezes kernels."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._spec.shapes)
    state = create_state(zeros, self._spec, ema=self._settings.train.ema_rate > 0)
    projections = self.projections(program)
    return state.replace(
      opt_state=self.optimizer(program, frozen).init(state.params),
      oscillation={name: each.init(state.params) for name, each in projections.items()},
    )

  def with_fresh_optimizer(
    self, state: TrainState, program: ProgramKey, frozen: Frozen = frozenset()
  ) -> TrainState:
    """The state with the optimizer of a phase's beginning."""
    start = self.optimizer(program, frozen).init(jax.device_get(state.params))
    return state.replace(opt_state=self._placement.replicate(start))

  def entered(
    self, state: TrainState, phase: Phase, before: Phase | None, frozen: Frozen
  ) -> TrainState:
    """The state with which a phase begins.

    The optimizer is fresh. What remedies carry stays from one phase to the next at the same bits.

    Args:
      state: at the end of the phase before.
      phase: that begins.
      before: the phase before; None at the run's beginning.
      frozen: kernels, as `block01/expand_conv/kernel`.
    """
    kept = state.oscillation if before and before.weight_bits == phase.weight_bits else {}
    carried: dict[str, Any] = {}
    for name, projection in self.projections(phase.program).items():
      fresh = name not in kept
      carried[name] = (
        self._placement.replicate(projection.init(state.params)) if fresh else kept[name]
      )
    return self.with_fresh_optimizer(state.replace(oscillation=carried), phase.program, frozen)
