"""The registered models, by the name that `config.model.name` takes."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import flax.linen as nn

from profit_jax.config import ConfigError, ModelSettings
from profit_jax.fields import listed
from profit_jax.models.naming import Naming

OWN_NAMES = "profit_jax"  # the source of our own names, which every model has
_TEACHERS = ("none", "self")  # values of `config.teacher.model` that are no model
_SETTINGS = frozenset(field.name for field in dataclasses.fields(ModelSettings)) - {"name"}

Module = TypeVar("Module", bound=type[nn.Module])


@dataclasses.dataclass(frozen=True)
class ModelEntry:
  """A registered model.

  Attributes:
    module: its class; called as `module(num_classes=10, **options)`.
    fixed: fields of the class that make this model of several.
    strides: the published ones, which `strides = ()` stands for; another list must be as long.
    quantized: whether it has quantizers; without, it is trained in full precision, as a teacher.
    head: path of the layer that depends on the number of classes, `head/logits`.
    names: of its layers in other codebases. Of two that explain a file equally well, the first
      counts.
  """

  module: type[nn.Module]
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  strides: tuple[int, ...] = ()
  quantized: bool = True
  head: str = "classifier"
  names: tuple[Naming, ...] = ()

  def __call__(self, **options: Any) -> nn.Module:
    """The model, with `num_classes` and other fields of its class."""
    return self.module(**self.fixed, **options)

  @property
  def options(self) -> frozenset[str]:
    """The fields of `ModelSettings` that the model has."""
    return frozenset(_fields(self.module) & _SETTINGS - self.fixed.keys())

  def settings_of(self, naming: Naming, variant: str | None = None) -> dict[str, Any]:
    """The settings of `config.model` with which another codebase computes: the published strides
    and what `naming` says.

    Args:
      naming: one of `names`.
      variant: one of its `variants`; None takes what all of them have in common.
    """
    strides = {"strides": ()} if self.strides and "strides" in self.options else {}
    return {**strides, **(naming.variant_settings(variant) if variant else naming.settings)}


REGISTRY: dict[str, ModelEntry] = {}


def register(
  name: str,
  *,
  fixed: Mapping[str, Any] | None = None,
  strides: Collection[int] = (),
  quantized: bool = True,
  head: str = "classifier",
  names: Collection[Naming] = (),
) -> Callable[[Module], Module]:
  """Registers a class as a model.

      @register("mine", strides=(2, 1, 2))
      class Mine(nn.Module):
        num_classes: int = 10

  A class that makes several models is decorated once for each, with `fixed`. The same class may be
  registered again, as by a configuration file that is read twice.

  Args:
    name: what `config.model.name` takes.
    fixed: see `ModelEntry`, as the others.
    strides: published ones.
    quantized: whether it has quantizers.
    head: path of the layer that depends on the number of classes.
    names: in other codebases, the preferred first.

  Raises:
    ConfigError: another class has the name; the class is not a linen module with a field
      `num_classes`; names that contradict each other; or settings that the model does not have.
  """

  def decorate(module: Module) -> Module:
    given = dict(fixed or {})
    entry = ModelEntry(module, given, tuple(strides), quantized, head, tuple(names))
    problem = _problem(name, entry)
    if problem:
      raise ConfigError(f"The model {name!r} cannot be registered: {problem}")
    REGISTRY[name] = entry
    return module

  return decorate


def _problem(name: Any, entry: ModelEntry) -> str | None:
  """What is wrong with an entry; None where nothing is."""
  module = entry.module
  if not isinstance(name, str) or not name or name in _TEACHERS:
    return f"its name must be a text, and not empty or one of {listed(_TEACHERS)}."
  if not (isinstance(module, type) and issubclass(module, nn.Module)):
    given = (
      module.__name__ if isinstance(module, type) else f"an instance of {type(module).__name__}"
    )
    return f"{given} is not a class derived from flax.linen.Module."
  if "num_classes" not in _fields(module):
    return f"{module.__name__} has no field num_classes, with which it is built."
  if name in REGISTRY and not _is_same(module, REGISTRY[name].module):
    taken = REGISTRY[name].module
    return f"{taken.__module__}.{taken.__qualname__} has this name. Choose another."
  if unknown := entry.fixed.keys() - _fields(module):
    return f"{module.__name__} has no field {listed(sorted(unknown))}, which `fixed` sets."
  return _naming_problem(entry)


def _naming_problem(entry: ModelEntry) -> str | None:
  sources = [naming.source for naming in entry.names]
  if len({*sources, OWN_NAMES}) <= len(sources):
    return (
      f"its names have the sources {listed(sources)}. Each must be there once; {OWN_NAMES} is "
      "taken by our own names."
    )
  for naming in entry.names:
    told = naming.settings.keys() | {key for each in naming.variants.values() for key in each}
    if unknown := told - entry.options:
      return (
        f"the settings of its {naming.source} names have {listed(sorted(unknown))}. Allowed are "
        f"the fields of {entry.module.__name__} that config.model has too: "
        f"{listed(sorted(entry.options)) or 'none'}."
      )
  return None


def _fields(module: type[nn.Module]) -> set[str]:
  return {field.name for field in dataclasses.fields(module)}


def _is_same(module: type[nn.Module], other: type[nn.Module]) -> bool:
  """Whether two classes are one that was defined twice: a file that is read again, as a script and
  as a configuration, or a notebook's cell.
  """
  where = [(cls.__module__, _file_of(cls)) for cls in (module, other)]
  same_place = any(first == second for first, second in zip(*where, strict=True))
  return module.__qualname__ == other.__qualname__ and same_place


def _file_of(module: type[nn.Module]) -> str:
  # Not by its module: that of a configuration file is not in sys.modules.
  code = getattr(inspect.unwrap(module.__call__), "__code__", None)
  return os.path.realpath(code.co_filename) if code else module.__module__
