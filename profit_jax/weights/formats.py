"""What a file is, by its content: weights that are read, or something else, which is named.

Suffixes do not count: browsers and file servers change them, and each codebase has others.
"""

import codecs
import gzip
import io
import itertools
import json
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from etils import epath

from profit_jax.fields import listed

Kind = Literal["safetensors", "npz", "torch", "index"]
CALLED: Mapping[Kind, str] = {
  "safetensors": "a .safetensors file",
  "npz": "an .npz file",
  "torch": "a PyTorch file",
  "index": "the index of a sharded file",
}
TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".pth.tar")
# What a damaged file is taken for, whose content does not tell.
_KINDS: Mapping[str, Kind] = {
  ".safetensors": "safetensors",
  ".npz": "npz",
  **dict.fromkeys(TORCH_SUFFIXES, "torch"),
}
# Where a directory has its weights, as Hugging Face's libraries write it; the first one counts.
_IN_DIRECTORIES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
# Of all tensors of a file, unpacked; the largest model here has 0.2e9 bytes.
_LARGEST = 4_000_000_000
# A packed file may have this many bytes, and this many times its size; weights hardly shrink.
_ALWAYS_UNPACKED, _LARGEST_RATIO = 64_000_000, 100
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_PACKINGS = 3  # a .zip in a .gz, and so on
_SHOWN = 5  # names, in a message
_SHOWN_TEXT = 80  # characters of a text or a name in a file
_BEGINNING = 4096  # bytes that tell what a file is

_PLAIN = "In PyTorch, save the plain weights: "
_STATE_DICT = f"{_PLAIN}torch.save(model.state_dict(), FILE)."
_KERAS = (
  "which is not read. timm has many of TensorFlow's nets for PyTorch (tf_*), as "
  "hf:timm/tf_mobilenetv3_large_100.in1k; or write the tensors under the names of docs/weights.md "
  "into an .npz."
)
_AS_NPZ = "Write its tensors under the names of docs/weights.md into an .npz."
_UNPACK = "Unpack it, and give the weights file in it."
TENSORFLOW_CHECKPOINT = f"is a TensorFlow checkpoint, {_KERAS}"
# What other files begin with -> what is said of them.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
  (b"\x89HDF\r\n\x1a\n", f"is an HDF5 file, as Keras writes (.h5), {_KERAS}"),
  (b"\x93NUMPY", "holds a single array without a name (.npy). Save named ones with numpy.savez."),
  (b"BZh", f"is packed with bzip2. {_UNPACK}"),
  (b"\xfd7zXZ\x00", f"is packed with xz. {_UNPACK}"),
  (b"\x28\xb5\x2f\xfd", f"is packed with zstd. {_UNPACK}"),
  (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive. {_UNPACK}"),
  (b"Rar!", f"is a RAR archive. {_UNPACK}"),
  (b"GGUF", f"is a GGUF file, which is not read. {_STATE_DICT}"),
  (b"%PDF", "is a PDF document, not weights. Download the file again."),
  (b"\x89PNG\r\n", "is an image (PNG), not weights. Download the file again."),
  (b"\xff\xd8\xff", "is an image (JPEG), not weights. Download the file again."),
)
# Entries of zip archives that are no weights -> what is said of the file.
_ENTRIES: tuple[tuple[str, str], ...] = (
  (
    r"(.*/)?(constants\.pkl|code/.*\.py)",
    f"is a TorchScript archive, which holds code. {_PLAIN}"
    "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE).",
  ),
  (
    r"(.*/)?(archive_format|serialized_exported_program\.json)",
    f"is an exported program (torch.export, .pt2), which holds a graph. {_PLAIN}"
    "torch.save(torch.export.load(FILE).state_dict, NEW_FILE).",
  ),
  (
    r"(.*/)?\.data/extern_modules",
    f"is a package of torch.package, which holds code. {_STATE_DICT}",
  ),
  (r"model\.weights\.h5", f"is a Keras model (.keras), {_KERAS}"),
  (r"(.*/)?saved_model\.pb", f"is a TensorFlow SavedModel, {_KERAS}"),
)
# Entries of directories, likewise.
_IN_OTHER_DIRECTORIES: tuple[tuple[str, str], ...] = (
  (r"saved_model\.pb", f"is a TensorFlow SavedModel, {_KERAS}"),
  (r".*\.data-\d{5}-of-\d{5}", f"holds a TensorFlow checkpoint, {_KERAS}"),
  (r"_CHECKPOINT_METADATA", f"is an Orbax checkpoint, which is not read. {_AS_NPZ}"),
)


