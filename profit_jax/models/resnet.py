"""ResNet-18, -50 and -101 (He et al., CVPR 2016, arXiv 1512.03385) in full precision: teachers.
ResNet-34 with DuQ quantizers: a student, or a teacher.

A bottleneck's stride stands on its 3x3 convolution, as in torchvision's and timm's weights.

By PROFIT's rule, the quantizers of ResNet-34 are on the convolutions' inputs, and shortcuts are
added in full precision. All of these inputs come from a ReLU: one unsigned quantizer feeds a
block's first convolution and the one on its shortcut, one the second, one the classifier.

Options: strides, bn_momentum, bn_epsilon, and the width of ResNet-34; see `ResNet` and `ResNet34`.
torchvision has weights; timm's have the same names.
"""

import functools
from collections.abc import Collection
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from profit_jax.models.common import divisible_by_8
from profit_jax.models.naming import Naming, Path, quantizable
from profit_jax.models.registry import register
from profit_jax.nn.functions import relu, spatial_mean
from profit_jax.nn.layers import BatchNorm, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits

# Blocks per stage, and whether they are bottlenecks.
DEPTHS = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True), 101: ((3, 4, 23, 3), True)}
BASIC_34 = (3, 4, 6, 3)
# Strides of the stem, of the max-pooling and of the first block of each stage: 224 -> 7.
IMAGENET_STRIDES = (2, 2, 1, 2, 2, 2)
STEM_CHANNELS = 64
BOTTLENECK_EXPANSION = 4

_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(x: jax.Array, features: int, kernel_size: int, stride: int, *, name: str) -> jax.Array:
  """A convolution without bias, padded by `(k - 1) / 2` on every side."""
  margin = (kernel_size - 1) // 2
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    stride,
    padding=margin,
    use_bias=False,
    dtype=x.dtype,
    kernel_init=_init,
    name=name,
  )(x)


