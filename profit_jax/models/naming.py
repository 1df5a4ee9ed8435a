"""How a model's file says what other codebases call its layers."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

# Of a layer in a model: ("block01", "expand_conv").
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
  """The names of a model's layers in one other codebase, in PyTorch.

  Attributes:
    source: the codebase: `torchvision`, `timm`, `authors`, or another name.
    layer_names: our layers -> their modules' names. It is given all layers of the model. Layers
      that it leaves out, quantizers, have no tensors there.
    settings: of `config.model`, with which the source's own code computes.
    pointwise: dense layers of ours that are 1x1 convolutions there, by their own name.
    quantizers: whether the source has DuQ's scalars.
    variants: names of the source's models that are this net -> settings of `config.model` that
      make it that one, beyond `settings`.
    unsupported: names of its models whose tensors look the same, but which compute something else
      -> what.
  """

  source: str
  layer_names: Callable[[Collection[Path]], Mapping[Path, str]]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  pointwise: frozenset[str] = frozenset()
  quantizers: bool = False
  variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  unsupported: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def variant_settings(self, name: str) -> dict[str, Any]:
    """All settings of `config.model` that make the model one of `variants`."""
    return {**self.settings, **self.variants[name]}
