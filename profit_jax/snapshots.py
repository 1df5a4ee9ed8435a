"""Moments of a run on disk: arrays and plain values that are there whole, with a checksum over all of them, or not at all.

WORKDIR/checkpoints/N/       a moment, written by orbax: `arrays`, one vector per dtype, and `values`, JSON
WORKDIR/damaged_checkpoints/ what could not be read back, set aside

Orbax writes into a directory of another name and renames it: a process that is killed leaves no half of a moment. What
happens to the files later, only a checksum tells; orbax has none.
"""

import collections
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from profit_jax import distributed
from profit_jax.settings import ConfigError

Warn = Callable[[str], None]


class Snapshot(NamedTuple):
  """A moment that was read back.

  Attributes:
    number: which one; later moments have larger numbers.
    values: plain values.
    arrays: on the host, by path, as `state/params/stem/kernel`.
  """

  number: int
  values: dict[str, Any]
  arrays: dict[str, np.ndarray]

  def section(self, name: str) -> dict[str, np.ndarray]:
    """The arrays of one of the trees, by path within it; empty if it was None."""
    return {path.removeprefix(f"{name}/"): leaf for path, leaf in self.arrays.items() if path.startswith(f"{name}/")}

  def restore(self, name: str, template: Any) -> Any:
    """One of the trees, or None where it was None.

    Args:
      name: the section.
      template: its structure, with shapes and dtypes.

    Raises:
      ConfigError: the saved tree has another structure.
    """
    saved = self.section(name)
    if not saved:
      return None
    expected = {path: (leaf.shape, str(leaf.dtype)) for path, leaf in _leaves(template)}
    found = {path: (leaf.shape, str(leaf.dtype)) for path, leaf in saved.items()}
    if found != expected:
      differing = [path for path in {**expected, **found} if expected.get(path) != found.get(path)]
      raise ConfigError(
        f"Checkpoint {self.number} does not hold the {name} of this plan's phase; the first differences: {differing[:5]}. "
        f"Start in an empty --workdir."
      )
    return jax.tree_util.tree_map_with_path(lambda path, _: saved[_name(path)], template)


