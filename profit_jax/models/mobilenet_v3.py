"""MobileNet-v3, large and small (Howard et al., ICCV 2019, arXiv 1905.02244) with DuQ quantizers
and negative padding.

A symmetric quantizer stands before every expansion, before the last convolution and before each
squeeze; one of the kind of the non-linearity after each of these. The first block has no expansion
and quantizes the stem's h-swish output. A depthwise convolution whose input is quantized after
h-swish pads with -3/8 (PROFIT section 3.3).

Two layouts are about, and the fields reproduce both exactly:

|                  | the authors'                          | torchvision's, timm's                |
|------------------|---------------------------------------|--------------------------------------|
| squeeze_excite   | before (the non-linearity)            | after                                |
| bn_epsilon       | 1e-5                                  | 1e-3 (torchvision), 1e-5 (timm)      |
| pad_value        | -3/8                                  | 0                                    |
| channel_rounding | up                                    | nearest (torchvision), timm          |

In both, what is quantized is the input of the next convolution. After h-swish and a squeeze-excite
in (0, 1) the minimum is still -3/8 or above, so the h-swish quantizer covers either order.

timm's `tf_*` weights come from TensorFlow: they want `padding=same` and `bn_epsilon=1e-3`. Other
widths of timm's nets want `channel_rounding=timm`. Three of its nets are models of their own:
`mobilenet_v3_large_minimal` and `_small_minimal` have ReLU, 3x3 kernels and no squeeze-excite, and
`mobilenet_v3_rw` has no shortcut in the first block, no bias before the last non-linearity and
h-swish within squeeze-excite.

Options: these four, and width, strides, dropout, bn_momentum, padding; see `MobileNetV3`. The
authors' code does not have MobileNet-v3 small; their class gives it the names below when it is
handed the small table. Their `Q_Sequential` numbers the modules in it, except that a quantizer of
its input is called `-N`, N being the number of the module after it.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax

from profit_jax.kernels.padding import Padding
from profit_jax.models.common import blocks_of, divisible_by_8, timm_names
from profit_jax.models.naming import Naming, Path, quantizable
from profit_jax.models.registry import register
from profit_jax.nn.functions import hard_sigmoid, hard_swish, relu, spatial_mean
from profit_jax.nn.fused import activate
from profit_jax.nn.layers import (
  BatchNorm,
  Dropout,
  QuantAct,
  QuantConv,
  QuantDense,
  at_least_float32,
)
from profit_jax.quant.base import HSWISH_MINIMUM, Kind
from profit_jax.quant.bits import Bits

# torch's kaiming_uniform_(mode="fan_out") with gain 1, which the authors start their dense layers
# from.
_dense_init = nn.initializers.variance_scaling(1.0, "fan_out", "uniform")


class BlockSpec(NamedTuple):
  """A row of the paper's tables 1 and 2; channels at width 1."""

  kernel_size: int
  hidden: int
  channels: int
  squeeze_excite: bool
  hswish: bool


class Variant(NamedTuple):
  """A member of the family.

  Attributes:
    stages: blocks by stage; only a stage's first block has a stride.
    strides: the published ones, of the stem and of each stage.
    pre_classifier: channels of the dense layer before the classifier, at width 1.
    activation: of the stem and the head.
    head_bias: whether the dense layer before the classifier has a bias.
    first_shortcut: whether the first block may add its input.
    simple_squeeze: squeezed channels are a quarter, not rounded, and the non-linearity behind them
      is the block's.
  """

  stages: tuple[tuple[BlockSpec, ...], ...]
  strides: tuple[int, ...]
  pre_classifier: int
  activation: Literal["hard_swish", "relu"] = "hard_swish"
  head_bias: bool = True
  first_shortcut: bool = True
  simple_squeeze: bool = False


STEM_CHANNELS = 16
HEAD_EXPANSION = 6  # of the last convolution, over the last block's channels
SQUEEZE = 4  # channels over squeezed channels

