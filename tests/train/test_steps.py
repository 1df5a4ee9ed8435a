"""Steps: evaluation counts, calibration, sharding, and what freezing saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from profit_jax.data import Normalization
from profit_jax.data.normalize import normalize
from profit_jax.quant.bits import Bits
from profit_jax.train import aiwq, nonfinite, optimizer, steps
from profit_jax.train.packing import pack, unpack
from profit_jax.train.state import create_state
from tests.specs import spec_of
from tests.train.tiny import CONVS, TinyNet

SPEC = spec_of(TinyNet(), 16)
NORMALIZATION = Normalization((0.5,) * 3, (0.25,) * 3)
TAUGHT_BY_ITSELF = steps.Distillation(TinyNet())
SGD = optimizer.SgdSettings(weight_decay=1e-4, momentum=0.9, quantizer_lr_scale=0.01)


@functools.cache
def variables():
  return SPEC.init(jax.random.key(0))


def batch(count, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8),
    "label": rng.integers(0, 10, count).astype(np.int32),
    "mask": np.ones(count, bool),
  }


def replicated(devices):
  mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
  return NamedSharding(mesh, PartitionSpec())


# Tests share the compiled programs: a step of the tiny net takes some seconds to compile.
@functools.cache
def training(devices=1, train_kernels=True, distillation=TAUGHT_BY_ITSELF, accumulation_steps=1):
  """A jitted training step, and what makes its first state, `(variables, ema) -> state`."""
  params = pack(variables()["params"], SPEC.groups)
  labels = optimizer.label_params(params, train_kernels=train_kernels)
  tx = optimizer.make_optimizer(labels, SGD)
  step = steps.make_train_step(
    TinyNet(),
    tx,
    normalization=NORMALIZATION,
    ema_rate=0.9,
    distillation=distillation,
    accumulation_steps=accumulation_steps,
  )

  def first(variables, *, ema):
    state = create_state(variables, SPEC, ema=ema)
    return state.replace(opt_state=tx.init(state.params))

  return jax.jit(step, out_shardings=replicated(devices)), first


@functools.cache
def evaluation():
  return jax.jit(steps.make_eval_step(TinyNet(), normalization=NORMALIZATION, num_classes=10))


def test_evaluation_ignores_padding_and_ranks_ties_as_a_stable_sort():
  step, rows = evaluation(), batch(32)

  def of(mask, rows=rows, net=None):
    return step(variables() if net is None else net, {**rows, "mask": mask}, Bits(4, 4))

  mask = np.arange(32) < 20
  part, rest, whole = of(mask), of(~mask), of(np.ones(32, bool))
  assert (int(part["examples"]), int(whole["examples"])) == (20, 32)
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-5, atol=1e-6), part, rest, whole
  )
  # What stands in the rows that only pad the batch does not matter.
  others = jax.tree.map(lambda own, other: np.r_[own[:20], other[20:]], rows, batch(32, seed=1))
  jax.tree.map(np.testing.assert_array_equal, part, of(mask, others))
  # A net whose logits are all equal predicts class 0, and has classes 0 to 4 in its top five.
  count = of(np.ones(32, bool), net=jax.tree.map(jnp.zeros_like, variables()))
  assert int(count["top1"]) == np.sum(rows["label"] == 0)
  assert int(count["top5"]) == np.sum(rows["label"] < 5)
  diverged = of(
    np.ones(32, bool), net=jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), variables())
  )
  assert int(diverged["top1"]) == int(diverged["top5"]) == 0


def test_a_teacher_sees_images_with_its_own_normalization():
  model, own = TinyNet(), Normalization((0.0,) * 3, (1.0,) * 3)
  # A net that is sure of itself: with logits near 0 every teacher teaches the same.
  sure = jax.tree.map(lambda leaf: leaf * (300 if leaf.shape == (16, 10) else 1), variables())
  # Running statistics, because those of the batch would take most of the normalization out again.
  step, first = training(
    distillation=steps.Distillation(model, batch_statistics=False, normalization=own)
  )
  _, metrics, _ = step(
    first(sure, ema=False), batch(16), Bits(), np.float32(0.1), jax.random.key(0), sure, None
  )

  @functools.partial(jax.jit, static_argnums=1)
  def apply(image, train):
    return model.apply(sure, image, Bits(), train, mutable=["batch_stats"])[0]

  def logits(normalization, train):
    return apply(normalize(jnp.asarray(batch(16)["image"]), normalization), train)

  student = logits(NORMALIZATION, True)
  expected, same = (
    jnp.mean(steps.distillation_loss(student, logits(seen, False))) for seen in (own, NORMALIZATION)
  )
  np.testing.assert_allclose(metrics["kd"], expected, rtol=1e-4)
  assert abs(float(expected / same) - 1) > 0.01


def test_uint8_images_are_normalized_inside_the_step():
  raw = batch(8)
  normalized = {**raw, "image": ((raw["image"] / 255 - 0.5) / 0.25).astype(np.float32)}
  losses = [evaluation()(variables(), rows, Bits())["loss"] for rows in (raw, normalized)]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_calibration_sets_a_and_c_of_every_quantizer():
  image = batch(64)["image"]
  params = jax.jit(
    lambda v, i: steps.calibrate_acts(
      TinyNet(), v, i, NORMALIZATION, jax.random.key(0), Bits(act=4)
    )
  )(variables(), image)
  params = jax.jit(lambda p: steps.calibrate_weights(p, Bits(weight=4), SPEC))(params)
  for layer in ("quant0", "quant1", "quant2", "signed_quant", *CONVS, "classifier"):
    assert params[layer]["quant_a"] == params[layer]["quant_c"]
    assert params[layer]["quant_a"] != variables()["params"][layer]["quant_a"]
  largest = np.abs(variables()["params"]["conv0"]["kernel"]).max()
  np.testing.assert_allclose(jax.nn.softplus(params["conv0"]["quant_a"]), 0.9 * largest, rtol=1e-5)
  np.testing.assert_array_equal(params["conv0"]["kernel"], variables()["params"]["conv0"]["kernel"])


def advance(batches, *, devices, parts):
  """The state, metrics and AIWQ after a step for each batch; all with a teacher, sampled."""
  everywhere = replicated(devices)
  rows = NamedSharding(everywhere.mesh, PartitionSpec("data"))
  step, first = training(devices=devices, accumulation_steps=parts)
  state, sampling, teacher, key = jax.device_put(
    (
      first(variables(), ema=True),
      aiwq.start(SPEC.convs),
      variables(),
      jax.random.key(0),
    ),
    everywhere,
  )
  for each in batches:
    state, metrics, sampling = step(
      state, jax.device_put(each, rows), Bits(8, 8), np.float32(0.05), key, teacher, sampling
    )
  return jax.device_get((state, metrics, sampling))


def test_four_devices_give_the_numbers_of_one():
  outcomes = [advance([batch(8, i) for i in range(3)], devices=n, parts=1) for n in (1, 4)]
  # float32 sums in another order; batch statistics over the global batch or the difference would be
  # percents.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), *outcomes)


def test_ema_follows_the_formula():
  states = [advance([batch(8, i) for i in range(count)], devices=1, parts=1)[0] for count in (1, 2)]
  for value, average in (("params", "ema_params"), ("batch_stats", "ema_batch_stats")):
    expected = jax.tree.map(
      lambda start, one, two: 0.9 * (0.9 * start + 0.1 * one) + 0.1 * two,
      variables()[value],
      *(unpack(getattr(state, value)) for state in states),
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      unpack(getattr(states[1], average)),
      expected,
    )


def plain_step(state, rows):
  """In full precision, without teacher and sampling."""
  step, _ = training()
  return step(state, rows, Bits(), np.float32(0.1), jax.random.key(0), None, None)


def test_rows_without_an_example_have_no_part_in_the_loss():
  state = training()[1](variables(), ema=False)

  def after(labels, mask):
    return plain_step(state, {**batch(16), "label": labels, "mask": mask})

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


def test_a_variance_that_overflows_is_not_finite_and_changes_nothing():
  flat = traverse_util.flatten_dict(variables())
  flat["params", "conv0", "kernel"] = flat["params", "conv0", "kernel"] * 1e22
  state = training()[1](traverse_util.unflatten_dict(flat), ema=False)
  after, metrics, _ = plain_step(state, batch(16))
  # The inverse of its deviation is 0, so that the loss does not show it.
  assert np.isfinite(metrics["loss"])
  assert not metrics["finite"]
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_the_message_about_numbers_that_are_not_finite_names_layers():
  statistics = {
    "norm0": {"mean": np.zeros(2), "var": np.asarray([1.0, 2e30])},
    "norm1": {"var": np.ones(2)},
  }
  told = nonfinite.describe("phase 1", 2.3, {"weight": 0.1}, {}, statistics)
  for part in ("phase 1", "2.3", "gradient", "weight 0.1", "norm0 2e+30"):
    assert part in told
  assert "norm1" not in told
  statistics = {"norm0": {"var": np.ones(2)}}
  told = nonfinite.describe("phase 1", float("nan"), {"weight": 0.1}, {}, statistics)
  assert "nan" in told
  assert "norm0" not in told


def test_a_batch_in_parts_has_the_gradient_of_its_loss():
  parts = [batch(8, seed) for seed in (0, 1)]
  # Every second row is a part's, so that each device's rows hold its share of both.
  together = jax.tree.map(lambda *rows: np.stack(rows, 1).reshape(16, *rows[0].shape[1:]), *parts)

  def mean(*leaves):
    return np.mean(leaves, axis=0)

  state, metrics, sampling = advance([together], devices=1, parts=2)
  alone = [advance([part], devices=1, parts=1) for part in parts]
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
    advance([together], devices=4, parts=2)[0].params,
    state.params,
  )


@functools.cache
def compiled_at_4_bits(train_kernels):
  """The executable, and the arguments of its first step."""
  step, first = training(train_kernels=train_kernels)
  state = first(variables(), ema=True)
  arguments = (state, batch(8), Bits(4, 4), np.float32(0.1), jax.random.key(0), None, None)
  return step.lower(*arguments).compile(), arguments


def test_a_phase_that_trains_no_kernel_needs_fewer_operations():
  # Little fewer: a and c still train, and their gradients need those of the quantized kernels.
  all_train, none_trains = (
    compiled_at_4_bits(train_kernels)[0].cost_analysis()["flops"] for train_kernels in (True, False)
  )
  assert all_train > none_trains


def test_bits_do_not_recompile():
  # An executable never compiles again: it takes the bits as values, or not at all.
  step, (state, rows, _, *rest) = compiled_at_4_bits(True)
  losses = {float(step(state, rows, Bits(bits, bits), *rest)[1]["loss"]) for bits in (8, 5, 4)}
  assert len(losses) == 3
