"""The models, by the name that `config.model.name` takes; each is one file of this package.

A file registers its model by `register`. So can a configuration file or a script, which makes the
name known to the process that runs it.
"""

import dataclasses
import difflib
import importlib
import math
import pkgutil

import flax.linen as nn

from profit_jax.config import ConfigError, ModelSettings, Settings
from profit_jax.fields import listed, require
from profit_jax.models.naming import Naming
from profit_jax.models.registry import REGISTRY, ModelEntry, register
from profit_jax.nn.rules import with_rules
from profit_jax.nn.spec import ModelSpec, describe
from profit_jax.quant import QUANTIZERS, Quantizer
from profit_jax.quant.bits import bits_of

__all__ = [
  "REGISTRY",
  "ModelEntry",
  "Naming",
  "build",
  "check",
  "options",
  "published_net",
  "published_nets",
  "register",
  "student_spec",
]
for _file in pkgutil.iter_modules(__path__):  # each registers its models
  importlib.import_module(f"{__name__}.{_file.name}")


def check(settings: Settings) -> None:
  """Checks what only the models know of their settings.

  Raises:
    ConfigError: strides of another number, or too many of them for the image; strides, a width or
      a padding where there are none; bits for a model without quantizers; what a quantizer does not
      offer; rules that do not fit the model; an unknown variant, or one without weights.
  """
  _check_quantizer(settings)
  for section, own in (("init", settings.init), ("teacher", settings.teacher)):
    if own.variant:
      needed = f'"" without {section}.weights, whose net it names'
      require(bool(own.weights), f"{section}.variant", own.variant, needed)
      published_net(own.variant, f"config.{section}.variant")
  _check_shape(settings.model, settings.data.image_size, "model")
  if settings.teacher.model in REGISTRY:
    _check_shape(settings.teacher.as_model(), settings.data.image_size, "teacher")
  name, plan = settings.model.name, settings.plan
  if not REGISTRY[name].quantized and (plan.weight_bits or plan.act_bits):
    quantized = [other for other, entry in REGISTRY.items() if entry.quantized]
    raise ConfigError(
      f"config.model.name = {name!r} is not allowed with config.plan.weight_bits = "
      f"{plan.weight_bits!r} and "
      f"config.plan.act_bits = {plan.act_bits!r}: {name} has no quantizers. Set both to () to "
      "train it in full precision, "
      f"as a teacher, or choose one of {', '.join(sorted(quantized))}."
    )
  if settings.quant.rules or settings.quant.policy != "profit":
    student_spec(settings, num_classes=10)  # layers have the same names for any number


def published_nets() -> set[str]:
  """The names of all nets of other codebases that a registered model knows."""
  return {name for entry in REGISTRY.values() for naming in entry.names for name in naming.nets}


def published_net(name: str, field: str) -> str:
  """The name of a net of another codebase, without the tag of its training (`.in1k`).

  Args:
    name: as timm or torchvision has it.
    field: what has it, for messages.

  Raises:
    ConfigError: no registered model knows it.
  """
  known, plain = published_nets(), name.partition(".")[0]
  if name in known:
    return name
  if plain in known:
    return plain
  near = difflib.get_close_matches(plain, sorted(known), n=5, cutoff=0.5)
  like = f" Names like it: {listed(near)}." if near else ""
  raise ConfigError(
    f"{field} = {name!r} is not allowed: it must be timm's or torchvision's name of a net.{like} "
    "docs/weights.md lists all."
  )


def _check_quantizer(settings: Settings) -> None:
  """Checks what only a quantizer knows of itself."""
  quantizer, oscillation = bits_of(settings.quant).quantizer, settings.oscillation
  fits = type(quantizer).fit_kernel is not Quantizer.fit_kernel
  require(
    fits or not settings.plan.refit_bits,
    "plan.refit_bits",
    settings.plan.refit_bits,
    f"() with quant.method = {quantizer.method}, which does not fit its scalars to kernels",
  )
  for name, off in (("dampening", 0.0), ("freeze_thresholds", ())):
    value, able = getattr(oscillation, name), [n for n, q in QUANTIZERS.items() if q.one_interval]
    require(
      quantizer.one_interval or not value,
      f"oscillation.{name}",
      value,
      f"{off} with quant.method = {quantizer.method}: it needs {' or '.join(able)}, whose codes "
      "come from one interval",
    )


def _check_shape(model: ModelSettings, image_size: int, section: str) -> None:
  entry = REGISTRY[model.name]
  strides, published = model.strides, entry.strides
  if strides and "strides" not in entry.options:
    raise ConfigError(
      f"config.{section}.strides = {strides!r} is not allowed: {model.name} has no such option, it "
      "must be ()."
    )
  if strides and published and len(strides) != len(published):
    raise ConfigError(
      f"config.{section}.strides = {strides!r} is not allowed: {model.name} takes "
      f"{len(published)} numbers, the stem's "
      f"and the stages', published as {published!r}; () stands for these."
    )
  reduction = math.prod(strides or published)
  if image_size < reduction:
    raise ConfigError(
      f"config.{section}.strides = {strides!r} is not allowed: the product of "
      f"{strides or published!r} must be at most "
      f"data.image_size = {image_size}; it is {reduction}, use fewer 2s."
    )
  if "width" not in entry.options and model.width != 1:
    raise ConfigError(
      f"config.{section}.width = {model.width!r} is not allowed: {model.name} has no width "
      "multiplier, it must be 1.0."
    )
  if "padding" not in entry.options and model.padding != "torch":
    able = [name for name, other in REGISTRY.items() if "padding" in other.options]
    raise ConfigError(
      f"config.{section}.padding = {model.padding!r} is not allowed: {model.name} has no such "
      f"option, it must be 'torch'. Models that have it: {', '.join(sorted(able))}."
    )


def build(settings: ModelSettings, num_classes: int) -> nn.Module:
  """The module that the settings describe; a model takes the fields that it has."""
  known = options(settings.name)
  chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name in known}
  return REGISTRY[settings.name](num_classes=num_classes, **chosen)


def student_spec(settings: Settings, num_classes: int) -> ModelSpec:
  """The model of a run, with its quantizers and the bits of single layers.

  Raises:
    ConfigError: rules that do not fit the model.
  """
  size = settings.data.image_size
  bits = dataclasses.replace(bits_of(settings.quant), aiwq_every=settings.plan.sampling_every)
  spec = describe(build(settings.model, num_classes), (size, size, 3), bits)
  return with_rules(spec, settings.quant.rules, settings.quant.policy)


def options(name: str) -> frozenset[str]:
  """The fields of `ModelSettings` that a registered model has."""
  return REGISTRY[name].options
