"""Quantized tensors travel as codes, and everything is what the values give."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from profit_jax.data import Normalization
from profit_jax.kernels import products
from profit_jax.kernels.target import Target, tracing_for
from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.nn.pending import parts_of
from profit_jax.quant import LSQ, PACT, QIL, DuQ
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import Product, Quantized, value_of
from profit_jax.train import steps
from tests.specs import spec_of
from tests.train.tiny import TinyNet


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def test_values_stand_in_plain_operations():
  codes, scale = jnp.asarray([0.0, 1.0, 3.0]), jnp.float32(0.5)
  x = Quantized(codes, scale, -3 / 8)
  expected = np.float32([-0.375, 0.125, 1.125])
  for found in (x.value(), jnp.asarray(x), np.asarray(x), x[:], jax.jit(lambda x: x)(x).value()):
    np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(2 * x + 1, 2 * expected + 1)
  np.testing.assert_array_equal(1 - x / 2, 1 - expected / 2)
  np.testing.assert_array_equal(np.float32([1, 2, 3]) * x, [1, 2, 3] * expected)
  np.testing.assert_allclose(jnp.mean(x), expected.mean(), rtol=1e-6)
  assert (x.shape, x.ndim, x.size, len(x)) == ((3,), 1, 3, 3)
  shifted = Product(codes, jnp.float32([1, 2, 3]), jnp.float32([5, 6, 7]))
  np.testing.assert_array_equal(-shifted, [-5, -8, -16])


CASES = {
  # The layer, the kind of its input's quantizer, what it pads with.
  "pointwise": (lambda: QuantConv(6), "symmetric"),
  "3x3": (lambda: QuantConv(6, 3, 2), "unsigned"),
  "depthwise": (lambda: QuantConv(4, 3, depthwise=True), "unsigned"),
  "negative_padding": (lambda: QuantConv(4, 3, depthwise=True, pad_value=-3 / 8), "hswish"),
  "zero_padding_after_hswish": (lambda: QuantConv(4, 5, 2, depthwise=True), "hswish"),
  "pointwise_after_hswish": (lambda: QuantConv(6), "hswish"),
}
QUANTIZERS = {
  "duq_per_channel": DuQ(per_channel=True),
  "lsq": LSQ(),
  "pact": PACT(),
  "qil": QIL(),
}


def convolution(layer, x, kernel):
  """The layer's, of values."""
  margin = (layer.kernel_size - 1) // 2
  around = [(0, 0, 0), (margin, margin, 0), (margin, margin, 0), (0, 0, 0)]
  return lax.conv_general_dilated(
    lax.pad(x, jnp.asarray(layer.pad_value, x.dtype), around),
    kernel,
    (layer.stride, layer.stride),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1] if layer.depthwise else 1,
  )


@pytest.mark.parametrize(
  ("case", "quant"),
  [*((case, "duq") for case in CASES), *(("3x3", quant) for quant in QUANTIZERS)],
)
def test_a_convolution_of_codes_is_that_of_the_values(case, quant):
  layer, act = CASES[case][0](), QuantAct(CASES[case][1])
  quantizer = QUANTIZERS.get(quant, DuQ())
  bits = Bits(4, 3, quantizer)
  with jax.enable_x64(True):
    x = jnp.asarray(draw(2, 5, 5, 4))

    @jax.jit
    def first(x):
      return {
        "act": act.init(jax.random.key(0), x, bits)["params"],
        "conv": layer.init(jax.random.key(1), x, bits)["params"],
      }

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), first(x))

    def quantized_input(params, x):
      return act.apply({"params": params["act"]}, x, bits)

    def codes(params, x):
      y = layer.apply({"params": params["conv"]}, quantized_input(params, x), bits)
      assert isinstance(parts_of(y), Product)
      return jnp.sum(jnp.sin(y))

    def values(params, x):
      scalars = dict(params["conv"])
      kernel = scalars.pop("kernel")
      quantize = quantizer.quantize_kernel
      kernel = quantizer.of_kernel(quantize, kernel, scalars, bits.kernel_qmax()).value()
      return jnp.sum(jnp.sin(convolution(layer, quantized_input(params, x).value(), kernel)))

    found, expected = (
      jax.jit(jax.value_and_grad(function, (0, 1)))(params, x) for function in (codes, values)
    )
  for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-11)


