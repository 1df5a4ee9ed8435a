"""From plain values to a frozen dataclass, with the types that it names; whatever is wrong, one
message says it.
"""

import dataclasses
import math
import typing
from collections.abc import Collection
from typing import Any, Literal


class ProfitError(Exception):
  """An error with one clear message.

  Attributes:
    label: before the message, where the command line prints it.
    code: the command line's exit code.
    everywhere: all processes of a run end with it alike.
  """

  label, code, everywhere = "error", 1, False


class ConfigError(ProfitError, ValueError):
  """Something the user can mend: what is wrong, the value, what is allowed, what to do."""

  code = 2


def build(
  cls: type, values: dict[str, Any], where: str, optional: Collection[str] = frozenset()
) -> Any:
  """Fills a dataclass from a dictionary, section by section, types checked.

  Args:
    cls: the dataclass.
    values: of its fields.
    where: what the dictionary is, `config` or a section of it.
    optional: fields that may be missing, as `config.plan.refit_bits`; they get their defaults.

  Raises:
    ConfigError: a field that is unknown, missing, or of another type.
  """
  hints = typing.get_type_hints(cls)
  unknown = sorted(values.keys() - hints.keys())
  missing = sorted(
    name for name in hints.keys() - values.keys() if f"{where}.{name}" not in optional
  )
  if unknown:
    raise ConfigError(f"{where} has unknown fields: {listed(unknown)}. Allowed: {listed(hints)}.")
  if missing:
    raise ConfigError(
      f"{where} lacks the fields {listed(missing)}. Start from profit_jax.config.default_config(), "
      "which has them all."
    )
  return cls(
    **{
      name: _convert(values[name], hint, f"{where}.{name}", optional)
      for name, hint in hints.items()
      if name in values
    }
  )


def _convert(value: Any, hint: Any, where: str, optional: Collection[str]) -> Any:
  field = where.removeprefix("config.")
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    if not isinstance(value, dict):
      raise ConfigError(f"{where} = {value!r} must be a section of fields.")
    return build(hint, value, where, optional)
  if hint is Any:
    return as_tuples(value)
  origin = typing.get_origin(hint)
  if origin is Literal:
    require(value in typing.get_args(hint), field, value, f"one of {listed(typing.get_args(hint))}")
    return value
  if origin is tuple:
    require(isinstance(value, (tuple, list)), field, value, 'a tuple, as "(8, 5, 4)"')
    return tuple(_convert(item, typing.get_args(hint)[0], where, optional) for item in value)
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if hint is float:
    require(number and math.isfinite(value), field, value, "a finite number")
    return float(value)
  if hint is int:
    require(number and isinstance(value, int), field, value, "a whole number")
    return int(value)
  require(isinstance(value, hint), field, value, {bool: "True or False", str: "text"}[hint])
  return value


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
  """Raises a ConfigError of a field, as `train.batch_size`, where its value is not allowed."""
  if not condition:
    raise ConfigError(f"config.{field} = {value!r} is not allowed: it must be {allowed}.")


def listed(names: Collection[Any]) -> str:
  """Names in a sentence."""
  return ", ".join(str(name) for name in names)


def as_tuples(value: Any) -> Any:
  """Nested lists and tuples as tuples."""
  return tuple(map(as_tuples, value)) if isinstance(value, (list, tuple)) else value


def as_lists(value: Any) -> Any:
  """Nested plain values, tuples as lists."""
  if isinstance(value, dict):
    return {key: as_lists(item) for key, item in value.items()}
  return [as_lists(item) for item in value] if isinstance(value, tuple) else value
