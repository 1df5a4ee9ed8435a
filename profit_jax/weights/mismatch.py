"""What to say about a file whose tensors are not those of the model: which kind of difference it
is, with what to do, the counts, and the first tensors of each kind. All are listed in a file.

The kernels of the models of this package are in `kernels.json`, which `tools/write_kernels.py`
writes: tracing all models takes half a minute.
"""

import collections
import contextlib
import functools
import importlib.resources
import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import traverse_util

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY, options
from profit_jax.nn.spec import KERNEL, describe
from profit_jax.quant.base import PREFIX
from profit_jax.weights.naming import Names, Path, namings
from profit_jax.weights.variants import Role

_IMAGE = (224, 224, 3)
_CLASSES = 1000
_SHOWN = 8  # tensors in a message
_TRACED_AT_MOST = 3  # models that are not in kernels.json
_ALIKE = 0.5  # share of kernels in common from which a net is named
_SAME = 0.9  # from which it is that net
_CLOSE = 0.12  # of widths, relative: channels are rounded
_LARGE = 64  # channels from which rounding matters little
_LONGEST = 300  # letters of a line on a tensor
_DATA = "kernels.json"
_VALUES = ("wrong type", "not finite", "impossible")

Shapes = Mapping[str, tuple[int, ...]]
ProblemKind = Literal[
  "missing", "unexpected", "wrong shape", "wrong type", "not finite", "impossible"
]


class Problem(NamedTuple):
  """What is wrong with a tensor."""

  kind: ProblemKind
  tensor: str
  detail: str

  def __str__(self) -> str:
    # A name may have any letters; this is one line.
    name = "".join(letter if letter.isprintable() else "?" for letter in self.tensor)
    return f"{self.kind}: {name}{self.detail}"


class Given(NamedTuple):
  """A file that does not fit a model, and what was expected.

  Attributes:
    file: what to call it.
    tensors: what it holds, without counters.
    model: a name of the registry.
    naming: the names that explain most of it.
    expected: the tensors of the model under these names.
    role: whose weights they are.
    head: of `expected`, those that depend on the number of classes.
    classes: that number; None where it does not matter.
    recorded: the model that the file says it was trained as.
  """

  file: str
  tensors: Mapping[str, np.ndarray]
  model: str
  naming: Names
  expected: Shapes
  role: Role
  head: Collection[str] = ()
  classes: int | None = None
  recorded: str | None = None


class Likeness(NamedTuple):
  """How much a file has in common with a model.

  Attributes:
    model: a name of the registry.
    prefix: what stands before the model's names in the file.
    names: share of the kernels in common, by name.
    shapes: share of the model's kernels whose shapes agree too.
    width: that the file has; None where it has the configured one, or that of another model.
  """

  model: str
  prefix: str = ""
  names: float = 0.0
  shapes: float = 0.0
  width: float | None = None