class RefusedError(ValueError):
  """A file is no weights, or holds none that can be read: what it is, and what to do. The message
  follows the file's name.
  """


class Recognised(NamedTuple):
  """A file of weights.

  Attributes:
    kind: its format; `index` names the files that hold the tensors.
    content: unpacked.
  """

  kind: Kind
  content: bytes


def recognised(content: bytes, name: str) -> Recognised | None:
  """The format of a file, and its content without what it was packed with.

  Args:
    content: of the file.
    name: of the file; its suffix counts where the content tells nothing.

  Returns:
    None where nothing tells.

  Raises:
    RefusedError: the file is something else, or holds too much.
  """
  packings = 0
  while (kind := _kind(content)) in ("gzip", "zip"):
    packings += 1
    if packings > _MOST_PACKINGS:
      raise RefusedError(f"is packed more than {_MOST_PACKINGS} times. {_UNPACK}")
    content = _gunzipped(content) if kind == "gzip" else _only_weights_in(content)
  if kind is not None:
    return Recognised(kind, content)
  _refuse_others(content)
  suffix = next((suffix for suffix in _KINDS if name.lower().endswith(suffix)), None)
  return None if suffix is None else Recognised(_KINDS[suffix], content)


def _kind(content: bytes) -> Kind | Literal["gzip", "zip"] | None:
  if content[:2] == b"\x1f\x8b":
    return "gzip"
  if content[:4] == b"PK\x03\x04":
    return _kind_of_archive(content)
  # The length of the header, at most 100 MB, and the header, which is JSON.
  if content[4:9] == b"\0\0\0\0{":
    return "safetensors"
  if content[:1] == b"\x80" and content[1:2] in b"\2\3\4\5":
    return "torch"
  return "index" if content[:1] == b"{" and b'"weight_map"' in content else None


def _kind_of_archive(content: bytes) -> Kind | Literal["zip"] | None:
  try:
    names = [entry.filename for entry in _entries(content)]
  except zipfile.BadZipFile:
    return None  # cut off; its name tells what it should be
  for pattern, told in _ENTRIES:
    if any(re.fullmatch(pattern, name) for name in names):
      raise RefusedError(told)
  if any(PurePosixPath(name).name == "data.pkl" for name in names):
    return "torch"
  return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"


def _entries(content: bytes) -> list[zipfile.ZipInfo]:
  """The files in a zip archive, without those that macOS adds.

  Raises:
    RefusedError: they are packed in an unusual way, or would be too large.
  """
  entries = zipfile.ZipFile(io.BytesIO(content)).infolist()
  # The others' decoders unpack as much as they like at once.
  if any(entry.compress_type not in _ZIP_METHODS for entry in entries):
    raise RefusedError(f"is a zip archive that is not packed with deflate. {_UNPACK}")
  _check_unpacked(sum(entry.file_size for entry in entries), len(content))
  return [
    entry
    for entry in entries
    if not entry.is_dir()
    and not entry.filename.startswith("__MACOSX/")
    and PurePosixPath(entry.filename).name != ".DS_Store"
  ]


def _most_unpacked(size: int) -> int:
  return min(_LARGEST, _ALWAYS_UNPACKED + _LARGEST_RATIO * size)


def _check_unpacked(size: int, packed: int) -> None:
  if size > _most_unpacked(packed):
    raise RefusedError(
      f"would have {size} bytes unpacked: more than any model here, or than its {packed} bytes "
      "can honestly hold."
    )


def _gunzipped(content: bytes) -> bytes:
  with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
    unpacked = file.read(_most_unpacked(len(content)) + 1)
  _check_unpacked(len(unpacked), len(content))
  return unpacked


def _only_weights_in(content: bytes) -> bytes:
  """The one weights file in a zip archive that is none itself."""
  archive = zipfile.ZipFile(io.BytesIO(content))
  names = [entry.filename for entry in _entries(content)]
  found = []
  for name in names:
    with archive.open(name) as file:
      beginning = file.read(16)
    # A zip archive that is cut off here has no kind: what it holds is at its end.
    if beginning[:4] == b"PK\x03\x04" or _kind(beginning) not in (None, "index"):
      found.append(name)
  if len(found) == 1:
    return archive.read(found[0])
  if found:
    raise RefusedError(
      f"is a zip archive with {len(found)} weights files: {some(found)}. Unpack it, and give one."
    )
  raise RefusedError(f"is a zip archive without weights; it holds {some(names) or 'nothing'}.")


def some(names: Collection[str]) -> str:
  """The first of some names of a file, in a message of one line."""
  shown = [_in_one_line(name) for name in itertools.islice(names, _SHOWN)]
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return f"{listed(shown)}{more}"


