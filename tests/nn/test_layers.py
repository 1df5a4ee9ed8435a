"""Building blocks: torch's conventions, negative padding, AIWQ's collections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.config import ConfigError
from profit_jax.nn.layers import BatchNorm, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits
from profit_jax.train import aiwq
from tests import golden_data


def init(module, *args):
  return module.init(jax.random.key(0), *args, mutable=["params", "batch_stats"])


# Compiled as a whole: every operation of its own costs as much as this one program.
@functools.partial(jax.jit, static_argnums=0)
def output(module, x, kernel=None):
  """The output with the first variables, and with this kernel where one is given."""
  variables = init(module, x, Bits())
  if kernel is not None:
    variables = {"params": {**variables["params"], "kernel": kernel}}
  return module.apply(variables, x, Bits())


def test_batch_norm_formulas_and_unbiased_running_variance():
  x = np.random.default_rng(0).normal(3, 2, (4, 3, 3, 5))
  with jax.enable_x64(True):
    module = BatchNorm(momentum=0.9, epsilon=1e-5)

    @jax.jit
    def first_step(x):
      variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), init(module, x, True))
      y, updates = module.apply(variables, x, True, mutable=["batch_stats"])
      return y, updates

    y, updates = first_step(x)
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.1 * mean, rtol=1e-10)
  np.testing.assert_allclose(
    updates["batch_stats"]["var"], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-10
  )


def test_batch_norm_gradient_is_that_of_its_formula():
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    x, upstream = (
      jnp.asarray(rng.normal(3, 2, (4, 3, 3, 5))),
      jnp.asarray(rng.normal(size=(4, 3, 3, 5))),
    )
    scale, bias = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=5))
    module = BatchNorm()

    def ours(x, scale, bias):
      variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": bias * 0, "var": bias * 0},
      }
      return jnp.sum(upstream * module.apply(variables, x, True, mutable=["batch_stats"])[0])

    def formula(x, scale, bias):
      mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
      return jnp.sum(upstream * ((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias))

    gradients = [jax.jit(jax.grad(f, (0, 1, 2)))(x, scale, bias) for f in (ours, formula)]
  for a, b in zip(*gradients, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("depthwise", [False, True])
def test_stride_pads_both_sides_as_torch(depthwise):
  per_channel = 1 if depthwise else 4
  kernel = np.ones((3, 3, per_channel, 4), np.float32)
  module = QuantConv(4, 3, 2, depthwise=depthwise)
  y = output(module, np.ones((1, 8, 8, 4), np.float32), kernel)
  # The first window hangs over the border, the last does not.
  assert y.shape == (1, 4, 4, 4)
  assert y[0, 0, 0, 0] == 4 * per_channel
  assert y[0, -1, -1, 0] == 9 * per_channel


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
  ("size", "stride", "extent"),
  [(3, 2, (8, 7)), (5, 2, (8, 9)), (5, 2, (3, 2)), (3, 1, (5, 4)), (1, 2, (6, 5))],
)
def test_same_pads_as_tensorflow(size, stride, extent, depthwise):
  per_channel = 1 if depthwise else 4
  rng = np.random.default_rng(size)
  x, kernel = rng.normal(size=(2, *extent, 4)), rng.normal(size=(size, size, per_channel, 4))
  module = QuantConv(4, size, stride, depthwise=depthwise, padding="same")
  with jax.enable_x64(True):
    # XLA's "SAME" is TensorFlow's.
    expected = jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=4 // per_channel,
    )
    y = output(module, x, kernel)
  np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_same_pads_with_the_padding_value():
  x, kernel = np.zeros((1, 4, 4, 1), np.float32), np.ones((3, 3, 1, 1), np.float32)
  y = output(QuantConv(1, 3, 2, True, -3 / 8, "same"), x, kernel)
  # Only the last windows hang over the border: by a column, a row, and both.
  np.testing.assert_allclose(y[0, :, :, 0], [[0, -9 / 8], [-9 / 8, -15 / 8]])


def test_a_padding_that_is_unknown_is_refused():
  with pytest.raises(ConfigError, match=r"padding = 'SAME'.*'torch', 'same'"):
    output(QuantConv(4, 3, padding="SAME"), np.zeros((1, 8, 8, 4), np.float32))


def test_negative_padding_is_code_0_of_the_hswish_quantizer():
  module = QuantConv(4, 3, depthwise=True, pad_value=-3 / 8)
  y = np.asarray(output(module, np.full((1, 5, 5, 4), -3 / 8, np.float32)))
  inside = np.broadcast_to(y[:, 2:3, 2:3, :], y.shape)
  np.testing.assert_allclose(y, inside, rtol=1e-6)


def test_quantizers_are_absent_in_full_precision_and_on_the_grid_otherwise():
  x = np.float32(np.maximum(np.random.default_rng(1).normal(size=(2, 4, 4, 3)), 0))
  act = QuantAct("unsigned")
  variables = init(act, x, Bits())
  assert act.apply(variables, x, Bits()).value() is x
  assert len(np.unique(jax.jit(act.apply)(variables, x, Bits(None, 3)))) <= 8


@pytest.mark.parametrize(
  "make",
  [
    functools.partial(QuantConv, 24),
    functools.partial(QuantConv, 24, 3, 2),
    functools.partial(QuantConv, 16, 3, depthwise=True, pad_value=-3 / 8),
    functools.partial(QuantConv, 16, 5, 2, depthwise=True),
    functools.partial(QuantDense, 24),
  ],
  ids=["pointwise", "3x3", "depthwise", "depthwise_5x5", "dense"],
)
def test_bfloat16_rounds_operands_and_results_and_sums_in_float32(make):
  rng = np.random.default_rng(0)

  def draw(shape):
    # Already rounded; means away from 0, so that long sums in bfloat16 would stop growing.
    return jnp.asarray(rng.normal(1, 1, shape), jnp.bfloat16).astype(jnp.float32)

  x = draw((512, 16) if make.func is QuantDense else (8, 9, 9, 16))
  variables = jax.jit(lambda x: init(make(), x, Bits()))(x)
  kernel = draw(variables["params"]["kernel"].shape)
  upstream = draw(jax.eval_shape(make().apply, variables, x, Bits()).shape)

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradients(dtype):
    def apply(x, kernel):
      variables_now = {"params": {**variables["params"], "kernel": kernel}}
      return make().apply(variables_now, x, Bits())

    y, vjp = jax.vjp(apply, x.astype(dtype), kernel)
    return y, *vjp(upstream.astype(dtype))

  ours, exact = value_and_gradients(jnp.bfloat16), value_and_gradients(jnp.float32)
  assert [each.dtype for each in ours] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  for rounded, sums in zip(ours, exact, strict=True):
    # Half a unit in the last place of bfloat16, and float32's own error where terms cancel.
    np.testing.assert_allclose(
      rounded.astype(jnp.float32), sums, rtol=2**-8, atol=1e-6 * np.abs(sums).max()
    )


@pytest.mark.parametrize(
  "layer", ["pointwise", "depthwise", "depthwise_negative_pad", "dead_channel"]
)
def test_authors_aiwq(layer):
  golden = golden_data.load("aiwq.npz")
  kernels = [golden[f"{layer}_{name}"].transpose(2, 3, 1, 0) for name in ("w_prev", "w")]
  module = QuantConv(
    features=kernels[0].shape[-1],
    kernel_size=kernels[0].shape[0],
    stride=2 if layer == "depthwise" else 1,
    depthwise=layer.startswith("depthwise"),
    pad_value=-3 / 8 if layer == "depthwise_negative_pad" else 0.0,
  )

  @jax.jit
  def step(state, params, x, bits):
    _, sown = module.apply(
      {"params": params, "previous": aiwq.previous_collection(state)["conv"]},
      x,
      bits,
      mutable=["moments", "quantized"],
    )
    return aiwq.update(state, {"conv": sown["moments"]}, {"conv": sown["quantized"]})

  with jax.enable_x64(True):
    x = golden[f"{layer}_x"].transpose(0, 2, 3, 1)
    state = aiwq.start({"conv": kernels[0].shape}, np.float64)
    for kernel in kernels:
      params = {"kernel": kernel, "quant_a": np.float64(0.8), "quant_c": np.float64(0.6)}
      state = step(state, params, x, Bits(4, None))
  # One KL, from 0: the metric is a thousandth of it, unless it is above 1.
  kl = float(golden[f"{layer}_kl"])
  assert 0 < kl <= 1
  np.testing.assert_allclose(state.metric["conv"], 0.001 * kl, rtol=1e-10)


def test_aiwq_of_every_second_image_is_that_of_those_images():
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(6, 5, 5, 4)))
  previous = {"kernel": np.float32(rng.normal(size=(3, 3, 4, 8))), "scale": np.ones(8, np.float32)}

  @functools.partial(jax.jit, static_argnums=1)
  def moments(x, every):
    module = QuantConv(features=8, kernel_size=3)
    bits = Bits(4, None, aiwq_every=every)
    variables = module.init(jax.random.key(0), x, bits)
    y, sown = module.apply(
      {**variables, "previous": previous}, x, bits, mutable=["moments", "quantized"]
    )
    return y, sown["moments"]

  (whole, of_some), (_, expected) = moments(x, 2), moments(x[::2], 1)
  assert len(whole) == len(x)
  for ours, theirs in zip(jax.tree.leaves(of_some), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
