"""Checkpoints on disk are complete or not there at all, and damage is noticed."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import time

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from profit_jax import checkpoints
from profit_jax.config import ConfigError


def trees(number, size=1000):
  rng = np.random.default_rng(number)
  return {
    "state": {
      "step": np.asarray(number, np.int32),
      "kernel": rng.normal(size=(4, size)).astype(np.float32),
    },
    "sampling": None,
    "best": {"flag": np.asarray(True)},
  }


def values(number):
  return {"epoch": number, "loss": 0.1 + 0.2, "top1_ema": None, "frozen": ["block01/expand_conv"]}


def write(directory, numbers, keep=3, size=1000):
  writer = checkpoints.Writer(directory, keep=keep)
  for number in numbers:
    writer.save(number, trees(number, size), values(number))
  writer.close()


def assert_is(checkpoint, number, size=1000):
  assert (checkpoint.number, checkpoint.values) == (number, values(number))
  expected = trees(number, size)
  np.testing.assert_array_equal(
    checkpoint.restore("state", expected["state"])["kernel"], expected["state"]["kernel"]
  )
  assert checkpoint.arrays["state/step"].dtype == np.int32
  assert checkpoint.restore("sampling", {"metric": np.zeros(3)}) is None
  assert checkpoint.section("best")["flag"].dtype == bool


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  directory = tmp_path_factory.mktemp("two") / "checkpoints"
  write(directory, [3, 7])
  return directory


@pytest.fixture
def copy(two, tmp_path):
  return shutil.copytree(two, tmp_path / "checkpoints")


def test_the_newest_comes_back(two):
  assert_is(checkpoints.read_newest(two, pytest.fail), 7)
  assert checkpoints.read_newest(two.parent / "absent", pytest.fail) is None


def test_the_last_few_stay(tmp_path):
  write(tmp_path / "c", [1, 2, 3, 5, 8], keep=2)
  assert checkpoints.saved_numbers(tmp_path / "c") == [5, 8]
  # A number that is on disk is the same checkpoint. What a killed process left is removed.
  unfinished = shutil.copytree(tmp_path / "c" / "8", tmp_path / "c" / "9.orbax-checkpoint-tmp")
  write(tmp_path / "c", [8, 9], keep=2)
  assert not unfinished.exists()
  assert checkpoints.saved_numbers(tmp_path / "c") == [8, 9]


def test_saved_arrays_may_be_overwritten_at_once(tmp_path):
  writer = checkpoints.Writer(tmp_path / "c", keep=1)
  given = trees(1, 100_000)
  writer.save(1, given, values(1))
  given["state"]["kernel"][:] = 0
  writer.close()
  assert_is(checkpoints.read_newest(tmp_path / "c", pytest.fail), 1, 100_000)


_DAMAGES = ("truncated", "altered", "removed")


def damages(directory):
  files = sorted(
    str(path.relative_to(directory / "7"))
    for path in (directory / "7").rglob("*")
    if path.is_file()
  )
  return [(file, how) for file in files for how in _DAMAGES]


def damage(path, how):
  content = path.read_bytes()
  if how == "removed":
    path.unlink()
  elif how == "truncated":
    path.write_bytes(content[: len(content) // 2])
  else:
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :])


def test_any_damage_to_any_file_falls_back_or_does_not_matter(copy):
  fell_back = set()
  for file, how in damages(copy):
    path, warnings = copy / "7" / file, []
    content = path.read_bytes()
    damage(path, how)
    found = checkpoints.read_newest(copy, warnings.append)
    path.write_bytes(content)
    if warnings:
      fell_back.add((file, how))
      assert f"{copy}/7 is damaged" in warnings[0]
      assert "3 is used" in warnings[0]
    # Whatever the damage, what comes back is one of the checkpoints, to the bit.
    assert_is(found, 3 if warnings else 7)
  contents = ["sha256", "manifest/metadata"]
  contents += [f"arrays/{name}/0" for name in ("best.bool", "state.float32", "state.int32")]
  assert fell_back >= {(file, how) for file in contents for how in _DAMAGES}


def test_who_trains_sets_damaged_ones_aside(copy):
  damage(copy / "7" / "arrays" / "state.float32" / "0", "altered")
  warnings = []
  writer = checkpoints.Writer(copy, keep=3)
  assert_is(writer.read_newest(warnings.append), 3)
  assert len(warnings) == 1
  assert str(copy.parent / "damaged_checkpoints") in warnings[0]
  assert (copy.parent / "damaged_checkpoints" / "7" / "manifest" / "metadata").exists()
  writer.save(7, trees(7), values(7))  # the run comes to the same number again
  writer.close()
  assert_is(checkpoints.read_newest(copy, pytest.fail), 7)


def test_nothing_is_changed_where_all_are_damaged(copy):
  for number in (3, 7):
    damage(copy / str(number) / "sha256", "truncated")
  writer = checkpoints.Writer(copy, keep=3)
  with pytest.raises(ConfigError, match=r"No checkpoint in [\s\S]*/7: [\s\S]*/3: "):
    writer.read_newest(pytest.fail)
  writer.close()
  assert checkpoints.saved_numbers(copy) == [3, 7]


def test_a_disk_that_fails_for_a_while_is_no_damage(copy):
  file = copy / "7" / "arrays" / "state.float32" / "0"
  content = file.read_bytes()
  file.unlink()
  file.symlink_to("/proc/self/mem")  # reading its beginning is an I/O error
  with pytest.raises(ConfigError, match=r"7/arrays/state.float32/0 .*Input/output error"):
    checkpoints.read_newest(copy, pytest.fail, set_aside=True)
  # Nothing was set aside, nor was 3 taken for the newest one.
  file.unlink()
  file.write_bytes(content)
  assert_is(checkpoints.read_newest(copy, pytest.fail), 7)


@pytest.fixture
def before_loading(monkeypatch):
  """Sets what happens before a checkpoint is read, as by a run that writes meanwhile."""

  def set_action(action):
    def load(place, load=checkpoints.load):
      action()
      return load(place)

    monkeypatch.setattr(checkpoints, "load", load)

  return set_action


def test_a_checkpoint_that_a_run_replaces_while_it_is_read_is_looked_for_again(
  copy, before_loading
):
  def replace():
    if checkpoints.saved_numbers(copy) != [9]:
      write(copy, [9], keep=1)

  before_loading(replace)
  assert_is(checkpoints.read_newest(copy, pytest.fail), 9)
  assert checkpoints.saved_numbers(copy) == [9]


def test_a_run_that_is_always_faster_ends_in_a_message(copy, before_loading):
  numbers = []

  def rename():
    newest = max(checkpoints.saved_numbers(copy))
    (copy / str(newest)).rename(copy / str(newest + 1))
    numbers.append(newest)

  before_loading(rename)
  shutil.rmtree(copy / "3")
  with pytest.raises(ConfigError, match="No checkpoint in"):
    checkpoints.read_newest(copy, pytest.fail)
  assert len(set(numbers)) > 1


def test_orbax_reads_a_checkpoint_without_this_package(two):
  manager = ocp.CheckpointManager(two)
  items = ocp.args.Composite(arrays=ocp.args.StandardRestore(), manifest=ocp.args.JsonRestore())
  restored = manager.restore(manager.latest_step(), args=items)
  assert manager.latest_step() == 7
  assert restored.manifest["values"] == values(7)
  shapes = restored.manifest["arrays"]["state.float32"]
  assert shapes == {"state/kernel": [4, 1000]}
  np.testing.assert_array_equal(
    restored.arrays["state.float32"].reshape(4, 1000), trees(7)["state"]["kernel"]
  )


def test_arrays_without_elements_and_of_any_type_come_back(tmp_path):
  written = {
    "state": {
      "empty": np.zeros((0, 3), np.int32),
      "half": np.arange(3).astype(ml_dtypes.bfloat16),
      "transposed": np.arange(6).reshape(2, 3).T,
    },
    "best": None,
  }
  writer = checkpoints.Writer(tmp_path / "c", keep=2)
  writer.save(1, {"best": None}, {})
  assert writer.read_newest(pytest.fail).arrays == {}
  writer.save(2, written, {})
  found = writer.read_newest(pytest.fail).restore("state", written["state"])
  writer.close()
  jax.tree.map(np.testing.assert_array_equal, found, written["state"])


def test_a_checkpoint_of_version_0_1_is_read(tmp_path):
  arrays = {"state/kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
  content = safetensors.numpy.save(arrays, {"values": json.dumps(values(4))})
  place = tmp_path / "c" / "4" / "moment"
  place.mkdir(parents=True)
  (place / "moment.safetensors").write_bytes(content)
  checksum = hashlib.sha256(content).hexdigest()
  (place / "moment.sha256").write_text(f"{checksum}  moment.safetensors\n")
  writer = checkpoints.Writer(tmp_path / "c", keep=2)
  found = writer.read_newest(pytest.fail)
  assert (found.number, found.values) == (4, values(4))
  np.testing.assert_array_equal(found.arrays["state/kernel"], arrays["state/kernel"])
  # The run resumes: what it saves next has today's format.
  writer.save(5, trees(5), values(5))
  writer.wait()
  assert_is(checkpoints.read_newest(tmp_path / "c", pytest.fail), 5)
  writer.close()
  damage(place / "moment.safetensors", "altered")
  shutil.rmtree(tmp_path / "c" / "5")
  with pytest.raises(ConfigError, match="checksum"):
    checkpoints.read_newest(tmp_path / "c", pytest.fail)


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path):
  (tmp_path / "checkpoints").write_text("not a directory")
  for action in (
    lambda: checkpoints.read_newest(tmp_path / "checkpoints", pytest.fail),
    lambda: checkpoints.Writer(tmp_path / "checkpoints", keep=1),
  ):
    with pytest.raises(ConfigError, match=r"/checkpoints .* cannot be listed"):
      action()


def test_another_structure_is_named(two):
  newest = checkpoints.read_newest(two, pytest.fail)
  with pytest.raises(ConfigError, match=r"Checkpoint 7 .* state .*\['weights', 'kernel'\]"):
    newest.restore(
      "state", {"step": np.zeros((), np.int32), "weights": np.zeros((4, 1000), np.float32)}
    )


def test_a_checkpoint_that_cannot_be_written_is_told_without_another_save(tmp_path, monkeypatch):
  def full(place):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  writer = checkpoints.Writer(tmp_path / "checkpoints", keep=1)
  writer.check()  # nothing was begun
  monkeypatch.setattr(checkpoints, "_digest", full)
  writer.save(3, trees(3), values(3))
  told = []
  for _ in range(1000):
    try:
      writer.check()
    except ConfigError as error:
      told.append(str(error))
    if told:
      break
    time.sleep(0.01)
  assert "No space left on device" in told[0]
  writer.check()  # once


# Orbax closes its event loop when the first array fails; TensorStore's threads still report others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_the_last_good_one(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
  )
  if mounted.returncode:
    pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
  try:
    size = 25_000  # 400 kB that cannot be compressed much
    write(disk / "checkpoints", [1, 2], size=size)
    writer = checkpoints.Writer(disk / "checkpoints", keep=1)
    writer.save(3, trees(3, size), values(3))
    with pytest.raises(ConfigError, match=r"No space left on device.* good one is 2"):
      writer.wait()
    assert checkpoints.saved_numbers(disk / "checkpoints") == [
      1,
      2,
    ]  # nor has the old one made room
    assert_is(checkpoints.read_newest(disk / "checkpoints", pytest.fail), 2, size)
    # With room again, the same command goes on.
    shutil.rmtree(disk / "checkpoints" / "1")
    writer = checkpoints.Writer(disk / "checkpoints", keep=5)
    assert_is(writer.read_newest(pytest.fail), 2, size)
    writer.save(3, trees(3, size), values(3))
    writer.close()
    assert_is(checkpoints.read_newest(disk / "checkpoints", pytest.fail), 3, size)
  finally:
    subprocess.run(["umount", "-l", str(disk)], check=True)
