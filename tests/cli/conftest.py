"""A run's directory whose best checkpoint is a net with random numbers: nothing is trained."""

import pytest
from etils import epath

from profit_jax import checkpoints, data
from profit_jax.models import REGISTRY, register
from profit_jax.train import run_directory
from profit_jax.train.progress import Best, PhaseRecord, Progress
from tests.export.nets import random_variables, small_settings
from tests.export.tiny import TinyV1

MODEL = "tiny_v1"


@pytest.fixture(scope="session")
def tiny_v1():
  """Registers the tiny net."""
  register(MODEL)(TinyV1)
  yield
  del REGISTRY[MODEL]


def tiny_settings(**changes):
  return small_settings("mobilenet_v1", **{"model.name": MODEL, **changes})


def write_run(workdir, best, **changes):
  settings = tiny_settings(**changes)
  workdir = epath.Path(workdir)
  run_directory.claim_workdir(workdir, run_directory.identity_of(settings, data.load(settings)))
  phase = {
    "index": 1,
    "name": "w4a4 ft1",
    "kind": "train",
    "weight_bits": 4,
    "act_bits": 4,
    "epochs": 2,
    "steps": 8,
  }
  times = {"seconds": 1.0, "compile_seconds": 0.5}
  record = PhaseRecord(**phase, top1=9.5, top1_ema=None, loss=2.3, frozen=[], **times)
  scores = (
    Best(epoch=2, phase=1, top1=9.5, top5=51.0, weights="raw", examples=450) if best else None
  )
  progress = Progress(phase=2, total_epochs=2, records=[record], best=scores)
  writer = checkpoints.Writer(workdir / "checkpoints", keep=1)
  writer.save(1, {"best": random_variables(settings) if best else None}, progress.to_dict())
  writer.close()


@pytest.fixture(scope="session")
def random_run(tmp_path_factory, tiny_v1):
  workdir = tmp_path_factory.mktemp("run") / "run"
  write_run(workdir, best=True)
  return workdir