def test_before_a_batch_norm_the_gradients_are_those_of_the_values():
  conv, norm, act = QuantConv(6, 3, pad_value=-3 / 8), BatchNorm(), QuantAct("hswish")
  bits = Bits(4, 3)
  with jax.enable_x64(True):
    x = jnp.asarray(draw(2, 5, 5, 4))

    @jax.jit
    def first(x):
      key = jax.random.key(0)
      return {
        "act": act.init(key, x, bits)["params"],
        "conv": conv.init(key, x, bits)["params"],
        "norm": norm.init(key, jnp.ones((1, 6), jnp.float64), True)["params"],
      }

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), first(x))
    stats = {"mean": jnp.full(6, 0.3), "var": jnp.ones(6)}

    def loss(params, x, of):
      y = conv.apply(
        {"params": params["conv"]}, act.apply({"params": params["act"]}, x, bits), bits
      )
      y, updates = norm.apply(
        {"params": params["norm"], "batch_stats": stats}, of(y), True, mutable=["batch_stats"]
      )
      return jnp.sum(jnp.sin(y) * jnp.arange(6.0)), updates

    found, expected = (
      jax.jit(jax.value_and_grad(functools.partial(loss, of=of), (0, 1), has_aux=True))(params, x)
      for of in (lambda y: y, value_of)
    )
  for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    # Of a and c, the sum over the values cancels seven digits.
    np.testing.assert_allclose(left, right, rtol=1e-7, atol=1e-10)


def test_a_dense_layer_and_dropout_keep_codes():
  dense, bits = QuantDense(5), Bits(4, 3)
  with jax.enable_x64(True):
    x = Quantized(jnp.float64(integers(0, 7, 3, 4)), jnp.float64(0.3), -3 / 8)
    drawn = dense.init(jax.random.key(0), jnp.ones((3, 4), jnp.float32), bits)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) + 0.1, drawn)

    def loss(params, scale, of):
      y = dense.apply({"params": params}, of(dataclasses.replace(x, scale=scale)), bits)
      return jnp.sum(jnp.sin(y))

    found, expected = (
      jax.jit(jax.value_and_grad(functools.partial(loss, of=of), (0, 1)))(params, x.scale)
      for of in (lambda x: x, value_of)
    )
  for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-11)


def test_dropout_keeps_codes_where_code_0_is_0():
  def dropped(x):
    return Dropout(0.5).apply({}, x, True, rngs={"dropout": jax.random.key(0)})

  codes = jnp.ones((4, 100))
  kept = dropped(Quantized(codes, jnp.float32(0.3)))
  assert isinstance(kept, Quantized)
  np.testing.assert_array_equal(np.unique(kept.codes), [0, 1])
  np.testing.assert_allclose(kept.value(), dropped(codes * 0.3), rtol=1e-6)
  shifted = dropped(Quantized(codes, jnp.float32(0.3), -3 / 8))
  np.testing.assert_allclose(np.unique(shifted), [-0.15, 0], rtol=1e-6)
  assert Dropout(0.5).apply({}, kept, False) is kept


def integers(low, high, *shape):
  return np.random.default_rng(0).integers(low, high + 1, shape)


