"""What lies in a directory, local or remote. Names are bytes: those on a disk need not be UTF-8."""

import collections
import concurrent.futures
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from profit_jax.config import ConfigError
from profit_jax.data.picture import SUFFIXES
from profit_jax.data.records import one_line

_ENDINGS = tuple(suffix.encode() for suffix in SUFFIXES)
# What browsers, file servers and operating systems leave beside images, in lower case. Names that
# begin with a dot are hidden too.
_HIDDEN = {
  *(b"@eadir", b"@recycle", b"#recycle", b"$recycle.bin", b"__macosx", b"__pycache__"),
  *(b"lost+found", b"system volume information", b"desktop.ini", b"thumbs.db", b"ehthumbs.db"),
}
_NAMED = 10  # in an error
# Requests at a time: a directory on a network answers after milliseconds.
_AT_ONCE = 16


class Entries(NamedTuple):
  """A directory without its hidden entries; names are sorted.

  Attributes:
    images: regular files, or links to some, whose names end like an image's.
    identities: of the images, a number each; the same file has the same one, and different files
      rarely have. Empty where the file system is remote.
    folders: directories, or links to some.
    files: other files.
    broken: links whose target is missing or cannot be reached.
    special: FIFOs, sockets and devices. Reading one may wait forever.
  """

  images: list[bytes]
  identities: list[int]
  folders: list[bytes]
  files: list[bytes]
  broken: list[bytes]
  special: list[bytes]


def is_remote(path: bytes) -> bool:
  """Whether a path is of a file system that TensorFlow opens, as `gs://`."""
  return b"://" in path


def entries(path: bytes) -> Entries:
  """Lists a directory.

  Raises:
    ConfigError: it cannot be listed.
  """
  try:
    return _remote_entries(path.decode()) if is_remote(path) else _local_entries(path)
  except tf.errors.OpError as error:
    told = one_line(error)
  except OSError as error:
    told = error.strerror or str(error)
  raise ConfigError(f"{shown(path)} cannot be listed: {told}.")


def _local_entries(path):
  device = os.stat(path).st_dev << 48
  images, found = [], collections.defaultdict(list)
  with os.scandir(path) as listing:
    for entry in listing:
      name = entry.name
      if _is_hidden(name):
        continue
      kind = _kind(entry)
      if kind == "images":
        # Links were followed to learn their kind. Of a file, the directory has its number.
        place = entry.stat() if entry.is_symlink() else None
        number = place.st_ino ^ (place.st_dev << 48) if place else entry.inode() ^ device
        images.append((name, number & 2**63 - 1))
      else:
        found[kind].append(name)
  images.sort()
  names, identities = [name for name, _ in images], [number for _, number in images]
  return _sorted(names, identities, found)


def _kind(entry):
  # The directory tells the kind of all but links.
  try:
    if entry.is_file():
      return "images" if _is_image(entry.name) else "files"
    if entry.is_dir():
      return "folders"
    entry.stat()
    return "special"
  except OSError:
    return "broken"


def _remote_entries(path):
  names, found, unknown = [], collections.defaultdict(list), []
  for text in tf.io.gfile.listdir(path):
    name = text.rstrip("/").encode()
    if not name or _is_hidden(name):
      continue
    if text.endswith("/"):
      found["folders"].append(name)
    else:
      (names if _is_image(name) else unknown).append(name)
  # Not all file systems end the names of directories with a slash.
  asked = at_once(lambda name: tf.io.gfile.isdir(f"{path}/{name.decode()}"), unknown)
  for name, is_folder in zip(unknown, asked, strict=True):
    found["folders" if is_folder else "files"].append(name)
  return _sorted(sorted(names), [], found)


def _sorted(images, identities, found):
  rest = (sorted(found[kind]) for kind in ("folders", "files", "broken", "special"))
  return Entries(images, identities, *rest)


def _is_hidden(name):
  return name.startswith(b".") or name.lower() in _HIDDEN


def _is_image(name):
  return name.lower().endswith(_ENDINGS)


def is_directory(path: bytes) -> bool:
  """Whether a path is that of a directory or of a link to one.

  Raises:
    ConfigError: a remote file system does not answer.
  """
  try:
    return tf.io.gfile.isdir(path.decode()) if is_remote(path) else os.path.isdir(path)
  except ValueError:  # a null byte
    return False
  except tf.errors.OpError as error:
    raise ConfigError(f"{shown(path)} cannot be reached: {one_line(error)}.") from error


def content(path: bytes) -> bytes:
  """Reads a file.

  Raises:
    OSError, tf.errors.OpError: it cannot be read.
  """
  if is_remote(path):
    with tf.io.gfile.GFile(path.decode(), "rb") as file:
      return file.read()
  with open(path, "rb") as file:
    return file.read()


def at_once(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
  """Results of a function that waits for files, in the order of the items."""
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    return list(pool.map(function, items))


def shown(path: bytes) -> str:
  """A path or name for a message: printable, on one line."""
  text = path.decode("utf-8", "backslashreplace")
  if text.isprintable():
    return text
  return "".join(
    char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
  )


def shown_names(names: Sequence[bytes], count: int = _NAMED) -> str:
  """The first names of a list, for a message."""
  return ", ".join(map(shown, names[:count])) + (", ..." if len(names) > count else "")


def normal_form(name: bytes) -> str:
  """The same for all Unicode forms of a name."""
  return unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape"))