class ResidualBlock(nn.Module):
  """Two 3x3 convolutions, or the bottleneck 1x1, 3x3, 1x1, beside a shortcut.

  Attributes:
    features: channels of the 3x3 convolutions; a bottleneck gives four times as many.
    stride: of the first (of a bottleneck, its only) 3x3 convolution.
    bottleneck: which of the two.
    norm: makes a batch normalization, given its name.
  """

  features: int
  stride: int
  bottleneck: bool
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H / stride, W / stride, features or 4 * features]`."""
    shortcut, features = x, self.features
    if self.bottleneck:
      layers = [
        (features, 1, 1),
        (features, 3, self.stride),
        (BOTTLENECK_EXPANSION * features, 1, 1),
      ]
    else:
      layers = [(features, 3, self.stride), (features, 3, 1)]
    for number, (channels, size, stride) in enumerate(layers, 1):
      activation = "relu" if number < len(layers) else None
      x = self.norm(name=f"norm{number}")(
        _conv(x, channels, size, stride, name=f"conv{number}"), train, activation
      )
    if shortcut.shape != x.shape:
      shortcut = _conv(shortcut, x.shape[-1], 1, self.stride, name="shortcut_conv")
      shortcut = self.norm(name="shortcut_norm")(shortcut, train)
    return nn.relu(x + shortcut)


def _torchvision_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers -> torchvision's: `("stage2_block00", "norm1")` -> `layer2.0.bn1`."""
  names = {("stem_conv",): "conv1", ("stem_norm",): "bn1", ("classifier",): "fc"}
  for layer in layers:
    if len(layer) == 2:
      stage, block = layer[0].removeprefix("stage").split("_block")
      part = layer[1].replace("norm", "bn")
      part = {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"}.get(part, part)
      names[layer] = f"layer{stage}.{int(block)}.{part}"
  return names


# With the same tensors, of timm; and of torchvision, where dilation is an argument and no name.
_DILATED = "it dilates in place of its last strides (replace_stride_with_dilation, output_stride)"
_UNSUPPORTED = {
  18: {"resnetblur18": "it blurs before its strides"},
  50: {
    "resnetblur50": "it blurs before its strides",
    "resnetaa50": "it pools before its strides",
    "resnet50_dilated": _DILATED,
  },
  101: {"resnet101_dilated": _DILATED},
}
_QUANTIZABLE = (18, 50)
_SEGMENTING = (50, 101)


def _register(depth: int, *, quantized: bool = False):
  # timm has torchvision's names, of tensors and of models.
  naming = Naming(
    source="torchvision",
    layer_names=_torchvision_names,
    settings={"bn_epsilon": 1e-5},
    variants={
      f"resnet{depth}": {},
      **(quantizable(f"resnet{depth}", {}) if depth in _QUANTIZABLE else {}),
    },
    unsupported=_UNSUPPORTED.get(depth, {}),
    absent={
      f"{head}_resnet{depth}": f"it segments images: {_DILATED}"
      for head in ("deeplabv3", "fcn")
      if depth in _SEGMENTING
    },
  )
  return register(
    f"resnet{depth}",
    fixed={} if quantized else {"depth": depth},
    strides=IMAGENET_STRIDES,
    quantized=quantized,
    names=(naming,),
  )


@_register(101)
@_register(50)
@_register(18)
class ResNet(nn.Module):
  """ResNet in full precision.

  Attributes:
    depth: 18, 50 or 101.
    num_classes: size of the head.
    strides: of the stem, the max-pooling (1 leaves it out) and the four stages; () is the published
      ones.
    bn_momentum: share of the old running statistics that a step keeps.
    bn_epsilon: added to variances.
  """

  depth: Literal[18, 50, 101]
  num_classes: int = 1000
  strides: tuple[int, ...] = ()
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits = Bits(), train: bool = False) -> jax.Array:
    """Logits `[N, num_classes]` of normalized images `[N, H, W, 3]`.

    Raises:
      ValueError: `bits` that are not full precision.
    """
    if bits.weight is not None or bits.act is not None:
      raise ValueError("ResNet is a teacher in full precision: it has no quantizers")
    norm = functools.partial(BatchNorm, momentum=self.bn_momentum, epsilon=self.bn_epsilon)
    blocks, bottleneck = DEPTHS[self.depth]
    stem_stride, pool_stride, *stage_strides = self.strides or IMAGENET_STRIDES

    x = norm(name="stem_norm")(
      _conv(x, STEM_CHANNELS, 7, stem_stride, name="stem_conv"), train, "relu"
    )
    if pool_stride != 1:
      x = nn.max_pool(x, (3, 3), (pool_stride, pool_stride), ((1, 1), (1, 1)))
    for stage, (count, stage_stride) in enumerate(zip(blocks, stage_strides, strict=True)):
      for position in range(count):
        x = ResidualBlock(
          features=STEM_CHANNELS * 2**stage,
          stride=stage_stride if position == 0 else 1,
          bottleneck=bottleneck,
          norm=norm,
          name=f"stage{stage + 1}_block{position:02d}",
        )(x, train)
    x = jnp.mean(x, axis=(1, 2))
    kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default
    return nn.Dense(self.num_classes, dtype=x.dtype, kernel_init=kernel_init, name="classifier")(x)


class QuantResidualBlock(nn.Module):
  """Two 3x3 convolutions beside a shortcut.

  Attributes:
    features: output channels.
    stride: of the first convolution.
    norm: makes a batch normalization, given its name.
  """

  features: int
  stride: int
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits, train: bool) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H / stride, W / stride, features]`; both are at least 0."""
    shortcut, x = x, QuantAct("unsigned", name="input_quant")(x, bits)
    if self.stride != 1 or shortcut.shape[-1] != self.features:
      shortcut = QuantConv(self.features, 1, self.stride, name="shortcut_conv")(x, bits)
      shortcut = self.norm(fused=False, name="shortcut_norm")(shortcut, train)
    x = QuantConv(self.features, 3, self.stride, name="conv1")(x, bits)
    x = self.norm(name="norm1")(x, train, "relu")
    x = QuantAct("unsigned", name="quant1")(x, bits)
    x = QuantConv(self.features, 3, name="conv2")(x, bits)
    x = self.norm(fused=False, name="norm2")(x, train)
    return relu(x + shortcut)


@_register(34, quantized=True)
class ResNet34(nn.Module):
  """ResNet-34 with quantizers.

  Attributes:
    num_classes: size of the head.
    width: multiplies the channels of every layer.
    strides: of the stem, the max-pooling (1 leaves it out) and the four stages; () is the published
      ones.
    bn_momentum: share of the old running statistics that a step keeps.
    bn_epsilon: added to variances.
  """

  num_classes: int = 1000
  width: float = 1.0
  strides: tuple[int, ...] = ()
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits = Bits(), train: bool = False) -> jax.Array:
    """Logits `[N, num_classes]` of normalized images `[N, H, W, 3]`; arguments: `MobileNetV2`'s."""
    norm = functools.partial(BatchNorm, momentum=self.bn_momentum, epsilon=self.bn_epsilon)
    stem_stride, pool_stride, *stage_strides = self.strides or IMAGENET_STRIDES
    channels = divisible_by_8(STEM_CHANNELS * self.width)

    x = QuantConv(channels, 7, stem_stride, name="stem_conv")(x, bits)
    x = norm(fused=False, name="stem_norm")(x, train, "relu")
    if pool_stride != 1:
      x = nn.max_pool(x, (3, 3), (pool_stride, pool_stride), ((1, 1), (1, 1)))
    for stage, (count, stage_stride) in enumerate(zip(BASIC_34, stage_strides, strict=True)):
      for position in range(count):
        x = QuantResidualBlock(
          features=channels * 2**stage,
          stride=stage_stride if position == 0 else 1,
          norm=norm,
          name=f"stage{stage + 1}_block{position:02d}",
        )(x, bits, train)
    x = QuantAct("unsigned", name="head_quant")(spatial_mean(x), bits)
    return QuantDense(self.num_classes, name="classifier")(x, bits)
