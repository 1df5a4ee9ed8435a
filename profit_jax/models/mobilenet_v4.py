"""MobileNet-v4, convolutional, small and medium (Qin et al., ECCV 2024, arXiv 2404.10518) with DuQ
quantizers by PROFIT's rule.

Every convolution reads codes. A symmetric quantizer is where no non-linearity comes before: on
the input of every block whose shortcut is in full precision, behind the depthwise convolution that
starts a universal inverted bottleneck, and before the last 1x1 convolution. An unsigned one is
after every ReLU, or after the mean over space where that comes next. The residual add stays in full
precision.

Options: width, strides, dropout, bn_momentum, bn_epsilon; see `MobileNetV4`. timm has weights.
"""

import functools
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax

from profit_jax.models.common import divisible_by_8
from profit_jax.models.naming import Naming, Path
from profit_jax.models.registry import register
from profit_jax.nn.functions import spatial_mean
from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits


class Conv(NamedTuple):
  """A convolution with norm and ReLU; channels at width 1."""

  kernel_size: int
  channels: int


class Fused(NamedTuple):
  """A fused inverted bottleneck: its expansion is the convolution over space."""

  kernel_size: int
  expansion: int
  channels: int


class Universal(NamedTuple):
  """A universal inverted bottleneck.

  Attributes:
    start: kernel size of the depthwise convolution before the expansion; 0 without.
    middle: of the one after it; 0 without.
    expansion: hidden channels over input channels.
    channels: of the output, at width 1.
  """

  start: int
  middle: int
  expansion: int
  channels: int


BlockSpec = Conv | Fused | Universal
# Blocks by stage; only a stage's first block has a stride.
VARIANTS: dict[str, tuple[tuple[BlockSpec, ...], ...]] = {
  "small": (
    (Conv(3, 32), Conv(1, 32)),
    (Conv(3, 96), Conv(1, 64)),
    (Universal(5, 5, 3, 96), *[Universal(0, 3, 2, 96)] * 4, Universal(3, 0, 4, 96)),
    (
      Universal(3, 3, 6, 128),
      Universal(5, 5, 4, 128),
      Universal(0, 5, 4, 128),
      Universal(0, 5, 3, 128),
      *[Universal(0, 3, 4, 128)] * 2,
    ),
  ),
  "medium": (
    (Fused(3, 4, 48),),
    (Universal(3, 5, 4, 80), Universal(3, 3, 2, 80)),
    (
      Universal(3, 5, 6, 160),
      *[Universal(3, 3, 4, 160)] * 2,
      Universal(3, 5, 4, 160),
      Universal(3, 3, 4, 160),
      Universal(3, 0, 4, 160),
      Universal(0, 0, 2, 160),
      Universal(3, 0, 4, 160),
    ),
    (
      Universal(5, 5, 6, 256),
      Universal(5, 5, 4, 256),
      *[Universal(3, 5, 4, 256)] * 2,
      Universal(0, 0, 4, 256),
      Universal(3, 0, 4, 256),
      Universal(3, 5, 2, 256),
      Universal(5, 5, 4, 256),
      *[Universal(0, 0, 4, 256)] * 2,
      Universal(5, 0, 2, 256),
    ),
  ),
}
# Strides of the stem, of the first block of each stage and of the last convolution: 224 -> 7.
IMAGENET_STRIDES = (2, 2, 2, 2, 2, 1)
STEM_CHANNELS = 32
HEAD_CHANNELS = 960
PRE_CLASSIFIER_CHANNELS = 1280


