"""What the MobileNets and their successors share: the inverted residual block with PROFIT's
quantizers, how channels are rounded, and what timm calls their blocks.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import flax.linen as nn
import jax

from profit_jax.kernels.padding import Padding
from profit_jax.models.naming import Path
from profit_jax.nn.fused import Activation
from profit_jax.nn.layers import QuantAct, QuantConv
from profit_jax.quant.bits import Bits

# A ReLU6 quantizer's interval starts at 6 or below, whether the non-linearity itself is bounded or
# not.
RELU6_BOUND = 6.0

# timm's convolutions of a block, by their number: without an expansion the first 1x1 convolution is
# the last.
_TIMM_CONVS = {2: ("conv_dw", "conv_pw"), 3: ("conv_pw", "conv_dw", "conv_pwl")}


def divisible_by_8(channels: float) -> int:
  """Rounds to the nearest multiple of 8, at least 8, and not more than 10 % down."""
  rounded = max(8, int(channels + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * channels else rounded


def scaled_depths(blocks: Sequence[int], factor: float) -> tuple[int, ...]:
  """The number of blocks of every stage, rounded up; the first and the last stage keep theirs."""
  first, *middle, last = blocks
  return (first, *(math.ceil(count * factor) for count in middle), last)


class InvertedResidual(nn.Module):
  """1x1 expansion, depthwise convolution, 1x1 projection; the input is added where the shapes
  agree.

  Attributes:
    features: output channels.
    expansion: hidden channels over input channels; 1 leaves the expansion convolution out.
    stride: of the depthwise convolution.
    quantize_input: a symmetric quantizer on the convolutions' input (the shortcut stays in full
      precision).
    activation: relu or relu6.
    norm: makes a batch normalization, given its name.
    kernel_size: of the depthwise convolution.
    padding: of the depthwise convolution.
    bound: of the first intervals after the non-linearity, or None.
    shortcut: False never adds the input.
  """

  features: int
  expansion: int
  stride: int
  quantize_input: bool
  activation: Activation
  norm: Any
  kernel_size: int = 3
  padding: Padding = "torch"
  bound: float | None = RELU6_BOUND
  shortcut: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, bits: Bits, train: bool) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H / stride, W / stride, features]`."""
    shortcut, hidden = x, x.shape[-1] * self.expansion
    if self.quantize_input:
      x = QuantAct("symmetric", name="input_quant")(x, bits)
    if self.expansion != 1:
      x = QuantConv(hidden, name="expand_conv")(x, bits)
      x = self.norm(name="expand_norm")(x, train, self.activation)
      x = QuantAct("unsigned", self.bound, name="expand_quant")(x, bits)
    x = QuantConv(
      hidden,
      self.kernel_size,
      self.stride,
      depthwise=True,
      padding=self.padding,
      name="depthwise_conv",
    )(x, bits)
    x = self.norm(name="depthwise_norm")(x, train, self.activation)
    x = QuantAct("unsigned", self.bound, name="depthwise_quant")(x, bits)
    x = QuantConv(self.features, name="project_conv")(x, bits)
    x = self.norm(fused=False, name="project_norm")(x, train)
    return x + shortcut if self.shortcut and x.shape == shortcut.shape else x


def blocks_of(layers: Collection[Path]) -> dict[str, set[Path]]:
  """The layers inside of each block, as paths without the block's name."""
  blocks: dict[str, set[Path]] = {}
  for layer in layers:
    if layer[0].startswith("block"):
      blocks.setdefault(layer[0], set()).add(layer[1:])
  return blocks


def timm_names(
  layers: Collection[Path], stage_blocks: Sequence[int], parts: Sequence[str]
) -> dict[Path, str]:
  """Our layers -> timm's, of the stem, the blocks and the classifier: `("block01", "expand_conv")`
  -> `blocks.1.0.conv_pw`.

  Args:
    layers: of a MobileNet.
    stage_blocks: the number of blocks in each stage.
    parts: what a block's convolutions begin with, in their order; a block may lack some.
  """
  names = {("stem_conv",): "conv_stem", ("stem_norm",): "bn1", ("classifier",): "classifier"}
  positions = [(stage, block) for stage, count in enumerate(stage_blocks) for block in range(count)]
  for block, inside in blocks_of(layers).items():
    stage, place = positions[int(block.removeprefix("block"))]
    ours = [part for part in parts if (f"{part}_conv",) in inside]
    for number, (part, conv) in enumerate(zip(ours, _TIMM_CONVS[len(ours)], strict=True), 1):
      names |= {
        (block, f"{part}_conv"): f"blocks.{stage}.{place}.{conv}",
        (block, f"{part}_norm"): f"blocks.{stage}.{place}.bn{number}",
      }
  return names
