"""The names of torchvision's models. timm's ResNets have the same."""

from collections.abc import Collection

from profit_jax.weights import authors
from profit_jax.weights.naming import Naming, Path, blocks_of

_NORM_SUFFIX = {"conv": 0, "norm": 1}


def mobilenet_v3_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers of MobileNet-v3 -> theirs: `("block03", "depthwise_conv")` ->
  `features.4.block.1.0`.
  """
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


def resnet_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers of ResNet -> theirs: `("stage2_block00", "norm1")` -> `layer2.0.bn1`."""
  names = {("stem_conv",): "conv1", ("stem_norm",): "bn1", ("classifier",): "fc"}
  for layer in layers:
    if len(layer) == 2:
      stage, block = layer[0].removeprefix("stage").split("_block")
      part = layer[1].replace("norm", "bn")
      part = {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"}.get(part, part)
      names[layer] = f"layer{stage}.{int(block)}.{part}"
  return names


_SQUEEZE_EXCITE = frozenset({"reduce", "expand"})
_V3_SETTINGS = {
  "squeeze_excite": "after",
  "bn_epsilon": 1e-3,
  "pad_value": 0.0,
  "channel_rounding": "nearest",
}
_RESNET = Naming(source="torchvision", layer_names=resnet_names, settings={"bn_epsilon": 1e-5})
_V3 = Naming(
  source="torchvision",
  layer_names=mobilenet_v3_names,
  settings=_V3_SETTINGS,
  pointwise=_SQUEEZE_EXCITE,
)

NAMINGS = {
  # The authors started from torchvision's code and kept its names.
  "mobilenet_v2": Naming(
    source="torchvision",
    layer_names=authors.mobilenet_v2_names,
    settings={"activation": "relu6", "bn_epsilon": 1e-5},
  ),
  "mobilenet_v3_large": _V3,
  "mobilenet_v3_small": _V3,
  "resnet18": _RESNET,
  "resnet50": _RESNET,
  "resnet101": _RESNET,
}
