"""What a step changes, by layer."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from profit_jax import snapshots
from profit_jax.quant import duq
from profit_jax.report import plots
from profit_jax.train import instability
from profit_jax.train.checkpoint import progress_of
from profit_jax.train.progress import EpochRecord, Progress


def params(kernel, a=1.0):
  return {"block": {"conv": {"kernel": np.float32(kernel), "quant_a": np.float32(duq.inverse_softplus(np.float32(a)))}}}


def test_the_share_of_codes_that_changed():
  # At 3 steps over an interval of 1, codes change at 1/6, 1/2, 5/6.
  before, after = params([0.1, 0.4, 0.6, -0.8]), params([0.2, 0.45, 0.6, -0.9])
  assert instability.flip_rates(before, after, 3.0) == {"block/conv": 0.5}
  # An interval that moves changes codes too; kernels that grow with it do not.
  assert instability.flip_rates(params([0.1, 0.4]), params([0.1, 0.4], a=0.5), 3.0) == {"block/conv": 1.0}
  assert instability.flip_rates(params([0.1, 0.4]), params([0.2, 0.8], a=2.0), 3.0) == {"block/conv": 0.0}


@pytest.mark.parametrize("method", ["lsq", "pact", "qil"])
def test_every_method_has_codes(method):
  rng = np.random.default_rng(0)
  kernel = np.float32(rng.normal(size=(3, 3, 4, 8)))
  scalars = {name: np.float32(0.5) for name in ("quant_a", "quant_center", "quant_width", "quant_gamma")}
  before, after = ({"conv": {"kernel": kernel * factor, **scalars}} for factor in (np.float32(1), np.float32(1.02)))
  assert instability.flip_rates(before, before, 7.0, method) == {"conv": 0.0}
  assert 0 < instability.flip_rates(before, after, 7.0, method)["conv"] < 0.5


def test_the_distance_of_a_batch_from_the_running_statistics():
  momentum, running = 0.9, {"mean": np.array([0.5, 1.0, 0.0]), "var": np.array([2.0, 1.0, 0.0])}
  batch = {"mean": np.array([0.7, 1.0, 0.0]), "var": np.array([1.5, 1.0, 0.0])}
  new = {name: momentum * running[name] + (1 - momentum) * batch[name] for name in running}
  expected = 0.5 * np.log(2.0 / 1.5) + (1.5 + 0.2**2) / (2 * 2.0) - 0.5
  found = instability.bn_distances({"norm": running}, {"norm": new}, momentum)
  np.testing.assert_allclose(found["norm"], (expected + 0) / 2, rtol=1e-3)  # the third channel is constant


def test_a_run_keeps_it_and_shows_it(finished_run):
  progress = progress_of(snapshots.read_newest(finished_run / "checkpoints", print))
  phases = json.loads((finished_run / "result.json").read_text())["phases"]
  for epoch in progress.epochs:
    phase = phases[epoch.phase - 1]
    trains_codes = phase["weight_bits"] is not None and phase["kind"] != "bn"
    assert set(epoch.instability["flip_rate"]) == ({"conv0", "conv1", "conv2", "classifier"} if trains_codes else set())
    assert set(epoch.instability["bn_distance"]) == {"norm0", "norm1", "norm2"}
  flips = [value for epoch in progress.epochs for value in epoch.instability["flip_rate"].values()]
  assert 0 < np.mean(flips) < 0.5
  # Frozen kernels keep their codes, unless their interval moves far.
  ft3 = next(phase for phase in phases if len(phase["frozen"]) == 2)
  last = [epoch for epoch in progress.epochs if epoch.phase == ft3["index"]]
  assert max(epoch.instability["flip_rate"][layer] for epoch in last for layer in ft3["frozen"]) < 0.01
  assert (finished_run / "plots" / "instability.png").read_bytes()[:4] == b"\x89PNG"
  assert "plots/instability.png" in (finished_run / "report.md").read_text()
  events = EventAccumulator(str(finished_run)).Reload()
  tags = events.Tags()
  assert {"flip_rate/conv0", "bn_distance/norm0"} <= {*tags["tensors"], *tags["scalars"]}
  assert {"flip_rate", "bn_distance", "instability"} <= {*tags["tensors"], *tags["histograms"], *tags["images"]}


def test_nothing_measured_is_no_picture():
  empty = Progress(epochs=[EpochRecord(phase=1, top1=1.0, top1_ema=None, loss=1.0)])
  assert plots.instability_image(empty) is None
  still = EpochRecord(phase=1, top1=1.0, top1_ema=None, loss=1.0, instability={"flip_rate": {"a": 0.0}})
  assert plots.instability_image(Progress(epochs=[still])) is None


def test_progress_of_an_older_release_is_read():
  values = Progress(epochs=[EpochRecord(phase=1, top1=1.0, top1_ema=None, loss=1.0)]).to_dict()
  del values["instability"], values["epochs"][0]["instability"]
  assert Progress.from_dict(values).epochs[0].instability == {}
