"""Remedies for oscillating weights: formulas, a hand-made history, and runs."""

import functools
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from profit_jax import checkpoints, data
from profit_jax.cli import app
from profit_jax.config import ConfigError, OscillationSettings, parse
from profit_jax.data.digits import INFO
from profit_jax.data.normalize import Normalization
from profit_jax.export.quantizers import quantized_kernel
from profit_jax.models import REGISTRY, build, check
from profit_jax.nn.layers import BatchNorm
from profit_jax.quant import DuQ, duq
from profit_jax.quant.bits import Bits
from profit_jax.schedule import plan
from profit_jax.train import optimizer, steps
from profit_jax.train.interrupt import Stopped
from profit_jax.train.mesh import make_mesh
from profit_jax.train.oscillation import (
  REMEDIES,
  AddedLoss,
  Remedies,
  Remedy,
  added_losses,
  dampening,
  freezing,
)
from profit_jax.train.packing import pack
from profit_jax.train.programs import Programs
from profit_jax.train.state import create_state, saved_form
from tests.specs import hand_made, spec_of
from tests.train.runs import STEPS_PER_EPOCH, WITHOUT_PLOTS, SignalAt, assert_same_run, number
from tests.train.shared import tiny_config
from tests.train.tiny import TinyNet

BITS = Bits(weight=3)  # codes -3 to 3


def params(kernel, a=1.5, **more):
  scalars = {"quant_a": duq.inverse_softplus(jnp.float32(a)), "quant_c": jnp.float32(0.3)}
  return {"conv": {"kernel": jnp.float32(kernel), **scalars, **more}}


def test_dampening_pulls_to_the_middle_of_the_bin():
  # Steps of 0.5: the values of codes are -1.5 to 1.5.
  kernel = np.float32([0.1, 0.3, -0.6, 1.4, 1.6, -9.0])
  middle = np.float32([0.0, 0.5, -0.5, 1.5])
  loss, gradient = jax.value_and_grad(dampening.dampening_loss)(
    params(kernel), BITS, hand_made(params(kernel))
  )
  np.testing.assert_allclose(loss, np.sum((kernel[:4] - middle) ** 2), rtol=1e-5)
  np.testing.assert_allclose(
    gradient["conv"]["kernel"], [*(2 * (kernel[:4] - middle)), 0.0, 0.0], rtol=1e-5
  )
  assert gradient["conv"]["quant_a"] == gradient["conv"]["quant_c"] == 0


def test_dampening_knows_channels_and_the_bits_of_single_layers():
  kernel = np.float32(np.random.default_rng(0).normal(0, 0.2, (3, 3, 2, 4)))
  tree = {
    "stem_conv": {
      **params(kernel)["conv"],
      "quant_a": duq.inverse_softplus(jnp.float32([0.5, 1, 2, 4])),
    }
  }
  given = Bits(weight=3, quantizer=DuQ(per_channel=True), layers={"stem_conv": 8})
  spec = hand_made(tree, given)
  step = np.float32([0.5, 1, 2, 4]) / 127
  expected = np.sum(
    np.where(np.abs(kernel) < step * 127, (kernel - step * np.rint(kernel / step)) ** 2, 0)
  )
  np.testing.assert_allclose(dampening.dampening_loss(tree, given, spec), expected, rtol=1e-4)


def history(codes, threshold, momentum=0.1):
  """`fix_codes` over a weight's codes, one a step: the state after each, and the latent kernels."""
  spec = hand_made(params([0.0]))
  state, kernels, states = freezing.start(spec.kernels), [], []
  for code in codes:
    new, state = freezing.fix_codes(
      state, params([code * 0.5 + 0.07]), BITS, threshold, momentum, spec
    )
    states.append(state)
    kernels.append(float(new["conv"]["kernel"][0]))
  return states, kernels


def test_the_frequency_counts_changes_against_the_last_one():
  codes = [1, 2, 2, 1, 1, 2, 3, 2]
  states, kernels = history(codes, threshold=1.0)
  turned = [0, 0, 0, 1, 0, 1, 0, 1]  # 2 -> 3 goes on in the direction of 1 -> 2
  expected = np.array(
    [
      sum(o * 0.1 * 0.9 ** (t - s) for s, o in enumerate(turned[: t + 1]))
      for t in range(len(codes))
    ]
  )
  np.testing.assert_allclose(
    [float(state.frequency["conv"][0]) for state in states], expected, rtol=1e-5
  )
  assert [int(state.codes["conv"][0]) for state in states] == codes
  np.testing.assert_allclose(kernels, np.array(codes) * 0.5 + 0.07, rtol=1e-6)


