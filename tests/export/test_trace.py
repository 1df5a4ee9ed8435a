"""Any model made of our layers becomes a net that computes what it computes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.config import ConfigError
from profit_jax.export import formats, onnx_file, quantizers, reference, verify
from profit_jax.export.build import build_net
from profit_jax.export.costs import costs
from profit_jax.nn import tracing
from profit_jax.nn.functions import spatial_mean
from profit_jax.nn.layers import QuantAct, QuantConv, QuantDense
from profit_jax.nn.rules import with_rules
from profit_jax.nn.spec import describe
from profit_jax.quant import PACT, QIL, QUANTIZERS, Bits, named
from profit_jax.quant.quantized import value_of
from tests.export import own_models, tiny
from tests.export.nets import NORMALIZATION, images, random_values, raw

OWN = (
  own_models.Branches,
  own_models.Plain,
  own_models.Codes,
  own_models.Vectors,
  own_models.Same,
)


def variables_of(model, shape=own_models.IMAGE_SHAPE):
  return random_values(describe(model, shape).shapes)


def own_net(model, bits=4, shape=own_models.IMAGE_SHAPE, variables=None):
  return build_net(
    describe(model, shape),
    variables_of(model, shape) if variables is None else variables,
    name="own",
    normalization=None,
    weight_bits=bits,
    act_bits=bits,
  )


def float_images(count=24, shape=own_models.IMAGE_SHAPE):
  return np.float32(np.random.default_rng(0).normal(0.3, 1.0, (count, *shape)))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("make", OWN)
def test_an_own_models_codes_are_the_nets(make, bits):
  model = make()
  variables = variables_of(model)
  net = own_net(model, bits, variables=variables)
  outputs = verify.trained_codes(net, describe(model, own_models.IMAGE_SHAPE), variables, None)(
    float_images()
  )
  compared = verify.compare(net, [float_images()], lambda _: outputs)
  assert compared.at_ties, [row for row in compared.rows if row.apart]
  assert compared.logits < 1e-5
  for name, codes in outputs[1].items():  # else they would be easy to agree on
    assert len(np.unique(codes)) >= 4, name


@pytest.mark.parametrize("name", formats.DEFAULT)
@pytest.mark.parametrize("make", OWN)
def test_a_file_computes_an_own_models_codes(tmp_path, name, make):
  net = own_net(make())
  path = tmp_path / f"net{formats.FORMATS[name].suffix}"
  module = formats.load(name)
  module.write(net, path)
  compared = verify.compare(net, [float_images()], verify.file_codes(module.open_file(path)))
  assert compared.exact, [row for row in compared.rows if row.differing]
  assert compared.logits < 1e-5


@pytest.mark.parametrize("name", ["onnx", "safetensors"])
def test_a_file_takes_vectors(tmp_path, name):
  net = own_net(own_models.Vectors(), shape=(20,))
  path = tmp_path / f"net{formats.FORMATS[name].suffix}"
  module, inputs = formats.load(name), float_images(shape=(20,))
  module.write(net, path)
  compared = verify.compare(net, [inputs], verify.file_codes(module.open_file(path)))
  assert compared.exact, [row for row in compared.rows if row.differing]
  assert compared.logits < 1e-5


def test_nothing_but_the_needed_nodes_stands_between_layers():
  names = {node.name: type(node).__name__ for node in own_net(own_models.Plain()).nodes}
  # Constants before a quantizer; plain norms and ReLUs are part of layers and quantizers.
  assert list(names.items())[:3] == [
    ("image/affine", "Affine"),
    ("input_quant", "Quantizer"),
    ("stem", "Layer"),
  ]
  functions = {name.rpartition("/")[2] for name, kind in names.items() if kind == "Activation"}
  assert functions == {"hard_swish", "hard_sigmoid", "relu6"}
  assert sorted(set(names.values())) == [
    "Activation",
    "Affine",
    "Clip",
    "Layer",
    "Maximum",
    "Mean",
    "Pool",
    "Product",
    "Quantizer",
    "Reshape",
    "Sum",
    "Value",
  ]


def test_codes_that_are_moved_stay_codes():
  net = own_net(own_models.Codes(), 3)
  assert [type(node).__name__ for node in net.nodes] == [
    "Layer",
    "Activation",
    "Quantizer",
    "Pool",
    "Concat",
    "Layer",
    "Quantizer",
    "Pool",
    "Reshape",
    "Layer",
  ]
  assert [(row.weight_bits, row.input, row.input_bits) for row in costs(net)] == [
    (8, "image", 32),
    (3, "hswish", 3),
    (8, "unsigned", 8),
  ]
  assert not net.float_fed() & {"deep_quant"}


class Names(nn.Module):
  """Its layers have names that plain operations would get."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = value_of(QuantConv(4, name="product")(x, bits))
    x = spatial_mean(x * nn.relu(x))
    x = QuantAct("symmetric", name="sum")(x, bits)
    return QuantDense(5, name="mean")(x, bits)


