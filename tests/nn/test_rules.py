"""Rules give single layers their bits, and the quantizers that feed them."""

from typing import get_args, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.config import ConfigError, QuantSettings
from profit_jax.models import build
from profit_jax.nn import feeds
from profit_jax.nn.functions import spatial_mean
from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.nn.rules import policy_quantizer, policy_rules, with_rules
from profit_jax.nn.spec import describe
from profit_jax.quant import LSQ, Bits
from profit_jax.quant.quantized import value_of
from profit_jax.train import aiwq, instability, steps
from profit_jax.train.oscillation import dampening, freezing
from tests.export.nets import random_values, settings_of
from tests.train.tiny import TinyNet

SHAPE = (8, 8, 3)


class Shared(nn.Module):
  """A quantizer that feeds two layers, one that is pooled, and two that are concatenated."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantConv(4, 3, name="stem")(x, bits)
    x = QuantAct("unsigned", name="shared_quant")(nn.relu(x), bits)
    left = QuantConv(4, 3, name="left")(x, bits)
    right = QuantConv(4, name="right")(x, bits)
    left = QuantAct("unsigned", name="left_quant")(nn.relu(left), bits)
    right = QuantAct("unsigned", name="right_quant")(nn.relu(right), bits)
    both = jnp.concatenate([left.value(), right.value()], axis=-1)
    x = QuantConv(6, name="joined")(nn.max_pool(both, (2, 2), (2, 2)), bits)
    x = QuantAct("unsigned", name="joined_quant")(nn.relu(x), bits)
    x = QuantConv(6, 3, name="added")(x.value() + nn.relu(value_of(x)), bits)
    x = QuantAct("symmetric", name="last_quant")(x, bits)
    x = Dropout(0.5, name="dropout")(spatial_mean(x).reshape(len(x), -1) * 0.5, train)
    return QuantDense(5, name="head")(x, bits)


def ruled(*rules, model=Shared(), policy="profit", bits=Bits()):
  return with_rules(describe(model, SHAPE, bits), rules, policy)


def widths(spec, weight=4, act=4):
  return {path: width and int(width) for path, width in spec.bits.at(weight, act).layers.items()}


def test_the_quantizer_that_feeds_a_layer_is_found_wherever_it_is():
  assert feeds.quantizers_of(describe(Shared(), SHAPE)) == {
    "stem": (),
    "left": ("shared_quant",),
    "right": ("shared_quant",),
    "joined": ("left_quant", "right_quant"),
    "added": (),  # the sum of two tensors
    "head": ("last_quant",),
  }


class Halved(nn.Module):
  """Layers that read halves of a quantizer's channels."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantAct("unsigned", name="quant")(QuantConv(8, name="stem")(x, bits), bits)
    left, right = jnp.split(x.value(), 2, axis=-1)
    x = QuantConv(4, name="left")(left, bits) + QuantConv(4, name="right")(right, bits)
    return spatial_mean(x)


def test_halves_of_channels_have_their_quantizer():
  found = feeds.quantizers_of(describe(Halved(), SHAPE))
  assert found == {"stem": (), "left": ("quant",), "right": ("quant",)}


@pytest.mark.parametrize(
  ("name", "last"),
  [
    ("mobilenet_v1", "block12/pointwise_quant"),
    ("mobilenet_v2", "head_quant"),
    ("mobilenet_v3_small", "pre_classifier_quant"),
  ],
)
def test_the_quantizers_of_the_published_models(name, last):
  spec = describe(build(settings_of(name).model, 10), (32, 32, 3))
  found = feeds.quantizers_of(spec)
  assert found["stem_conv"] == ()
  assert found["classifier"] == (last,)
  without = [layer for layer, quantizers in found.items() if not quantizers]
  assert without == ["stem_conv"] + [layer for layer in without if "squeeze_excite" in layer]


def test_the_first_rule_that_matches_the_whole_path_decides():
  spec = ruled(("(left|right|joined)", 6, 7), ("stem|head", 8, None), (".*e.*", "float", None))
  assert widths(spec) == {
    "left": 6,
    "right": 6,
    "joined": 6,
    "shared_quant": 7,
    "left_quant": 7,
    "right_quant": 7,
    "stem": 8,
    "head": 8,
    "added": None,
  }
  assert list(spec.kernels) == ["stem", "left", "right", "joined", "head"]
  assert list(spec.all_kernels) == ["stem", "left", "right", "joined", "added", "head"]


