"""Moments of a run on disk: arrays and plain values that are there whole, with a checksum over all
of them, or not at all.

WORKDIR/checkpoints/N/moment/  written through orbax: moment.safetensors has the arrays, and the
                               plain values as JSON in its metadata;
                               `sha256sum -c moment.sha256` checks it
WORKDIR/damaged_checkpoints/   what could not be read back, set aside

Orbax writes into a directory of another name and renames it (on `gs://`: marks it at the end): a
process that is killed leaves no half of a moment. What happens to the files later, only a checksum
tells; orbax has none.

The format is not one of orbax's. Its arrays (`StandardSave`) take 1.5 s to write and 1.7 s to read
for the thousand small ones of a state, on a core that trains; one file that every tool reads takes
0.05 s. They also have no checksum, their reader prints stacks from its own threads where a file is
damaged, and it does not tell damage from a disk that cannot be read for a while.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import logging as absl_logging
from etils import epath

from profit_jax import distributed
from profit_jax.config import ConfigError

# What goes wrong in a save is raised, and told once; orbax's threads also print a stack each.
absl_logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)

Warn = Callable[[str], None]
ReadFile = Callable[[epath.Path], bytes]
_TIMEOUT = 120  # seconds
_READ: ReadFile = operator.methodcaller("read_bytes")
_LISTINGS = 5  # of a directory whose moments go away while they are read
_ITEM, _FILE, _CHECKSUM = "moment", "moment.safetensors", "moment.sha256"


class Checkpoint(NamedTuple):
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
  """Orbax's, but for preemptions: the loop asks for them, and a second caller with other numbers
  would upset the count.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class Writer:
  """Writes moments, in the background, and keeps the last few."""

  def __init__(self, directory: epath.PathLike, *, keep: int):
    """Args: directory: `WORKDIR/checkpoints`; keep: how many stay. Raises as `saved_numbers`, and
    as `save`.
    """
    self._directory = epath.Path(directory)
    # Orbax would only stumble at the first save over what is no directory.
    saved_on_all_hosts(self._directory)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=True,
      cleanup_tmp_directories=True,
      # How long the other processes wait for one that could not write.
      async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT),
    )
    self._manager = self._guarded(lambda: _Manager(self._directory, options=options))
    self._newest = self._manager.latest_step()

  def save(self, number: int, trees: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Begins to write a moment, once the one before is on disk. A number that is there already is
    the same moment.

    Args:
      number: grows from one to the next.
      trees: of arrays, by section; None is an empty one.
      values: what JSON holds.

    Raises:
      ConfigError: a moment could not be written.
    """
    if number == self._newest:
      return
    content = b""
    if distributed.is_first():
      # A copy in memory: orbax writes in the background, while the next step is already given the
      # originals to overwrite.
      arrays = {
        path: np.asarray(leaf, order="C") for path, leaf in _leaves(jax.device_get(dict(trees)))
      }
      content = safetensors.numpy.save(arrays, {"values": json.dumps(values)})
    self._guarded(
      lambda: self._manager.save(number, args=ocp.args.Composite(**{_ITEM: _Save(content)}))
    )
    self._newest = number

  def read_newest(self, warn: Warn) -> Checkpoint | None:
    """The newest moment that is whole, as `read_newest`; damaged ones are set aside, out of the way
    of later ones.
    """
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
        f"Make room (or give the disk back) and run the same command: it goes on from there."
      ) from error


def saved_numbers(directory: epath.PathLike) -> list[int]:
  """The moments in a directory, oldest first, damaged ones among them.

  Raises:
    ConfigError: it is no directory, or cannot be listed.
  """
  directory = epath.Path(directory)
  try:
    if not directory.exists():
      return []
    # Where a directory cannot be renamed (`gs://`), orbax writes into it and marks it at the end.
    there = (path for path in directory.iterdir() if path.name.isascii() and path.name.isdigit())
    return sorted(int(path.name) for path in there if ocp.path.step.is_path_finalized(path))
  except Exception as error:  # remote file systems have their own
    raise ConfigError(
      f"{directory} must be the directory of a run's checkpoints, and cannot be listed: "
      f"{_short(error)}. Move away what is "
      f"there, or give another --workdir."
    ) from error


def saved_on_all_hosts(directory: epath.PathLike) -> list[int]:
  """The moments that the first process sees, in all; raises as `saved_numbers`."""
  return distributed.on_first_host(lambda: saved_numbers(directory))


def read_newest(
  directory: epath.PathLike,
  warn: Warn,
  *,
  set_aside: bool = False,
  read_file: ReadFile = _READ,
) -> Checkpoint | None:
  """The newest moment that is whole; every process of a run must call this together.

  Args:
    directory: `WORKDIR/checkpoints`.
    warn: told of every moment that cannot be read back, by name.
    set_aside: move those out of the way of later ones. Only who trains may.
    read_file: reads one file of a moment.

  Returns:
    None in a fresh directory.

  Raises:
    ConfigError: there are moments, and none of them is whole; or one cannot be read at present. All
      stay where they are.
  """
  directory = epath.Path(directory)
  for _ in range(_LISTINGS):
    numbers = saved_on_all_hosts(directory)
    found, damaged = newest_of(directory, numbers, read_file)
    # A run that is going on may have written a newer one meanwhile, and deleted these.
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
        f"checkpoint {place} is damaged ({damage}); it was moved to {aside}, and the run goes on "
        f"from {found.number}."
      )
    else:
      warn(f"checkpoint {place} is damaged ({damage}); {found.number} is used.")
  return found


def newest_of(
  directory: epath.Path, numbers: list[int], read_file: ReadFile = _READ
) -> tuple[Checkpoint | None, dict[int, str]]:
  """The newest of these moments (oldest first) that is whole, and what is wrong with newer ones;
  all processes together. `read_file` reads one file of a moment.
  """
  damaged = {}
  for number in reversed(numbers):
    read = functools.partial(_read, directory, number, read_file)
    found, damage = distributed.on_all_hosts(read)
    if distributed.true_on_all_hosts(found is not None):
      return found, damaged
    damaged[number] = damage or "another process could not read it"
  return None, damaged


def _move(place: epath.Path, target: epath.Path) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  if target.exists():
    target.rmtree()
  place.rename(target)


def _read(directory: epath.Path, number: int, read_file: ReadFile) -> tuple[Checkpoint | None, str]:
  """A moment as this process sees it, or what is wrong with it; raises as `_content`."""
  place = directory / str(number) / _ITEM
  try:
    content, checksum = (_content(place / name, read_file) for name in (_FILE, _CHECKSUM))
    if checksum.decode().split()[:1] != [hashlib.sha256(content).hexdigest()]:
      raise ValueError(f"the checksum of {_FILE} is not what {_CHECKSUM} says")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    values = json.loads(header["__metadata__"]["values"])
    return Checkpoint(number, values, safetensors.numpy.load(content)), ""
  except ConfigError:
    raise
  except Exception as error:  # damaged files raise whatever their parsers stumble over
    return None, _short(error)


def _content(path: epath.Path, read_file: ReadFile) -> bytes:
  """A file of a moment.

  Raises:
    FileNotFoundError: it is not there.
    ConfigError: it may be whole, but cannot be read: a disk or a network that has failed for a
      while.
  """
  try:
    if path.exists() and not path.is_dir():
      return read_file(path)
  except FileNotFoundError:
    pass
  except Exception as error:  # remote file systems have their own
    raise ConfigError(
      f"The checkpoint file {path} cannot be read at present: {_short(error)}. Nothing was "
      "changed. Run the same command "
      "again when it can; or, if it is lost, move its checkpoint's directory away: the one "
      "before is used then."
    ) from error
  raise FileNotFoundError(f"{path.name} is missing")


def _short(error: Exception) -> str:
  """The first sentence or so of an error, without what parsers print after it."""
  return " ".join(str(error).split())[:200] or type(error).__name__


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _write_through(path: epath.Path, content: bytes) -> None:
  """To the disk, not only to the kernel: the moment before may be deleted next."""
  with path.open("wb") as file:
    file.write(content)
    file.flush()
    # Remote files have no number.
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
      os.fsync(file.fileno())


class _Handler(ocp.AsyncCheckpointHandler):
  """Tells orbax how a moment is written."""

  async def async_save(self, directory: epath.Path, args: "_Save") -> list[ocp.future.Future]:
    async def write():  # `directory` may not be there yet, which the future waits for
      if distributed.is_first():
        _write_through(directory / _FILE, args.content)
        _write_through(
          directory / _CHECKSUM, f"{hashlib.sha256(args.content).hexdigest()}  {_FILE}\n".encode()
        )

    return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="moment")]

  # Neither is used: all saves are asynchronous, and `read_newest` needs no orbax.
  save = None
  restore = None


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Save(ocp.args.CheckpointArgs):
  content: bytes
