"""Checkpoints through orbax: the newest states, the best weights, the teacher that a run made for itself.

checkpoints/last/N      state and progress after epoch N of the run
checkpoints/best/N      the best weights so far at the plan's last bits: {params, batch_stats}
checkpoints/teacher/1   the student before quantization, where it is its own teacher
"""

import collections
import math
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from profit_jax.settings import ConfigError
from profit_jax.train.progress import Progress
from profit_jax.train.state import TrainState


class Checkpoints:
  """Reads and writes a run's checkpoints."""

  def __init__(self, directory: epath.PathLike, *, keep: int):
    """Args: directory: `WORKDIR/checkpoints`; keep: how many of the newest states stay."""
    root = epath.Path(directory)
    self._root = root
    self._last = _manager(root / "last", keep)
    self._best = _manager(root / "best", 1)
    self._teacher = _manager(root / "teacher", 1)

  def save(self, state: TrainState, progress: Progress) -> None:
    """Saves the end of an epoch.

    What the progress says to exist, the best weights and the teacher, is on disk before it: a run that is killed here
    finds all of it, or goes on from an epoch earlier.
    """
    self._best.wait_until_finished()
    self._teacher.wait_until_finished()
    packed, layout = _pack(state)
    self._last.save(
      progress.total_epochs,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(packed),
        progress=ocp.args.JsonSave({"progress": progress.to_dict(), "layout": layout}),
      ),
    )

  def save_best(self, epoch: int, variables: Any) -> None:
    """Saves the best weights so far. A resumed run that finds the same epoch's again keeps them: they are equal."""
    if epoch not in self._best.all_steps():
      self._best.save(epoch, args=ocp.args.Composite(variables=ocp.args.StandardSave(_host_copy(variables))))

  def save_teacher(self, variables: Any) -> None:
    """Saves the student as its own teacher, once."""
    if self._teacher.latest_step() is None:
      self._teacher.save(1, args=ocp.args.Composite(variables=ocp.args.StandardSave(_host_copy(variables))))

  def restore_progress(self) -> Progress | None:
    """Where the newest checkpoint stands; None in a fresh directory.

    Read it first: only it tells which optimizer the state was saved with.
    """
    step = self._last.latest_step()
    if step is None:
      return None
    return Progress.from_dict(self._restore_json(step)["progress"])

  def restore_state(self, template: TrainState) -> TrainState:
    """The newest state, on the host.

    Args:
      template: the shapes, with the optimizer of the phase that the progress names.

    Raises:
      ConfigError: the saved state has another structure; orbax by itself would drop what does not fit.
    """
    step = self._last.latest_step()
    saved, expected = self._restore_json(step)["layout"], _layout(template)
    if saved != expected:
      changed = [entry for entry in saved + expected if entry not in saved or entry not in expected][:5]
      raise ConfigError(
        f"{self._root}/last/{step} does not hold the state of this plan's phase; the first differences: {changed}. "
        f"Start in an empty --workdir."
      )
    restored = self._last.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return _unpack(restored["state"], template)

  def _restore_json(self, step: int) -> dict[str, Any]:
    return self._last.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

  def restore_best(self, template: Any) -> Any:
    """The best weights of the newest progress, or None if there are none yet.

    Raises:
      ConfigError: the progress names weights that are not there.
    """
    progress = self.restore_progress()
    if progress is None or progress.best is None:
      return None
    if progress.best.epoch not in self._best.all_steps():
      raise ConfigError(f"{self._root}/best/{progress.best.epoch} is missing; the run cannot be evaluated without it.")
    return _restore_variables(self._best, progress.best.epoch, template)

  def restore_teacher(self, template: Any) -> Any:
    """The student's own teacher, or None if there is none yet."""
    step = self._teacher.latest_step()
    return None if step is None else _restore_variables(self._teacher, step, template)

  def wait(self) -> None:
    """Until everything is written."""
    for manager in (self._last, self._best, self._teacher):
      manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases."""
    for manager in (self._last, self._best, self._teacher):
      manager.close()


def _manager(directory: epath.Path, keep: int) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
  return ocp.CheckpointManager(directory, options=options)


def _restore_variables(manager: ocp.CheckpointManager, step: int, template: Any) -> Any:
  return manager.restore(step, args=ocp.args.Composite(variables=ocp.args.StandardRestore(template)))["variables"]


def _host_copy(tree: Any) -> Any:
  """Arrays of our own: orbax writes in the background, while the next step is already given the originals to overwrite."""
  return jax.tree.map(np.array, jax.device_get(tree))


# A state has over a thousand small arrays, and orbax takes 0.7 s to save them one by one; packed into one vector per dtype
# it is 0.06 s (the demo's state, 2 cores). The layout beside it keeps what the tree would tell: path,
# shape and dtype of every leaf.


def _layout(state: Any) -> list[list[Any]]:
  """Path, shape and dtype of every leaf, as JSON gives it back."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return [
    [jax.tree_util.keystr(path, simple=True, separator="/"), list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves
  ]


def _pack(state: TrainState) -> tuple[dict[str, np.ndarray], list[list[Any]]]:
  parts = collections.defaultdict(list)
  for leaf in jax.tree.leaves(jax.device_get(state)):
    parts[str(leaf.dtype)].append(np.ravel(leaf))
  return {dtype: np.concatenate(vectors) for dtype, vectors in parts.items()}, _layout(state)


def _unpack(packed: dict[str, np.ndarray], template: Any) -> Any:
  offsets = collections.Counter()

  def take(leaf):
    dtype, start = str(leaf.dtype), offsets[str(leaf.dtype)]
    offsets[dtype] += math.prod(leaf.shape)
    return np.asarray(packed[dtype][start : offsets[dtype]]).reshape(leaf.shape)

  return jax.tree.map(take, template)
