"""The tiny net as a registered model, and one whole run of it that many tests look at."""

import os
import pathlib

import filelock
import pytest

from configs import digits_w4
from profit_jax.models import REGISTRY, register
from profit_jax.train.compiler import Compiler
from tests.train.tiny import TinyNet
from tests.wrong_input import command

PHASES = 9  # of `tiny_config()`, an epoch each


@pytest.fixture(scope="session")
def tiny():
  """Registers the tiny net as `tiny`."""
  register("tiny")(TinyNet)
  yield
  del REGISTRY["tiny"]


def tiny_config(**changes):
  """Nine phases of an epoch each on the digits: every kind of phase, every part of PROFIT."""
  config = digits_w4.get_config()
  # Runs of one session share their compiled programs; `finished_run` makes most of them.
  config.compilation_cache = os.environ.get("PROFIT_JAX_TESTS_CACHE", "")
  config.update_from_flattened_dict(
    {
      "model.name": "tiny",
      "model.strides": (2, 1, 1, 1, 1, 1, 1, 1),
      "data.image_size": 16,
      "plan.weight_bits": (4,),
      "plan.act_bits": (4,),
      "plan.profit_bits": (4,),
      "plan.freeze_fractions": (1 / 3, 2 / 3),
      "plan.full_precision_epochs": 1,
      "plan.finetune_epochs": 1,
      "plan.bn_epochs": 1,
      "plan.sampling_epochs": 1,
      "plan.warmup_epochs": 0,
      "train.batch_size": 128,
      "train.eval_batch_size": 128,
      # High rates: in ten steps an epoch the net should learn more than chance.
      "train.full_precision_learning_rate": 0.5,
      "train.learning_rate": 0.1,
      "train.ema_rate": 0.9,
      **changes,
    }
  )
  return config


@pytest.fixture(scope="session")
def finished_run(tiny, tmp_path_factory):
  """The directory of an uninterrupted run of `tiny_config()`, from the command line.

  All test processes of a session share it. The first that needs it trains it; a lock lets the
  others wait.
  """
  session = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    session = session.parent
  workdir = session / "finished_run"
  with filelock.FileLock(session / "finished_run.lock"):
    if not (workdir / "result.json").exists():
      file = pathlib.Path(__file__).with_name("tiny_run.py")
      code, _, err = command(f"--config={file}", f"--workdir={workdir}")
      assert code == 0, err
  return workdir


@pytest.fixture(scope="module")
def compiled():
  """The keys of the programs that are compiled, in order."""
  keys, make = [], Compiler._make

  def note(compiler, key, turn):
    keys.append(key)
    return make(compiler, key, turn)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Compiler, "_make", note)
    yield keys
