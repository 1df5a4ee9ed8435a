"""What the MobileNets share: how channels are rounded, and what timm calls their blocks."""

from collections.abc import Collection, Sequence

from profit_jax.models.naming import Path

# timm's convolutions of a block, by their number: without an expansion the first 1x1 convolution is
# the last.
_TIMM_CONVS = {2: ("conv_dw", "conv_pw"), 3: ("conv_pw", "conv_dw", "conv_pwl")}


def divisible_by_8(channels: float) -> int:
  """Rounds to the nearest multiple of 8, at least 8, and not more than 10 % down."""
  rounded = max(8, int(channels + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * channels else rounded


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