def test_a_code_that_oscillates_is_fixed_to_its_mean():
  # It is 1 most of the time, and fixed in the step whose oscillation takes the frequency above
  # 0.15, the second within few.
  codes = [1, 1, 1, 2, 1, 2, 1, 3, -3]
  states, kernels = history(codes, threshold=0.15)
  fixed = [bool(state.fixed["conv"][0]) for state in states]
  assert fixed == [False] * 5 + [True] * 4
  assert kernels[5:] == [0.5] * 4  # code 1, in the latent weight
  assert {int(state.codes["conv"][0]) for state in states[5:]} == {1}


def test_a_fixed_code_stays_when_its_interval_moves():
  states, _ = history([1, 2, 1, 2, 1], threshold=0.15)
  tree = params([0.2], a=6.0)
  new, state = freezing.fix_codes(states[-1], tree, BITS, 0.15, 0.1, hand_made(tree))
  assert state.fixed["conv"][0]
  code = int(state.codes["conv"][0])
  assert code in (1, 2)
  np.testing.assert_allclose(new["conv"]["kernel"][0], code * 2.0, rtol=1e-6)
  assert exported_code(new["conv"], 3) == code


def test_fixed_codes_of_channels_with_intervals_of_their_own():
  intervals = jnp.float32([1.5, 3.0])
  spec = hand_made(params(np.zeros((1, 2))), Bits(quantizer=DuQ(per_channel=True)))
  state = freezing.start(spec.kernels)
  for code in (1, 2, 1, 2, 1):
    tree = params(np.float32([[0.5, 1.0]]) * code)
    tree["conv"] |= {
      "quant_a": duq.inverse_softplus(intervals),
      "quant_c": duq.inverse_softplus(intervals),
    }
    new, state = freezing.fix_codes(state, tree, BITS, 0.15, 0.1, spec)
  assert state.fixed["conv"].all()
  np.testing.assert_allclose(new["conv"]["kernel"], [[0.5, 1.0]], rtol=1e-6)


def exported_code(layer, bits):
  found = quantized_kernel("conv", layer, 2 ** (bits - 1) - 1, DuQ())
  return int(np.ravel(found.codes)[0])


def test_strengths_are_annealed_over_all_phases_of_the_bits(tiny):
  bits = {"plan.weight_bits": (8, 4), "plan.freeze_fractions": (0.0, 1 / 3, 2 / 3)}
  epochs = {"plan.finetune_epochs": 2, "plan.sampling_epochs": 2}
  remedy = {"oscillation.dampening": 0.4, "oscillation.freeze_thresholds": (0.1, 0.02)}
  settings = parse(tiny_config(**bits, **epochs, **remedy), REGISTRY)
  phases = plan(settings)
  w4 = [p for p in phases if p.weight_bits == 4 and p.kind != "bn"]
  assert [p.kind for p in w4] == ["sampling"] + ["finetune"] * 3
  total, steps_per_epoch, done = sum(p.epochs for p in w4) * 10, 10, 0
  remedies = Remedies(settings.oscillation)
  for phase in w4:
    for step in range(phase.epochs * steps_per_epoch):
      found = remedies.strengths(phases, phase, step, steps_per_epoch)
      left = (1 + math.cos(math.pi * done / total)) / 2
      np.testing.assert_allclose(
        [found["dampening"], found["freezing"]], [0.4 * (1 - left), 0.02 + 0.08 * left], rtol=1e-5
      )
      done += 1
  assert done == total
  high = next(p for p in phases if p.weight_bits == 8 and p.kind == "finetune")
  assert remedies.strengths(phases, high, 0, 10)["freezing"] > 1  # no frequency is
  for phase in phases:
    assert (remedies.strengths(phases, phase, 0, 10) is None) == (not phase.trains_codes)
  assert Remedies(OscillationSettings()).strengths(phases, w4[0], 0, 10) is None


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"oscillation.dampening": -1.0}, r"oscillation\.dampening = -1.0 is not allowed"),
    ({"oscillation.dampening": 0.1, "quant.method": "pact"}, r"needs duq or lsq"),
    ({"oscillation.freeze_thresholds": (0.02, 0.1)}, r"not rising"),
    (
      {"oscillation.freeze_thresholds": (0.1, 0.0005)},
      r"above oscillation\.freeze_momentum = 0.001",
    ),
    ({"oscillation.freeze_thresholds": (0.1,)}, r"two frequencies"),
    ({"oscillation.freeze_thresholds": (0.1, 0.02), "quant.method": "qil"}, r"needs duq or lsq"),
    ({"oscillation.bn_reestimation_batches": -2}, r"oscillation\.bn_reestimation_batches = -2"),
  ],
)
def test_what_cannot_be_is_refused(tiny, changes, message):
  with pytest.raises(ConfigError, match=message):
    check(parse(tiny_config(**changes), REGISTRY))