def _refuse_others(content: bytes) -> None:
  """Says what a file without weights is."""
  beginning = content[:_BEGINNING]
  for magic, told in _BEGINNINGS:
    if beginning.startswith(magic):
      raise RefusedError(told)
  if not content:
    raise RefusedError(f"is empty. Download or copy it again; it must be one of {listed(_KINDS)}.")
  if not beginning.strip(b"\0"):
    raise RefusedError("holds only zero bytes: a download that did not finish. Fetch it again.")
  if beginning[257:262] == b"ustar":
    raise RefusedError(f"is a tar archive. {_UNPACK}")
  if beginning[4:8] == b"TFL3":
    raise RefusedError(f"is a TensorFlow Lite model, {_KERAS}")
  # TensorFlow's index of a checkpoint is a table of LevelDB.
  if content[-8:] == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb":
    raise RefusedError(TENSORFLOW_CHECKPOINT)
  # ONNX: the version of its format, at most 31, and then a text or a message.
  if re.match(rb"\x08[\x01-\x1f][\x12\x1a\x22\x32\x3a\x42]", beginning):
    raise RefusedError(f"is an ONNX model, which is not read. {_STATE_DICT}")
  # A map of a few texts.
  if re.match(rb"[\x81-\x8f][\xa1-\xbf][ -~]", beginning):
    raise RefusedError(f"is a MessagePack file, as Flax writes, which is not read. {_AS_NPZ}")
  _refuse_text(beginning)


def _refuse_text(beginning: bytes) -> None:
  """Names what a server or git has put in the place of a file."""
  text = _text(beginning)
  if text is None:
    return
  start = text.lstrip("\ufeff \t\r\n")
  shown = _in_one_line(start)
  if re.match(r"<!doctype html|<html|<head", start, re.IGNORECASE):
    title = re.search(r"<title[^>]*>(.*?)</title>", start, re.IGNORECASE | re.DOTALL)
    called = f" ({_in_one_line(title[1])!r})" if title else ""
    raise RefusedError(
      f"is a web page{called}, not weights. Download the file itself: its address is often behind "
      "a button or needs a login."
    )
  if start.startswith("version https://git-lfs"):
    raise RefusedError(
      "is a pointer of Git LFS, not the file that it stands for. Fetch that with `git lfs pull`."
    )
  if re.match(r"(\.\./)*\.git/annex/objects|/annex/objects", start):
    raise RefusedError(
      "is a pointer of git-annex, not the file that it stands for. Fetch that with `git annex get`."
    )
  told = _error_of_server(start)
  if told:
    raise RefusedError(
      f"is the answer of a server, not weights: {told!r}. Check the address and your access, and "
      "download the file again."
    )
  raise RefusedError(f"is a text, not weights; it begins {shown!r}. Download the file again.")


def _error_of_server(text: str) -> str | None:
  """The message in the XML or JSON with which storage services refuse a file."""
  if text.startswith("<"):
    found = re.findall(r"<(?:Code|Message)>(.*?)</", text, re.DOTALL)
    return _in_one_line(": ".join(found) or text)
  try:
    answer = json.loads(text)
  except (ValueError, RecursionError):
    return None
  if not isinstance(answer, dict):
    return None
  told = answer.get("error") or answer.get("message")
  told = told.get("message", told) if isinstance(told, dict) else told
  return _in_one_line(str(told)) if told else None


def _text(beginning: bytes) -> str | None:
  """The beginning of a file as text; None where it is none."""
  encoding = "utf-16" if beginning[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
  try:
    # The last character may be cut in two, which the incremental decoder allows.
    text = codecs.getincrementaldecoder(encoding)().decode(beginning)
  except UnicodeDecodeError:
    return None
  return text if all(c.isprintable() or c in "\ufeff\t\r\n" for c in text) else None


def _in_one_line(text: str) -> str:
  text = " ".join(text.split())
  return text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}..."


def weights_in(directory: epath.Path) -> epath.Path | None:
  """The weights in a directory that Hugging Face's libraries wrote; None where there are none."""
  found = (directory / name for name in _IN_DIRECTORIES)
  return next((path for path in found if path.exists()), None)


def told_of_directory(directory: epath.Path) -> str:
  """What to say of a directory without known weights; it follows the directory's name."""
  names = sorted(path.name for path in directory.iterdir())
  for pattern, told in _IN_OTHER_DIRECTORIES:
    if any(re.fullmatch(pattern, name) for name in names):
      return told
  files = [name for name in names if name.lower().endswith((*_KINDS, ".pkl"))]
  return f"is a directory: give one of its files, {some(files)}." if files else ""
