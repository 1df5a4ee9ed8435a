"""SIGKILL at any instant: the same command goes on, and ends with the same bits."""

import time

import jax
import pytest

from profit_jax import checkpoints
from profit_jax.cli import app
from profit_jax.config import ConfigError
from tests.train import forked, killed
from tests.train.runs import assert_same_run, number
from tests.train.shared import tiny_config


@pytest.fixture(scope="module")
def started(tmp_path_factory):
  """Starts the tiny run."""
  log = tmp_path_factory.mktemp("log") / "log"

  def start(workdir):
    changes = {"checkpoint.minutes": 0.002}  # a save at nearly every step
    cache = jax.config.jax_compilation_cache_dir
    return forked.start(killed.train, str(workdir), cache, log, changes)

  return start


def wait(process, condition):
  end = time.monotonic() + 120
  while not condition():
    assert process.is_alive(), "the run ended by itself"
    assert time.monotonic() < end
    time.sleep(0.001)


def test_a_run_killed_again_and_again_ends_with_the_same_numbers(finished_run, started, tmp_path):
  run = tmp_path / "run"
  saved = run / "checkpoints"

  def reached(least):
    return lambda: max(checkpoints.saved_numbers(saved), default=-1) >= least

  def saving(least):
    return lambda: reached(least)() and any(saved.glob("*tmp*"))

  instants = {
    "before the first checkpoint": saved.exists,
    "in the first save": saving(-1),
    "in mid-epoch": reached(number(3, 2)),
    "in a save in mid-sampling": saving(number(5, 1)),
    "in a frozen phase": reached(number(7)),
  }
  for instant, condition in instants.items():
    process = started(run)
    wait(process, condition)
    if instant == "in mid-epoch":
      # While it lives, nobody else trains there; once it is killed, anybody may.
      with pytest.raises(ConfigError, match=f"{run} is in use .*process {process.pid}"):
        app.main(tiny_config(), str(run), "train")
    process.kill()
    process.join()
    assert process.exitcode == -9, instant
  process = started(run)
  process.join(120)
  assert process.exitcode == 0
  assert_same_run(run, finished_run)
