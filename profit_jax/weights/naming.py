"""What a source calls our tensors, and with which model settings its own code computes."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from profit_jax.quant import QUANTIZERS
from profit_jax.weights import layout

# Of a leaf, collection first: ("params", "block01", "expand_conv", "kernel").
Path = tuple[str, ...]
QUANTIZER_LEAVES = frozenset(
  leaf for cls in QUANTIZERS.values() for leaf in (*cls.kernel_scalars, *cls.act_scalars)
)


def blocks_of(layers: Collection[Path]) -> dict[str, set[Path]]:
  """The layers inside of each block, as paths without the block's name."""
  blocks: dict[str, set[Path]] = {}
  for layer in layers:
    if layer[0].startswith("block"):
      blocks.setdefault(layer[0], set()).add(layer[1:])
  return blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
  """The names of a model's tensors in torch files of one source.

  Attributes:
    source: `torchvision`, `timm`, `authors`.
    layer_names: our layers (paths without collection and leaf) -> their modules' names. Layers that
      it leaves out, quantizers, have no tensors there.
    settings: of `config.model`, with which the source's own code computes.
    pointwise: dense layers of ours that are 1x1 convolutions there, by their own name.
    quantizers: whether the source has DuQ's scalars.
  """

  source: str
  layer_names: Callable[[Collection[Path]], Mapping[Path, str]]
  settings: Mapping[str, Any]
  pointwise: frozenset[str] = frozenset()
  quantizers: bool = False

  def tensor_names(self, paths: Collection[Path]) -> dict[Path, str]:
    """Our leaves -> their tensors, without those that the source does not have."""
    layers = self.layer_names({path[1:-1] for path in paths})
    return {
      path: f"{layers[path[1:-1]]}.{layout.TORCH_LEAF[path[-1]]}"
      for path in paths
      if path[1:-1] in layers
      and (path[-1] not in QUANTIZER_LEAVES or (self.quantizers and path[-1] in layout.TORCH_LEAF))
    }

  def tensor_shape(self, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of their tensor for a leaf of ours."""
    return layout.torch_shape(path[-1], shape, path[-2] in self.pointwise)

  def read(self, path: Path, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Their tensor as our leaf."""
    return layout.from_torch(path[-1], tensor, shape)

  def write(self, path: Path, array: np.ndarray) -> np.ndarray:
    """Our leaf as their tensor."""
    return layout.to_torch(path[-1], array, path[-2] in self.pointwise)


class OwnNaming(Naming):
  """Our own names and layout: `params/block01/expand_conv/kernel`."""

  def __init__(self):
    """Has no arguments: every model has the same rule."""
    super().__init__(source="profit_jax", layer_names=dict, settings={}, quantizers=True)

  def tensor_names(self, paths: Collection[Path]) -> dict[Path, str]:
    """See `Naming`."""
    return {path: "/".join(path) for path in paths}

  def tensor_shape(self, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `Naming`."""
    return tuple(shape)

  def read(self, path: Path, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """See `Naming`."""
    return tensor

  def write(self, path: Path, array: np.ndarray) -> np.ndarray:
    """See `Naming`."""
    return np.asarray(array, order="C")