def test_the_optimizer_gets_the_gradient_of_dampening(tiny):
  model, spec = TinyNet(), spec_of(TinyNet(), 16)
  variables = spec.init(jax.random.key(0))
  labels = optimizer.label_params(pack(variables["params"], spec.groups), train_kernels=True)
  tx = optimizer.make_optimizer(
    labels,
    optimizer.SgdSettings(weight_decay=0.0, momentum=0.0, quantizer_lr_scale=0.01),
    frozenset({"conv1/kernel"}),
    of_gradient=[dampening.add_dampening(spec)],
  )
  norm = Normalization((0.3,) * 3, (0.35,) * 3)
  step = jax.jit(
    steps.make_train_step(
      model,
      tx,
      normalization=norm,
      ema_rate=0.9,
    )
  )
  state = create_state(variables, spec, ema=False)
  state = state.replace(opt_state=tx.init(state.params))
  rng = np.random.default_rng(0)
  batch = {
    "image": np.uint8(rng.integers(0, 256, (8, 16, 16, 3))),
    "label": np.arange(8, dtype=np.int32),
  }

  def after(weight):
    strengths = {"dampening": np.float32(weight)}
    return step(state, batch, Bits(3, 3), np.float32(0.1), jax.random.key(0), None, None, strengths)

  (plain, _, _), (damped, metrics, _) = after(0.0), after(0.5)
  loss, gradient = jax.value_and_grad(dampening.dampening_loss)(
    variables["params"], Bits(3, 3), spec
  )
  np.testing.assert_allclose(metrics["dampening"], 0.5 * loss, rtol=1e-5)
  for layer in ("conv0", "conv1", "conv2", "classifier"):
    kernels = [state.params.arrays[f"{layer}/kernel"] for state in (damped, plain)]
    moved = kernels[0] - kernels[1]
    expected = 0.0 if layer == "conv1" else -0.1 * 0.5 * gradient[layer]["kernel"]
    np.testing.assert_allclose(moved, np.broadcast_to(expected, moved.shape), atol=1e-6)


class Pull(Remedy):
  """A remedy as a user would add it: pulls every kernel down, and counts the steps."""

  name = "pull"
  is_on = True

  def summary(self):
    return "pulls"

  def strength(self, weight_bits, left):
    return 0.5

  def of_gradient(self, spec):
    def update(updates, state, params=None, *, strengths, **_):
      kernels = {f"{layer}/kernel" for layer in spec.kernels}
      arrays = {
        name: leaf + strengths["pull"] if name in kernels else leaf
        for name, leaf in updates.arrays.items()
      }
      return updates.replace(arrays=arrays), state.replace(value=strengths["pull"])

    first = AddedLoss(np.zeros((), np.float32), "pull")
    return optax.GradientTransformationExtraArgs(lambda _: first, update)

  def of_params(self, spec):
    def update(params, state, before=None, **_):
      return params, state + 1

    return optax.GradientTransformationExtraArgs(lambda _: np.zeros((), np.int32), update)


def test_a_remedy_needs_nothing_but_its_class(tiny, monkeypatch):
  monkeypatch.setitem(REMEDIES, "pull", Pull)
  settings = parse(tiny_config(), REGISTRY)
  assert Remedies(settings.oscillation).summary() == "pulls"
  spec = spec_of(TinyNet(), 16)
  programs = Programs(settings, INFO, spec, spec, make_mesh(settings))
  programs.close()  # nothing is compiled
  trains = plan(settings)[-2].program
  for program, acts in ((trains, True), (trains._replace(train_kernels=False), False)):
    first = jax.eval_shape(functools.partial(programs.states.first, program))
    state, metrics, _ = programs.tracer.train_step(program).out_info
    # Steps follow on each other, and every checkpoint has what the remedy carries.
    assert jax.tree.structure(state) == jax.tree.structure(first)
    assert ("pull" in metrics) == ("pull" in state.oscillation) == acts
  # Its loss term is no part of a checkpoint.
  saved = saved_form(jax.device_get(programs.states.first(trains)))
  assert not added_losses(saved.opt_state)
  assert saved.oscillation == {"pull": 0}


