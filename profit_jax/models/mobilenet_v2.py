"""MobileNet-v2 (Sandler et al., CVPR 2018, arXiv 1801.04381) with DuQ quantizers where PROFIT's
authors put them.

A symmetric quantizer is on the input of every inverted-residual block except the first, and
before the last 1x1 convolution; an unsigned one after every ReLU; the residual add stays in full
precision.

Options: width, strides, activation, dropout, bn_momentum, bn_epsilon; see `MobileNetV2`. timm's
deeper nets are models of their own, `mobilenet_v2_110d` and `mobilenet_v2_120d`.

torchvision, timm and the authors have weights. The authors started from torchvision's code and kept
its names; their `Q_Sequential` numbers the modules in it, except that a symmetric quantizer of its
input is called `-N`, N being the number of the module after it.
"""

import functools
from collections.abc import Collection
from typing import Literal

import flax.linen as nn
import jax

from profit_jax.models.common import (
  RELU6_BOUND,
  InvertedResidual,
  divisible_by_8,
  scaled_depths,
  timm_names,
)
from profit_jax.models.naming import Naming, Path, quantizable
from profit_jax.models.registry import register
from profit_jax.nn.functions import spatial_mean
from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits

# Per stage: expansion, output channels at width 1, number of blocks.
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
# Strides of the stem and of the first block of each stage: 224 -> 7.
IMAGENET_STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280

_AUTHORS_BLOCK = {
  "input_quant": "-0",
  "expand_conv": "0.0",
  "expand_norm": "0.1",
  "expand_quant": "0.2",
  "depthwise_conv": "1.0",
  "depthwise_norm": "1.1",
  "depthwise_quant": "1.2",
  "project_conv": "2",
  "project_norm": "3",
}
# The first block has no expansion, so that all of its places are one lower.
_AUTHORS_FIRST_BLOCK = {
  "depthwise_conv": "0.0",
  "depthwise_norm": "0.1",
  "depthwise_quant": "0.2",
  "project_conv": "1",
  "project_norm": "2",
}
_AUTHORS_OUTSIDE = {
  "stem_conv": "features.0.0",
  "stem_norm": "features.0.1",
  "stem_quant": "features.0.2",
  "head_input_quant": "features.-18",
  "head_conv": "features.18.0",
  "head_norm": "features.18.1",
  "head_quant": "relu6",
  "classifier": "classifier.1",
}


def _authors_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers -> the authors': `("block01", "expand_conv")` -> `features.2.conv.0.0`."""
  names = {}
  for layer in layers:
    if len(layer) == 1:
      names[layer] = _AUTHORS_OUTSIDE[layer[0]]
    else:
      index = int(layer[0].removeprefix("block"))
      places = _AUTHORS_FIRST_BLOCK if index == 0 else _AUTHORS_BLOCK
      names[layer] = f"features.{index + 1}.conv.{places[layer[1]]}"
  return names


def depths(factor: float) -> tuple[int, ...]:
  """The number of blocks of every stage."""
  return scaled_depths([blocks for _, _, blocks in STAGES], factor)


def _timm_names(layers: Collection[Path], depth: float = 1.0) -> dict[Path, str]:
  """Our layers -> those of timm's mobilenetv2_100."""
  names = timm_names(layers, depths(depth), ("expand", "depthwise", "project"))
  return names | {("head_conv",): "conv_head", ("head_norm",): "bn2"}


_RELU6 = {"activation": "relu6", "bn_epsilon": 1e-5}
_NAMES = (
  # Without the quantizers' scalars, the authors' files are torchvision's.
  Naming(
    source="torchvision",
    layer_names=_authors_names,
    settings=_RELU6,
    variants={
      "mobilenet_v2": {"width": 1.0},
      **quantizable("mobilenet_v2", {"width": 1.0, "activation": "relu"}),
    },
  ),
  Naming(
    source="timm",
    layer_names=_timm_names,
    settings=_RELU6,
    variants={
      f"mobilenetv2_{percent:03d}": {"width": percent / 100} for percent in (35, 50, 75, 100, 140)
    },
  ),
  Naming(
    source="authors",
    layer_names=_authors_names,
    settings={"activation": "relu", "bn_epsilon": 1e-5},
    quantizers=True,
  ),
)