def test_a_quantizer_can_stay_in_full_precision():
  spec = ruled(("head", None, "float"))
  assert widths(spec) == {"last_quant": None}
  assert widths(spec, act=None) == {}
  assert "last_quant" not in spec.quantizers


def test_one_rule_decides_about_a_quantizer_that_other_layers_read_too():
  assert widths(ruled(("left", None, 8))) == {"shared_quant": 8}
  assert widths(ruled(("left", None, 8), ("right", 6, None))) == {"shared_quant": 8, "right": 6}


@pytest.mark.parametrize(
  ("policy", "expected"),
  [
    ("profit", {}),
    ("lsq_paper", {"stem": 8, "head": 8, "last_quant": 8}),
    ("brevitas", {"stem": 8}),
  ],
)
def test_policies_are_rules_for_the_ends(policy, expected):
  assert widths(ruled(policy=policy)) == expected
  # Own rules come first.
  assert widths(ruled(("stem|head", 6, None), policy=policy)) == {"stem": 6, "head": 6}


def test_every_policy_that_a_configuration_can_name_is_known():
  for policy in get_args(get_type_hints(QuantSettings)["policy"]):
    policy_rules(policy, ["only"])
    assert policy_quantizer(policy, LSQ()).per_channel == (policy == "brevitas")
  assert policy_rules("lsq_paper", ["only"]) == [("only", 8, 8)]


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ([("haed", 8, 8)], r"'haed', 8, 8\) matches no layer\. Near names: head, added\."),
    ([("ight", 8, None)], r"whole paths, .* a part of 'right': write '\.\*ight\.\*'"),
    ([("igh|ef", 8, None)], r"part of 'left', 'right': write '\.\*\(\?:igh\|ef\)\.\*'"),
    ([("(?i)IGHT", 8, None)], r"a part of 'right'\.$"),
    ([("last_quant", 8, 8)], r"'last_quant' is a quantizer: name the layer that it feeds, 'head'"),
    ([("q+", 8, None)], r"matches no layer\. The layers are 'stem', 'left', .* and 1 more\."),
    ([(".*t", 8, None), ("left", 4, None)], r"'left', 4, None\) decides nothing: .*'\.\*t'"),
    ([("stem", 8, 8)], r"bits for the inputs of 'stem', which no quantizer feeds"),
    (
      [("left", 8, 8), ("right", None, "float")],
      r"'shared_quant' two widths: it feeds 'left' \(8, by \('left', 8, 8\)\) and 'right' "
      r"\('float', by \('right', None, 'float'\)\)",
    ),
  ],
)
def test_rules_that_do_not_fit_the_model_are_named(rules, message):
  with pytest.raises(ConfigError, match=f"^config.quant.rules.*{message}"):
    ruled(*rules)


class Plain(nn.Module):
  """Nothing in it is quantized."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    return nn.Dense(5)(x.reshape(len(x), -1))


def test_a_model_without_quantized_layers_has_no_rules():
  with pytest.raises(ConfigError, match="the model has none that is quantized"):
    ruled(("head", 8, 8), model=Plain())
  assert not ruled(model=Plain(), policy="lsq_paper").bits.own


class Forward(nn.Module):
  """A batch norm behind a layer, and a quantizer that is fused with it."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantAct("symmetric", name="first_quant")(x, bits)
    x = BatchNorm(name="norm")(QuantConv(4, 3, name="conv")(x, bits), train, "relu")
    x = QuantAct("unsigned", name="quant")(x, bits)
    return QuantDense(5, name="head")(spatial_mean(x), bits)


