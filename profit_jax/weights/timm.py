"""The names of timm's MobileNets: mobilenetv1_100, mobilenetv2_100, mobilenetv3_large_100,
mobilenetv3_small_100.
"""

import functools
from collections.abc import Collection, Sequence

from profit_jax.models import mobilenet_v1, mobilenet_v2, mobilenet_v3
from profit_jax.weights.naming import Naming, Path, blocks_of


def mobilenet_names(layers: Collection[Path], stage_blocks: Sequence[int]) -> dict[Path, str]:
  """Our layers -> theirs: `("block01", "expand_conv")` -> `blocks.1.0.conv_pw`.

  Args:
    layers: of MobileNet v1, v2 or v3.
    stage_blocks: the number of blocks in each stage.
  """
  names = {("stem_conv",): "conv_stem", ("stem_norm",): "bn1", ("classifier",): "classifier"}
  if ("pre_classifier",) in layers:  # v3, whose last convolution is a stage of its own
    last = f"blocks.{len(stage_blocks)}.0"
    names |= {
      ("head_conv",): f"{last}.conv",
      ("head_norm",): f"{last}.bn1",
      ("pre_classifier",): "conv_head",
    }
  else:
    names |= {("head_conv",): "conv_head", ("head_norm",): "bn2"}
  positions = [(stage, block) for stage, count in enumerate(stage_blocks) for block in range(count)]
  for block, inside in blocks_of(layers).items():
    prefix = "blocks.{}.{}".format(*positions[int(block.removeprefix("block"))])
    convs = (
      ["conv_pw", "conv_dw", "conv_pwl"] if ("expand_conv",) in inside else ["conv_dw", "conv_pw"]
    )
    ours = ["expand"] * (len(convs) == 3) + [
      "depthwise",
      "pointwise" if ("pointwise_conv",) in inside else "project",
    ]
    for number, (stage, conv) in enumerate(zip(ours, convs, strict=True), 1):
      names |= {
        (block, f"{stage}_conv"): f"{prefix}.{conv}",
        (block, f"{stage}_norm"): f"{prefix}.bn{number}",
      }
    for part in ("reduce", "expand"):
      names[block, "squeeze_excite", part] = f"{prefix}.se.conv_{part}"
  return names


def _naming(stage_blocks, settings, pointwise=()):
  layer_names = functools.partial(mobilenet_names, stage_blocks=tuple(stage_blocks))
  return Naming(
    source="timm", layer_names=layer_names, settings=settings, pointwise=frozenset(pointwise)
  )


def _v3(variant):
  settings = {
    "squeeze_excite": "after",
    "bn_epsilon": 1e-5,
    "pad_value": 0.0,
    "channel_rounding": "nearest",
  }
  blocks = [len(stage) for stage in mobilenet_v3.VARIANTS[variant].stages]
  return _naming(blocks, settings, ("reduce", "expand", "pre_classifier"))


_RELU6 = {"activation": "relu6", "bn_epsilon": 1e-5}
NAMINGS = {
  "mobilenet_v1": _naming([blocks for _, blocks in mobilenet_v1.STAGES], _RELU6),
  "mobilenet_v2": _naming([blocks for _, _, blocks in mobilenet_v2.STAGES], _RELU6),
  "mobilenet_v3_large": _v3("large"),
  "mobilenet_v3_small": _v3("small"),
}
