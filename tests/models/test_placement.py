"""Where quantizers stand: every layer but the first reads codes, and a quantizer is signed where
its input may be negative.
"""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from profit_jax.models import REGISTRY
from profit_jax.nn.layers import QuantAct, QuantConv, QuantDense
from profit_jax.quant import Quantized
from profit_jax.quant.bits import Bits

# Model -> its smallest width. MobileNet-v3 large and small: test_mobilenet_v3.py.
MODELS = {
  "efficientnet_lite0": 0.25,
  "mnasnet": 0.25,
  "mobilenet_v3_rw": 0.35,
  "mobilenet_v3_small_minimal": 0.5,
  "mobilenet_v4_conv_medium": 0.25,
  "mobilenet_v4_conv_small": 0.35,
  "resnet34": 0.125,
}


@functools.cache
def calls(name):
  """Layers by path, each with what it reads; nothing is computed."""
  model, found = REGISTRY[name](num_classes=10, width=MODELS[name]), {}

  def watch(call, args, kwargs, context):
    if context.method_name == "__call__":
      found["/".join(context.module.path)] = context.module, *args[:1]
    return call(*args, **kwargs)

  def initialize(key):
    return model.init(key, np.zeros((1, 64, 64, 3), np.float32), Bits(4, 4))

  with nn.intercept_methods(watch):
    jax.eval_shape(initialize, jax.random.key(0))
  return found


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_but_the_first_reads_codes(name):
  floats = {
    path
    for path, (module, *read) in calls(name).items()
    if isinstance(module, QuantConv | QuantDense) and not isinstance(read[0], Quantized)
  }
  assert floats == {"stem_conv"}


@pytest.mark.parametrize("name", MODELS)
def test_quantizers_are_signed_where_no_non_linearity_comes_before(name):
  kinds = {path: m.kind for path, (m, *_) in calls(name).items() if isinstance(m, QuantAct)}
  signed = {path for path, kind in kinds.items() if kind == "symmetric"}
  inputs = {path for path in kinds if path.endswith("/input_quant")}
  # A block behind a ReLU, and one behind a convolution with a ReLU, read what is not negative.
  after_relu = {
    "mobilenet_v3_rw": {"block00/input_quant"},
    "mobilenet_v3_small_minimal": {"block00/input_quant"},
    "resnet34": inputs,
  }.get(name, set())
  between = {path for path in kinds if path.endswith("/start_quant")}
  expected = (inputs - after_relu) | between
  assert signed == expected | ({"head_input_quant"} & kinds.keys())
  assert ("hswish" in kinds.values()) == (name == "mobilenet_v3_rw")


def test_only_a_net_with_hswish_pads_with_the_value_of_its_code_0():
  padded = {
    name: [p for p, (m, *_) in calls(name).items() if isinstance(m, QuantConv) and m.pad_value]
    for name in MODELS
  }
  assert [name for name, paths in padded.items() if paths] == ["mobilenet_v3_rw"]
  # The first block reads the stem's h-swish; from the seventh on all non-linearities are h-swish.
  after_hswish = [f"block{index:02d}/depthwise_conv" for index in (0, *range(6, 15))]
  assert padded["mobilenet_v3_rw"] == after_hswish
