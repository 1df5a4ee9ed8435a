"""How a model's file says what other codebases call its layers."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

# Of a layer in a model: ("block01", "expand_conv").
Path = tuple[str, ...]


def quantizable(name: str, settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Variants: the class of torchvision.models.quantization for a net, by both names that it has.
  Before quantization it has the tensors of the plain net.
  """
  return {f"quantized_{name}": settings, f"quantization.{name}": settings}


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
    unsupported: names of its models that have the same tensors at width 1, but compute something
      else -> what.
    absent: names of its related models that no model here is -> why.
  """

  source: str
  layer_names: Callable[[Collection[Path]], Mapping[Path, str]]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  pointwise: frozenset[str] = frozenset()
  quantizers: bool = False
  variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  unsupported: Mapping[str, str] = dataclasses.field(default_factory=dict)
  absent: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def refused(self) -> dict[str, str]:
    """All names of nets that are refused -> why."""
    return {**self.unsupported, **self.absent}

  @property
  def nets(self) -> set[str]:
    """All names of the source's nets that this naming knows."""
    return {*self.variants, *self.unsupported, *self.absent}

  def variant_settings(self, name: str) -> dict[str, Any]:
    """All settings of `config.model` that make the model one of `variants`."""
    return {**self.settings, **self.variants[name]}
