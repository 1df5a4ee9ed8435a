"""MobileNet-v1 (Howard et al., 2017, arXiv 1704.04861) with DuQ quantizers.

The PROFIT paper trains it, the authors' code does not have it: an unsigned quantizer follows
every ReLU. There is no shortcut and no layer without a ReLU after it, so none is symmetric. The
classifier sees the mean of quantized values.

Options: width, strides, activation, dropout, bn_momentum, bn_epsilon; see `MobileNetV1`. timm has
weights. Its mobilenetv1_100h has one more convolution and is another model, `mobilenet_v1_h`.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, Literal

import flax.linen as nn
import jax

from profit_jax.models.common import RELU6_BOUND, divisible_by_8, timm_names
from profit_jax.models.naming import Naming, Path
from profit_jax.models.registry import register
from profit_jax.nn.functions import spatial_mean
from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits

# Per stage: output channels at width 1, number of blocks.
STAGES = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))
# Strides of the stem and of the first block of each stage: 224 -> 7.
IMAGENET_STRIDES = (2, 1, 2, 2, 2, 2)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1024


class DepthwiseSeparable(nn.Module):
  """Depthwise 3x3, then 1x1 convolution, each with norm, non-linearity and quantizer.

  Attributes:
    features: output channels.
    stride: of the depthwise convolution.
    activation: relu or relu6.
    norm: makes a batch normalization, given its name.
  """

  features: int
  stride: int
  activation: Literal["relu", "relu6"]
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits, train: bool) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H / stride, W / stride, features]`."""
    x = QuantConv(x.shape[-1], 3, self.stride, depthwise=True, name="depthwise_conv")(x, bits)
    x = self.norm(name="depthwise_norm")(x, train, self.activation)
    x = QuantAct("unsigned", RELU6_BOUND, name="depthwise_quant")(x, bits)
    x = QuantConv(self.features, name="pointwise_conv")(x, bits)
    x = self.norm(name="pointwise_norm")(x, train, self.activation)
    return QuantAct("unsigned", RELU6_BOUND, name="pointwise_quant")(x, bits)


def _timm_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers -> those of timm's mobilenetv1_100 and mobilenetv1_100h."""
  names = timm_names(layers, [blocks for _, blocks in STAGES], ("depthwise", "pointwise"))
  head = {("head_conv",): "conv_head", ("head_norm",): "bn2"}
  return names | {layer: name for layer, name in head.items() if layer in layers}


_TIMM = Naming(
  source="timm",
  layer_names=_timm_names,
  settings={"activation": "relu6", "bn_epsilon": 1e-5},
  variants={"mobilenetv1_100": {"width": 1.0}, "mobilenetv1_125": {"width": 1.25}},
)
_TIMM_HEAD = dataclasses.replace(_TIMM, variants={"mobilenetv1_100h": {"width": 1.0}})


@register(
  "mobilenet_v1_h", fixed={"head_conv": True}, strides=IMAGENET_STRIDES, names=(_TIMM_HEAD,)
)
@register("mobilenet_v1", strides=IMAGENET_STRIDES, names=(_TIMM,))
class MobileNetV1(nn.Module):
  """MobileNet-v1.

  Attributes:
    num_classes: size of the head.
    width: multiplies the channels of every layer.
    strides: of the stem and of the five stages; () is the published ones.
    activation: `relu6` is what timm's weights were trained with.
    dropout: rate before the classifier.
    bn_momentum: share of the old running statistics that a step keeps.
    bn_epsilon: added to variances.
    head_conv: a 1x1 convolution before the mean.
  """

  num_classes: int = 1000
  width: float = 1.0
  strides: tuple[int, ...] = ()
  activation: Literal["relu", "relu6"] = "relu6"
  dropout: float = 0.0
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  head_conv: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits = Bits(), train: bool = False) -> jax.Array:
    """Logits `[N, num_classes]` of normalized images `[N, H, W, 3]`; arguments: `MobileNetV2`'s."""
    norm = functools.partial(BatchNorm, momentum=self.bn_momentum, epsilon=self.bn_epsilon)
    strides = self.strides or IMAGENET_STRIDES
    x = QuantConv(divisible_by_8(STEM_CHANNELS * self.width), 3, strides[0], name="stem_conv")(
      x, bits
    )
    x = norm(name="stem_norm")(x, train, self.activation)
    x = QuantAct("unsigned", RELU6_BOUND, name="stem_quant")(x, bits)

    index = 0
    for (channels, blocks), stage_stride in zip(STAGES, strides[1:], strict=True):
      for position in range(blocks):
        x = DepthwiseSeparable(
          features=divisible_by_8(channels * self.width),
          stride=stage_stride if position == 0 else 1,
          activation=self.activation,
          norm=norm,
          name=f"block{index:02d}",
        )(x, bits, train)
        index += 1

    if self.head_conv:
      x = QuantConv(divisible_by_8(HEAD_CHANNELS * max(1.0, self.width)), name="head_conv")(x, bits)
      x = norm(name="head_norm")(x, train, self.activation)
      x = QuantAct("unsigned", RELU6_BOUND, name="head_quant")(x, bits)
    x = spatial_mean(x)
    x = Dropout(self.dropout, name="dropout")(x, train)
    return QuantDense(self.num_classes, name="classifier")(x, bits)
