"""Checkpoints of a run on disk: complete and verified by a checksum, or not there at all.

WORKDIR/checkpoints/N/arrays/    `ocp.args.PyTreeSave`: the arrays, one vector per section and dtype
WORKDIR/checkpoints/N/manifest/  `ocp.args.JsonSave`: the plain values, and the path and shape of
                                 every array in the vectors
WORKDIR/checkpoints/N/sha256     the checksum of these files
WORKDIR/damaged_checkpoints/     what could not be read back

Orbax writes into a directory of another name and renames it (on `gs://`: marks it when complete).
A process that is killed therefore leaves no partial checkpoint. The checksum finds later damage:
Orbax has none. It is of files, not of arrays, so that Orbax never reads damaged ones: its threads
print stacks then.

Arrays are packed because TensorStore opens every array by itself. Under their own names, the 2,257
arrays of a MobileNet-v2 run (45 MB; 2 CPU cores, Orbax 0.12.8) take 5.4 s to write and 4.4 s to
read. Neither OCDBT, Zarr 3 nor compression changes that: TensorStore without Orbax needs 1.8 s and
1.1 s. The vectors take 0.18 s and 0.04 s, as plain Zarr without OCDBT and compression; with OCDBT
0.33 s and 0.07 s.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import logging as absl_logging
from etils import epath

from profit_jax import distributed
from profit_jax.config import ConfigError

# What goes wrong in a save is raised, and told once; Orbax's threads also print a stack each.
absl_logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)

Warn = Callable[[str], None]
Content = tuple[dict[str, np.ndarray], dict[str, Any]]
_Vectors = dict[str, np.ndarray]
_TIMEOUT = 120  # seconds
_LISTINGS = 5  # of a directory whose checkpoints are replaced while they are read
_ARRAYS, _MANIFEST, _CHECKSUM = "arrays", "manifest", "sha256"
_WRITTEN_LATER = (_CHECKSUM, "_CHECKPOINT_METADATA", "commit_success.txt")  # two are Orbax's
_ITEM_0_1 = "moment"  # of version 0.1.0


class Checkpoint(NamedTuple):
  """A checkpoint that was read back.

  Attributes:
    number: which one; later checkpoints have larger numbers.
    values: plain values.
    arrays: on the host, by path, as `state/params/stem/kernel`.
  """

  number: int
  values: dict[str, Any]
  arrays: dict[str, np.ndarray]

  def section(self, name: str) -> dict[str, np.ndarray]:
    """The arrays of one of the trees, by path within it; empty if it was None."""
    return {
      path.removeprefix(f"{name}/"): leaf
      for path, leaf in self.arrays.items()
      if path.startswith(f"{name}/")
    }

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
        f"Checkpoint {self.number} does not hold the {name} of this plan's phase; the first "
        f"differences: {differing[:5]}. "
        f"Start in an empty --workdir."
      )
    return jax.tree_util.tree_map_with_path(lambda path, _: saved[_name(path)], template)


class _Manager(ocp.CheckpointManager):
  """Orbax's, without its own look-out for preemptions.

  The loop asks for them, and a second caller with other numbers would upset the count.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class Writer:
  """Writes checkpoints in the background, and keeps the last few."""

  def __init__(self, directory: epath.PathLike, *, keep: int):
    """Creates the directory and removes what a killed process left unfinished in it.

    Args:
      directory: `WORKDIR/checkpoints`.
      keep: how many checkpoints stay.

    Raises:
      ConfigError: as `saved_numbers`, and as `save`.
    """
    self._directory = epath.Path(directory)
    # Orbax would only stumble at the first save over what is no directory.
    saved_on_all_hosts(self._directory)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=True,
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(
        # How long the other processes wait for one that could not write.
        timeout_secs=_TIMEOUT,
        post_finalization_callback=self._seal,
      ),
    )
    handlers = {
      _ARRAYS: ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False),
      _MANIFEST: ocp.JsonCheckpointHandler(),
    }
    self._unchecked = False  # whether a checkpoint was begun of which nobody knows the end
    self._manager = self._guarded(
      lambda: _Manager(self._directory, options=options, item_handlers=handlers)
    )

  def save(self, number: int, trees: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Begins to write a checkpoint, after the one before is on disk.

    A number that is already on disk is the same checkpoint. Every process of a run calls this; the
    first one writes.

    Args:
      number: grows from one checkpoint to the next.
      trees: of arrays, by section; None is an empty one. They are copied: the next step may
        overwrite them.
      values: what JSON holds.

    Raises:
      ConfigError: a checkpoint could not be written.
    """
    if number == self._manager.latest_step():
      return
    vectors, manifest = _packed(trees, values)
    items: dict[str, ocp.args.CheckpointArgs] = {_MANIFEST: ocp.args.JsonSave(manifest)}
    if vectors:  # Orbax refuses an empty tree.
      items[_ARRAYS] = ocp.args.PyTreeSave(vectors)
    self._guarded(lambda: self._manager.save(number, args=ocp.args.Composite(**items)))
    self._unchecked = True

  def check(self) -> None:
    """Raises as `save` where the checkpoint that was begun last could not be written; waits for
    nothing.
    """
    if self._unchecked and not self._manager.is_saving_in_progress():
      self._unchecked = False
      self.wait()

  def read_newest(self, warn: Warn) -> Checkpoint | None:
    """The newest undamaged checkpoint, as `read_newest`; newer, damaged ones are set aside."""
    self.wait()
    found = read_newest(self._directory, warn, set_aside=True)
    self._manager.reload()
    return found

  def wait(self) -> None:
    """Waits until everything is on disk; raises as `save`."""
    self._guarded(self._manager.wait_until_finished)

  def close(self) -> None:
    """Waits and releases."""
    self._manager.close()

  def _seal(self) -> None:
    """Adds the checksum to a checkpoint, before Orbax gives it its final name.

    Writes all of it through to the disk: Orbax removes the oldest checkpoint next.
    """
    if not distributed.is_first():
      return
    # One: what other processes left unfinished was removed at the beginning.
    for place in self._directory.glob("[0-9]*"):
      if ocp.path.step.is_path_finalized(place):
        continue
      (place / _CHECKSUM).write_text(_digest(place))
      for path in _files(place):
        # Remote files have no descriptor.
        with (
          contextlib.suppress(AttributeError, io.UnsupportedOperation),
          path.open("rb") as file,
        ):
          os.fsync(file.fileno())

  def _guarded(self, action: Callable[[], Any]) -> Any:
    try:
      return action()
    except (AssertionError, LookupError, TypeError):
      raise  # ours to mend
    except Exception as error:  # remote file systems have their own
      lost = error
      while lost is not None and not isinstance(lost, jax.errors.JaxRuntimeError):
        lost = lost.__cause__
      if lost is not None and jax.process_count() > 1:
        raise lost from None  # another process is gone, see `distributed.peers_needed`
      there = saved_numbers(self._directory)
      good = f"the last good one is {there[-1]}" if there else "there is no earlier one"
      raise ConfigError(
        f"A checkpoint could not be written to {self._directory}: {_short(error)}. Nothing that "
        f"was there is lost: {good}. "
        f"Make room (or give the disk back) and run the same command: it resumes from there."
      ) from error


def saved_numbers(directory: epath.PathLike) -> list[int]:
  """The checkpoints in a directory, oldest first, damaged ones among them.

  Raises:
    ConfigError: it is no directory, or cannot be listed.
  """
  directory = epath.Path(directory)
  try:
    if not directory.exists():
      return []
    # Where a directory cannot be renamed (`gs://`), Orbax writes into it and marks it at the end.
    there = (path for path in directory.iterdir() if path.name.isascii() and path.name.isdigit())
    return sorted(int(path.name) for path in there if ocp.path.step.is_path_finalized(path))
  except Exception as error:  # remote file systems have their own
    raise ConfigError(
      f"{directory} must be the directory of a run's checkpoints, and cannot be listed: "
      f"{_short(error)}. Move away what is "
      f"there, or give another --workdir."
    ) from error


def saved_on_all_hosts(directory: epath.PathLike) -> list[int]:
  """The checkpoints that the first process sees, in all; raises as `saved_numbers`."""
  return distributed.on_first_host(lambda: saved_numbers(directory))


def load(place: epath.Path) -> Content:
  """The arrays, by path, and the values of one checkpoint, verified.

  Args:
    place: `WORKDIR/checkpoints/N`.

  Raises:
    ValueError: the files are not what their checksum says.
    OSError: one is missing.
    ConfigError: one cannot be read at present.
  """
  if (place / _ITEM_0_1).exists():
    return _load_0_1(place / _ITEM_0_1)
  if _content(place / _CHECKSUM) != _digest(place).encode():
    raise ValueError("the checksum of its files is not the one that was saved with them")
  manifest = ocp.JsonCheckpointHandler().restore(place / _MANIFEST)
  arrays = place / _ARRAYS
  vectors = ocp.PyTreeCheckpointHandler().restore(arrays) if arrays.exists() else {}
  return _unpacked(manifest["arrays"], vectors), manifest["values"]


def read_newest(
  directory: epath.PathLike,
  warn: Warn,
  *,
  set_aside: bool = False,
) -> Checkpoint | None:
  """The newest undamaged checkpoint; every process of a run must call this together.

  Args:
    directory: `WORKDIR/checkpoints`.
    warn: told of every checkpoint that cannot be read back, by name.
    set_aside: move those out of the way of later ones. Only the process that trains may do so.

  Returns:
    None in a directory without checkpoints.

  Raises:
    ConfigError: all checkpoints are damaged, or one cannot be read at present. All stay where they
      are.
  """
  directory = epath.Path(directory)
  for _ in range(_LISTINGS):
    numbers = saved_on_all_hosts(directory)
    found, damaged = newest_of(directory, numbers)
    # The run itself may have written a newer one meanwhile, and deleted these.
    if found is not None or numbers == saved_on_all_hosts(directory):
      break
  if damaged and found is None:
    listing = "\n  ".join(
      f"{directory / str(number)}: {damage}" for number, damage in damaged.items()
    )
    raise ConfigError(
      f"No checkpoint in {directory} can be read back; nothing was changed. Restore one from a "
      "copy, or start in an empty "
      f"--workdir.\n  {listing}"
    )
  aside = directory.parent / "damaged_checkpoints"
  for number, damage in damaged.items():
    place = directory / str(number)
    if set_aside:
      distributed.on_first_host(functools.partial(_move, place, aside / str(number)))
      warn(
        f"checkpoint {place} is damaged ({damage}); it was moved to {aside}, and the run resumes "
        f"from {found.number}."
      )
    else:
      warn(f"checkpoint {place} is damaged ({damage}); {found.number} is used.")
  return found


def newest_of(
  directory: epath.PathLike, numbers: list[int]
) -> tuple[Checkpoint | None, dict[int, str]]:
  """The newest undamaged one of these checkpoints, and what is wrong with newer ones.

  Args:
    directory: `WORKDIR/checkpoints`.
    numbers: of the checkpoints, oldest first.

  Raises:
    ConfigError: one cannot be read at present.
  """
  damaged = {}
  for number in reversed(numbers):
    read = functools.partial(_read, epath.Path(directory) / str(number))
    content, damage = distributed.on_all_hosts(read)
    if distributed.true_on_all_hosts(content is not None):
      arrays, values = content
      return Checkpoint(number, values, arrays), damaged
    damaged[number] = damage or "another process could not read it"
  return None, damaged


def _move(place: epath.Path, target: epath.Path) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  if target.exists():
    target.rmtree()
  place.rename(target)


def _read(place: epath.Path) -> tuple[Content | None, str]:
  """A checkpoint as this process sees it, or what is wrong with it; raises as `_content`."""
  try:
    return load(place), ""
  except ConfigError:
    raise
  except Exception as error:  # missing and altered files; files that another process removes
    return None, _short(error)


def _content(path: epath.Path) -> bytes:
  """What a file of a checkpoint holds.

  Raises:
    OSError: it is not there.
    ConfigError: it cannot be read: a disk or a network that has failed for a while.
  """
  try:
    return path.read_bytes()
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
    raise
  except Exception as error:  # remote file systems have their own
    raise ConfigError(
      f"The checkpoint file {path} cannot be read at present: {_short(error)}. Nothing was "
      "changed. Run the same command "
      "again when it can; or, if it is lost, move its checkpoint's directory away: the one "
      "before is used then."
    ) from error


def _files(place: epath.Path) -> Iterator[epath.Path]:
  """All files of a checkpoint."""
  return (directory / name for directory, _, names in place.walk() for name in names)


def _digest(place: epath.Path) -> str:
  """The SHA-256 of the names and contents of a checkpoint's files; raises as `_content`."""
  digest = hashlib.sha256()
  for path in sorted(_files(place)):
    if path.name not in _WRITTEN_LATER:
      digest.update(f"{path.relative_to(place)}\n".encode())
      digest.update(hashlib.sha256(_content(path)).digest())
  return digest.hexdigest()


def _packed(trees: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[_Vectors, dict[str, Any]]:
  """Copies arrays into a vector per section and dtype, as `state.float32`.

  Returns:
    The vectors that are not empty, which Orbax refuses; and the values, and the shapes of the
    arrays by vector and path.
  """
  groups: dict[str, dict[str, np.ndarray]] = {}
  for path, leaf in _leaves(jax.device_get(dict(trees))):
    array = np.asarray(leaf)
    groups.setdefault(f"{path.partition('/')[0]}.{array.dtype}", {})[path] = array
  vectors = {
    name: np.concatenate([array.ravel() for array in arrays.values()])
    for name, arrays in groups.items()
    if any(array.size for array in arrays.values())
  }
  shapes = {name: {path: a.shape for path, a in arrays.items()} for name, arrays in groups.items()}
  # A copy: the caller may change its values while Orbax writes in the background.
  manifest = json.loads(json.dumps({"values": values, "arrays": shapes}))
  return vectors, manifest


def _unpacked(shapes: Mapping[str, Any], vectors: _Vectors) -> dict[str, np.ndarray]:
  """The arrays that `_packed` put into the vectors, by path."""
  arrays = {}
  for name, by_path in shapes.items():
    vector = vectors.get(name, np.zeros(0, name.rpartition(".")[2]))
    ends = np.cumsum([math.prod(shape) for shape in by_path.values()])
    for (path, shape), part in zip(by_path.items(), np.split(vector, ends[:-1]), strict=True):
      arrays[path] = part.reshape(shape)
  return arrays


def _load_0_1(place: epath.Path) -> Content:
  """As `load`, of a checkpoint that version 0.1.0 wrote: one safetensors file and its checksum."""
  content = _content(place / f"{_ITEM_0_1}.safetensors")
  checksum = _content(place / f"{_ITEM_0_1}.sha256").split()[:1]
  if checksum != [hashlib.sha256(content).hexdigest().encode()]:
    raise ValueError("the checksum of its content is not the one that was saved with it")
  header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
  return safetensors.numpy.load(content), json.loads(header["__metadata__"]["values"])


def _short(error: Exception) -> str:
  """The beginning of an error, on one line and with files' names in place of their paths.

  TensorStore repeats long paths before it says what is wrong.
  """
  text = re.sub(r"(?<![^\s\"'])(\w+:/)?/[^\s\"']*/(?=[^/\s])", "", " ".join(str(error).split()))
  return text[:300] or type(error).__name__


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