_SE, _HS = True, True
VARIANTS = {
  "large": Variant(
    stages=(
      (BlockSpec(3, 16, 16, False, False),),
      (BlockSpec(3, 64, 24, False, False), BlockSpec(3, 72, 24, False, False)),
      (
        BlockSpec(5, 72, 40, _SE, False),
        BlockSpec(5, 120, 40, _SE, False),
        BlockSpec(5, 120, 40, _SE, False),
      ),
      (
        BlockSpec(3, 240, 80, False, _HS),
        BlockSpec(3, 200, 80, False, _HS),
        BlockSpec(3, 184, 80, False, _HS),
        BlockSpec(3, 184, 80, False, _HS),
      ),
      (BlockSpec(3, 480, 112, _SE, _HS), BlockSpec(3, 672, 112, _SE, _HS)),
      (
        BlockSpec(5, 672, 160, _SE, _HS),
        BlockSpec(5, 960, 160, _SE, _HS),
        BlockSpec(5, 960, 160, _SE, _HS),
      ),
    ),
    strides=(2, 1, 2, 2, 2, 1, 2),
    pre_classifier=1280,
  ),
  "small": Variant(
    stages=(
      (BlockSpec(3, 16, 16, _SE, False),),
      (BlockSpec(3, 72, 24, False, False), BlockSpec(3, 88, 24, False, False)),
      (
        BlockSpec(5, 96, 40, _SE, _HS),
        BlockSpec(5, 240, 40, _SE, _HS),
        BlockSpec(5, 240, 40, _SE, _HS),
      ),
      (BlockSpec(5, 120, 48, _SE, _HS), BlockSpec(5, 144, 48, _SE, _HS)),
      (
        BlockSpec(5, 288, 96, _SE, _HS),
        BlockSpec(5, 576, 96, _SE, _HS),
        BlockSpec(5, 576, 96, _SE, _HS),
      ),
    ),
    strides=(2, 2, 2, 2, 1, 2),
    pre_classifier=1024,
  ),
}


def _minimal(variant: Variant) -> Variant:
  """The same with ReLU, 3x3 kernels and no squeeze-excite."""
  stages = tuple(
    tuple(block._replace(kernel_size=3, squeeze_excite=False, hswish=False) for block in stage)
    for stage in variant.stages
  )
  return variant._replace(stages=stages, activation="relu")


VARIANTS |= {
  "large_minimal": _minimal(VARIANTS["large"]),
  "small_minimal": _minimal(VARIANTS["small"]),
  "rw": VARIANTS["large"]._replace(head_bias=False, first_shortcut=False, simple_squeeze=True),
}

# Non-linearities, and the kind of the quantizer behind each.
_FUNCTIONS: dict[str, tuple[Callable[..., jax.Array], Kind]] = {
  "hard_swish": (hard_swish, "hswish"),
  "relu": (relu, "unsigned"),
}
# Below this width, timm's stem keeps its channels.
_TIMM_FIXED_STEM = 0.75


def up_to_multiple_of_8(channels: float) -> int:
  """Rounds up to a multiple of 8."""
  return int((channels + 7) // 8) * 8


class SqueezeExcite(nn.Module):
  """Scales each channel by a number in [0, 1] that two dense layers make of the channels' means.

  Attributes:
    squeezed: channels between the two.
    dense: makes a dense layer, given the size of its output and its name.
    hswish: the non-linearity between the two is h-swish, else ReLU.
  """

  squeezed: int
  dense: Any
  hswish: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits) -> jax.Array:
    """`[N, H, W, C]` -> the same."""
    scale = spatial_mean(x)
    scale = QuantAct("symmetric", name="input_quant")(scale, bits)
    activate_squeezed, kind = (hard_swish, "hswish") if self.hswish else (relu, "unsigned")
    scale = activate_squeezed(self.dense(self.squeezed, name="reduce")(scale, bits))
    scale = QuantAct(kind, name="reduce_quant")(scale, bits)
    scale = hard_sigmoid(self.dense(x.shape[-1], name="expand")(scale, bits))
    # In float32 at least, for the sake of the sum over space that is the scale's gradient.
    return (at_least_float32(x) * at_least_float32(scale)[:, None, None, :]).astype(x.dtype)


