"""The names of the authors' PyTorch code (github EunhyeokPark/PROFIT).

Their `Q_Sequential` numbers the modules in it, except that a quantizer of its input (symmetric, or
h-swish at the front) is called `-N`, N being the number of the module after it.
"""

from collections.abc import Collection

from profit_jax.weights.naming import Naming, Path, blocks_of

_V2_BLOCK = {
  "input_quant": "-0",
  "expand_conv": "0.0",
  "expand_norm": "0.1",
  "expand_quant": "0.2",
  "depthwise_conv": "1.0",
  "depthwise_norm": "1.1",
  "depthwise_quant": "1.2",
  "project_conv": "2",
  "project_norm": "3",
}
# The first block has no expansion, so that all of its places are one lower.
_V2_FIRST_BLOCK = {
  "depthwise_conv": "0.0",
  "depthwise_norm": "0.1",
  "depthwise_quant": "0.2",
  "project_conv": "1",
  "project_norm": "2",
}
_V2 = {
  "stem_conv": "features.0.0",
  "stem_norm": "features.0.1",
  "stem_quant": "features.0.2",
  "head_input_quant": "features.-18",
  "head_conv": "features.18.0",
  "head_norm": "features.18.1",
  "head_quant": "relu6",
  "classifier": "classifier.1",
}

# Squeeze-excite has a place of its own also where there is none.
_V3_BLOCK = (
  "expand_conv",
  "expand_norm",
  "expand_quant",
  "depthwise_conv",
  "depthwise_norm",
  "squeeze_excite",
)
_V3_BLOCK += ("depthwise_quant", "project_conv", "project_norm")
_V3_SQUEEZE_EXCITE = {
  "input_quant": "fc.-0",
  "reduce": "fc.0",
  "reduce_quant": "fc.1",
  "expand": "fc.2",
}


def mobilenet_v2_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers of MobileNet-v2 -> theirs: `("block01", "expand_conv")` -> `features.2.conv.0.0`."""
  names = {}
  for layer in layers:
    if len(layer) == 1:
      names[layer] = _V2[layer[0]]
    else:
      index = int(layer[0].removeprefix("block"))
      places = _V2_FIRST_BLOCK if index == 0 else _V2_BLOCK
      names[layer] = f"features.{index + 1}.conv.{places[layer[1]]}"
  return names


def mobilenet_v3_names(layers: Collection[Path]) -> dict[Path, str]:
  """Our layers of MobileNet-v3 -> theirs: `("block03", "squeeze_excite", "reduce")` ->
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
    order = _V3_BLOCK if ("expand_conv",) in inside else _V3_BLOCK[3:]
    prefix = f"features.{int(block.removeprefix('block')) + 1}.conv"
    names[block, "input_quant"] = f"{prefix}.-0"
    for place, layer in enumerate(order):
      if layer == "squeeze_excite":
        names |= {
          (block, layer, part): f"{prefix}.{place}.{name}"
          for part, name in _V3_SQUEEZE_EXCITE.items()
        }
      else:
        names[block, layer] = f"{prefix}.{place}"
  return {layer: names[layer] for layer in layers}


_V2_SETTINGS = {"activation": "relu", "bn_epsilon": 1e-5}
_V3_SETTINGS = {
  "squeeze_excite": "before",
  "bn_epsilon": 1e-5,
  "pad_value": -0.375,
  "channel_rounding": "up",
}


def _naming(layer_names, settings):
  return Naming(source="authors", layer_names=layer_names, settings=settings, quantizers=True)


# MobileNet-v3 small is not in their code; their class gives it these names when it is handed the
# small table.
NAMINGS = {
  "mobilenet_v2": _naming(mobilenet_v2_names, _V2_SETTINGS),
  "mobilenet_v3_large": _naming(mobilenet_v3_names, _V3_SETTINGS),
  "mobilenet_v3_small": _naming(mobilenet_v3_names, _V3_SETTINGS),
}
