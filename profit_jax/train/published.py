"""Settings that are published with weights: crop, interpolation, normalization, epsilon and others.

They are taken for every field that has its default. A field that the user has set is compared.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

from etils import epath

from profit_jax import data
from profit_jax.config import Settings
from profit_jax.models import REGISTRY
from profit_jax.weights import hub
from profit_jax.weights.hub import Published
from profit_jax.weights.variants import VARIANT_FIELD, named, published_settings

_INTERPOLATIONS = ("bicubic", "bilinear")
_DATA_FIELDS = ("image_size", "crop_pct", "interpolation", "normalization")
# A choice: the full-precision phase adapts the weights to negative padding.
_CHOSEN = frozenset({"pad_value"})
_CLOSE = 1e-3  # of shares and pixel values in 0..1, which are published rounded


class Applied(NamedTuple):
  """The published settings that a run took.

  Attributes:
    settings: with what was taken.
    lines: one for each field that changed.
    fields: those that have a published value that is not their default, `data.crop_pct`.
  """

  settings: Settings
  lines: list[str]
  fields: tuple[str, ...]


def apply(settings: Settings) -> Applied:
  """Takes what is published of `init.weights` and of a teacher's weights.

  Raises:
    ConfigError: weights that are not known, cannot be described, or are another net's.
  """
  lines: list[str] = []
  fields: list[str] = []
  for section, own, model in (
    ("model", settings.init, settings.model.name),
    ("teacher", settings.teacher, settings.teacher.model),
  ):
    weights, variant = own.weights, own.variant
    role = "student" if section == "model" else "teacher"
    told = named(hub.published(weights, own.entry), variant, weights, role) if weights else None
    if told is None:
      continue
    of_model = published_settings(told, model, weights, role)
    if told.claimed and told.architecture in REGISTRY:
      continue  # the authors' files may have this name, too
    wanted = {f"{section}.{name}": v for name, v in of_model.items() if name not in _CHOSEN}
    wanted |= _image_settings(settings, told, section)
    by_user = told.origin in VARIANT_FIELD.values()
    for field, value in wanted.items():
      default = _get(Settings(), field)
      if _get(settings, field) == default != value:
        settings = _set(settings, field, value)
        of_net = by_user and field.partition(".")[2] in of_model
        by = f"as {told.architecture} has it" if of_net else f"as published with {weights}"
        lines.append(f"config.{field} = {_text(value)}, {by} (default: {_text(default)}).")
      if _get(settings, field) == value != default:
        fields.append(field)
  return Applied(settings, lines, tuple(fields))


def as_begun(
  settings: Settings, saved: Settings, fields: Collection[str] | None = None
) -> Settings:
  """The settings with what a run that has begun took from its weights.

  Args:
    settings: of a command that resumes the run.
    saved: the run's.
    fields: that it took, as `Applied.fields`; None of a run of an earlier version, which did not
      save them: those that it may have taken.
  """
  ours, theirs = ((run.init, run.teacher.weights, run.teacher.variant) for run in (settings, saved))
  if ours != theirs:
    return settings
  for field in _may_have_taken(settings) if fields is None else fields:
    if _get(settings, field) == _get(Settings(), field):
      settings = _set(settings, field, _get(saved, field))
  return settings


def _may_have_taken(settings: Settings) -> list[str]:
  """The fields that a run with these settings may have taken from its weights."""
  weights = settings.init.weights, settings.teacher.weights
  if not any(map(_may_be_described, filter(None, weights))):
    return []
  fields = [f"data.{name}" for name in _DATA_FIELDS]
  for section, model in (("model", settings.model.name), ("teacher", settings.teacher.model)):
    names = REGISTRY[model].names if model in REGISTRY else ()
    told = {key for each in names for name in each.variants for key in each.variant_settings(name)}
    fields += [f"{section}.{name}" for name in sorted(told - _CHOSEN)]
  if settings.teacher.model in REGISTRY:
    fields.append(_normalization_field("teacher"))
  return fields


def _may_be_described(weights: str) -> bool:
  """Whether something was published of weights, which may be gone since."""
  if hub.is_name(weights) or not epath.Path(weights).exists():
    return True
  return hub.published(weights) is not None


def differences(settings: Settings, told: Published, section: str) -> list[str]:
  """A line for each setting of the images that differs from the published one.

  Args:
    settings: of the run.
    told: what is published of its weights.
    section: `model`, or `teacher`, which has a normalization only.
  """
  found = []
  for field, value in _image_settings(settings, told, section).items():
    if _get(settings, field) != value:
      found.append(
        f"config.{field} = {_text(_get(settings, field))}, but these weights were published with "
        f"{_text(value)}."
      )
  if section == "model" and told.interpolation not in (None, *_INTERPOLATIONS):
    found.append(
      f"These weights were published with interpolation {told.interpolation}, which "
      f"config.data.interpolation does not have: it is {' or '.join(_INTERPOLATIONS)}."
    )
  if told.mean and told.std and _normalization(settings, told, section) is None:
    found.append(
      f"These weights were published with mean {told.mean} and std {told.std}, which no value of "
      f"config.{_normalization_field(section)} stands for."
    )
  return found


def _image_settings(settings: Settings, told: Published, section: str) -> dict[str, Any]:
  """Published values that a configuration can have, by field."""
  found: dict[str, Any] = {}
  ours = settings.data
  if section == "model":
    if told.image_size is not None and 8 <= told.image_size <= 1024:
      found["data.image_size"] = told.image_size
    if told.crop_pct is not None and 0.1 <= told.crop_pct <= 1:
      same = abs(told.crop_pct - ours.crop_pct) < _CLOSE
      found["data.crop_pct"] = ours.crop_pct if same else told.crop_pct
    if told.interpolation in _INTERPOLATIONS:
      found["data.interpolation"] = told.interpolation
  name = _normalization(settings, told, section)
  return found | ({_normalization_field(section): name} if name else {})


def _normalization_field(section: str) -> str:
  return "teacher.normalization" if section == "teacher" else "data.normalization"


def _normalization(settings: Settings, told: Published, section: str) -> str | None:
  """The value of `normalization` that stands for the published one: the configured, if it does."""
  if not (told.mean and told.std):
    return None
  configured = _get(settings, _normalization_field(section))
  values = {"dataset": data.normalization_of(settings.data.name), **data.NORMALIZATIONS}
  same = [
    name
    for name, value in values.items()
    if len(value.mean) == len(told.mean)
    and len(value.std) == len(told.std)
    and all(
      abs(ours - theirs) < _CLOSE
      for ours, theirs in zip((*value.mean, *value.std), (*told.mean, *told.std), strict=True)
    )
  ]
  if configured in same:
    return configured
  return next((name for name in same if name != "dataset"), None)


def _get(settings: Settings, field: str) -> Any:
  section, _, name = field.partition(".")
  return getattr(getattr(settings, section), name)


def _set(settings: Settings, field: str, value: Any) -> Settings:
  section, _, name = field.partition(".")
  changed = dataclasses.replace(getattr(settings, section), **{name: value})
  return dataclasses.replace(settings, **{section: changed})


def _text(value: Any) -> str:
  return f"{value:.6g}" if isinstance(value, float) else str(value)
