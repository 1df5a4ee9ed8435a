"""What training carries from step to step: arrays only."""

from typing import Any

import flax.struct
import jax
import numpy as np
import optax

from profit_jax.nn.spec import ModelSpec
from profit_jax.train.optimizer import FrozenKernels, NotSaved
from profit_jax.train.packing import Packed, pack_variables, unpack


class TrainState(flax.struct.PyTreeNode):
  """The student, its exponential moving average, and the optimizer of the present phase.

  Attributes:
    step: int32 scalar, over all phases.
    params: the student's parameters, quantizer scalars included, packed.
    batch_stats: its running statistics, packed.
    ema_params: their average, updated once a step; None without EMA.
    ema_batch_stats: likewise.
    opt_state: fresh in every phase.
    oscillation: by name, the states of remedies that project the params; see
      `oscillation.Remedy.of_params`.
  """

  step: jax.Array
  params: Packed
  batch_stats: Packed
  ema_params: Packed | None
  ema_batch_stats: Packed | None
  opt_state: Any
  oscillation: dict[str, Any] = flax.struct.field(default_factory=dict)

  @property
  def variables(self) -> dict[str, Packed]:
    """The student; `packing.unpack` makes of it what `apply` takes."""
    return {"params": self.params, "batch_stats": self.batch_stats}

  @property
  def ema_variables(self) -> dict[str, Packed]:
    """The average, likewise."""
    return {"params": self.ema_params, "batch_stats": self.ema_batch_stats}


def create_state(variables: dict[str, Any], spec: ModelSpec, *, ema: bool) -> TrainState:
  """A state at step 0 without an optimizer, on the host.

  Args:
    variables: nested dictionaries.
    spec: of their model.
    ema: whether there is an average; it starts as a copy (an alias cannot be donated).
  """

  def copy():
    return pack_variables(jax.tree.map(np.array, variables), spec)

  own, average = copy(), copy() if ema else {}
  return TrainState(
    step=np.zeros((), np.int32),
    params=own["params"],
    batch_stats=own["batch_stats"],
    ema_params=average.get("params"),
    ema_batch_stats=average.get("batch_stats"),
    opt_state=(),
  )


def saved_form(state: TrainState) -> Any:
  """A state on the host as checkpoints hold it: every leaf under its path in the model.

  It lacks the frozen kernels' momentum and what is `NotSaved`, as the flags that freeze kernels:
  they follow from AIWQ's ranking.
  """
  frozen = frozenset()
  for node in jax.tree.leaves(state.opt_state, is_leaf=_is_whole):
    if isinstance(node, FrozenKernels):
      frozen |= node.names()

  def saved(node):
    if isinstance(node, NotSaved):
      return optax.MaskedNode()
    if not isinstance(node, Packed):
      return node
    masked = dict.fromkeys(frozen & node.arrays.keys(), optax.MaskedNode())
    return unpack(node.replace(arrays={**node.arrays, **masked}))

  opt_state = jax.tree.map(saved, state.opt_state, is_leaf=_is_whole)
  return unpack(state.replace(opt_state=opt_state))


def _is_whole(node: Any) -> bool:
  return isinstance(node, Packed | NotSaved)


def from_saved(saved: Any, template: TrainState) -> TrainState:
  """The state of a checkpoint, on the host.

  Args:
    saved: of the structure of `saved_form(template)`.
    template: of the beginning of the phase, on the host. It gives the packing, what is `NotSaved`,
      and the momentum of frozen kernels.
  """

  def packed(node, value):
    if isinstance(node, NotSaved):
      return node
    return node.filled(value) if isinstance(node, Packed) else value

  return jax.tree.map(packed, template, saved, is_leaf=_is_whole)