def test_layers_keep_their_names():
  names = [node.name for node in own_net(Names()).nodes]
  assert names == ["product", "product/relu", "product_2", "mean_2", "sum", "mean"]


class ReadTwice(nn.Module):
  """Operations that read a tensor twice, and values that a user looks at."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = spatial_mean(value_of(QuantConv(4, 3, name="conv")(x, bits)))
    x = jnp.concatenate([x, x], axis=-1)
    self.sow("intermediates", "joined", x)
    x = QuantAct("symmetric", name="quant")(jnp.maximum(x * x, x) + x, bits)
    self.sow("intermediates", "quantized", x)
    x = QuantDense(4, name="dense")(jnp.concatenate([value_of(x)] * 2, axis=-1), bits)
    return QuantDense(5, name="head")(QuantAct("symmetric", name="head_quant")(x + x, bits), bits)


@pytest.mark.parametrize("name", ["onnx", "safetensors"])
def test_an_operation_may_read_a_tensor_twice_and_a_model_sow_it(tmp_path, name):
  model = ReadTwice()
  variables = variables_of(model)
  net = own_net(model, variables=variables)
  spec = describe(model, own_models.IMAGE_SHAPE)
  outputs = verify.trained_codes(net, spec, variables, None)(float_images())
  compared = verify.compare(net, [float_images()], lambda _: outputs)
  assert compared.at_ties, [row for row in compared.rows if row.apart]
  path = tmp_path / f"net{formats.FORMATS[name].suffix}"
  module = formats.load(name)
  module.write(net, path)
  compared = verify.compare(net, [float_images()], verify.file_codes(module.open_file(path)))
  assert compared.exact, [row for row in compared.rows if row.differing]


ENDS = (("stem_conv", 8, None), ("classifier", 6, None))


# PACT's kernels take one bit more; QIL prunes, so that signed activations have no affine map.
@pytest.mark.parametrize(
  ("method", "options", "bits", "kernel_bits"),
  [
    ("lsq", {}, 3, 3),
    ("pact", {}, 7, 8),
    ("pact", {"per_channel": True}, 3, 4),
    ("qil", {}, 4, 4),
    ("qil", {"per_channel": True, "rules": ENDS}, 4, 4),
    ("duq", {"per_channel": True}, 4, 4),
    ("duq", {"rules": ENDS}, 2, 2),
  ],
)
def test_every_quantizer_is_exported(tmp_path, method, options, bits, kernel_bits):
  rules = options.get("rules", ())
  quantizer = named(method, per_channel=options.get("per_channel", False))
  spec = describe(tiny.TinyV1(), (16, 16, 3), Bits(quantizer=quantizer))
  spec = with_rules(spec, rules, "profit")
  variables = random_values(spec.shapes)
  net = build_net(
    spec,
    variables,
    name="tiny",
    normalization=NORMALIZATION,
    weight_bits=bits,
    act_bits=bits,
  )
  outputs = verify.trained_codes(net, spec, variables, NORMALIZATION)(images())
  compared = verify.compare(net, [images()], lambda _: outputs)
  assert compared.at_ties, [row for row in compared.rows if row.apart]
  assert compared.logits < 1e-5
  first, last = (8, 6) if rules else (bits, bits)
  assert [layer.bits for layer in net.layers] == [first, bits, bits, last]
  assert (net.layers[1].code_bits or net.layers[1].bits) == kernel_bits
  onnx_file.write(net, tmp_path / "net.onnx")
  runner = onnx_file.open_file(tmp_path / "net.onnx")
  assert verify.compare(net, [images()], verify.file_codes(runner)).exact


def mixed_net(rules=tiny.MIXED):
  """A net whose layers have all kinds of bits, its model's description and variables."""
  spec = with_rules(describe(tiny.TinyV1(), (16, 16, 3)), rules, "profit")
  variables = random_values(spec.shapes)
  options = {"name": "tiny", "normalization": NORMALIZATION, "weight_bits": 3, "act_bits": 3}
  return build_net(spec, variables, **options), spec, variables