class Block(nn.Module):
  """One block of any kind; the input is added where a bottleneck keeps the shape.

  Attributes:
    spec: its kind and sizes.
    features: output channels.
    stride: of its only convolution over space, or of the later of two.
    quantize_input: a symmetric quantizer on the convolutions' input (the shortcut stays in full
      precision).
    norm: makes a batch normalization, given its name.
  """

  spec: BlockSpec
  features: int
  stride: int
  quantize_input: bool
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits, train: bool) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H / stride, W / stride, features]`."""
    spec, shortcut = self.spec, x
    if self.quantize_input:
      x = QuantAct("symmetric", name="input_quant")(x, bits)
    if isinstance(spec, Conv):
      return self._relu(x, "conv", self.features, spec.kernel_size, self.stride, bits, train)
    hidden = divisible_by_8(x.shape[-1] * spec.expansion)
    if isinstance(spec, Fused):
      x = self._relu(x, "expand", hidden, spec.kernel_size, self.stride, bits, train)
    else:
      if spec.start:
        stride = 1 if spec.middle else self.stride
        x = QuantConv(x.shape[-1], spec.start, stride, depthwise=True, name="start_conv")(x, bits)
        x = self.norm(name="start_norm")(x, train)
        x = QuantAct("symmetric", name="start_quant")(x, bits)
      x = self._relu(x, "expand", hidden, 1, 1, bits, train)
      if spec.middle:
        x = self._relu(x, "middle", 0, spec.middle, self.stride, bits, train)
    x = QuantConv(self.features, name="project_conv")(x, bits)
    x = self.norm(fused=False, name="project_norm")(x, train)
    return x + shortcut if x.shape == shortcut.shape else x

  def _relu(
    self, x: Any, part: str, features: int, size: int, stride: int, bits: Bits, train: bool
  ) -> Any:
    """A convolution, depthwise without features, with norm, ReLU and quantizer."""
    x = QuantConv(features, size, stride, depthwise=not features, name=f"{part}_conv")(x, bits)
    x = self.norm(name=f"{part}_norm")(x, train, "relu")
    return QuantAct("unsigned", name=f"{part}_quant")(x, bits)


# A convolution and its norm in timm, by the kind of block and our name of the part.
_TIMM_UNIVERSAL = {
  "start": ("dw_start.conv", "dw_start.bn"),
  "expand": ("pw_exp.conv", "pw_exp.bn"),
  "middle": ("dw_mid.conv", "dw_mid.bn"),
  "project": ("pw_proj.conv", "pw_proj.bn"),
}
_TIMM_PARTS = {
  Conv: {"conv": ("conv", "bn1")},
  Fused: {"expand": ("conv_exp", "bn1"), "project": ("conv_pwl", "bn2")},
  Universal: _TIMM_UNIVERSAL,
}


def _timm_names(layers: Collection[Path], variant: str) -> dict[Path, str]:
  """Our layers -> timm's: `("block04", "expand_conv")` -> `blocks.2.0.pw_exp.conv`."""
  names = {
    ("stem_conv",): "conv_stem",
    ("stem_norm",): "bn1",
    ("head_conv",): "blocks.4.0.conv",  # the last convolution is a separate stage
    ("head_norm",): "blocks.4.0.bn1",
    ("pre_classifier",): "conv_head",
    ("pre_classifier_norm",): "norm_head",
    ("classifier",): "classifier",
  }
  places = [
    (f"blocks.{stage}.{place}", spec)
    for stage, blocks in enumerate(VARIANTS[variant])
    for place, spec in enumerate(blocks)
  ]
  for index, (prefix, spec) in enumerate(places):
    for part, (conv, norm) in _TIMM_PARTS[type(spec)].items():
      names[f"block{index:02d}", f"{part}_conv"] = f"{prefix}.{conv}"
      names[f"block{index:02d}", f"{part}_norm"] = f"{prefix}.{norm}"
  return {layer: name for layer, name in names.items() if layer in layers}


def _register(variant: str, widths: dict[str, float], **refused: dict[str, str]):
  timm = Naming(
    source="timm",
    layer_names=functools.partial(_timm_names, variant=variant),
    settings={"bn_epsilon": 1e-5},
    pointwise=frozenset({"pre_classifier"}),
    variants={
      f"mobilenetv4_conv_{variant}{suffix}": {"width": width} for suffix, width in widths.items()
    },
    **refused,
  )
  return register(
    f"mobilenet_v4_conv_{variant}",
    fixed={"variant": variant},
    strides=IMAGENET_STRIDES,
    names=(timm,),
  )


# timm's other nets of the family.
_UNSUPPORTED = {
  "mobilenetv4_conv_aa_medium": "it pools behind convolutions with a stride",
  "mobilenetv4_conv_blur_medium": "it blurs behind convolutions with a stride",
}
_ABSENT = {
  "mobilenetv4_conv_large": "only small and medium are",
  "mobilenetv4_conv_aa_large": "only small and medium are",
  "mobilenetv4_hybrid_medium": "it has attention",
  "mobilenetv4_hybrid_medium_075": "it has attention",
  "mobilenetv4_hybrid_large": "it has attention",
  "mobilenetv4_hybrid_large_075": "it has attention",
}


@_register("medium", {"": 1.0}, unsupported=_UNSUPPORTED, absent=_ABSENT)
@_register("small", {"": 1.0, "_035": 0.35, "_050": 0.5})
class MobileNetV4(nn.Module):
  """MobileNet-v4 of convolutions only.

  Attributes:
    variant: `small` or `medium`.
    num_classes: size of the head.
    width: multiplies the channels of every layer; those of the stem only above 1, those before the
      classifier never.
    strides: of the stem, the four stages and the last convolution; () is the published ones.
    dropout: rate before the classifier.
    bn_momentum: share of the old running statistics that a step keeps.
    bn_epsilon: added to variances.
  """

  variant: Literal["small", "medium"]
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
    stem_stride, *strides, head_stride = self.strides or IMAGENET_STRIDES
    stem = divisible_by_8(STEM_CHANNELS * max(1.0, self.width))
    x = QuantConv(stem, 3, stem_stride, name="stem_conv")(x, bits)
    x = norm(name="stem_norm")(x, train, "relu")
    x = QuantAct("unsigned", name="stem_quant")(x, bits)

    index, after_relu = 0, True
    for blocks, stage_stride in zip(VARIANTS[self.variant], strides, strict=True):
      for position, spec in enumerate(blocks):
        x = Block(
          spec=spec,
          features=divisible_by_8(spec.channels * self.width),
          stride=stage_stride if position == 0 else 1,
          quantize_input=not after_relu,
          norm=norm,
          name=f"block{index:02d}",
        )(x, bits, train)
        index, after_relu = index + 1, isinstance(spec, Conv)

    x = QuantAct("symmetric", name="head_input_quant")(x, bits)
    head = divisible_by_8(HEAD_CHANNELS * self.width)
    x = QuantConv(head, 1, head_stride, name="head_conv")(x, bits)
    x = norm(name="head_norm")(x, train, "relu")
    x = spatial_mean(x)
    x = QuantAct("unsigned", name="head_quant")(x, bits)
    x = QuantDense(PRE_CLASSIFIER_CHANNELS, use_bias=False, name="pre_classifier")(x, bits)
    x = norm(name="pre_classifier_norm")(x, train, "relu")
    x = QuantAct("unsigned", name="pre_classifier_quant")(x, bits)
    x = Dropout(self.dropout, name="dropout")(x, train)
    return QuantDense(self.num_classes, name="classifier")(x, bits)
