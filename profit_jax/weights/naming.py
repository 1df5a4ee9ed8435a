"""The tensors of a model's leaves in files, under other codebases' names or our own."""

import abc
import dataclasses
import types
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from profit_jax.models.naming import Naming
from profit_jax.models.registry import OWN_NAMES, REGISTRY
from profit_jax.quant import QUANTIZERS
from profit_jax.weights import layout

# Of a leaf, collection first: ("params", "block01", "expand_conv", "kernel").
Path = tuple[str, ...]
QUANTIZER_LEAVES = frozenset(
  leaf for cls in QUANTIZERS.values() for leaf in (*cls.kernel_scalars, *cls.act_scalars)
)


class Names(abc.ABC):
  """What one kind of file calls a model's tensors, and how it stores them.

  Attributes:
    source: whose names.
    settings: of `config.model`, with which the source's own code computes.
    duq_only: whether there is a place for DuQ's scalars, but not for other quantizers'.
  """

  source: str
  settings: Mapping[str, Any]
  duq_only: bool

  @abc.abstractmethod
  def tensor_names(self, paths: Collection[Path]) -> dict[Path, str]:
    """Our leaves -> their tensors, without those that the source does not have."""

  @abc.abstractmethod
  def tensor_shape(self, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of their tensor for a leaf of ours."""

  @abc.abstractmethod
  def read(self, path: Path, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Their tensor as our leaf."""

  @abc.abstractmethod
  def write(self, path: Path, array: np.ndarray) -> np.ndarray:
    """Our leaf as their tensor."""


@dataclasses.dataclass(frozen=True)
class TorchNames(Names):
  """Another codebase's names, and torch's layout."""

  naming: Naming
  settings: Mapping[str, Any]

  @property
  def source(self) -> str:
    """See `Names`."""
    return self.naming.source

  @property
  def duq_only(self) -> bool:
    """See `Names`."""
    return self.naming.quantizers

  def tensor_names(self, paths: Collection[Path]) -> dict[Path, str]:
    """See `Names`."""
    layers = self.naming.layer_names({path[1:-1] for path in paths})
    return {
      path: f"{layers[path[1:-1]]}.{layout.torch_leaf(path[-1])}"
      for path in paths
      if path[1:-1] in layers and self._has(path[-1])
    }

  def _has(self, leaf: str) -> bool:
    if leaf not in QUANTIZER_LEAVES:
      return True
    return self.naming.quantizers and leaf in layout.TORCH_LEAF

  def tensor_shape(self, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `Names`."""
    return layout.torch_shape(path[-1], shape, path[-2] in self.naming.pointwise)

  def read(self, path: Path, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """See `Names`."""
    return layout.from_torch(path[-1], tensor, shape)

  def write(self, path: Path, array: np.ndarray) -> np.ndarray:
    """See `Names`."""
    return layout.to_torch(path[-1], array, path[-2] in self.naming.pointwise)


class OwnNames(Names):
  """Our own names and layout, one rule for every model: `params/block01/expand_conv/kernel`."""

  source = OWN_NAMES
  settings: Mapping[str, Any] = types.MappingProxyType({})
  duq_only = False

  def tensor_names(self, paths: Collection[Path]) -> dict[Path, str]:
    """See `Names`."""
    return {path: "/".join(path) for path in paths}

  def tensor_shape(self, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `Names`."""
    return tuple(shape)

  def read(self, path: Path, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """See `Names`."""
    return tensor

  def write(self, path: Path, array: np.ndarray) -> np.ndarray:
    """See `Names`."""
    return np.asarray(array, order="C")


def namings(model: str) -> dict[str, Names]:
  """The names of a model's tensors by source; of equally good ones the first count."""
  entry = REGISTRY[model]
  known = [TorchNames(naming, entry.settings_of(naming)) for naming in entry.names]
  return {names.source: names for names in (*known, OwnNames())}
