"""MnasNet-B1 (Tan et al., CVPR 2019, arXiv 1807.11626) with DuQ quantizers where PROFIT puts them
in MobileNet-v2.

A symmetric quantizer is on the input of every inverted-residual block except the first, and
before the last 1x1 convolution; an unsigned one after every ReLU; the residual add stays in full
precision.

Options: width, strides, dropout, bn_momentum, bn_epsilon; see `MnasNet`. torchvision (`mnasnet1_0`,
and other widths) and timm (`mnasnet_100`) have weights.
"""

import functools
from collections.abc import Collection

import flax.linen as nn
import jax

from profit_jax.models.common import InvertedResidual, blocks_of, divisible_by_8, timm_names
from profit_jax.models.naming import Naming, Path
from profit_jax.models.registry import register
from profit_jax.nn.functions import spatial_mean
from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits

# Per stage: kernel size, expansion, output channels at width 1, number of blocks.
STAGES = (
  (3, 1, 16, 1),
  (3, 3, 24, 3),
  (5, 3, 40, 3),
  (5, 6, 80, 3),
  (3, 6, 96, 2),
  (5, 6, 192, 4),
  (3, 6, 320, 1),
)
DEPTHS = tuple(blocks for *_, blocks in STAGES)
# Strides of the stem and of the first block of each stage: 224 -> 7.
IMAGENET_STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


def _timm_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers -> timm's: `("block01", "expand_conv")` -> `blocks.1.0.conv_pw`."""
  names = timm_names(layers, DEPTHS, ("expand", "depthwise", "project"))
  return names | {("head_conv",): "conv_head", ("head_norm",): "bn2"}


# torchvision lists stem, first block and head among the stages.
_TORCHVISION_OUTSIDE = {
  ("stem_conv",): "layers.0",
  ("stem_norm",): "layers.1",
  ("block00", "depthwise_conv"): "layers.3",
  ("block00", "depthwise_norm"): "layers.4",
  ("block00", "project_conv"): "layers.6",
  ("block00", "project_norm"): "layers.7",
  ("head_conv",): "layers.14",
  ("head_norm",): "layers.15",
  ("classifier",): "classifier.1",
}
_TORCHVISION_BLOCK = {
  "expand_conv": 0,
  "expand_norm": 1,
  "depthwise_conv": 3,
  "depthwise_norm": 4,
  "project_conv": 6,
  "project_norm": 7,
}


def _torchvision_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers -> torchvision's: `("block01", "expand_conv")` -> `layers.8.0.layers.0`."""
  places = [(stage, block) for stage, count in enumerate(DEPTHS) for block in range(count)]
  names = dict(_TORCHVISION_OUTSIDE)
  for name in blocks_of(layers).keys() - {"block00"}:
    stage, block = places[int(name.removeprefix("block"))]
    names |= {
      (name, part): f"layers.{7 + stage}.{block}.layers.{number}"
      for part, number in _TORCHVISION_BLOCK.items()
    }
  return names


_SETTINGS = {"bn_epsilon": 1e-5}
_NAMES = (
  Naming(
    source="torchvision",
    layer_names=_torchvision_names,
    settings=_SETTINGS,
    variants={
      name: {"width": width}
      for name, width in (
        ("mnasnet0_5", 0.5),
        ("mnasnet0_75", 0.75),
        ("mnasnet1_0", 1.0),
        ("mnasnet1_3", 1.3),
      )
    },
  ),
  Naming(
    source="timm",
    layer_names=_timm_names,
    settings=_SETTINGS,
    variants={f"mnasnet_{percent:03d}": {"width": percent / 100} for percent in (50, 75, 100, 140)},
    absent={"mnasnet_small": "it has other stages"},
  ),
)


@register("mnasnet", strides=IMAGENET_STRIDES, names=_NAMES)
class MnasNet(nn.Module):
  """MnasNet-B1.

  Attributes:
    num_classes: size of the head.
    width: multiplies the channels of every layer but the head.
    strides: of the stem and of the seven stages; () is the published ones.
    dropout: rate before the classifier.
    bn_momentum: share of the old running statistics that a step keeps (0.9997 in torchvision).
    bn_epsilon: added to variances.
  """

  num_classes: int = 1000
  width: float = 1.0
  strides: tuple[int, ...] = ()
  dropout: float = 0.2
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits = Bits(), train: bool = False) -> jax.Array:
    """Logits `[N, num_classes]` of normalized images `[N, H, W, 3]`; arguments: `MobileNetV2`'s."""
    norm = functools.partial(BatchNorm, momentum=self.bn_momentum, epsilon=self.bn_epsilon)
    strides = self.strides or IMAGENET_STRIDES
    x = QuantConv(divisible_by_8(STEM_CHANNELS * self.width), 3, strides[0], name="stem_conv")(
      x, bits
    )
    x = norm(name="stem_norm")(x, train, "relu")
    x = QuantAct("unsigned", name="stem_quant")(x, bits)

    index, last = 0, sum(DEPTHS) - 1
    for stage, stage_stride in zip(STAGES, strides[1:], strict=True):
      kernel_size, expansion, channels, blocks = stage
      for position in range(blocks):
        x = InvertedResidual(
          features=divisible_by_8(channels * self.width),
          expansion=expansion,
          stride=stage_stride if position == 0 else 1,
          quantize_input=index > 0,
          activation="relu",
          norm=norm,
          kernel_size=kernel_size,
          bound=None,
          shortcut=0 < index < last,
          name=f"block{index:02d}",
        )(x, bits, train)
        index += 1

    x = QuantAct("symmetric", name="head_input_quant")(x, bits)
    x = QuantConv(HEAD_CHANNELS, name="head_conv")(x, bits)
    x = norm(name="head_norm")(x, train, "relu")
    x = spatial_mean(x)
    x = QuantAct("unsigned", name="head_quant")(x, bits)
    x = Dropout(self.dropout, name="dropout")(x, train)
    return QuantDense(self.num_classes, name="classifier")(x, bits)