@pytest.mark.parametrize("train", [False, True])
def test_layers_compute_at_their_own_bits(train):
  rules = ("conv", 8, "float"), ("head", "float", 5)
  spec = ruled(*rules, model=Forward())
  variables = random_values(spec.shapes)
  images = jnp.float32(np.random.default_rng(0).normal(size=(4, *SHAPE)))
  seen = {}

  def watch(call, args, kwargs, context):
    result = call(*args, **kwargs)
    seen["/".join(context.module.path)] = args[0], result
    return result

  with nn.intercept_methods(watch):
    spec.model.apply(variables, images, spec.bits.at(4, 4), train, mutable=["batch_stats"])
  np.testing.assert_array_equal(np.asarray(seen["first_quant"][1]), images)
  assert seen["quant"][1].codes.max() == 31
  params, quantizer = variables["params"], spec.bits.quantizer
  kernel = quantizer.quantize_kernel(params["conv"]["kernel"], params["conv"], np.float32(127))
  expected = jax.lax.conv_general_dilated(
    images, kernel.value(), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  np.testing.assert_allclose(seen["conv"][1], expected, atol=1e-5)
  head = seen["head"][0] @ params["head"]["kernel"] + params["head"]["bias"]
  np.testing.assert_allclose(seen["head"][1], head, atol=1e-5)


@pytest.fixture(scope="module")
def tiny_spec():
  return ruled(("conv1", 8, None), ("classifier", "float", "float"), model=TinyNet())


def test_weights_are_calibrated_at_the_bits_of_their_layer(tiny_spec):
  params = random_values(tiny_spec.shapes)["params"]
  spec = describe(TinyNet(), SHAPE, Bits(quantizer=LSQ()))
  spec = with_rules(spec, (("conv1", 8, None), ("classifier", "float", None)), "profit")
  found = steps.calibrate_weights(params, spec.bits.at(4, None), spec)
  for layer, qmax in (("conv0", 7), ("conv1", 127)):
    first = LSQ().first_kernel(params[layer]["kernel"], np.float32(qmax))["quant_a"]
    np.testing.assert_allclose(np.logaddexp(0, found[layer]["quant_a"]), first, rtol=1e-5)
  assert found["classifier"]["quant_a"] is params["classifier"]["quant_a"]


def test_activations_are_calibrated_at_the_bits_of_their_quantizer():
  rules = (("conv1", None, 8), ("classifier", None, "float"))
  spec = with_rules(describe(TinyNet(), SHAPE, Bits(quantizer=LSQ())), rules, "profit")
  variables = random_values(spec.shapes)
  images, raw = jnp.ones((4, *SHAPE)), variables["params"]["signed_quant"]["quant_a"]

  def calibrated(bits):
    _, updates = spec.model.apply(
      variables, images, bits, True, mutable=["calibration", "batch_stats"]
    )
    return updates["calibration"]

  found, usual = calibrated(spec.bits.at(None, 4)), calibrated(Bits(act=4, quantizer=LSQ()))
  ratio = found["quant0"]["quant_a"] / usual["quant0"]["quant_a"]
  np.testing.assert_allclose(ratio, np.sqrt(255 / 15), rtol=1e-5)
  np.testing.assert_allclose(found["quant1"]["quant_a"], usual["quant1"]["quant_a"])
  assert "signed_quant" not in found
  assert raw is variables["params"]["signed_quant"]["quant_a"]


def test_float_layers_are_excluded_from_what_watches_codes(tiny_spec):
  assert list(tiny_spec.convs) == ["conv0", "conv1", "conv2"]
  spec = ruled(("conv0", "float", None), ("conv1", 8, None), model=TinyNet())
  assert list(aiwq.start(spec.convs).metric) == ["conv1", "conv2"]
  assert list(instability.start(spec.kernels).codes) == ["conv1", "conv2", "classifier"]
  params = random_values(spec.shapes)["params"]
  codes = spec.kernel_codes(params, spec.bits.at(2, None))
  assert {layer: int(np.abs(code).max()) for layer, code in codes.items()} == {
    "conv1": 127,
    "conv2": 1,
    "classifier": 1,
  }


def test_codes_above_four_bits_are_not_fixed():
  spec = ruled(("conv1", 8, None), ("conv2", 3, None), model=TinyNet())
  params, state = random_values(spec.shapes)["params"], freezing.start(spec.kernels)
  for sign in (1.0, -1.0, 1.0):  # every code that is not 0 moves there and back
    turned = jax.tree.map(lambda leaf, sign=sign: leaf * sign if leaf.ndim > 1 else leaf, params)
    _, state = freezing.fix_codes(state, turned, spec.bits.at(2, None), jnp.float32(0.4), 0.5, spec)
  fixed = {layer: bool(codes.any()) for layer, codes in state.fixed.items()}
  assert fixed == {"conv0": True, "conv1": False, "conv2": True, "classifier": True}


def test_dampening_pulls_to_the_codes_of_the_layer():
  spec = ruled(("conv1", 8, None), model=TinyNet())
  params = random_values(spec.shapes)["params"]
  own = dampening.dampening_loss(params, spec.bits.at(2, None), spec)
  usual = dampening.dampening_loss(params, Bits(2), spec)
  assert own < usual