def test_a_net_has_the_bits_of_every_layer():
  net, spec, variables = mixed_net()
  outputs = verify.trained_codes(net, spec, variables, NORMALIZATION)(images())
  compared = verify.compare(net, [images()], lambda _: outputs)
  assert compared.at_ties, [row for row in compared.rows if row.apart]
  assert compared.logits < 1e-5
  assert [(row.weight_bits, row.input, row.input_bits) for row in costs(net)] == [
    (32, "image", 8),
    (8, "unsigned", 6),
    (3, "float", 32),
    (32, "float", 32),  # a mean of codes
  ]
  assert [quantizer.bits for quantizer in net.quantizers] == [6, 8]
  # What a layer of floats gives depends on the order of its sums.
  assert net.float_fed() == {"stem_quant", "block00/pointwise_quant"}
  floats = [row for row in costs(net) if row.weight_bits == 32]
  assert [row.kernel_bytes for row in floats] == [4 * 3 * 3 * 3 * 8, 4 * 16 * 10]


@pytest.mark.parametrize("name", formats.DEFAULT)
def test_a_file_has_the_bits_of_every_layer(tmp_path, name):
  net, _, _ = mixed_net()
  module, path = formats.load(name), tmp_path / f"net{formats.FORMATS[name].suffix}"
  module.write(net, path)
  compared = verify.compare(net, [images()], verify.file_codes(module.open_file(path)))
  assert compared.differing == 0
  assert compared.codes > 10_000
  assert compared.logits < 1e-5


class Bordered(nn.Module):
  """Its convolution pads with the value of a code."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantAct("hswish", name="quant")(QuantConv(4, name="stem")(x, bits), bits)
    x = QuantConv(4, 3, pad_value=-0.375, name="conv")(x, bits)
    return QuantDense(5, name="head")(spatial_mean(x), bits)


def test_a_layer_that_reads_floats_pads_with_any_number():
  spec = with_rules(describe(Bordered(), (8, 8, 3)), (("conv", 8, "float"),), "profit")
  numbers = {"name": "own", "normalization": None, "weight_bits": 4, "act_bits": 4}
  variables, image = random_values(spec.shapes), float_images(shape=(8, 8, 3))
  net = build_net(spec, variables, **numbers)
  expected = spec.model.apply(variables, image, spec.bits.at(4, 4))
  np.testing.assert_allclose(reference.run(net, image), expected, atol=1e-5)


class Strided(nn.Module):
  """SAME without a border: 9 pixels are three times 3."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantConv(8, 3, stride=3, padding="same", name="conv")(x, bits)
    return QuantDense(5, name="head")(spatial_mean(x), bits)


def test_a_border_of_nothing_stays_nothing():
  spec = with_rules(describe(Strided(), (9, 9, 1)), (("head", "float", None),), "profit")
  variables, image = random_values(spec.shapes), float_images(shape=(9, 9, 1))
  net = build_net(spec, variables, name="own", normalization=None, weight_bits=4, act_bits=4)
  assert net.shapes()["conv"] == (3, 3, 8)
  expected = spec.model.apply(variables, image, spec.bits.at(4, 4))
  np.testing.assert_allclose(reference.run(net, image), expected, atol=1e-5)


