"""What a step changes, by layer."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from profit_jax.quant import QUANTIZERS, duq, named
from profit_jax.quant.bits import Bits
from profit_jax.report import plots
from profit_jax.train import instability, run_state
from profit_jax.train.progress import EpochRecord, Progress
from tests.specs import hand_made


def params(kernel, a=1.0):
  scalars = {"quant_a": duq.inverse_softplus(np.float32(a)), "quant_c": np.float32(1.0)}
  return {
    "block": {
      "conv": {
        "kernel": np.float32(kernel),
        **{name: np.float32(raw) for name, raw in scalars.items()},
      }
    }
  }


def seen(*trees, bits=3):
  spec = hand_made(trees[0])
  window = instability.start(spec.kernels)
  for tree in trees:
    window = instability.observe(window, spec.kernel_codes(tree, Bits(weight=bits)))
  return window


def test_the_share_of_codes_that_change():
  # At 3 steps over an interval of 1, codes change at 1/6, 1/2, 5/6.
  before, after = params([0.1, 0.4, 0.6, -0.8]), params([0.2, 0.45, 0.6, -0.9])
  assert instability.rates(seen(before, after)) == {
    "flip_rate": {"block/conv": 0.5},
    "oscillation_rate": {"block/conv": 0},
  }
  # An interval that moves changes codes too; kernels that grow with it do not.
  assert instability.rates(seen(params([0.1, 0.4]), params([0.1, 0.4], a=0.5)))["flip_rate"] == {
    "block/conv": 1.0
  }
  assert instability.rates(seen(params([0.1, 0.4]), params([0.2, 0.8], a=2.0)))["flip_rate"] == {
    "block/conv": 0.0
  }
  assert instability.rates(seen(before)) == {}


def test_the_share_that_changes_back():
  # Codes 0 1 0 0 1 (a step up, one back, a pause, up again: two against the last) and 0 1 2 3 3
  # (three up).
  window = seen(
    *(params([one / 3, other / 3]) for one, other in ((0, 0), (1, 1), (0, 2), (0, 3), (1, 3)))
  )
  assert instability.rates(window) == {
    "flip_rate": {"block/conv": 6 / 8},
    "oscillation_rate": {"block/conv": 2 / 8},
  }
  # From the lowest code of 8 bits to the highest and back: more than 8 bits apart.
  far = seen(*(params([value], a=1.0) for value in (-1.0, 1.0, -1.0)), bits=8)
  assert instability.rates(far) == {
    "flip_rate": {"block/conv": 1.0},
    "oscillation_rate": {"block/conv": 0.5},
  }


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("method", list(QUANTIZERS))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_method_has_codes(method, per_channel, bits):
  quantizer = named(method, per_channel=per_channel)
  rng, qmax = np.random.default_rng(0), np.float32(2 ** (bits - 1) - 1)
  kernel = np.float32(rng.normal(size=(3, 3, 4, 8)))
  scalars = {
    leaf: np.float32(rng.uniform(0.3, 1.5, 8) if per_channel else 0.5)
    for leaf in quantizer.kernel_scalars
  }
  tree = {
    "block": {"conv": {"kernel": kernel, **scalars}},
    "stem_conv": {"kernel": kernel, **scalars},
  }
  given = Bits(weight=bits, quantizer=quantizer, layers={"stem_conv": 8})
  codes = hand_made(tree, given).kernel_codes(tree, given)
  for layer, used in (("block/conv", qmax), ("stem_conv", np.float32(127))):
    quantized = quantizer.of_kernel(quantizer.quantize_kernel, kernel, scalars, used)
    values, found = np.asarray(quantized), np.asarray(codes[layer]).astype(int)
    assert found.dtype.kind == "i"
    assert found.min() >= -used - (method == "pact")
    assert found.max() <= used
    # Equal values are equal codes and greater values greater ones, in every channel.
    for value, code in zip(values.reshape(-1, 8).T, found.reshape(-1, 8).T, strict=True):
      order = np.argsort(value, kind="stable")
      steps_up = np.diff(value[order]) > 1e-6
      assert np.array_equal(steps_up, np.diff(code[order]) > 0)


def test_the_distance_of_a_batch_from_the_running_statistics():
  momentum, running = 0.9, {"mean": np.array([0.5, 1.0, 0.0]), "var": np.array([2.0, 1.0, 0.0])}
  batch = {"mean": np.array([0.7, 1.0, 0.0]), "var": np.array([1.5, 1.0, 0.0])}
  new = {name: momentum * running[name] + (1 - momentum) * batch[name] for name in running}
  expected = 0.5 * np.log(2.0 / 1.5) + (1.5 + 0.2**2) / (2 * 2.0) - 0.5
  found = instability.bn_distances({"norm": running}, {"norm": new}, {"norm": momentum})
  # The third channel is constant.
  np.testing.assert_allclose(found["norm"], (expected + 0) / 2, rtol=1e-3)


def test_a_run_keeps_it_and_shows_it(finished_run):
  progress = run_state.read(finished_run / "checkpoints", print).progress
  phases = json.loads((finished_run / "result.json").read_text())["phases"]
  for epoch in progress.epochs:
    phase = phases[epoch.phase - 1]
    trains_codes = phase["weight_bits"] is not None and phase["kind"] != "bn"
    kernels = {"conv0", "conv1", "conv2", "classifier"}
    for name in ("flip_rate", "oscillation_rate"):
      assert set(epoch.instability.get(name, ())) == (kernels if trains_codes else set())
    assert set(epoch.instability["bn_distance"]) == {"norm0", "norm1", "norm2"}
    assert set(epoch.instability["aiwq"]) == (
      kernels - {"classifier"} if phase["kind"] == "sampling" else set()
    )
    acts = {"quant0", "quant1", "quant2", "signed_quant"}
    quantized = (acts if phase["act_bits"] else set()) | (
      kernels if phase["weight_bits"] else set()
    )
    for name in ("clip_rate", "quant_a", "quant_c"):
      assert set(epoch.instability.get(name, ())) == quantized
  flips = [
    value for epoch in progress.epochs for value in epoch.instability.get("flip_rate", {}).values()
  ]
  assert 0 < np.mean(flips) < 0.5
  # Frozen kernels keep their codes, unless their interval moves far.
  ft2 = next(phase for phase in phases if len(phase["frozen"]) == 2)
  last = [epoch for epoch in progress.epochs if epoch.phase == ft2["index"]]
  assert (
    max(epoch.instability["flip_rate"][layer] for epoch in last for layer in ft2["frozen"]) < 0.01
  )
  for name in ("instability.png", "quantizers.png"):
    assert (finished_run / "plots" / name).read_bytes()[:4] == b"\x89PNG"
    assert f"plots/{name}" in (finished_run / "report.md").read_text()
  events = EventAccumulator(str(finished_run)).Reload()
  tags = events.Tags()
  assert {"flip_rate/conv0", "oscillation_rate/conv0", "bn_distance/norm0"} <= {
    *tags["tensors"],
    *tags["scalars"],
  }
  assert {"flip_rate", "oscillation_rate", "bn_distance", "instability"} <= {
    *tags["tensors"],
    *tags["histograms"],
    *tags["images"],
  }


def test_nothing_measured_is_no_picture():
  empty = Progress(epochs=[EpochRecord(phase=1, top1=1.0, top1_ema=None, loss=1.0)])
  assert plots.instability_image(empty) is None
  still = EpochRecord(
    phase=1, top1=1.0, top1_ema=None, loss=1.0, instability={"flip_rate": {"a": 0.0}}
  )
  assert plots.instability_image(Progress(epochs=[still])) is None


def test_progress_of_an_older_release_is_read():
  values = Progress(epochs=[EpochRecord(phase=1, top1=1.0, top1_ema=None, loss=1.0)]).to_dict()
  del values["instability"], values["epochs"][0]["instability"]
  assert Progress.from_dict(values).epochs[0].instability == {}
