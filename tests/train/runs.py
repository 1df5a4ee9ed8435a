"""What tests read from the directory of a run, and how they stop one."""

import json
import os

import pytest

from profit_jax import checkpoints
from profit_jax.cli.app import Hooks
from profit_jax.train.observer import Observer

# Of runs whose pictures no test looks at.
WITHOUT_PLOTS = Hooks(plots=False)
STEPS_PER_EPOCH = 10  # of the tiny configuration: 1347 digits in batches of 128


def number(epochs, step=0):
  """The checkpoint after `epochs` epochs of the run and `step` steps of the next."""
  return epochs * (STEPS_PER_EPOCH + 1) + step


def result_of(workdir):
  return json.loads((workdir / "result.json").read_text())


def newest_of(workdir):
  return checkpoints.read_newest(workdir / "checkpoints", pytest.fail)


def without_times(tree):
  """A result, or the values of a checkpoint, without its durations."""
  if isinstance(tree, dict):
    return {key: without_times(value) for key, value in tree.items() if "seconds" not in key}
  return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def assert_same_checkpoint(one, other):
  """Everything in two checkpoints is equal, to the bit."""
  assert without_times(one.values) == without_times(other.values)
  assert one.arrays.keys() == other.arrays.keys()
  different = [
    path for path in one.arrays if one.arrays[path].tobytes() != other.arrays[path].tobytes()
  ]
  assert different == []


def assert_same_run(one, other):
  """The results are equal, and everything in the last checkpoints is, to the bit."""
  assert without_times(result_of(one)) == without_times(result_of(other))
  assert_same_checkpoint(newest_of(one), newest_of(other))


def damage(checkpoint):
  """Changes one bit in the middle of a checkpoint."""
  file = checkpoint / "arrays" / "state.float32" / "0"
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0x40
  file.write_bytes(content)


class SignalAt(Observer):
  """Sends this process a signal at each of some stop points, once.

  Attributes:
    reached: the stop points that have come, in order.
  """

  def __init__(self, signals):
    """Args: signals: by the number of the stop point."""
    self._signals = dict(signals)
    self.reached = []

  def stop_point(self, number):
    if number in self._signals and number not in self.reached:
      self.reached.append(number)
      os.kill(os.getpid(), self._signals[number])

  @property
  def hooks(self):
    return Hooks(callbacks=[self], plots=False)


class SaveAt(Observer):
  """A clock by which a run saves these checkpoints in addition to those at the ends of phases.

  With `stop`, the run ends right after each of them.
  """

  def __init__(self, numbers, stop=False):
    """Args: numbers: of the checkpoints; stop: whether the run ends after each."""
    self._numbers, self._stop, self._now = list(numbers), stop, 0.0

  def stop_point(self, number):
    if self._stop and number in self._numbers:
      self._numbers.remove(number)
      raise KeyboardInterrupt
    if number + 1 in self._numbers:
      self._now += 3600.0

  @property
  def hooks(self):
    return Hooks(callbacks=[self], clock=lambda: self._now, plots=False)
