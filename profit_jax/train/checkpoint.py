"""Checkpoints through orbax: the newest states, the best weights, the teacher that a run made for itself.

    checkpoints/last/N      state and progress after epoch N of the run
    checkpoints/best/N      the best weights so far at the plan's last bits: {params, batch_stats}
    checkpoints/teacher/1   the student before quantization, where it is its own teacher
"""

from typing import Any

import jax
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
    """Saves the end of an epoch."""
    self._last.save(
      progress.total_epochs,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_plain(state)), progress=ocp.args.JsonSave(progress.to_dict())
      ),
    )

  def save_best(self, epoch: int, variables: Any) -> None:
    """Saves the best weights so far. A resumed run that finds the same epoch's again keeps them: they are equal."""
    if epoch not in self._best.all_steps():
      self._best.save(epoch, args=ocp.args.Composite(variables=ocp.args.StandardSave(variables)))

  def save_teacher(self, variables: Any) -> None:
    """Saves the student as its own teacher, once."""
    if self._teacher.latest_step() is None:
      self._teacher.save(1, args=ocp.args.Composite(variables=ocp.args.StandardSave(variables)))

  def restore_progress(self) -> Progress | None:
    """Where the newest checkpoint stands; None in a fresh directory.

    Read it first: only it tells which optimizer the state was saved with.
    """
    step = self._last.latest_step()
    if step is None:
      return None
    restored = self._last.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
    return Progress.from_dict(restored["progress"])

  def restore_state(self, template: TrainState) -> TrainState:
    """The newest state.

    Args:
      template: the shapes, with the optimizer of the phase that the progress names.

    Raises:
      ConfigError: the saved state has another structure; orbax by itself would drop what does not fit.
    """
    step = self._last.latest_step()
    metadata = self._last.item_metadata(step)["state"]
    saved, expected = _paths(metadata), _paths(_plain(template))
    if saved != expected:
      changed = sorted(set(saved.items()) ^ set(expected.items()))[:5]
      raise ConfigError(
        f"{self._root}/last/{step} does not hold the state of this plan's phase; the first differences: {changed}. "
        f"Start in an empty --workdir."
      )
    restored = self._last.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_plain(template))))
    leaves = [restored["state"][name] for name in _plain(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)

  def restore_best(self, template: Any) -> Any:
    """The best weights, or None if there are none yet."""
    return _restore_variables(self._best, template)

  def restore_teacher(self, template: Any) -> Any:
    """The student's own teacher, or None if there is none yet."""
    return _restore_variables(self._teacher, template)

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


def _restore_variables(manager: ocp.CheckpointManager, template: Any) -> Any:
  step = manager.latest_step()
  if step is None:
    return None
  return manager.restore(step, args=ocp.args.Composite(variables=ocp.args.StandardRestore(template)))["variables"]


def _plain(state: TrainState) -> dict[str, Any]:
  """The state as a flat dictionary of arrays: the path of a leaf is its name, whatever optax's containers are."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _paths(flat: Any) -> dict[str, tuple[int, ...]]:
  return {name: tuple(leaf.shape) for name, leaf in flat.items()}
