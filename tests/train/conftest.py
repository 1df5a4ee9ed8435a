"""The tiny net as a registered model, and one whole run of it that several tests look at."""

import os
import time

import pytest

from configs import digits_w4
from profit_jax import app
from profit_jax.models import REGISTRY
from tests.train.tiny import TinyNet


@pytest.fixture(scope="session")
def tiny():
  """Registers the tiny net as `tiny`."""
  REGISTRY["tiny"] = TinyNet
  yield
  del REGISTRY["tiny"]


def tiny_config(**changes):
  """All 22 phases on digits, an epoch or two each."""
  config = digits_w4.get_config()
  # Runs of this session share their programs, traced and compiled. No test replaces what is
  # compiled in them.
  config.compilation_cache = os.environ.get("PROFIT_JAX_TESTS_CACHE", "")
  config.update_from_flattened_dict(
    {
      "model.name": "tiny",
      "model.strides": (2, 1, 1, 1, 1, 1, 1, 1),
      "data.image_size": 16,
      "plan.full_precision_epochs": 2,
      "plan.finetune_epochs": 2,
      "plan.sampling_epochs": 2,
      "train.batch_size": 128,
      "train.eval_batch_size": 128,
      **changes,
    }
  )
  return config


@pytest.fixture(scope="session")
def finished_run(tiny, tmp_path_factory, worker_id):
  """The directory of a run that nobody stopped; the test processes share one, which the first that
  needs it makes.
  """
  session = (
    tmp_path_factory.getbasetemp()
    if worker_id == "master"
    else tmp_path_factory.getbasetemp().parent
  )
  workdir, done = session / "finished_run", session / "finished_run.done"
  try:
    workdir.mkdir()
  except FileExistsError:
    for _ in range(300):
      if done.exists():
        return workdir
      time.sleep(1)
    pytest.fail("the other test process did not finish the run")
  app.main(tiny_config(), str(workdir), "train")
  done.touch()
  return workdir