@pytest.mark.parametrize(
  ("size", "stride", "depthwise"), [(1, 1, False), (3, 2, False), (5, 1, True)]
)
def test_sums_of_codes_are_exact_in_one_pass(size, stride, depthwise):
  # 8 bits on both sides.
  x = integers(0, 255, 2, 7, 7, 8)
  kernel = integers(-127, 127, size, size, 1 if depthwise else 8, 8)
  assert 255 * 127 * kernel[..., 0].size < 2**24

  def sums(dtype):
    with tracing_for(Target("tpu")):
      return products.conv(
        jnp.asarray(x, dtype),
        jnp.asarray(kernel, dtype),
        stride,
        0.0,
        margin=(size - 1) // 2,
        depthwise=depthwise,
        exact=True,
      )

  def of_float64(x, kernel):
    layer = QuantConv(8, size, stride, depthwise)
    return convolution(layer, jnp.float64(x), jnp.float64(kernel))

  with jax.enable_x64(True):
    exact = np.asarray(jax.jit(of_float64)(x, kernel))
  np.testing.assert_array_equal(jax.jit(sums, static_argnums=0)(np.dtype(np.float32)), exact)
  # As one pass of a TPU does, which a CPU cannot be told to: operands rounded to bfloat16.
  rounded = (jnp.asarray(each, jnp.bfloat16).astype(jnp.float32) for each in (x, kernel))
  np.testing.assert_array_equal(convolution(QuantConv(8, size, stride, depthwise), *rounded), exact)


def test_a_net_in_float32_has_the_codes_of_float64():
  net, bits = TinyNet(), Bits(4, 4)
  images = jnp.asarray(draw(64, 16, 16, 3), jnp.float32)
  spec, as_they_are = spec_of(net, 16), Normalization((0.0,) * 3, (1.0,) * 3)
  variables = spec.init(jax.random.key(0))
  variables["params"] = steps.calibrate_weights(
    steps.calibrate_acts(net, variables, images, as_they_are, jax.random.key(0), Bits(act=4)),
    bits,
    spec,
  )

  @functools.partial(jax.jit, static_argnums=0)
  def codes(dtype, variables):
    _, state = net.apply(
      variables,
      images.astype(dtype),
      bits,
      True,
      capture_intermediates=lambda module, _: isinstance(module, QuantAct),
      mutable=["intermediates", "batch_stats"],
    )
    found = jax.tree.leaves(state["intermediates"], is_leaf=lambda x: isinstance(x, Quantized))
    return jnp.concatenate([jnp.ravel(each.codes).astype(jnp.float32) for each in found])

  found = {
    dtype: np.asarray(codes(np.dtype(dtype), variables)) for dtype in (jnp.float32, jnp.bfloat16)
  }
  with jax.enable_x64(True):
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    expected = np.asarray(codes(np.dtype(np.float64), double))
  assert len(np.unique(expected)) > 16
  differing = {dtype: np.mean(each != expected) for dtype, each in found.items()}
  # Of 73,728 codes; none when this was written. A value on the edge between two codes would fall on
  # either side.
  assert differing[jnp.float32] <= 1e-4
  assert differing[jnp.bfloat16] > 1e-3  # 2.5 %: so the bound above says something


def precisions(function, *arguments):
  jaxpr = jax.make_jaxpr(function)(*arguments)
  return [
    str(equation.params["precision"] and equation.params["precision"][0])
    for equation in all_equations(jaxpr.jaxpr)
    if equation.primitive.name in ("conv_general_dilated", "dot_general")
  ]


def all_equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from all_equations(inner)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_only_products_of_codes_take_one_pass_in_float32(platform):
  conv, dense, bits = QuantConv(6, 3), QuantDense(5), Bits(4, 4)
  x = jnp.ones((2, 5, 5, 4))
  variables = conv.init(jax.random.key(0), x, bits)
  flat = dense.init(jax.random.key(0), x[:, 0, 0], bits)

  def of_codes(x):
    x = Quantized(x, jnp.float32(1))
    return jnp.sum(conv.apply(variables, x, bits)) + jnp.sum(
      dense.apply(flat, Quantized(x.codes[:, 0, 0], x.scale), bits)
    )

  def of_images(x):
    return jnp.sum(conv.apply(variables, x, bits))

  with tracing_for(Target(platform)), jax.default_matmul_precision("highest"):
    assert precisions(of_codes, x) == ["DEFAULT"] * 2
    assert precisions(of_images, x) == ["HIGHEST"]
    backward = precisions(jax.grad(of_codes), x)
  assert backward.count("DEFAULT") == 2
  assert set(backward) == {"DEFAULT", "HIGHEST"}
  with tracing_for(Target(platform)):
    assert set(precisions(jax.grad(of_codes), x)) <= {"DEFAULT", "None"}
