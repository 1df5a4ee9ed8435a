"""MobileNet-v3 against the authors' logits, and negative padding."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from profit_jax.models import REGISTRY
from profit_jax.models.common import divisible_by_8
from profit_jax.models.mobilenet_v3 import Block, up_to_multiple_of_8
from profit_jax.nn.layers import BatchNorm, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits
from profit_jax.weights.load import import_variables
from tests import golden_data
from tests.specs import variable_shapes


@functools.cache
def golden_program(mode):
  """The authors' layout with the golden's variables: `(image, levels) -> logits`."""
  model = REGISTRY["mobilenet_v3_large"](
    num_classes=10, squeeze_excite="before", channel_rounding="up", bn_momentum=0.9997, dropout=0.0
  )
  tensors = golden_data.tensors(golden_data.load("mobilenet_v3_large.json"))
  loaded = import_variables(
    "mobilenet_v3_large", variable_shapes(model, 64), tensors, "golden", dtype=np.float64
  )
  assert (loaded.source, loaded.quantizers) == ("authors", True)
  apply = jax.jit(
    lambda v, x, steps: model.apply(v, x, steps, mode == "train", mutable=["batch_stats"])[0]
  )
  return functools.partial(apply, loaded.variables)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
  ("weight_bits", "act_bits"),
  [(8, 8), (4, 4), (3, 3), (None, 8), (None, None)],
  ids=["w8a8", "w4a4", "w3a3", "w0a8", "w0a0"],  # as in the golden file
)
def test_authors_logits(weight_bits, act_bits, mode):
  expected = golden_data.load("mobilenet_v3_large.npz")[
    f"w{weight_bits or 0}a{act_bits or 0}_{mode}"
  ]
  with jax.enable_x64(True):
    image = golden_data.images("input:mobilenet_v3_large", (4, 3, 64, 64))
    logits = golden_program(mode)(image, Bits(weight_bits, act_bits))
  assert np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max() < 1e-9


# What the two roundings make of the expansions of MobileNet-v3 at width 0.75; torchvision's and the
# authors' formulas.
@pytest.mark.parametrize(
  ("channels", "nearest", "up"), [(16, 16, 16), (72, 56, 56), (40, 32, 32), (184, 136, 144)]
)
def test_channel_rounding(channels, nearest, up):
  assert (divisible_by_8(channels * 0.75), up_to_multiple_of_8(channels * 0.75)) == (nearest, up)


@functools.cache
def modules(**options):
  """All modules of MobileNet-v3 small by path; nothing is computed."""
  model, found = REGISTRY["mobilenet_v3_small"](**options), {}

  def watch(call, args, kwargs, context):
    found["/".join(context.module.path)] = context.module
    return call(*args, **kwargs)

  with nn.intercept_methods(watch):
    jax.eval_shape(
      lambda key: model.init(key, np.zeros((1, 64, 64, 3), np.float32)), jax.random.key(0)
    )
  return found


@pytest.mark.parametrize("pad_value", [-0.375, 0.0])
def test_depthwise_convolutions_after_hswish_pad_with_the_padding_value(pad_value):
  # -3/8 is the default.
  made = modules() if pad_value else modules(pad_value=0.0)
  convs = {name: module for name, module in made.items() if isinstance(module, QuantConv)}
  # The first block's input is the stem's h-swish; from the fourth on all non-linearities are
  # h-swish.
  after_hswish = {f"block{index:02d}/depthwise_conv" for index in (0, *range(3, 11))}
  assert {
    name for name, conv in convs.items() if conv.kernel_size > 1 and conv.pad_value == -0.375
  } == (after_hswish if pad_value else set())


def test_quantizers_have_the_kind_of_the_non_linearity_before_them():
  kinds = {name: module.kind for name, module in modules().items() if isinstance(module, QuantAct)}
  assert kinds["block00/input_quant"] == "hswish"
  assert (
    kinds["block00/depthwise_quant"] == kinds["block00/squeeze_excite/reduce_quant"] == "unsigned"
  )
  assert {kinds[f"block{index:02d}/input_quant"] for index in range(1, 11)} == {"symmetric"}
  assert {
    kinds[f"block{index:02d}/{part}_quant"] for index in (1, 2) for part in ("expand", "depthwise")
  } == {"unsigned"}
  assert {
    kinds[f"block{index:02d}/{part}_quant"]
    for index in range(3, 11)
    for part in ("expand", "depthwise")
  } == {"hswish"}
  assert (kinds["head_input_quant"], kinds["head_quant"], kinds["pre_classifier_quant"]) == (
    "symmetric",
    "hswish",
    "hswish",
  )


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_hswish_quantizer_never_sees_less_than_its_code_0(order):
  # Also where squeeze-excite comes after the non-linearity: it scales by 0 to 1.
  block = Block(
    kernel_size=3,
    hidden=16,
    features=8,
    stride=1,
    squeezed=8,
    hswish=True,
    input_kind="symmetric",
    squeeze_excite=order,
    pad_value=-0.375,
    dense=QuantDense,
    norm=functools.partial(BatchNorm, epsilon=1e-5),
  )
  x = 3 * np.random.default_rng(1).normal(size=(4, 8, 8, 8)).astype(np.float32)

  @jax.jit
  def seen(x):
    _, sown = block.init_with_output(jax.random.key(0), x, Bits(), True, capture_intermediates=True)
    return sown["intermediates"]["depthwise_quant"]["__call__"][0].value()

  quantized_input = seen(x)
  assert -0.375 - 1e-6 <= quantized_input.min() < -0.1
