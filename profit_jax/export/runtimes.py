"""The lowest version of a runtime that opens a file: facts of `runtimes.json`, which
`tools/oldest_runtimes.py` measured by installing the versions.
"""

import functools
import json
import pathlib
import re
from collections.abc import Collection
from importlib import metadata
from typing import Any

from profit_jax.export.net import FLOAT_BITS

PATH = pathlib.Path(__file__).with_name("runtimes.json")
# Formats that the runtime itself writes: a newer one may write what no older one opens.
_WRITTEN_BY_RUNTIME = ("jax",)


@functools.cache
def facts() -> dict[str, Any]:
  """What was measured, as the tool's docstring describes it."""
  return json.loads(PATH.read_text())


def kernels_of(field_bits: int) -> str:
  """The name that the facts have for kernels of a width in the file: `int4`, or `float32`."""
  return "float32" if field_bits == FLOAT_BITS else f"int{field_bits}"


def lowest(name: str, field_bits: Collection[int]) -> str | None:
  """The lowest version that opens a file of these kernels and computes what the pinned one does.

  Args:
    name: of the format.
    field_bits: of the file's kernels, as `Layer.field_bits`.

  Returns:
    The version; None where it was not measured: for an unknown format or kind of kernel, and where
    a runtime writes the file that is newer than the tested ones.
  """
  if name in _WRITTEN_BY_RUNTIME and not _is_tested(name):
    return None
  measured = facts()["formats"].get(name, {}).get("kernels", {})
  found = [measured.get(kernels_of(bits), {}).get("lowest") for bits in field_bits]
  if not found or None in found:
    return None
  return max(found, key=number)


def _is_tested(name: str) -> bool:
  """Whether the installed runtime is no newer than those that were tried."""
  present = installed(facts()["formats"][name]["package"])
  return present is not None and number(present) <= number(tested(name)[-1])


def tested(name: str) -> list[str]:
  """The versions that were tried with files of a format, the oldest first."""
  return facts()["formats"].get(name, {}).get("versions", [])


def installed(package: str) -> str | None:
  """The installed version of a package; None where there is none, or under another name."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def number(version: str) -> tuple[int, ...]:
  """A version for comparisons: its first three numbers."""
  return tuple(map(int, re.findall(r"\d+", version)[:3]))
