"""Steps: evaluation counts, calibration, sharding, and what freezing saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from profit_jax.data import Normalization
from profit_jax.data.normalize import normalize
from profit_jax.models import init_variables
from profit_jax.quant.levels import Levels, levels
from profit_jax.train import aiwq, optimizer, sanity, steps
from profit_jax.train.state import create_state
from tests.train.tiny import CONVS, TinyNet

NORMALIZATION = Normalization((0.5,) * 3, (0.25,) * 3)
SGD = optimizer.SgdSettings(weight_decay=1e-4, momentum=0.9, quantizer_lr_scale=0.01)


@pytest.fixture(scope="module")
def variables():
  return init_variables(TinyNet(), jax.random.key(0), 16)


def batch(count, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8),
    "label": rng.integers(0, 10, count).astype(np.int32),
    "mask": np.ones(count, bool),
  }


def make_step(model, params, frozen=frozenset(), train_kernels=True, **options):
  labels = optimizer.label_params(params, train_kernels=train_kernels, frozen=frozen)
  tx = optimizer.make_optimizer(labels, SGD)
  step = steps.make_train_step(
    model, tx, normalization=NORMALIZATION, ema_rate=0.9, teacher_model=model, **options
  )
  return step, tx


def test_evaluation_ignores_padding_and_ranks_ties_as_a_stable_sort(variables):
  step = jax.jit(steps.make_eval_step(TinyNet(), normalization=NORMALIZATION, num_classes=10))
  whole = step(variables, batch(32), levels(4, 4))
  padded = {**batch(32), "mask": np.arange(32) < 20}
  part = step(variables, padded, levels(4, 4))
  first = step(variables, jax.tree.map(lambda leaf: leaf[:20], batch(32)), levels(4, 4))
  assert int(whole["examples"]) == 32
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), part, first)
  # A net whose logits are all equal predicts class 0, and has classes 0 to 4 in its top five.
  blind = jax.tree.map(jnp.zeros_like, variables)
  count = step(blind, batch(32), Levels())
  assert int(count["top1"]) == np.sum(batch(32)["label"] == 0)
  assert int(count["top5"]) == np.sum(batch(32)["label"] < 5)
  diverged = step(jax.tree.map(lambda leaf: leaf * jnp.nan, variables), batch(32), Levels())
  assert int(diverged["top1"]) == int(diverged["top5"]) == 0


def test_a_teacher_sees_images_with_its_own_normalization(variables):
  model, own = TinyNet(), Normalization((0.0,) * 3, (1.0,) * 3)
  # A net that is sure of itself: with logits near 0 every teacher teaches the same.
  sure = jax.tree.map(lambda leaf: leaf * (300 if leaf.shape == (16, 10) else 1), variables)
  tx = make_step(model, sure["params"])[1]
  state = create_state(sure, ema=False)
  state = state.replace(opt_state=tx.init(state.params))
  # Running statistics, because those of the batch would take most of the normalization out again.
  options = {"teacher_batch_statistics": False, "teacher_normalization": own}
  step = steps.make_train_step(
    model, tx, normalization=NORMALIZATION, ema_rate=0.9, teacher_model=model, **options
  )
  kd = jax.jit(step)(state, batch(16), Levels(), np.float32(0.1), jax.random.key(0), sure, None)[1][
    "kd"
  ]

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def logits(normalization, train):
    image = normalize(jnp.asarray(batch(16)["image"]), normalization)
    return model.apply(sure, image, Levels(), train, mutable=["batch_stats"])[0]

  student = logits(NORMALIZATION, True)
  expected, same = (
    jnp.mean(steps.distillation_loss(student, logits(seen, False))) for seen in (own, NORMALIZATION)
  )
  np.testing.assert_allclose(kd, expected, rtol=1e-4)
  assert abs(float(expected / same) - 1) > 0.01


def test_uint8_images_are_normalized_inside_the_step(variables):
  step = jax.jit(steps.make_eval_step(TinyNet(), normalization=NORMALIZATION, num_classes=10))
  raw = batch(8)
  normalized = {**raw, "image": ((raw["image"] / 255 - 0.5) / 0.25).astype(np.float32)}
  np.testing.assert_allclose(
    step(variables, raw, Levels())["loss"], step(variables, normalized, Levels())["loss"], rtol=1e-5
  )


def test_calibration_sets_a_and_c_of_every_quantizer(variables):
  image = batch(64)["image"]
  params = jax.jit(
    lambda v, i: steps.calibrate_acts(
      TinyNet(), v, i, NORMALIZATION, jax.random.key(0), np.float32(15)
    )
  )(variables, image)
  params = jax.jit(steps.calibrate_weights)(params, np.float32(7))
  for layer in ("quant0", "quant1", "quant2", "signed_quant", *CONVS, "classifier"):
    assert params[layer]["quant_a"] == params[layer]["quant_c"]
    assert params[layer]["quant_a"] != variables["params"][layer]["quant_a"]
  largest = np.abs(variables["params"]["conv0"]["kernel"]).max()
  np.testing.assert_allclose(jax.nn.softplus(params["conv0"]["quant_a"]), 0.9 * largest, rtol=1e-5)
  np.testing.assert_array_equal(params["conv0"]["kernel"], variables["params"]["conv0"]["kernel"])


def test_four_devices_give_the_numbers_of_one(variables):
  step, tx = make_step(TinyNet(), variables["params"])
  start = create_state(variables, ema=True)
  start = start.replace(opt_state=tx.init(start.params))
  outcomes = []
  for count in (1, 4):
    mesh = Mesh(np.asarray(jax.devices()[:count]), ("data",))
    put = lambda tree, *axes, mesh=mesh: jax.device_put(  # noqa: E731
      tree, NamedSharding(mesh, PartitionSpec(*axes))
    )
    state, sampling, teacher = put((start, aiwq.start(variables["params"]), variables))
    jitted = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
    for i in range(3):
      state, metrics, sampling = jitted(
        state,
        put(batch(32, i), "data"),
        levels(8, 8),
        np.float32(0.05),
        put(jax.random.key(0)),
        teacher,
        sampling,
      )
    outcomes.append(jax.device_get((state, metrics, sampling.metric)))
  # float32 sums in another order; batch statistics over the global batch or the difference would be
  # percents.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), *outcomes)


def test_rows_without_an_example_have_no_part_in_the_loss(variables):
  step, tx = make_step(TinyNet(), variables["params"])
  state = create_state(variables, ema=False)
  state = state.replace(opt_state=tx.init(state.params))
  jitted = jax.jit(step)

  def after(labels, mask):
    rows = {**batch(16), "label": labels, "mask": mask}
    return jitted(state, rows, Levels(), np.float32(0.1), jax.random.key(0), None, None)

  labels, mask = batch(16)["label"], np.arange(16) < 12
  others = np.where(mask, labels, (labels + 1) % 10)
  part = after(labels, mask)
  jax.tree.map(np.testing.assert_array_equal, part, after(others, mask))
  assert int(part[1]["examples"]) == 12
  # Of the whole batch's loss, the rows that count and those that do not have their shares.
  rest, whole = after(labels, ~mask), after(labels, np.ones(16, bool))
  np.testing.assert_allclose(
    12 * part[1]["loss"] + 4 * rest[1]["loss"], 16 * whole[1]["loss"], rtol=1e-6
  )
  assert int(part[1]["correct"]) + int(rest[1]["correct"]) == int(whole[1]["correct"])
  assert float(after(labels, np.zeros(16, bool))[1]["loss"]) == 0.0


def test_a_variance_that_overflows_is_not_finite_and_changes_nothing(variables):
  step, tx = make_step(TinyNet(), variables["params"])
  flat = traverse_util.flatten_dict(variables)
  flat["params", "conv0", "kernel"] = flat["params", "conv0", "kernel"] * 1e22
  state = create_state(traverse_util.unflatten_dict(flat), ema=False)
  state = state.replace(opt_state=tx.init(state.params))
  after, metrics, _ = jax.jit(step)(
    state, batch(16), Levels(), np.float32(0.1), jax.random.key(0), None, None
  )
  # The inverse of its deviation is 0, so that the loss does not show it.
  assert np.isfinite(metrics["loss"])
  assert not metrics["finite"]
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_what_is_told_of_numbers_that_are_not_finite_names_layers():
  statistics = {
    "norm0": {"mean": np.zeros(2), "var": np.asarray([1.0, 2e30])},
    "norm1": {"var": np.ones(2)},
  }
  told = sanity.describe("phase 1", 2.3, {"weight": 0.1}, {}, statistics)
  assert (
    "The loss is 2.3, but its gradient, or the mean or variance of a batch in some layer, is not "
    "finite in" in told
  )
  assert told.endswith("Running variances above 1e+12: norm0 2e+30.")
  statistics = {"norm0": {"var": np.ones(2)}}
  assert "variance" not in sanity.describe("phase 1", float("nan"), {"weight": 0.1}, {}, statistics)


def test_a_batch_in_parts_has_the_gradient_of_its_loss(variables):
  parts = [batch(8, seed) for seed in (0, 1)]
  # Every second row is a part's, so that each device's rows hold its share of both.
  together = jax.tree.map(lambda *rows: np.stack(rows, 1).reshape(16, *rows[0].shape[1:]), *parts)

  def after(rows, count, devices=1):
    step, tx = make_step(TinyNet(), variables["params"], accumulation_steps=count)
    state = create_state(variables, ema=True)
    state = state.replace(opt_state=tx.init(state.params))
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
    arguments = (
      levels(8, 8),
      np.float32(0.1),
      jax.random.key(0),
      variables,
      aiwq.start(variables["params"]),
    )
    return jax.device_get(jax.jit(step)(state, rows, *arguments))

  def mean(*leaves):
    return np.mean(leaves, axis=0)

  state, metrics, sampling = after(together, 2)
  alone = [after(rows, 1) for rows in parts]
  # The first step moves every parameter by its gradient times a rate, so that the mean gradient
  # moves it by the mean.
  for name in ("params", "batch_stats", "ema_params"):
    expected = jax.tree.map(mean, *(getattr(own[0], name) for own in alone))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      getattr(state, name),
      expected,
    )
  for name in ("loss", "ce", "kd"):
    np.testing.assert_allclose(metrics[name], mean(*(own[1][name] for own in alone)), rtol=1e-5)
  assert int(metrics["examples"]) == 16
  assert int(metrics["correct"]) == sum(int(own[1]["correct"]) for own in alone)
  jax.tree.map(np.testing.assert_array_equal, sampling.previous, alone[0][2].previous)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    after(together, 2, devices=4)[0].params,
    state.params,
  )


def test_a_frozen_phase_needs_fewer_operations(variables):
  # Little fewer: a and c of a frozen kernel still train, and their gradients need the gradient of
  # the quantized kernel. The demo's MobileNet-v2 at batch 64, too large for a test: 793.156,
  # 793.070 and 792.751 million.
  model, operations = TinyNet(), []
  state = create_state(variables, ema=True)
  for fraction in (0.0, 1 / 3, 2 / 3):
    step, tx = make_step(model, variables["params"], aiwq.frozen_layers(CONVS, fraction))
    state = state.replace(opt_state=tx.init(state.params))
    arguments = (state, batch(8), levels(4, 4), np.float32(0.1), jax.random.key(0), None, None)
    operations.append(jax.jit(step).lower(*arguments).compile().cost_analysis()["flops"])
  assert operations[0] > operations[1] > operations[2]


def test_bits_do_not_recompile(variables):
  step, tx = make_step(TinyNet(), variables["params"])
  traces = []

  @jax.jit
  def counted(*args):
    traces.append(1)
    return step(*args)

  state = create_state(variables, ema=True)
  state = state.replace(opt_state=tx.init(state.params))
  losses = [
    float(
      counted(state, batch(16), levels(bits, bits), np.float32(0.1), jax.random.key(0), None, None)[
        1
      ]["loss"]
    )
    for bits in (8, 5, 4)
  ]
  assert len(traces) == 1
  assert len(set(losses)) == 3