class Block(nn.Module):
  """1x1 expansion, depthwise convolution, squeeze-excite, 1x1 projection; the input is added where
  the shapes agree.

  Attributes:
    kernel_size: of the depthwise convolution.
    hidden: its channels; equal to the input's, there is no expansion.
    features: output channels.
    stride: of the depthwise convolution.
    squeezed: channels inside squeeze-excite; 0 without.
    hswish: the non-linearities are h-swish, else ReLU.
    input_kind: of the input's quantizer: that of the non-linearity before it, or symmetric.
    squeeze_excite: before or after the depthwise convolution's non-linearity.
    pad_value: of a depthwise convolution whose input comes from h-swish.
    dense: makes a dense layer, given the size of its output and its name.
    norm: makes a batch normalization, given its name.
    padding: of the depthwise convolution.
    hswish_squeeze: the non-linearity within squeeze-excite is h-swish.
    shortcut: False never adds the input.
  """

  kernel_size: int
  hidden: int
  features: int
  stride: int
  squeezed: int
  hswish: bool
  input_kind: Kind
  squeeze_excite: Literal["before", "after"]
  pad_value: float
  dense: Any
  norm: Any
  padding: Padding = "torch"
  hswish_squeeze: bool = False
  shortcut: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits, train: bool) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H / stride, W / stride, features]`."""
    activation, kind = ("hard_swish", "hswish") if self.hswish else ("relu", "unsigned")
    shortcut, expands = x, self.hidden != x.shape[-1]
    after_hswish = self.hswish if expands else self.input_kind == "hswish"

    x = QuantAct(self.input_kind, name="input_quant")(x, bits)
    if expands:
      x = QuantConv(self.hidden, name="expand_conv")(x, bits)
      x = self.norm(name="expand_norm")(x, train, activation)
      x = QuantAct(kind, name="expand_quant")(x, bits)
    x = QuantConv(
      self.hidden,
      self.kernel_size,
      self.stride,
      depthwise=True,
      pad_value=self.pad_value if after_hswish else 0.0,
      padding=self.padding,
      name="depthwise_conv",
    )(x, bits)
    norm = self.norm(name="depthwise_norm")
    if self.squeezed:
      squeeze_excite = SqueezeExcite(
        self.squeezed, self.dense, self.hswish_squeeze, name="squeeze_excite"
      )
      if self.squeeze_excite == "before":
        x = activate(squeeze_excite(norm(x, train), bits), activation)
      else:
        x = squeeze_excite(norm(x, train, activation), bits)
    else:
      x = norm(x, train, activation)
    x = QuantAct(kind, name="depthwise_quant")(x, bits)
    x = QuantConv(self.features, name="project_conv")(x, bits)
    x = self.norm(fused=False, name="project_norm")(x, train)
    return x + shortcut if self.shortcut and x.shape == shortcut.shape else x


_NORM_SUFFIX = {"conv": 0, "norm": 1}


def _torchvision_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers -> torchvision's: `("block03", "depthwise_conv")` -> `features.4.block.1.0`."""
  blocks = blocks_of(layers)
  last = len(blocks) + 1
  single = {"pre_classifier": "classifier.0", "classifier": "classifier.3"}
  for part, number in _NORM_SUFFIX.items():
    single |= {f"stem_{part}": f"features.0.{number}", f"head_{part}": f"features.{last}.{number}"}
  names = {(layer,): name for layer, name in single.items()}
  for block, inside in blocks.items():
    prefix = f"features.{int(block.removeprefix('block')) + 1}.block"
    # A block is a list of what it has.
    stages = ["expand"] if ("expand_conv",) in inside else []
    stages += (
      ["depthwise"]
      + (["squeeze_excite"] if ("squeeze_excite", "reduce") in inside else [])
      + ["project"]
    )
    for place, stage in enumerate(stages):
      if stage == "squeeze_excite":
        names |= {
          (block, stage, "reduce"): f"{prefix}.{place}.fc1",
          (block, stage, "expand"): f"{prefix}.{place}.fc2",
        }
      else:
        names |= {
          (block, f"{stage}_{part}"): f"{prefix}.{place}.{number}"
          for part, number in _NORM_SUFFIX.items()
        }
  return names


def _timm_names(layers: Collection[Path], variant: str) -> dict[Path, str]:
  """Our layers -> those of timm's mobilenetv3_large_100, mobilenetv3_small_100, ..."""
  blocks = [len(stage) for stage in VARIANTS[variant].stages]
  names = timm_names(layers, blocks, ("expand", "depthwise", "project"))
  for layer in layers:
    if len(layer) == 3 and layer[2] in ("reduce", "expand"):
      of_block = names[layer[0], "depthwise_conv"].rpartition(".")[0]
      names[layer] = f"{of_block}.se.conv_{layer[2]}"
  last = f"blocks.{len(blocks)}.0"  # the last convolution is a stage of its own
  return names | {
    ("head_conv",): f"{last}.conv",
    ("head_norm",): f"{last}.bn1",
    ("pre_classifier",): "conv_head",
  }


# Squeeze-excite has a place of its own also where there is none.
_AUTHORS_BLOCK = (
  "expand_conv",
  "expand_norm",
  "expand_quant",
  "depthwise_conv",
  "depthwise_norm",
  "squeeze_excite",
  "depthwise_quant",
  "project_conv",
  "project_norm",
)
_AUTHORS_SQUEEZE_EXCITE = {
  "input_quant": "fc.-0",
  "reduce": "fc.0",
  "reduce_quant": "fc.1",
  "expand": "fc.2",
}


def _authors_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers -> the authors': `("block03", "squeeze_excite", "reduce")` ->
  `features.4.conv.5.fc.0`.
  """
  blocks = blocks_of(layers)
  last = len(blocks) + 1
  single = {
    "stem_conv": "features.0.0",
    "stem_norm": "features.0.1",
    "head_input_quant": f"features.-{last}",
    "head_conv": f"features.{last}.0",
    "head_norm": f"features.{last}.1",
    "head_quant": "classifier.-0",
    "pre_classifier": "classifier.0",
    "pre_classifier_quant": "classifier.1",
    "classifier": "classifier.3",  # 2 is the dropout
  }
  names = {(layer,): name for layer, name in single.items()}
  for block, inside in blocks.items():
    order = _AUTHORS_BLOCK if ("expand_conv",) in inside else _AUTHORS_BLOCK[3:]
    prefix = f"features.{int(block.removeprefix('block')) + 1}.conv"
    names[block, "input_quant"] = f"{prefix}.-0"
    for place, layer in enumerate(order):
      if layer == "squeeze_excite":
        names |= {
          (block, layer, part): f"{prefix}.{place}.{name}"
          for part, name in _AUTHORS_SQUEEZE_EXCITE.items()
        }
      else:
        names[block, layer] = f"{prefix}.{place}"
  return {layer: names[layer] for layer in layers}


_ZERO_PADDING = {"squeeze_excite": "after", "pad_value": 0.0}
_TENSORFLOW = {"padding": "same", "bn_epsilon": 1e-3}


def _timm_naming(variant: str, **fields: Any) -> Naming:
  return Naming(
    source="timm",
    layer_names=functools.partial(_timm_names, variant=variant),
    pointwise=frozenset({"reduce", "expand", "pre_classifier"}),
    **fields,
  )


def _timm(variant: str, widths: Collection[int]) -> Naming:
  """Names of timm's `large` or `small`, at these widths in percent and TensorFlow's."""
  variants = {
    f"mobilenetv3_{variant}_{percent:03d}": {"width": percent / 100, "bn_epsilon": 1e-5}
    for percent in widths
  }
  variants |= {
    f"tf_mobilenetv3_{variant}_{percent:03d}": {"width": percent / 100, **_TENSORFLOW}
    for percent in (75, 100)
  }
  return _timm_naming(
    variant,
    settings={
      **_ZERO_PADDING,
      "padding": "torch",
      "bn_epsilon": 1e-5,
      "channel_rounding": "timm",
    },
    variants=variants,
    absent={"mobilenetv3_large_150d": "it is deeper"} if variant == "large" else {},
  )


# torchvision's segmentation nets.
_ABSENT = {
  f"{head}_mobilenet_v3_large": "it segments images and dilates in place of its last strides"
  for head in ("deeplabv3", "lraspp")
}


def _names(variant: str, timm_widths: Collection[int]) -> tuple[Naming, ...]:
  """What other codebases call a member of the family."""
  plain, large = {"width": 1.0}, variant == "large"
  return (
    Naming(
      source="torchvision",
      layer_names=_torchvision_names,
      settings={
        **_ZERO_PADDING,
        "padding": "torch",
        "bn_epsilon": 1e-3,
        "channel_rounding": "nearest",
      },
      pointwise=frozenset({"reduce", "expand"}),
      variants={
        f"mobilenet_v3_{variant}": plain,
        **(quantizable("mobilenet_v3_large", plain) if large else {}),
      },
      absent=_ABSENT if large else {},
    ),
    _timm(variant, timm_widths),
    Naming(
      source="authors",
      layer_names=_authors_names,
      settings={
        "squeeze_excite": "before",
        "padding": "torch",
        "bn_epsilon": 1e-5,
        "pad_value": HSWISH_MINIMUM,
        "channel_rounding": "up",
      },
      quantizers=True,
    ),
  )


def _register(variant: str, names: Collection[Naming]):
  return register(
    f"mobilenet_v3_{variant}",
    fixed={"variant": variant},
    strides=VARIANTS[variant].strides,
    names=names,
  )


def _register_minimal(variant: str):
  """Registers timm's tf_mobilenetv3_large_minimal_100 or tf_mobilenetv3_small_minimal_100."""
  name = f"{variant}_minimal"
  timm = _timm_naming(
    name,
    settings={**_TENSORFLOW, "channel_rounding": "timm"},
    variants={f"tf_mobilenetv3_{name}_100": {"width": 1.0}},
  )
  return _register(name, (timm,))


_RW = _timm_naming(
  "rw",
  settings={**_ZERO_PADDING, "padding": "torch", "bn_epsilon": 1e-3, "channel_rounding": "timm"},
  variants={"mobilenetv3_rw": {"width": 1.0}},
)


@_register("rw", (_RW,))
@_register_minimal("small")
@_register_minimal("large")
@_register("small", _names("small", (50, 75, 100)))
@_register("large", _names("large", (75, 100)))
class MobileNetV3(nn.Module):
  """MobileNet-v3.

  Attributes:
    variant: a key of `VARIANTS`.
    num_classes: size of the head.
    width: multiplies the channels of every layer.
    strides: of the stem and of the stages; () is the published ones.
    dropout: rate before the classifier.
    bn_momentum: share of the old running statistics that a step keeps (0.9997 in the authors'
      code).
    bn_epsilon: added to variances.
    squeeze_excite: before or after the depthwise convolution's non-linearity.
    pad_value: what depthwise convolutions after h-swish pad with, -3/8 or 0.
    channel_rounding: of scaled channels to a multiple of 8: nearest (torchvision), up (the
      authors), or timm: nearest, where expansions multiply rounded channels, the layer before the
      classifier is not scaled, and the stem only from 0.75 on.
    padding: of the stem and the depthwise convolutions: `same` is TensorFlow's.
  """

  variant: Literal["large", "small", "large_minimal", "small_minimal", "rw"]
  num_classes: int = 1000
  width: float = 1.0
  strides: tuple[int, ...] = ()
  dropout: float = 0.2
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  squeeze_excite: Literal["before", "after"] = "after"
  pad_value: float = HSWISH_MINIMUM
  channel_rounding: Literal["nearest", "up", "timm"] = "nearest"
  padding: Padding = "torch"

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits = Bits(), train: bool = False) -> jax.Array:
    """Logits `[N, num_classes]` of normalized images `[N, H, W, 3]`; arguments: `MobileNetV2`'s."""
    dense = functools.partial(QuantDense, kernel_init=_dense_init)
    norm = functools.partial(BatchNorm, momentum=self.bn_momentum, epsilon=self.bn_epsilon)
    variant = VARIANTS[self.variant]
    strides = self.strides or variant.strides

    function, kind = _FUNCTIONS[variant.activation]

    stem = self._stem_channels()
    x = QuantConv(stem, 3, strides[0], padding=self.padding, name="stem_conv")(x, bits)
    x = norm(fused=False, name="stem_norm")(x, train, variant.activation)

    index, channels = 0, STEM_CHANNELS
    for stage, stage_stride in zip(variant.stages, strides[1:], strict=True):
      for position, spec in enumerate(stage):
        hidden = self._hidden_channels(x.shape[-1], spec.hidden, channels)
        x = Block(
          kernel_size=spec.kernel_size,
          hidden=hidden,
          features=self._channels(spec.channels),
          stride=stage_stride if position == 0 else 1,
          squeezed=self._squeezed(hidden, variant) if spec.squeeze_excite else 0,
          hswish=spec.hswish,
          input_kind=kind if index == 0 else "symmetric",
          squeeze_excite=self.squeeze_excite,
          pad_value=self.pad_value,
          dense=dense,
          norm=norm,
          padding=self.padding,
          hswish_squeeze=variant.simple_squeeze and spec.hswish,
          shortcut=index > 0 or variant.first_shortcut,
          name=f"block{index:02d}",
        )(x, bits, train)
        index, channels = index + 1, spec.channels

    x = QuantAct("symmetric", name="head_input_quant")(x, bits)
    x = QuantConv(self._head_channels(variant), name="head_conv")(x, bits)
    x = norm(name="head_norm")(x, train, variant.activation)
    x = spatial_mean(x)
    x = QuantAct(kind, name="head_quant")(x, bits)
    features, scaled = variant.pre_classifier, self.channel_rounding != "timm"
    pre_classifier = dense(
      self._channels(features) if scaled else features,
      use_bias=variant.head_bias,
      name="pre_classifier",
    )
    x = QuantAct(kind, name="pre_classifier_quant")(function(pre_classifier(x, bits)), bits)
    x = Dropout(self.dropout, name="dropout")(x, train)
    return dense(self.num_classes, name="classifier")(x, bits)

  def _channels(self, channels: int) -> int:
    return (up_to_multiple_of_8 if self.channel_rounding == "up" else divisible_by_8)(
      channels * self.width
    )

  def _stem_channels(self) -> int:
    fixed = self.channel_rounding == "timm" and self.width < _TIMM_FIXED_STEM
    return STEM_CHANNELS if fixed else self._channels(STEM_CHANNELS)

  def _hidden_channels(self, before: int, hidden: int, channels: int) -> int:
    """Of a block with `before` input channels; at width 1 these are `channels`."""
    if self.channel_rounding == "timm":
      return divisible_by_8(before * hidden / channels)
    return self._channels(hidden)

  def _squeezed(self, hidden: int, variant: Variant) -> int:
    if variant.simple_squeeze:
      return hidden // SQUEEZE
    return (
      up_to_multiple_of_8(hidden / SQUEEZE)
      if self.channel_rounding == "up"
      else divisible_by_8(hidden // SQUEEZE)
    )

  def _head_channels(self, variant: Variant) -> int:
    last = variant.stages[-1][-1].channels
    # torchvision multiplies the rounded channels, the others round the multiplied ones.
    return (
      HEAD_EXPANSION * self._channels(last)
      if self.channel_rounding == "nearest"
      else self._channels(HEAD_EXPANSION * last)
    )