class Writer:
  """Writes moments, in the background, and keeps the last few."""

  def __init__(self, directory: epath.PathLike, *, keep: int):
    """Args: directory: `WORKDIR/checkpoints`; keep: how many stay."""
    self._directory = epath.Path(directory)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self._directory, options=options)
    self._newest = self._manager.latest_step()

  def save(self, number: int, trees: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Begins to write a moment, once the one before is on disk. A number that is there already is the same moment.

    Args:
      number: grows from one to the next.
      trees: of arrays, by section; None is an empty one.
      values: what JSON holds.

    Raises:
      ConfigError: a moment could not be written.
    """
    if number == self._newest:
      return
    packed, layout = _pack(trees)
    content = {"values": dict(values), "layout": layout}
    content["sha256"] = _digest(packed, content)
    arguments = ocp.args.Composite(arrays=ocp.args.StandardSave(packed), values=ocp.args.JsonSave(content))
    self._guarded(lambda: self._manager.save(number, args=arguments))
    self._newest = number

  def read_newest(self, warn: Warn) -> Snapshot | None:
    """The newest moment that is whole, as `read_newest`; damaged ones are set aside, out of the way of later ones."""
    self.wait()
    found = read_newest(self._directory, warn, set_aside=True)
    self._manager.reload()
    self._newest = self._manager.latest_step()
    return found

  def wait(self) -> None:
    """Until everything is on disk; raises as `save`."""
    self._guarded(self._manager.wait_until_finished)

  def close(self) -> None:
    """Waits and releases."""
    self._manager.close()

  def _guarded(self, action: Callable[[], Any]) -> None:
    try:
      action()
    except Exception as error:  # tensorstore's and file systems' own
      there = saved_numbers(self._directory)
      good = f"the last good one is {there[-1]}" if there else "there is no earlier one"
      raise ConfigError(
        f"A checkpoint could not be written to {self._directory}: {_short(error)}. Nothing that was there is lost: {good}. "
        f"Make room (or give the disk back) and run the same command: it goes on from there."
      ) from error


def saved_numbers(directory: epath.PathLike) -> list[int]:
  """The moments in a directory, oldest first, damaged ones among them."""
  directory = epath.Path(directory)
  if not directory.exists():
    return []
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def read_newest(directory: epath.PathLike, warn: Warn, *, set_aside: bool = False) -> Snapshot | None:
  """The newest moment that is whole; every process of a run must call this together.

  Args:
    directory: `WORKDIR/checkpoints`.
    warn: told of every moment that cannot be read back, by name.
    set_aside: move those out of the way of later ones. Only who trains may.

  Returns:
    None in a fresh directory.

  Raises:
    ConfigError: there are moments, and none of them is whole. All stay where they are.
  """
  directory = epath.Path(directory)
  damaged = {}
  found = None
  for number in reversed(saved_numbers(directory)):
    found, damage = _read_on_all(directory, number)
    if found is not None:
      break
    damaged[number] = damage
  if damaged and found is None:
    listing = "\n  ".join(f"{directory / str(number)}: {damage}" for number, damage in damaged.items())
    raise ConfigError(
      f"No checkpoint in {directory} can be read back; nothing was changed. Restore one from a copy, or start in an empty "
      f"--workdir.\n  {listing}"
    )
  aside = directory.parent / "damaged_checkpoints"
  for number, damage in damaged.items():
    place = directory / str(number)
    if set_aside:
      distributed.first_does(functools.partial(_move, place, aside / str(number)))
      warn(f"checkpoint {place} is damaged ({damage}); it was moved to {aside}, and the run goes on from {found.number}.")
    else:
      warn(f"checkpoint {place} is damaged ({damage}); {found.number} is used.")
  return found


def _move(place: epath.Path, target: epath.Path) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  if target.exists():
    target.rmtree()
  place.rename(target)


def _read_on_all(directory: epath.Path, number: int) -> tuple[Snapshot | None, str]:
  """A moment, or what is wrong with it; the same in all processes."""

  def read():
    try:
      return _read(directory, number), ""
    except Exception as error:  # damaged files raise whatever their parsers stumble over
      return None, _short(error)

  found, damage = read()
  if not distributed.on_all(found is not None):
    return None, damage or "another process could not read it"
  return found, ""


def _read(directory: epath.Path, number: int) -> Snapshot:
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    restore = ocp.args.Composite(arrays=ocp.args.StandardRestore(), values=ocp.args.JsonRestore())
    saved = checkpointer.restore(directory / str(number), args=restore)
  packed = {dtype: np.asarray(vector) for dtype, vector in saved["arrays"].items()}
  content = saved["values"]
  if content.pop("sha256") != _digest(packed, content):
    raise ValueError("its checksum is another one than when it was written")
  return Snapshot(number, content["values"], _unpack(packed, content["layout"]))


def _short(error: Exception) -> str:
  """The first sentence or so of an error, without what parsers print after it."""
  return " ".join(str(error).split())[:200] or type(error).__name__


# A state has over a thousand small arrays, and orbax takes 0.7 s to save them one by one; packed into one vector per dtype
# it is 0.06 s (the demo's state, 2 cores). The layout beside it keeps what the tree would tell: path, shape, dtype.

_Layout = list[list[Any]]


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _pack(trees: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], _Layout]:
  parts, layout = collections.defaultdict(list), []
  for path, leaf in _leaves(jax.device_get(dict(trees))):
    parts[str(leaf.dtype)].append(np.ravel(leaf))
    layout.append([path, list(leaf.shape), str(leaf.dtype)])
  # Copies: orbax writes in the background, while the next step is already given the originals to overwrite.
  return {dtype: np.concatenate(vectors) for dtype, vectors in parts.items()}, layout


def _unpack(packed: Mapping[str, np.ndarray], layout: _Layout) -> dict[str, np.ndarray]:
  offsets, found = collections.Counter(), {}
  for path, shape, dtype in layout:
    start = offsets[dtype]
    offsets[dtype] += int(np.prod(shape, dtype=int))
    found[path] = packed[dtype][start : offsets[dtype]].reshape(shape)
  return found


def _digest(packed: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> str:
  digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
  for dtype, vector in sorted(packed.items()):
    digest.update(f"{dtype} {vector.dtype} {vector.shape}".encode())
    digest.update(np.ascontiguousarray(vector).view(np.uint8))
  return digest.hexdigest()
