"""Which label a class folder has: by the order of names, or of the lines of a file."""

import codecs
import collections
import re
from collections.abc import Iterable

import tensorflow as tf

from profit_jax.config import ConfigError
from profit_jax.data.listing import Entries, content, normal_form, shown, shown_names
from profit_jax.data.records import one_line

FILE = b"classes.txt"
_LONGEST = 60  # bytes of a line that an error shows
# What has the file's name and cannot be read, by the names of `Entries`.
_NO_FILE = {"folders": "a folder", "broken": "a broken link", "special": "no regular file"}


def is_file(name: bytes) -> bool:
  """Whether an entry of the root is the file that fixes the order; its name counts in any case."""
  return name.lower() == FILE


def given(root: bytes, inside: Entries, classes: Iterable[bytes]) -> list[bytes] | None:
  """The classes in the order of ROOT/classes.txt, None without that file.

  Args:
    root: the folder that may hold it.
    inside: what the folder holds.
    classes: names of the class folders.

  Raises:
    ConfigError: it cannot be read, or does not name each class once.
  """
  path, names = _path(root, inside), {*classes}
  if path is None:
    return None
  by_form = {normal_form(name): name for name in names}
  order = []
  for line in _lines(path):
    # Names of folders may begin and end with spaces.
    forms = normal_form(line), normal_form(line.strip())
    found = next((by_form[form] for form in forms if form in by_form), line.strip())
    order += [found] if found else []
  wrong = {
    "missing": sorted(names - {*order}),
    "no class folders": sorted({*order} - names),
    "more than once": [name for name, count in collections.Counter(order).items() if count > 1],
  }
  if any(wrong.values()):
    told = "; ".join(
      f"{what}: {shown_names([name[:_LONGEST] for name in those])}"
      for what, those in wrong.items()
      if those
    )
    raise ConfigError(
      f"{shown(path)} fixes the order of the classes and must hold each class folder's name once, "
      f"one a line. {told[0].upper()}{told[1:]}. Correct it, or remove it for the order of names."
    )
  return order


def _path(root, inside):
  for kind in ("files", *_NO_FILE):
    # The exact name first, if several differ in case.
    names = sorted(filter(is_file, getattr(inside, kind)), key=lambda name: name != FILE)
    if names and kind == "files":
      return root + b"/" + names[0]
    if names:
      raise ConfigError(
        f"{shown(root + b'/' + names[0])} is {_NO_FILE[kind]}, and must be a text file that fixes "
        "the order of the classes. Correct it, or remove it for the order of names."
      )
  return None


def _lines(path):
  try:
    text = content(path)
  except (OSError, tf.errors.OpError) as error:
    raise ConfigError(f"{shown(path)} cannot be read: {one_line(error)}.") from error
  if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Windows' shell writes it
    text = text.decode("utf-16", "replace").encode()
  return text.removeprefix(codecs.BOM_UTF8).splitlines()


def note(root: bytes, order: list[bytes]) -> str | None:
  """Tells that classes are numbers, whose order is not that of their names."""
  if not all(re.fullmatch(rb"[0-9]+", name) for name in order):
    return None
  if order == sorted(order, key=int):
    return None
  label = next(i for i, name in enumerate(order) if int(name) != i)
  return (
    f"The classes are numbered in the order of their names, {shown_names(order, 4)}: label {label} "
    f"is class {shown(order[label])}. If the loaded weights were trained with 0, 1, 2, 3, ..., "
    f"write the names in that order to {shown(root + b'/' + FILE)}, one a line."
  )
