"""EfficientNet-Lite 0 to 4 (Google, 2020: EfficientNet, Tan and Le, ICML 2019, arXiv 1905.11946,
without squeeze-excite and with ReLU6) with DuQ quantizers where PROFIT puts them in MobileNet-v2.

A symmetric quantizer is on the input of every inverted-residual block except the first, and
before the last 1x1 convolution; an unsigned one after every ReLU6; the residual add stays in full
precision.

Lite1 to lite4 are wider and deeper; their stem, first and last stage's depth and head stay as they
are. `width` multiplies on top of that. Published resolutions: 224, 240, 260, 280, 300.

Options: width, strides, dropout, bn_momentum, bn_epsilon, padding; see `EfficientNetLite`. timm has
weights of two trainings with the same tensors, which need different settings: TensorFlow's
(`tf_efficientnet_lite0`: `padding=same`, `bn_epsilon=1e-3`) and its own (`efficientnet_lite0`). The
package efficientnet-lite-pytorch has TensorFlow's under other names.
"""

import functools
from collections.abc import Collection
from typing import NamedTuple

import flax.linen as nn
import jax

from profit_jax.kernels.padding import Padding
from profit_jax.models.common import (
  RELU6_BOUND,
  InvertedResidual,
  blocks_of,
  divisible_by_8,
  scaled_depths,
  timm_names,
)
from profit_jax.models.naming import Naming, Path
from profit_jax.models.registry import register
from profit_jax.nn.functions import spatial_mean
from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits


class Stage(NamedTuple):
  """Blocks of one resolution.

  Attributes:
    kernel_size: of the depthwise convolutions.
    expansion: hidden channels over input channels.
    channels: of the output, at width 1.
    blocks: their number, at depth 1.
  """

  kernel_size: int
  expansion: int
  channels: int
  blocks: int


STAGES = (
  Stage(3, 1, 16, 1),
  Stage(3, 6, 24, 2),
  Stage(5, 6, 40, 2),
  Stage(3, 6, 80, 3),
  Stage(5, 6, 112, 3),
  Stage(5, 6, 192, 4),
  Stage(3, 6, 320, 1),
)
# Strides of the stem and of the first block of each stage: 224 -> 7.
IMAGENET_STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
# Factors of channels and of blocks.
SIZES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))


def depths(size: int) -> tuple[int, ...]:
  """The number of blocks of every stage."""
  return scaled_depths([stage.blocks for stage in STAGES], SIZES[size][1])


def _timm_names(layers: Collection[Path], size: int) -> dict[Path, str]:
  """Our layers -> timm's: `("block01", "expand_conv")` -> `blocks.1.0.conv_pw`."""
  names = timm_names(layers, depths(size), ("expand", "depthwise", "project"))
  return names | {("head_conv",): "conv_head", ("head_norm",): "bn2"}


_TF_NORMS = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}


def _efficientnet_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers -> efficientnet-lite-pytorch's: `("block01", "expand_conv")` ->
  `_blocks.1._expand_conv`.
  """
  names = {
    ("stem_conv",): "_conv_stem",
    ("stem_norm",): "_bn0",
    ("head_conv",): "_conv_head",
    ("head_norm",): "_bn1",
    ("classifier",): "_fc",
  }
  for block, inside in blocks_of(layers).items():
    prefix = f"_blocks.{int(block.removeprefix('block'))}"
    for part, norm in _TF_NORMS.items():
      if (f"{part}_conv",) in inside:
        names[block, f"{part}_conv"] = f"{prefix}._{part}_conv"
        names[block, f"{part}_norm"] = f"{prefix}.{norm}"
  return names


_TENSORFLOW = {"padding": "same", "bn_epsilon": 1e-3}


def _register(size: int):
  timm = Naming(
    source="timm",
    layer_names=functools.partial(_timm_names, size=size),
    variants={
      f"efficientnet_lite{size}": {"padding": "torch", "bn_epsilon": 1e-5},
      f"tf_efficientnet_lite{size}": _TENSORFLOW,
    },
  )
  package = Naming(
    source="efficientnet-lite-pytorch",
    layer_names=_efficientnet_names,
    settings=_TENSORFLOW,
    variants={f"efficientnet-lite{size}": {}},
  )
  return register(
    f"efficientnet_lite{size}",
    fixed={"size": size},
    strides=IMAGENET_STRIDES,
    names=(timm, package),
  )


@_register(4)
@_register(3)
@_register(2)
@_register(1)
@_register(0)
class EfficientNetLite(nn.Module):
  """EfficientNet-Lite.

  Attributes:
    size: 0 to 4.
    num_classes: size of the head.
    width: multiplies the channels of every layer but the stem and the head.
    strides: of the stem and of the seven stages; () is the published ones.
    dropout: rate before the classifier; published are 0.2 (lite0, lite1), 0.3 and 0.4 (lite4).
    bn_momentum: share of the old running statistics that a step keeps.
    bn_epsilon: added to variances.
    padding: of the stem and the depthwise convolutions: `same` is TensorFlow's.
  """

  size: int
  num_classes: int = 1000
  width: float = 1.0
  strides: tuple[int, ...] = ()
  dropout: float = 0.2
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  padding: Padding = "torch"

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits = Bits(), train: bool = False) -> jax.Array:
    """Logits `[N, num_classes]` of normalized images `[N, H, W, 3]`; arguments: `MobileNetV2`'s."""
    norm = functools.partial(BatchNorm, momentum=self.bn_momentum, epsilon=self.bn_epsilon)
    strides, width = self.strides or IMAGENET_STRIDES, self.width * SIZES[self.size][0]
    x = QuantConv(STEM_CHANNELS, 3, strides[0], padding=self.padding, name="stem_conv")(x, bits)
    x = norm(name="stem_norm")(x, train, "relu6")
    x = QuantAct("unsigned", RELU6_BOUND, name="stem_quant")(x, bits)

    index = 0
    for stage, blocks, stage_stride in zip(STAGES, depths(self.size), strides[1:], strict=True):
      for position in range(blocks):
        x = InvertedResidual(
          features=divisible_by_8(stage.channels * width),
          expansion=stage.expansion,
          stride=stage_stride if position == 0 else 1,
          quantize_input=index > 0,
          activation="relu6",
          norm=norm,
          kernel_size=stage.kernel_size,
          padding=self.padding,
          name=f"block{index:02d}",
        )(x, bits, train)
        index += 1

    x = QuantAct("symmetric", name="head_input_quant")(x, bits)
    x = QuantConv(HEAD_CHANNELS, name="head_conv")(x, bits)
    x = norm(name="head_norm")(x, train, "relu6")
    x = spatial_mean(x)
    x = QuantAct("unsigned", RELU6_BOUND, name="head_quant")(x, bits)
    x = Dropout(self.dropout, name="dropout")(x, train)
    return QuantDense(self.num_classes, name="classifier")(x, bits)
