"""One multiplication from sums to codes: the same codes for every sum that there is."""

import numpy as np
import pytest

from profit_jax.export import requantize
from profit_jax.export.net import IMAGE, Activation, Clip, Layer, Net, Pool, Quantizer
from profit_jax.export.reference import codes

CHANNELS = 40


def quantizer(name, source, bits, inverse=1.0):
  numbers = {"low": 0, "high": 2**bits - 1, "bits": bits, "inverse": inverse, "scale": 1.0}
  return Quantizer(name=name, input=source, margin=0.0, **numbers)


def net_of(multiplier, bias, bits=4, between=(), kernel=None, behind=()):
  """A quantizer, a 1x1 convolution of 8 channels, what is between, another quantizer and layer."""
  random = np.random.default_rng(0)
  if kernel is None:
    kernel = random.integers(-7, 8, (1, 1, 8, len(multiplier))).astype(np.int8)
  layer = Layer(
    name="conv",
    input="first",
    kernel=kernel,
    multiplier=np.float32(multiplier),
    bias=np.float32(bias),
    bits=4,
  )
  last = Layer(
    name="last",
    input="second",
    kernel=np.ones((1, 1, len(multiplier), 2), np.int8),
    multiplier=np.ones(2, np.float32),
    bias=np.zeros(2, np.float32),
    bits=4,
  )
  source = between[-1].name if between else "conv"
  nodes = (
    quantizer("first", IMAGE, 4),
    layer,
    *between,
    quantizer("second", source, bits, np.float32(1.7)),
    *behind,
    last,
  )
  return Net("own", nodes, (1, 1, 8), None, 4, bits)


def random_numbers(bits, seed=1):
  random = np.random.default_rng(seed)
  spread = 2**bits / 400 * random.uniform(0.2, 3.0, CHANNELS)
  return spread * random.choice([-1, 1], CHANNELS), 2**bits * random.uniform(-0.5, 0.8, CHANNELS)


def wanted(net, sums):
  """The reference's codes of sums `[..., F]`."""
  layer, *between = net.nodes[1:-2]
  x = np.float32(sums) * layer.multiplier + layer.bias
  for node in between:
    low, high = (node.low, node.high) if isinstance(node, Clip) else (0.0, 6.0)
    x = np.clip(x, np.float32(low), np.float32(high))
  return codes(net.quantizers[-1], x)


def computed(found, sums, inside, fused):
  """The codes that a runtime computes, with or without fused multiply-add."""
  sums = sums * np.where(found.layer.multiplier < 0, 1, -1)
  rest = np.maximum(np.float32(sums) + found.offset, np.float32(0.0))
  assert ((rest == np.maximum(sums + np.float64(found.offset), 0.0)) | ~inside).all()
  start = found.top + requantize.ROUNDING
  if fused:
    rounded = np.float32(np.float64(rest) * -np.float64(found.factor) + start)
  else:
    rounded = rest * -found.factor + start
  return np.maximum(rounded - requantize.ROUNDING, 0.0)


BETWEEN = {
  "nothing": (),
  "relu6": (Activation(name="act", input="conv", function="relu6"),),
  "clip": (Clip(name="act", input="conv", low=-1.0, high=3.0),),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_sum_gets_the_references_code(bits, between):
  multiplier, bias = random_numbers(bits)
  multiplier[0] = 0.0
  bias[1], bias[2] = -1e4, 1e4  # one code for all sums
  net = net_of(multiplier, bias, bits, BETWEEN[between])
  found = requantize.requantizations(net)["conv"]
  largest = np.abs(np.int64(net.layers[0].kernel)).sum((0, 1, 2)) * 15
  sums = np.arange(-largest.max(), largest.max() + 1)[:, None]
  inside = np.abs(sums) <= largest
  expected = wanted(net, sums)
  for fused in (False, True):
    assert ((computed(found, sums, inside, fused) == expected) | ~inside).all()
  assert len(np.unique(expected)) > 2


def test_kernels_keep_their_codes_but_for_signs():
  net = net_of(*random_numbers(4))
  (found,) = requantize.requantizations(net).values()
  sign = np.where(net.layers[0].multiplier < 0, 1, -1)
  np.testing.assert_array_equal(found.layer.kernel, net.layers[0].kernel * sign)


def test_what_has_no_such_form_is_left():
  numbers = random_numbers(4)
  smallest = np.full((1, 1, 8, CHANNELS), -8, np.int8)
  hard_swish = Activation(name="act", input="conv", function="hard_swish")
  pool = Pool(
    name="pool",
    input="second",
    function="max",
    window=(1, 1),
    strides=(1, 1),
    padding=((0, 0), (0, 0)),
  )
  floor = Clip(name="act", input="conv", low=2.0, high=5.0)  # above 0: a second bend
  for options in (
    {"kernel": smallest},
    {"between": (hard_swish,)},
    {"between": (floor,)},
    {"behind": (pool,)},
  ):
    assert not requantize.requantizations(net_of(*numbers, **options))
  assert requantize.requantizations(net_of(*numbers))
