"""Weights under the names of the authors' PyTorch code (github EunhyeokPark/PROFIT).

The full-precision tensors of MobileNet-v2 have torchvision's names there, so a torchvision file is this file without
quantizer scalars.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from profit_jax.settings import ConfigError
from profit_jax.weights.layout import TORCH_LEAF, from_torch, torch_shape

Variables = dict[str, Any]
Path = tuple[str, ...]

# A block's modules by their place in the authors' `conv` sequence; the first block has no expansion, so that all of its
# places are one lower.
_BLOCK_PLACES = {
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
_FIRST_BLOCK_PLACES = {
  "depthwise_conv": "0.0",
  "depthwise_norm": "0.1",
  "depthwise_quant": "0.2",
  "project_conv": "1",
  "project_norm": "2",
}
_MOBILENET_V2_PLACES = {
  "stem_conv": "features.0.0",
  "stem_norm": "features.0.1",
  "stem_quant": "features.0.2",
  "head_input_quant": "features.-18",
  "head_conv": "features.18.0",
  "head_norm": "features.18.1",
  "head_quant": "relu6",
  "classifier": "classifier.1",
}


def mobilenet_v2_name(path: Path) -> str:
  """The authors' name of a MobileNet-v2 layer: `("block01", "expand_conv")` -> `features.2.conv.0.0`."""
  if len(path) == 1:
    return _MOBILENET_V2_PLACES[path[0]]
  block, layer = int(path[0].removeprefix("block")), path[1]
  places = _FIRST_BLOCK_PLACES if block == 0 else _BLOCK_PLACES
  return f"features.{block + 1}.conv.{places[layer]}"


LAYER_NAMES = {"mobilenet_v2": mobilenet_v2_name}


def tensor_names(model: str, variables: Variables) -> dict[Path, str]:
  """Our path (collection first) -> the authors' tensor name, for every leaf of a model's variables."""
  layer_name = LAYER_NAMES[model]
  return {path: f"{layer_name(path[1:-1])}.{TORCH_LEAF[path[-1]]}" for path in traverse_util.flatten_dict(variables)}


def import_variables(
  model: str, template: Variables, tensors: Mapping[str, np.ndarray], source: str, *, dtype: Any = np.float32
) -> tuple[Variables, bool]:
  """Fills a model's variables from tensors under the authors' names; strict.

  Args:
    model: a key of `LAYER_NAMES`.
    template: the variables' shapes (arrays or `jax.ShapeDtypeStruct`), `params` and `batch_stats`.
    tensors: the file's content. torch's `num_batches_tracked` counters are passed over; quantizer scalars may be absent
      all together (a full-precision file), never in part.
    source: what to call the file in a message.
    dtype: of the result.

  Returns:
    The variables, and whether the quantizers' scalars came from the file. Where they did not, they are 1.

  Raises:
    ConfigError: listing every missing, unexpected or misshapen tensor.
  """
  names = tensor_names(model, template)
  given = {name: np.asarray(value) for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
  quantizers = {path for path in names if path[-1] in ("quant_a", "quant_c")}
  with_quantizers = any(names[path] in given for path in quantizers)
  expected = {path: name for path, name in names.items() if with_quantizers or path not in quantizers}

  problems = [f"unexpected: {name} {given[name].shape}" for name in sorted(given.keys() - set(expected.values()))]
  leaves = {}
  for path, leaf in traverse_util.flatten_dict(template).items():
    if path not in expected:
      leaves[path] = np.full(leaf.shape, np.log(np.expm1(1.0)), dtype)
      continue
    name, shape = names[path], torch_shape(path[-1], leaf.shape)
    if name not in given:
      problems.append(f"missing: {name} {shape}")
    elif given[name].shape != shape:
      problems.append(f"wrong shape: {name} is {given[name].shape}, must be {shape}")
    else:
      leaves[path] = from_torch(path[-1], given[name]).astype(dtype)
  if problems:
    listing = "\n  ".join(problems)
    raise ConfigError(
      f"{source} does not hold the weights of {model} as configured ({len(problems)} of {len(names)} tensors differ). "
      f"Nothing was loaded. Use the matching file, model.width and number of classes.\n  {listing}"
    )
  return traverse_util.unflatten_dict(leaves), with_quantizers
