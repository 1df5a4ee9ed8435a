"""MobileNet-v2 (Sandler et al., CVPR 2018, arXiv 1801.04381) with DuQ quantizers where PROFIT's
authors put them.

A symmetric quantizer stands on the input of every inverted-residual block except the first, and
before the last 1x1 convolution; an unsigned one after every ReLU; the residual add stays in full
precision.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax

from profit_jax.models.common import RELU6_BOUND, divisible_by_8
from profit_jax.nn.functions import spatial_mean
from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits

# Per stage: expansion, output channels at width 1, number of blocks.
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
# Strides of the stem and of the first block of each stage: 224 -> 7.
IMAGENET_STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280


class InvertedResidual(nn.Module):
  """1x1 expansion, depthwise 3x3, 1x1 projection; the input is added where the shapes agree.

  Attributes:
    features: output channels.
    expansion: hidden channels over input channels; 1 leaves the expansion convolution out.
    stride: of the depthwise convolution.
    quantize_input: a symmetric quantizer on the convolutions' input (the shortcut stays in full
      precision).
    activation: relu or relu6.
    norm: makes a batch normalization, given its name.
  """

  features: int
  expansion: int
  stride: int
  quantize_input: bool
  activation: Literal["relu", "relu6"]
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits, train: bool) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H / stride, W / stride, features]`."""
    shortcut, hidden = x, x.shape[-1] * self.expansion
    if self.quantize_input:
      x = QuantAct("symmetric", name="input_quant")(x, bits)
    if self.expansion != 1:
      x = QuantConv(hidden, name="expand_conv")(x, bits)
      x = self.norm(name="expand_norm")(x, train, self.activation)
      x = QuantAct("unsigned", RELU6_BOUND, name="expand_quant")(x, bits)
    x = QuantConv(hidden, 3, self.stride, depthwise=True, name="depthwise_conv")(x, bits)
    x = self.norm(name="depthwise_norm")(x, train, self.activation)
    x = QuantAct("unsigned", RELU6_BOUND, name="depthwise_quant")(x, bits)
    x = QuantConv(self.features, name="project_conv")(x, bits)
    x = self.norm(fused=False, name="project_norm")(x, train)
    return x + shortcut if x.shape == shortcut.shape else x


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
  """

  num_classes: int = 1000
  width: float = 1.0
  strides: tuple[int, ...] = ()
  activation: Literal["relu", "relu6"] = "relu6"
  dropout: float = 0.2
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5

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
    x = QuantConv(divisible_by_8(STEM_CHANNELS * self.width), 3, strides[0], name="stem_conv")(
      x, bits.of_first()
    )
    x = norm(name="stem_norm")(x, train, self.activation)
    x = QuantAct("unsigned", RELU6_BOUND, name="stem_quant")(x, bits)

    index = 0
    for (expansion, channels, blocks), stage_stride in zip(STAGES, strides[1:], strict=True):
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
    x = QuantConv(divisible_by_8(HEAD_CHANNELS * max(1.0, self.width)), name="head_conv")(x, bits)
    x = norm(name="head_norm")(x, train, self.activation)
    x = spatial_mean(x)
    x = QuantAct("unsigned", RELU6_BOUND, name="head_quant")(x, bits.of_last())
    x = Dropout(self.dropout, name="dropout")(x, train)
    return QuantDense(self.num_classes, name="classifier")(x, bits.of_last())
