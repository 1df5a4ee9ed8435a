"""A run's checkpoints: everything that it needs to go on as if nobody had stopped it, in one
checkpoint.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from profit_jax import checkpoints
from profit_jax.train.aiwq import AiwqState
from profit_jax.train.instability import Window
from profit_jax.train.packing import unpack
from profit_jax.train.progress import Progress
from profit_jax.train.state import TrainState, from_saved, saved_form


class Shapes(NamedTuple):
  """What the arrays of a moment look like; see `RunState`. The state is one of the beginning of its
  phase, on the host.
  """

  state: TrainState
  sampling: AiwqState | None
  variables: Any
  window: Window


@dataclasses.dataclass
class RunState:
  """A run between two steps.

  Attributes:
    progress: where it stands.
    state: the student, its average, the optimizer.
    sampling: in a sampling phase; else None.
    best: the best variables so far at the plan's last bits, on the host; None before there are any.
    teacher: the student before quantization, on the host, where it is its own teacher; else None.
    window: what was seen of weight codes since the last steps of an epoch began; else None.
  """

  progress: Progress
  state: TrainState
  sampling: AiwqState | None = None
  best: Any = None
  teacher: Any = None
  window: Window | None = None

  def number(self, steps_per_epoch: int) -> int:
    """Grows with every step, every end of an epoch (which has an evaluation, and may end a phase),
    and every retry: where a run has gone back to, it is at a later moment than the one on disk.
    """
    return (
      number_at_end(self.progress.total_epochs, steps_per_epoch)
      + self.progress.step
      + self.progress.retries
    )


def number_at_end(epochs: int, steps_per_epoch: int) -> int:
  """The number of the moment after so many epochs of a run that was never sent back."""
  return epochs * (steps_per_epoch + 1)


def save(writer: checkpoints.Writer, current: RunState, number: int) -> None:
  """Begins to write a moment; raises as `Writer.save`."""
  trees = {name: getattr(current, name) for name in ("sampling", "best", "teacher", "window")}
  trees["state"] = saved_form(jax.device_get(current.state))
  writer.save(number, trees, current.progress.to_dict())


def progress_of(checkpoint: checkpoints.Checkpoint) -> Progress:
  """Where a checkpoint stands.

  Read it first: it says which optimizer the state was saved with.
  """
  return Progress.from_dict(checkpoint.values)


def restore(checkpoint: checkpoints.Checkpoint, shapes: Shapes) -> RunState:
  """The run state of a checkpoint, on the host; raises as `Checkpoint.restore`.

  Earlier releases saved the previous kernels' values for AIWQ, not their codes: of such a moment,
  the first step does not count.
  """
  saved = checkpoint.restore("state", saved_form(shapes.state))
  return RunState(
    progress_of(checkpoint),
    from_saved(saved, shapes.state),
    shapes.sampling and _sampling(checkpoint, shapes.sampling),
    checkpoint.restore("best", shapes.variables),
    checkpoint.restore("teacher", shapes.variables),
    checkpoint.restore("window", shapes.window),
  )


def _sampling(checkpoint: checkpoints.Checkpoint, template: AiwqState) -> AiwqState | None:
  if any(path.startswith("scale/") for path in checkpoint.section("sampling")):
    return checkpoint.restore("sampling", template)
  without_scale = checkpoint.restore("sampling", template._replace(scale={}))
  if without_scale is None:
    return None
  return without_scale._replace(scale=template.scale, has_previous=np.zeros((), bool))


def host_copy(tree: Any) -> Any:
  """A tree on the host, unpacked and copied: the next step overwrites the devices'."""
  return unpack(jax.tree.map(lambda leaf: leaf.copy(), jax.device_get(tree)))


def best_variables(
  directory: epath.PathLike, shapes: Any, warn: Callable[[str], None]
) -> tuple[Progress, Any] | None:
  """Where the run in a directory stands, and its best variables; it may still be going on. None if
  there are none yet.
  """
  checkpoint = checkpoints.read_newest(directory, warn)
  best = checkpoint and checkpoint.restore("best", shapes)
  return None if best is None else (progress_of(checkpoint), best)
