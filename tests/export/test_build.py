"""The code-domain net computes what the trained model computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.export import reference, verify
from profit_jax.export.build import kernel_codes
from profit_jax.export.costs import costs
from profit_jax.models import build
from profit_jax.quant import duq
from profit_jax.settings import ConfigError
from tests.export.nets import NORMALIZATION, full_net, images, random_net


@pytest.mark.parametrize(
  ("name", "weight_bits", "act_bits", "changes"),
  [
    ("mobilenet_v1", 4, 4, {}),
    ("mobilenet_v1", 2, 8, {"model.activation": "relu"}),
    ("mobilenet_v2", 3, 3, {}),
    ("mobilenet_v2", 8, 2, {"model.activation": "relu"}),
    ("mobilenet_v3_large", 4, 4, {}),
    ("mobilenet_v3_small", 2, 2, {}),
    ("mobilenet_v3_small", 5, 8, {"model.squeeze_excite": "before"}),
  ],
)
def test_its_codes_are_the_trained_models(name, weight_bits, act_bits, changes):
  settings, variables, net = random_net(name, weight_bits, act_bits, **changes)
  run = verify.trained_codes(net, build(settings.model, 10), variables, NORMALIZATION)
  logits, codes = run(images())
  compared = verify.compare(net, [images()], lambda _: (logits, codes))
  assert compared.at_ties, [row for row in compared.rows if row.apart]
  assert compared.logits < 1e-5
  for quantizer in net.quantizers:  # else they would be easy to agree on
    found = np.unique(codes[quantizer.name])
    assert len(found) >= 2
    assert quantizer.low <= found[0]
    assert found[-1] <= quantizer.high


def test_a_wrong_number_in_one_channel_is_found_where_it_is():
  settings, variables, net = random_net("mobilenet_v1", 4, 4)
  run = verify.trained_codes(net, build(settings.model, 10), variables, NORMALIZATION)
  layer = next(layer for layer in net.layers if layer.name == "block03/pointwise_conv")
  layer.bias[2] += 0.5
  try:
    compared = verify.compare(net, [images()], run)
  finally:
    layer.bias[2] -= 0.5
  assert not compared.at_ties
  assert [row.quantizer for row in compared.rows if row.apart] == ["block03/pointwise_quant"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_kernel_codes_are_those_of_the_quantizer(bits):
  rng = np.random.default_rng(bits)
  kernel, raw = np.float32(rng.normal(size=(3, 3, 64, 64))), np.float32(0.3)
  steps = 2 ** (bits - 1) - 1
  codes = kernel_codes(kernel, raw, steps)
  values = duq.quantize(
    jnp.asarray(kernel), jnp.asarray(raw), jnp.asarray(raw), jnp.float32(steps), "symmetric"
  )
  interval = np.logaddexp(0, np.float64(raw))
  np.testing.assert_array_equal(codes, np.rint(np.float64(values) * steps / interval))
  assert set(np.unique(codes)) == set(range(-steps, steps + 1))


def test_sums_stay_exact_in_float32():
  # The largest that any published net can reach: every code the largest, at 8 bits by 8 bits in the
  # widest layers. Above 2^24 float32 has no odd numbers; such a sum needs codes that no trained net
  # has, and verification would see it.
  for name in ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large"):
    for layer in full_net(name, 4).layers:
      terms = layer.kernel[..., 0].size
      assert terms * 7 * 15 < 2**24, layer.name


def test_a_border_that_has_no_code_is_refused():
  with pytest.raises(ConfigError, match=r"pad_value = 0\.0 cannot be exported"):
    random_net("mobilenet_v3_small", 4, 4, **{"model.pad_value": 0.0})


def test_costs_of_the_published_nets():
  # Multiply-accumulates at 224 pixels, in millions: v1 569 (arXiv 1704.04861, table 4), v2 300
  # (arXiv 1801.04381, table 4), v3 large 219 and small 56 (arXiv 1905.02244, table 3).
  for name, millions in (
    ("mobilenet_v1", 569),
    ("mobilenet_v2", 300),
    ("mobilenet_v3_large", 219),
    ("mobilenet_v3_small", 56),
  ):
    rows = costs(full_net(name, 4))
    assert sum(row.macs for row in rows) == pytest.approx(millions * 1e6, rel=0.03), name
    assert all(row.bops == row.macs * 4 * row.input_bits for row in rows)
    assert rows[0].input_bits == 8


def test_a_compiled_reference_computes_what_single_operations_do():
  # XLA would join a product and a sum into one operation that rounds once, and ties would fall
  # elsewhere.
  _, _, net = random_net("mobilenet_v2", 3, 3)
  _, single = reference.run_with_codes(net, images()[:4])
  compared = verify.compare(
    net, [images()[:4]], lambda image: (np.asarray(reference.run(net, image)), dict(single))
  )
  assert not compared.differing
