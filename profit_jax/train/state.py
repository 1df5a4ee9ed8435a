"""What training carries from step to step: arrays only."""

from typing import Any

import flax.struct
import jax
import numpy as np


class TrainState(flax.struct.PyTreeNode):
  """The student, its exponential moving average, and the optimizer of the present phase.

  Attributes:
    step: int32 scalar, over all phases.
    params: the student's parameters, quantizer scalars included.
    batch_stats: its running statistics.
    ema_params: their average, updated once a step; None without EMA.
    ema_batch_stats: likewise.
    opt_state: fresh in every phase.
    oscillation: a `remedies.Oscillation` where codes that oscillate are fixed; else None.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  ema_params: Any
  ema_batch_stats: Any
  opt_state: Any
  oscillation: Any = None

  @property
  def variables(self) -> dict[str, Any]:
    """The student, as `apply` takes it."""
    return {"params": self.params, "batch_stats": self.batch_stats}

  @property
  def ema_variables(self) -> dict[str, Any]:
    """The average, as `apply` takes it."""
    return {"params": self.ema_params, "batch_stats": self.ema_batch_stats}


def create_state(variables: dict[str, Any], *, ema: bool) -> TrainState:
  """A state at step 0 without an optimizer, on the host; the average starts as a copy (an alias
  cannot be donated).
  """

  def copy(tree):
    return jax.tree.map(np.array, tree)

  params, batch_stats = variables["params"], variables["batch_stats"]
  return TrainState(
    step=np.zeros((), np.int32),
    params=copy(params),
    batch_stats=copy(batch_stats),
    ema_params=copy(params) if ema else None,
    ema_batch_stats=copy(batch_stats) if ema else None,
    opt_state=(),
  )
