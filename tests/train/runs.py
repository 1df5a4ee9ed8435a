"""What tests read from the directory of a run, and how they stop one."""

import json
import os

import pytest

from profit_jax import snapshots
from profit_jax.train.loop import Loop

STEPS_PER_EPOCH = 10  # of the tiny configuration: 1347 digits in batches of 128


def number(epochs, step=0):
  """The snapshot after so many epochs of the run, and steps of the next."""
  return epochs * (STEPS_PER_EPOCH + 1) + step


def result_of(workdir):
  return json.loads((workdir / "result.json").read_text())


def newest_of(workdir):
  return snapshots.read_newest(workdir / "checkpoints", pytest.fail)


def without_times(tree):
  """A result, or the values of a snapshot, without what it took."""
  if isinstance(tree, dict):
    return {key: without_times(value) for key, value in tree.items() if "seconds" not in key}
  return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def assert_same_run(one, other):
  """The results are equal, and everything in the last checkpoints is, to the bit."""
  assert without_times(result_of(one)) == without_times(result_of(other))
  a, b = newest_of(one), newest_of(other)
  assert without_times(a.values) == without_times(b.values)
  assert a.arrays.keys() == b.arrays.keys()
  assert [path for path in a.arrays if a.arrays[path].tobytes() != b.arrays[path].tobytes()] == []


def signal_at(patch, signals):
  """Before it goes on from each of these numbers, the run gets the signal, once; returns the
  numbers that have come.
  """
  meet, come = Loop._meet, []

  def signalled(self):
    if self._number in signals and self._number not in come:
      come.append(self._number)
      os.kill(os.getpid(), signals[self._number])
    meet(self)

  patch.setattr(Loop, "_meet", signalled)
  return come


def damage(checkpoint):
  """Changes one bit in the middle of a moment."""
  file = checkpoint / "moment" / "moment.safetensors"
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0x40
  file.write_bytes(content)


def stop_at(patch, numbers):
  """Every one of these snapshots is saved, and then the run ends, once for each; returns those that
  have come.
  """
  save, come = snapshots.Writer.save, []

  def save_and_stop(self, number, trees, values):
    save(self, number, trees, values)
    if number in numbers and number not in come:
      come.append(number)
      raise KeyboardInterrupt

  patch.setattr(Loop, "_save_is_due", lambda self: self._number in numbers)
  patch.setattr(snapshots.Writer, "save", save_and_stop)
  return come
