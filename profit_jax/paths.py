"""Paths that users give: local, or of a file system that `etils.epath` opens (`gs://`)."""

import os
import urllib.parse

from etils import epath

from profit_jax.config import ConfigError


def opened(what: str, path: str) -> epath.Path:
  """The place of a path, absolute where it is local; whether anything is there, its caller asks.

  Args:
    what: the path is, as a message begins: `--workdir`.
    path: not empty.

  Raises:
    ConfigError: a file system that nobody knows, or that does not answer.
  """
  try:
    place = epath.Path(path if "://" in path else os.path.abspath(path))
    place.exists()
    return place
  # Remote file systems have their own, and epath raises KeyError('s4://').
  except Exception as error:
    told = " ".join(str(error).split())[:300]
    raise ConfigError(
      f"{what} {path!r} cannot be reached: {told}. It must be a local path, or one of a file "
      "system that can be opened "
      f"from here, as gs://BUCKET/NAME."
    ) from error


def require_file(what: str, path: str, instead: str) -> None:
  """Checks that a local path is a file.

  Args:
    what: it is, as a message begins: `--config=`.
    path: the path.
    instead: what the user should give, as a sentence.

  Raises:
    ConfigError: there is no file.
  """
  if os.path.isfile(path):
    return
  problem = "is a directory, not a file" if path and os.path.isdir(path) else "does not exist"
  raise ConfigError(f"{what}{path or repr(path)} {problem}. {instead}")


def without_file_scheme(path: str) -> str:
  """The local path that a `file:` URL names; other paths stay as they are."""
  parts = urllib.parse.urlsplit(path) if path.lower().startswith("file:/") else None
  if parts is None or parts.netloc not in ("", "localhost"):
    return path
  return urllib.parse.unquote(parts.path, errors="surrogateescape")


def read_file(path: str | os.PathLike) -> bytes:
  """The content of a local file.

  Raises:
    ConfigError: no regular file, or one that cannot be read.
  """
  # A special file, as a pipe, would be waited for.
  if os.path.exists(path) and not os.path.isfile(path):
    what = "a directory" if os.path.isdir(path) else "a special file"
    raise ConfigError(f"{os.fspath(path)!r} is {what}. Give a file.")
  try:
    with open(path, "rb") as file:
      return file.read()
  except OSError as error:
    raise ConfigError(f"{os.fspath(path)!r} cannot be read: {error.strerror}.") from error
