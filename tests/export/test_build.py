"""The code-domain net computes what the trained model computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.config import ConfigError
from profit_jax.export import verify
from profit_jax.export.costs import costs
from profit_jax.export.net import Activation
from profit_jax.export.quantizers import quantized_kernel
from profit_jax.models import student_spec
from profit_jax.quant import DuQ, duq
from tests.export.nets import (
  NORMALIZATION,
  full_net,
  images,
  net_of,
  random_net,
  random_variables,
  raw,
  small_settings,
)


@pytest.mark.parametrize(
  ("name", "weight_bits", "act_bits", "changes"),
  [
    ("mobilenet_v1", 4, 4, {}),
    ("mobilenet_v2", 3, 3, {}),
    ("mobilenet_v3_large", 5, 8, {"model.squeeze_excite": "before"}),
    ("mobilenet_v3_small", 2, 2, {"model.squeeze_excite": "after"}),
    ("mobilenet_v4_conv_small", 4, 3, {}),
    ("efficientnet_lite0", 3, 4, {"model.padding": "same"}),
    ("mnasnet", 2, 2, {}),
    ("resnet34", 4, 4, {}),
    # Nets of the same files, at the same strides.
    ("mobilenet_v1", 4, 4, {"model.name": "mobilenet_v1_h"}),
    ("mobilenet_v3_large", 4, 4, {"model.name": "mobilenet_v3_rw"}),
    ("mobilenet_v3_small", 4, 4, {"model.name": "mobilenet_v3_small_minimal"}),
    # Borders of -3/8 around floats, of quantized kernels and of others.
    ("mobilenet_v3_small", 4, 4, {"quant.rules": ((".*/depthwise_conv", None, "float"),)}),
    ("mobilenet_v3_small", 4, 4, {"quant.rules": ((".*/depthwise_conv", "float", "float"),)}),
  ],
)
def test_its_codes_are_the_trained_models(name, weight_bits, act_bits, changes):
  settings, variables, net = random_net(name, weight_bits, act_bits, **changes)
  run = verify.trained_codes(net, student_spec(settings, 10), variables, NORMALIZATION)
  logits, codes = run(images())
  compared = verify.compare(net, [images()], lambda _: (logits, codes))
  assert compared.at_ties, [row for row in compared.rows if row.apart]
  assert compared.logits < 1e-5
  for quantizer in net.quantizers:  # else they would be easy to agree on
    found = np.unique(codes[quantizer.name])
    assert len(found) >= 2
    assert quantizer.low <= found[0]
    assert found[-1] <= quantizer.high


@pytest.mark.parametrize(("activation", "kept"), [("relu", False), ("relu6", True)])
def test_a_quantizers_range_replaces_the_activation(activation, kept):
  # A quantizer whose interval ends beyond 6 does not replace ReLU6.
  settings = small_settings("mobilenet_v1", **{"model.activation": activation})
  variables = random_variables(settings)
  variables["params"]["block01"]["depthwise_quant"]["quant_a"] = raw(6.5)
  net = net_of(settings, variables, 4, 4)
  found = [node.name for node in net.nodes if isinstance(node, Activation)]
  assert found == (["block01/depthwise_conv/relu6"] if kept else [])


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_the_head_has_the_models_activation(activation):
  _, _, net = random_net("mobilenet_v2", 8, 2, **{"model.activation": activation})
  assert [node.function for node in net.nodes if isinstance(node, Activation)] == [activation]


@pytest.mark.parametrize("bits", range(2, 9))
def test_kernel_codes_are_those_of_the_quantizer(bits):
  rng = np.random.default_rng(bits)
  kernel, raw_a = np.float32(rng.normal(size=(3, 3, 64, 64))), np.float32(0.3)
  steps = 2 ** (bits - 1) - 1
  params = {"kernel": kernel, "quant_a": raw_a, "quant_c": raw_a}
  found = quantized_kernel("conv", params, steps, DuQ())
  values = duq.quantize(
    jnp.asarray(kernel), jnp.asarray(raw_a), jnp.asarray(raw_a), jnp.float32(steps), "symmetric"
  )
  interval = np.logaddexp(0, np.float64(raw_a))
  np.testing.assert_array_equal(found.codes, np.rint(np.float64(values) * steps / interval))
  assert set(np.unique(found.codes)) == set(range(-steps, steps + 1))
  assert (found.bits, found.code_bits) == (bits, None)


def test_a_border_that_has_no_code_is_refused():
  settings = small_settings("mobilenet_v3_small", **{"model.pad_value": 0.0})
  with pytest.raises(ConfigError, match=r"depthwise_conv.* pad_value = 0\.0 .*-0\.375"):
    net_of(settings, random_variables(settings), 4, 4)


# Multiply-accumulates at 224 pixels, in millions: v1 569 (arXiv 1704.04861, table 4), v2 300 (arXiv
# 1801.04381, table 4), v3 large 219 and small 56 (arXiv 1905.02244, table 3).
@pytest.mark.parametrize(
  ("name", "millions"),
  [
    ("mobilenet_v1", 569),
    ("mobilenet_v2", 300),
    ("mobilenet_v3_large", 219),
    ("mobilenet_v3_small", 56),
  ],
)
def test_costs_and_sums_of_the_published_nets(name, millions):
  net = full_net(name, 4)
  rows = costs(net)
  assert sum(row.macs for row in rows) == pytest.approx(millions * 1e6, rel=0.03)
  assert all(row.bops == row.macs * 4 * row.input_bits for row in rows)
  assert rows[0].input_bits == 8
  # Sums stay exact in float32, with every code the largest. Above 2^24 float32 has no odd numbers;
  # at 8 bits such a sum needs codes that no trained net has, and verification would see it.
  for layer in net.layers:
    assert layer.kernel[..., 0].size * 7 * 15 < 2**24, layer.name