def _register_deep(name: str, width: float, depth: float):
  """Registers timm's model of that name, `mobilenetv2_110d`: deeper, with the stem and head of
  width 1.
  """
  timm = Naming(
    source="timm",
    layer_names=functools.partial(_timm_names, depth=depth),
    settings=_RELU6,
    variants={f"mobilenetv2_{name}": {}},
  )
  return register(
    f"mobilenet_v2_{name}",
    fixed={"width": width, "depth": depth, "scaled_ends": False},
    strides=IMAGENET_STRIDES,
    names=(timm,),
  )


@_register_deep("120d", 1.2, 1.4)
@_register_deep("110d", 1.1, 1.2)
@register("mobilenet_v2", strides=IMAGENET_STRIDES, names=_NAMES)
class MobileNetV2(nn.Module):
  """MobileNet-v2.

  Attributes:
    num_classes: size of the head.
    width: multiplies the channels of every layer; the head's 1280 only grows.
    strides: of the stem and of the seven stages, () is the published ones; small images want fewer
      2s.
    activation: `relu` is what the authors' code computes (6 only bounds its first intervals),
      `relu6` what torchvision's weights were trained with.
    dropout: rate before the classifier.
    bn_momentum: share of the old running statistics that a step keeps.
    bn_epsilon: added to variances.
    depth: multiplies the number of blocks of every stage but the first and the last.
    scaled_ends: whether the width multiplies the channels of the stem and the head too.
  """

  num_classes: int = 1000
  width: float = 1.0
  strides: tuple[int, ...] = ()
  activation: Literal["relu", "relu6"] = "relu6"
  dropout: float = 0.2
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  depth: float = 1.0
  scaled_ends: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits = Bits(), train: bool = False) -> jax.Array:
    """Logits `[N, num_classes]` of normalized images `[N, H, W, 3]`.

    Args:
      x: images, NHWC; the network's input is not quantized.
      bits: of the quantizers; full precision by default.
      train: batch statistics and dropout (which wants a `dropout` key unless its rate is 0).
    """
    norm = functools.partial(BatchNorm, momentum=self.bn_momentum, epsilon=self.bn_epsilon)
    strides = self.strides or IMAGENET_STRIDES
    ends = self.width if self.scaled_ends else 1.0
    x = QuantConv(divisible_by_8(STEM_CHANNELS * ends), 3, strides[0], name="stem_conv")(x, bits)
    x = norm(name="stem_norm")(x, train, self.activation)
    x = QuantAct("unsigned", RELU6_BOUND, name="stem_quant")(x, bits)

    index = 0
    stages = zip(STAGES, depths(self.depth), strides[1:], strict=True)
    for (expansion, channels, _), blocks, stage_stride in stages:
      for position in range(blocks):
        x = InvertedResidual(
          features=divisible_by_8(channels * self.width),
          expansion=expansion,
          stride=stage_stride if position == 0 else 1,
          quantize_input=index > 0,
          activation=self.activation,
          norm=norm,
          name=f"block{index:02d}",
        )(x, bits, train)
        index += 1

    x = QuantAct("symmetric", name="head_input_quant")(x, bits)
    x = QuantConv(divisible_by_8(HEAD_CHANNELS * max(1.0, ends)), name="head_conv")(x, bits)
    x = norm(name="head_norm")(x, train, self.activation)
    x = spatial_mean(x)
    x = QuantAct("unsigned", RELU6_BOUND, name="head_quant")(x, bits)
    x = Dropout(self.dropout, name="dropout")(x, train)
    return QuantDense(self.num_classes, name="classifier")(x, bits)