def mismatch(given: Given, problems: Collection[Problem]) -> ConfigError:
  """The error for a file that does not fit, in 12 lines at most."""
  order = (*_COUNTED, "unexpected")
  problems = sorted(problems, key=lambda p: (order.index(p.kind), _by_number(p.tensor)))
  kinds: dict[str, list[Problem]] = {}
  for problem in problems:
    kinds.setdefault(problem.kind, []).append(problem)
  lines = [
    f"{given.file} does not hold the weights of {given.model} as configured "
    f"({given.naming.source} names). Nothing was loaded.",
    _advice(given, problems),
    _counts(given, kinds),
  ]
  each = max(1, _SHOWN // len(kinds))
  shown = problems
  if len(problems) > _SHOWN:
    shown = [problem for group in kinds.values() for problem in group[:each]]
  lines += [f"  {str(problem)[:_LONGEST]}" for problem in shown]
  if len(shown) < len(problems) and (path := _listed_in_file(given.file, problems)):
    lines.append(f"All {len(problems)} differences are listed in {path}.")
  return ConfigError("\n".join(lines))


def _by_number(name: str) -> list[tuple[int, str]]:
  """By which names are sorted: `features.2` before `features.10`."""
  parts = re.split(r"([0-9]+)", name)
  numbers = [part.lstrip("0") if part.isdecimal() else None for part in parts]
  return [
    (-1, part) if number is None else (len(number), number)
    for part, number in zip(parts, numbers, strict=True)
  ]


def _counts(given: Given, kinds: Mapping[str, Collection[Problem]]) -> str:
  extra = len(kinds.get("unexpected", ()))
  wrong = {kind: len(group) for kind, group in kinds.items() if kind != "unexpected"}
  total = len(given.expected)
  told = [f"{total - sum(wrong.values())} fit"]
  told += [f"{count} {_COUNTED[kind]}" for kind, count in wrong.items()]
  text = f"Of the model's {total} tensors {', '.join(told)}."
  return f"{text} The file has {extra} more." if extra else text


_COUNTED = {
  "missing": "missing",
  "wrong shape": "of another shape",
  "wrong type": "of another type",
  "not finite": "not finite",
  "impossible": "with impossible values",
}


def _listed_in_file(file: str, problems: Collection[Problem]) -> str | None:
  """The path of a new file with all problems; None where none can be written."""
  with contextlib.suppress(OSError):
    handle, path = tempfile.mkstemp(".txt", "profit_jax_weights_")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as opened:
      opened.write(f"{file}\n")
      opened.writelines(f"{problem}\n" for problem in problems)
    return path
  return None


def _advice(given: Given, problems: Collection[Problem]) -> str:
  """Which kind of difference it is, and what to do about it."""
  section = "model" if given.role != "teacher" else "teacher"
  if told := _of_few(given, problems):
    return told
  field = "config.teacher.model" if section == "teacher" else "config.model.name"
  if given.recorded not in (None, given.model):
    return (
      f"It was trained as {given.recorded}: set {field}={given.recorded}, or use a file of "
      f"{given.model}."
    )
  like = _closest(given)
  if like is None:
    return _unknown(given)
  if like.model != given.model:
    width = _width(like, given)
    return (
      f"{_prefix(like)}Its tensors are those of {like.model}: set {field}={like.model}"
      f"{' and ' + width if width else ''}, or use a file of {given.model}."
    )
  if like.prefix:
    return (
      f"{_prefix(like)}Remove it: save {{name.removeprefix({like.prefix!r}): tensor}} for all "
      "tensors of that net."
    )
  if width := _width(like, given):
    return f"It has the names of {like.model} and other widths: set {width}, or use another file."
  if like.shapes >= _SAME:
    return f"Most of it is {like.model}. Use a file that has all tensors of this net and no others."
  return (
    f"Its names are those of {like.model}. Use the matching file, "
    f"config.{section}.width and number of classes."
  )


def _unknown(given: Given) -> str:
  """What to do about a file that no known net explains."""
  starts: collections.Counter[str] = collections.Counter()
  for name in given.expected:
    starts.update(name[:at] for at in _starts(name)[1:] if name[at:] in given.tensors)
  start, count = max(starts.items(), key=lambda item: item[1], default=("", 0))
  if count > _ALIKE * len(given.tensors):
    return (
      f"It is a part of {given.model}: its names lack {start!r}. Use a file of the whole net, with "
      "its whole names."
    )
  section = "model" if given.role != "teacher" else "teacher"
  return (
    f"No known net has these names. Use a file of {given.model}, with the matching "
    f"config.{section}.width and number of classes."
  )


def _of_few(given: Given, problems: Collection[Problem]) -> str:
  """Of a file whose net is right, what else is wrong; "" of others."""
  if all(p.kind == "wrong shape" and p.tensor in given.head for p in problems):
    return _other_classes(given)
  if {("missing", name) for name in given.head} == {(p.kind, p.tensor) for p in problems}:
    return _no_classifier(given)
  if all(p.tensor.rpartition("/")[2].startswith(PREFIX) for p in problems):
    return "Its quantizers are others. Set config.quant as it was in its run, or use another file."
  if all(p.kind == "wrong type" for p in problems):
    return (
      "Only the type of its numbers is wrong, as of quantized weights. Save them as float32: "
      "{name: tensor.float()}; or use the file from before their conversion."
    )
  if all(p.kind in _VALUES for p in problems):
    return (
      "Only values are wrong, which no training leaves: it was damaged, or its training diverged. "
      "Use another file."
    )
  return ""


def _other_classes(given: Given) -> str:
  theirs = [
    there
    for name in given.head
    for there, here in zip(given.tensors[name].shape, given.expected[name], strict=False)
    if there != here
  ]
  told = f"Only its number of classes differs: {theirs[0]}, not {given.classes}."
  if given.role == "teacher":
    return f"{told} A teacher needs those of the data, {given.classes}."
  if given.role == "library":
    return f"{told} Load it into a model of its classes, and leave out the variables of the head."
  return f"{told} config.init.reset_head=True starts with a new classifier."


def _no_classifier(given: Given) -> str:
  told = "Only its classifier is missing."
  if given.role == "student":
    return f"{told} config.init.reset_head=True starts with a new classifier."
  return f"{told} Use a file that has one."


def _prefix(like: Likeness) -> str:
  if not like.prefix:
    return ""
  return f"Its names have {like.prefix!r} before those of {like.model}. "


def _width(like: Likeness, given: Given) -> str:
  """What to set for a file of another width; "" where it has the model's."""
  section = "teacher" if given.role == "teacher" else "model"
  if like.width is None or "width" not in options(like.model):
    return ""
  known = {
    float(told["width"])
    for naming in REGISTRY[like.model].names
    for told in naming.variants.values()
    if "width" in told
  }
  close = [width for width in known if abs(math.log(like.width / width)) < _CLOSE]
  width = min(close, key=lambda width: abs(width - like.width), default=round(like.width, 2))
  told = f"config.{section}.width={width:g}"
  rounding = given.naming.settings.get("channel_rounding")
  if rounding and like.model == given.model:
    told += f" and config.{section}.channel_rounding={rounding}"
  return told


def _closest(given: Given) -> Likeness | None:
  """The model whose kernels a file has most in common with; None where there are few."""
  kernels = {name: value.shape for name, value in given.tensors.items() if value.ndim >= 2}
  expected = {name: shape for name, shape in given.expected.items() if len(shape) >= 2}
  configured = _likeness(given.model, expected, kernels)._replace(width=None)
  found = [
    _likeness(model, names, kernels)
    for model in _candidates(given.model)
    for names in _kernel_names(model)
  ]
  best = max(
    found or [configured],
    key=lambda like: (round(like.names, 2), like.shapes, like.model == given.model),
  )
  if configured.names >= best.names and configured.shapes >= _SAME:
    best = configured
  elif best.model == given.model and best.shapes >= _SAME:
    best = best._replace(width=1.0)  # that of the index
  return best if best.names >= _ALIKE else None


def _likeness(model: str, names: Shapes, kernels: Shapes) -> Likeness:
  """How much kernels in a file have in common with those of a model under some names."""
  counts: collections.Counter[str] = collections.Counter()
  most = max((len(_starts(name)) for name in names), default=1)
  for name in kernels:
    counts.update(name[:at] for at in _starts(name)[-most:] if name[at:] in names)
  if not counts:
    return Likeness(model)
  prefix, common = max(counts.items(), key=lambda item: (item[1], -len(item[0])))
  there = {name: kernels[prefix + name] for name in names if prefix + name in kernels}
  others = sum(name.startswith(prefix) for name in kernels) - common
  same = sum(shape == names[name] for name, shape in there.items())
  # Of large kernels: small ones are rounded more.
  ratios = [
    max(shape) / max(names[name])
    for name, shape in there.items()
    if len(shape) == 4 and max(shape) >= _LARGE
  ]
  ratio = statistics.median(ratios) if ratios else 1.0
  return Likeness(
    model,
    prefix,
    common / (len(names) + others),
    same / len(names),
    ratio if abs(ratio - 1) > _CLOSE / 4 and same < _SAME * len(there) else None,
  )


def _starts(name: str) -> list[int]:
  """Where the parts of a tensor's name begin."""
  return [0, *(at + 1 for at, letter in enumerate(name) if letter in "./")]


def _candidates(configured: str) -> list[str]:
  """The models that a file may be of: those of this package, and a few of the user's."""
  known = kernel_index()
  others = [model for model in (configured, *REGISTRY) if model not in known]
  own = list(dict.fromkeys(others))[:_TRACED_AT_MOST]
  return [*own, *(model for model in REGISTRY if model in known)]


def _kernel_names(model: str) -> list[Shapes]:
  """The kernels of a model under each of its names, at width 1 and 1000 classes."""
  kernels = kernel_index().get(model)
  if kernels is None:
    try:
      kernels = kernels_of(model)
    except Exception:  # a model of a user is code that can raise anything
      return []
  paths: dict[Path, tuple[int, ...]] = {
    ("params", *layer.split("/"), KERNEL): tuple(shape) for layer, shape in kernels.items()
  }
  return [
    {
      name: naming.tensor_shape(path, paths[path])
      for path, name in naming.tensor_names(paths).items()
    }
    for naming in namings(model).values()
  ]


@functools.cache
def kernel_index() -> dict[str, dict[str, list[int]]]:
  """The shapes of the kernels of each model of this package, by layer, as `kernels_of`."""
  return json.loads(importlib.resources.files(__package__).joinpath(_DATA).read_text())


def kernels_of(model: str) -> dict[str, list[int]]:
  """The shapes of a model's kernels at its default settings, by layer; it is traced."""
  shapes: Any = describe(REGISTRY[model](num_classes=_CLASSES), _IMAGE).shapes
  flat = traverse_util.flatten_dict(shapes["params"])
  return {
    "/".join(path[:-1]): list(leaf.shape) for path, leaf in flat.items() if path[-1] == KERNEL
  }
