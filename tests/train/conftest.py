"""The tiny net as a registered model, and one whole run of it that several tests look at."""

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
  config.compilation_cache = ""
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
def finished_run(tiny, tmp_path_factory):
  """The directory of a run that nobody stopped."""
  workdir = tmp_path_factory.mktemp("run")
  app.main(tiny_config(), str(workdir), "train")
  return workdir