SHORT = {
  "plan.act_bits": (4,),
  "plan.weight_bits": (2,),
  "plan.stabilize": False,
  "plan.profit_bits": (2,),
  "teacher.model": "none",
  "plan.finetune_epochs": 2,
  "plan.freeze_fractions": (1 / 3,),
  "oscillation.dampening": 0.01,
  "train.learning_rate": 0.3,  # weights of so small a net hardly oscillate otherwise
  "oscillation.freeze_thresholds": (0.03, 0.021),
  "oscillation.freeze_momentum": 0.02,
  "oscillation.bn_reestimation_batches": 3,
}


@pytest.fixture(scope="module")
def remedied(tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("remedied")
  app.main(tiny_config(**SHORT), str(workdir), "train")
  return workdir


def test_all_remedies_and_profit_in_one_run(remedied):
  result = json.loads((remedied / "result.json").read_text())
  assert result["phases"][-1]["frozen"] == [result["aiwq"][0]["layer"]]
  assert (
    "| remedies | dampening up to 0.01; codes fixed above a" in (remedied / "report.md").read_text()
  )
  # The last phase's state: what is fixed has its code's value, and stays fixed from phase to phase.
  state = checkpoints.read_newest(remedied / "checkpoints", pytest.fail).section("state")
  shares, frozen = [], "oscillation/freezing"
  for layer in ("conv0", "conv1", "conv2", "classifier"):
    fixed, mean = state[f"{frozen}/fixed/{layer}"], state[f"{frozen}/mean/{layer}"]
    kernel, interval = (
      state[f"params/{layer}/kernel"],
      np.logaddexp(0, state[f"params/{layer}/quant_a"]),
    )
    np.testing.assert_allclose(kernel[fixed], np.rint(mean[fixed]) * interval, rtol=1e-6)
    shares.append(fixed.mean())
  assert 0 < np.mean(shares) < 0.9


def test_a_stopped_run_ends_the_same(remedied, tmp_path):
  # In the last epoch, with fixed codes: in the window of watched steps; and between its last step
  # and the evaluation.
  signals = {number(5, 7): signal.SIGTERM, number(5, STEPS_PER_EPOCH): signal.SIGTERM}
  sent = SignalAt(signals)
  for _ in signals:
    with pytest.raises(Stopped):
      app.main(tiny_config(**SHORT), str(tmp_path / "run"), "train", hooks=sent.hooks)
  app.main(tiny_config(**SHORT), str(tmp_path / "run"), "train", hooks=WITHOUT_PLOTS)
  assert sent.reached == list(signals)
  assert_same_run(tmp_path / "run", remedied)


def test_the_best_weights_have_the_statistics_of_the_first_batches(remedied, tiny):
  settings = parse(tiny_config(**SHORT), REGISTRY)
  checkpoint = checkpoints.read_newest(remedied / "checkpoints", pytest.fail)
  best = traverse_util.unflatten_dict(
    {tuple(k.split("/")): v for k, v in checkpoint.section("best").items()}
  )
  source, model = data.load(settings), build(settings.model, 10)
  found, keep, key = [], BatchNorm.momentum, jax.random.key(0)
  for batch, _ in zip(
    source.train_batches(checkpoint.values["best"]["epoch"] - 1, 128), range(3), strict=False
  ):
    image = (np.float32(batch["image"]) / 255 - 0.3) / 0.35
    _, updates = model.apply(
      best, image, Bits(2, 4), True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    changed = updates["batch_stats"], best["batch_stats"]
    found.append(
      jax.tree.map(lambda new, old: (np.float64(new) - keep * old) / (1 - keep), *changed)
    )
  mean = jax.tree.map(lambda *each: np.mean(each, 0), *found)
  for norm, values in best["batch_stats"].items():
    for name in values:
      np.testing.assert_allclose(
        values[name], mean[norm][name], rtol=2e-3, atol=2e-5, err_msg=f"{norm} {name}"
      )