class Halved(nn.Module):
  """Layers that read halves of a quantizer's channels."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantAct("symmetric", name="quant")(x, bits)
    left, right = jnp.split(value_of(x), 2, axis=-1)
    x = QuantConv(4, name="left")(left, bits) + QuantConv(4, name="right")(right, bits)
    return QuantDense(5, name="head")(spatial_mean(x), bits)


def test_halves_of_channels_are_refused():
  with pytest.raises(ConfigError, match="split"):
    own_net(Halved(), shape=(8, 8, 2))


@pytest.mark.parametrize(
  ("method", "kind"),
  [
    (method, kind)
    for method in QUANTIZERS
    for kind in ("unsigned", "hswish", "symmetric")
    if (method, kind) != ("qil", "symmetric")
  ],
)
def test_a_quantizer_is_its_affine_map(method, kind):
  quantizer, qmax = named(method), Bits(5, 5).act_qmax(kind)
  params = {leaf: raw(1.0 + index / 3) for index, leaf in enumerate(quantizer.act_scalars)}
  node, _ = quantizers.quantizer("quant", params, float(qmax), kind, quantizer)
  x = np.float32(np.random.default_rng(0).uniform(-3.0, 3.0, (100, 100)))
  expected = quantizer.quantize_act(x, params, qmax, kind)
  codes = reference.codes(node, x)
  reach = np.float32(1e-6)
  near = (reference.codes(node, x - reach) <= expected.codes) & (
    expected.codes <= reference.codes(node, x + reach)
  )
  assert near.all()
  assert (codes == expected.codes).mean() > 0.999
  assert set(np.unique(codes)) == set(range(node.low, node.high + 1))
  assert (node.bits, node.offset) == (5, expected.offset)
  np.testing.assert_allclose(node.scale, expected.scale, rtol=1e-6)


class Refused(nn.Module):
  """A model that cannot be exported."""

  change: Callable[..., Any]

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    conv = QuantConv(1, 3, name="conv")
    x = QuantAct("unsigned", name="conv_quant")(conv(x, bits), bits)
    x = self.change(value_of(x), bits, conv)
    return QuantDense(3, name="head")(jnp.mean(value_of(x), axis=(1, 2)), bits)


def sine(x, bits, conv):
  return jnp.sin(x)


def twice(x, bits, conv):
  return conv(x, bits)


def unused(x, bits, conv):
  QuantConv(4, name="unused")(x, bits)
  return x


def border(x, bits, conv):
  x = QuantAct("hswish", name="wave_quant")(x, bits)
  return QuantConv(4, 3, name="wave")(x, bits)


def plain(x, bits, conv):
  return nn.Conv(4, (1, 1), name="plain")(x)


def by_place(x, bits, conv):
  return x + jnp.arange(15.0)[:, None, None]


def over_channels(x, bits, conv):
  return x / jnp.sum(x, axis=-1, keepdims=True)


def reserved(x, bits, conv):
  return QuantConv(4, name="image")(x, bits)


def full_precision_weights(x, bits, conv):
  return QuantConv(4, name="float")(x, bits.at(None, bits.act))


def full_precision_activations(x, bits, conv):
  return QuantAct("unsigned", name="float")(x, bits.at(bits.weight, None))


def bounds(x, bits, conv):
  return jnp.minimum(jnp.concatenate([x, x], axis=-1), jnp.arange(2.0))


def across_images(x, bits, conv):
  return x.reshape(-1, 4, 1, 1)


def inside_vmap(x, bits, conv):
  return jax.vmap(lambda x: nn.relu(x) ** 3)(x)


def spread_alone(x, bits, conv):
  mean = jnp.mean(x, axis=(1, 2), keepdims=True)
  return jnp.concatenate([x, jnp.broadcast_to(mean, x.shape)], axis=-1)


def over_time(x, bits, conv):
  return jax.lax.scan(lambda carry, _: (carry + x, None), x, None, length=2)[0] ** 2


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (sine, r"^test_trace\.py:\d+: the operation sin \(after layer 'conv_quant'\).*maximum"),
    (twice, r"The layer conv is called twice"),
    (unused, r"the layer 'unused' is called, but"),
    (border, r"'wave' .*'wave_quant', whose zeros are worth -0\.375, and pad_value = 0\.0"),
    (plain, r"conv_general_dilated, as of nn\.Conv; QuantConv.*after layer 'conv_quant'"),
    (by_place, r"a constant that varies over height"),
    (over_channels, r"a sum over the axes \(3,\)"),
    (reserved, r"'image' cannot be exported under this name"),
    (full_precision_weights, r"the weights of the layer 'float' are in full precision"),
    (full_precision_activations, r"the activations of the layer 'float' are in full precision"),
    (bounds, r"a bound that differs by element"),
    (across_images, r"1 array of the shape \(45, 3\) for one image"),
    (inside_vmap, r"the operation integer_pow \(after layer 'conv_quant'\)"),
    (spread_alone, r"repeating a tensor along an axis"),
    (over_time, r"the operation (integer_pow|square) \(after layer 'conv_quant'\)"),
  ],
  ids=lambda case: getattr(case, "__name__", ""),
)
def test_what_no_file_can_hold_is_named(change, named):
  with pytest.raises(ConfigError, match=named):
    own_net(Refused(change))


class Spatial(nn.Module):
  """Gives what it should average."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    return value_of(QuantConv(4, name="conv")(x, bits))


def test_an_output_that_is_no_logits():
  with pytest.raises(ConfigError, match=r"\(1, 15, 12, 4\).*\[N, classes\]"):
    own_net(Spatial())


def test_codes_that_no_file_can_hold():
  wide = {"kernel": np.float32([[1.0, -0.5]])}
  with pytest.raises(ConfigError, match=r"'head' .* pact at 8 bits .* 255.* 127"):
    quantizers.quantized_kernel("head", wide, 127.0, PACT())
  scalars = {"quant_center": raw(1.0), "quant_width": raw(0.5)}
  with pytest.raises(ConfigError, match=r"'input_quant' .*qil.*symmetric"):
    quantizers.quantizer("input_quant", scalars, 7.0, "symmetric", QIL())


def test_the_trace_mode_ends_with_its_block():
  def fail():
    with tracing.traced():
      assert tracing.active()
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    fail()
  assert not tracing.active()
