"""A run's checkpoints: everything that it needs to go on as if nobody had stopped it, in one
snapshot.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from profit_jax import snapshots
from profit_jax.train.aiwq import AiwqState
from profit_jax.train.instability import Window
from profit_jax.train.packing import unpack
from profit_jax.train.progress import Progress
from profit_jax.train.state import TrainState, from_saved, saved_form


class Shapes(NamedTuple):
  """What the arrays of a moment look like; see `Moment`. The state is one of the beginning of its
  phase, on the host.
  """

  state: TrainState
  sampling: AiwqState | None
  variables: Any
  window: Window


@dataclasses.dataclass
class Moment:
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


def save(writer: snapshots.Writer, moment: Moment, number: int) -> None:
  """Begins to write a moment; raises as `Writer.save`."""
  trees = {name: getattr(moment, name) for name in ("sampling", "best", "teacher", "window")}
  trees["state"] = saved_form(jax.device_get(moment.state))
  writer.save(number, trees, moment.progress.to_dict())


def progress_of(snapshot: snapshots.Snapshot) -> Progress:
  """Where a snapshot stands. Read first: only it tells which optimizer the state was saved with."""
  return Progress.from_dict(snapshot.values)


def restore(snapshot: snapshots.Snapshot, shapes: Shapes) -> Moment:
  """The moment of a snapshot, on the host; raises as `Snapshot.restore`.

  Earlier releases saved the previous kernels' values for AIWQ, not their codes: of such a moment,
  the first step does not count.
  """
  saved = snapshot.restore("state", saved_form(shapes.state))
  return Moment(
    progress_of(snapshot),
    from_saved(saved, shapes.state),
    shapes.sampling and _sampling(snapshot, shapes.sampling),
    snapshot.restore("best", shapes.variables),
    snapshot.restore("teacher", shapes.variables),
    snapshot.restore("window", shapes.window),
  )


def _sampling(snapshot: snapshots.Snapshot, template: AiwqState) -> AiwqState | None:
  if any(path.startswith("scale/") for path in snapshot.section("sampling")):
    return snapshot.restore("sampling", template)
  without_scale = snapshot.restore("sampling", template._replace(scale={}))
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
  snapshot = snapshots.read_newest(directory, warn)
  best = snapshot and snapshot.restore("best", shapes)
  return None if best is None else (progress_of(snapshot), best)
