"""A run's checkpoints: everything that it needs to resume as if it had never been stopped."""

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
  """Templates of the arrays of a checkpoint; see `RunState`. The state is one of the beginning of
  its phase, on the host.
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
    window: weight codes since the last steps of an epoch began; else None.
  """

  progress: Progress
  state: TrainState
  sampling: AiwqState | None = None
  best: Any = None
  teacher: Any = None
  window: Window | None = None

  def number(self, steps_per_epoch: int) -> int:
    """Of its checkpoint.

    It grows with every step, every end of an epoch (which has an evaluation, and may end a phase),
    and every retry: a run that has gone back has a larger number than its last checkpoint.
    """
    return (
      number_at_end(self.progress.total_epochs, steps_per_epoch)
      + self.progress.step
      + self.progress.retries
    )


class SavedRun(NamedTuple):
  """A checkpoint of a run, opened once.

  Attributes:
    checkpoint: its arrays.
    progress: where the run stands. It says with which optimizer the state was saved.
  """

  checkpoint: checkpoints.Checkpoint
  progress: Progress


def opened(checkpoint: checkpoints.Checkpoint | None) -> SavedRun | None:
  """A checkpoint with its progress parsed; None for None."""
  return checkpoint and SavedRun(checkpoint, Progress.from_dict(checkpoint.values))


def number_at_end(epochs: int, steps_per_epoch: int) -> int:
  """The number of the checkpoint at the end of an epoch, of a run that never went back.

  Args:
    epochs: of the run so far.
    steps_per_epoch: of the run.
  """
  return epochs * (steps_per_epoch + 1)


def save(writer: checkpoints.Writer, current: RunState, number: int) -> None:
  """Begins to write a checkpoint; raises as `Writer.save`."""
  trees = {name: getattr(current, name) for name in ("sampling", "best", "teacher", "window")}
  trees["state"] = saved_form(jax.device_get(current.state))
  writer.save(number, trees, current.progress.to_dict())


def copy(writer: checkpoints.Writer, saved: SavedRun) -> None:
  """Writes the checkpoint of another run, with its progress as it is now; raises as `Writer.save`.

  Args:
    writer: of this run.
    saved: of the other.
  """
  writer.save(saved.checkpoint.number, saved.checkpoint.arrays, saved.progress.to_dict())
  writer.wait()


def restore(saved: SavedRun, shapes: Shapes) -> RunState:
  """The run state of a checkpoint, on the host; raises as `Checkpoint.restore`.

  Checkpoints of earlier releases are translated.
  """
  checkpoint = saved.checkpoint
  return RunState(
    saved.progress,
    _state(checkpoint, shapes.state),
    shapes.sampling and _sampling(checkpoint, shapes.sampling),
    checkpoint.restore("best", shapes.variables),
    checkpoint.restore("teacher", shapes.variables),
    checkpoint.restore("window", shapes.window),
  )


def _state(checkpoint: checkpoints.Checkpoint, template: TrainState) -> TrainState:
  """Earlier releases had one remedy with a state, freezing, and saved that without its name."""
  form = saved_form(template)
  if any(path.startswith("oscillation/fixed/") for path in checkpoint.section("state")):
    nameless = form.oscillation.get("freezing", {})
    saved = checkpoint.restore("state", form.replace(oscillation=nameless))
    saved = saved.replace(oscillation={"freezing": saved.oscillation})
  else:
    saved = checkpoint.restore("state", form)
  return from_saved(saved, template)


def _sampling(checkpoint: checkpoints.Checkpoint, template: AiwqState) -> AiwqState | None:
  """Earlier releases saved the previous kernels' values for AIWQ, not their codes: then the first
  step does not count.
  """
  if any(path.startswith("scale/") for path in checkpoint.section("sampling")):
    return checkpoint.restore("sampling", template)
  without_scale = checkpoint.restore("sampling", template._replace(scale={}))
  if without_scale is None:
    return None
  return without_scale._replace(scale=template.scale, has_previous=np.zeros((), bool))


def host_copy(tree: Any) -> Any:
  """A tree on the host, unpacked and copied: the next step overwrites the devices'."""
  return unpack(jax.tree.map(lambda leaf: leaf.copy(), jax.device_get(tree)))


def read(directory: epath.PathLike, warn: Callable[[str], None]) -> SavedRun | None:
  """The newest checkpoint in a directory, whose run may still train; None if there is none.

  Args:
    directory: `WORKDIR/checkpoints`.
    warn: told of checkpoints that cannot be read back.
  """
  return opened(checkpoints.read_newest(directory, warn))


def best_variables(
  directory: epath.PathLike, shapes: Any, warn: Callable[[str], None]
) -> tuple[Progress, Any] | None:
  """Where the run in a directory stands, and its best variables; None if there are none yet.

  Arguments as `read`'s; `shapes` are those of the variables.
  """
  saved = read(directory, warn)
  best = saved and saved.checkpoint.restore("best", shapes)
  return None if best is None else (saved.progress, best)
