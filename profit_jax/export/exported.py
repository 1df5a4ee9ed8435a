"""Exported files on disk: what a file is, checked against its card, and its runtime."""

import hashlib
import inspect
import os
from typing import Any, NamedTuple

from profit_jax import paths
from profit_jax.config import ConfigError
from profit_jax.export import card, formats, runtimes


class ExportedFile(NamedTuple):
  """A file whose bytes are those of its card.

  Attributes:
    path: of the file.
    format: as `formats.FORMATS` names it.
    card: its content.
  """

  path: str
  format: str
  card: dict[str, Any]

  @property
  def of_pictures(self) -> bool:
    """Whether the card says how pictures are prepared; files of `profit_jax.export` take arrays."""
    pixels = self.card["input"]
    return pixels["type"] == "uint8" and {"crop_pct", "interpolation"} <= pixels.keys()


def read(path: str | os.PathLike) -> ExportedFile:
  """Checks a file.

  Raises:
    ConfigError: no format has its suffix, it does not exist, there is no card, or the card is that
      of other bytes.
  """
  name = formats.of_file(path)
  if not os.path.exists(path):
    raise ConfigError(
      f"{os.fspath(path)!r} does not exist. Give a file that profit export or profit_jax.export "
      "wrote."
    )
  own = hashlib.sha256(paths.read_file(path)).hexdigest()
  content = card.read(path)
  if own != content["sha256"]:
    raise ConfigError(
      f"{os.fspath(path)!r} is not the file that its card describes: other bytes. Export it again."
    )
  return ExportedFile(os.fspath(path), name, content)


def opened(file: ExportedFile, threads: int | None = None) -> formats.Runner:
  """A file in its runtime.

  Args:
    file: checked.
    threads: of the runtime; None leaves it to it.

  Raises:
    ConfigError: the runtime is not installed, too old, or does not open the file; or its threads
      cannot be set.
  """
  module = formats.load(file.format)
  options = {}
  if threads is not None:
    if "threads" not in inspect.signature(module.open_file).parameters:
      raise ConfigError(
        f"threads={threads} is not allowed for {file.path!r}: the runtime of format {file.format} "
        "takes its number from the process. Leave it out, and restrict the process, as with "
        "taskset -c 0."
      )
    options["threads"] = threads
  _require_version(file)
  try:
    return module.open_file(file.path, **options)
  except ConfigError:
    raise
  except Exception as error:  # its bytes are the card's: it is the versions that differ
    text = " ".join(str(error).split())
    raise ConfigError(
      f"{file.path!r} cannot be opened with the versions installed here: {text} It was "
      f"exported with {_versions(file)}. Export the run again, or install those."
    ) from error


def _require_version(file: ExportedFile) -> None:
  """Raises ConfigError where the runtime is older than the lowest version that the card names.

  Not left to the runtime: an old one may open a file and compute something else.
  """
  package = formats.FORMATS[file.format].opened_by
  lowest = file.card.get("runtime_check", {}).get("lowest")
  present = package and runtimes.installed(package)
  if lowest and present and runtimes.number(present) < runtimes.number(lowest):
    raise ConfigError(
      f"{file.path!r} cannot be opened with {package} {present}: it needs version {lowest} or "
      f'later. Install it: pip install "{package}>={lowest}". The file was exported with '
      f"{_versions(file)}."
    )


def _versions(file: ExportedFile) -> str:
  return ", ".join(f"{package} {version}" for package, version in file.card["versions"].items())
