"""What the bytes of an image mean, by Pillow alone: training, evaluation, `predict` and the check
of an export all see the pixels of `decode`.

`preprocess` decodes plain JPEG and PNG files with TensorFlow, which is faster and gives the same
pixels; everything else comes here. `docs/data.md` has the table of what is read and how.
"""

import io
import os
import re
import struct
import warnings
import zlib
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, features

from profit_jax import paths
from profit_jax.config import ConfigError
from profit_jax.data.base import LONGEST

# Names of files that are taken for images; what they hold is decided by their content.
SUFFIXES = (
  *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng"),
  *(".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
  *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Of all that Pillow opens, what has a signature and no program inside; EPS would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
_KERNELS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# What makes an image upright, by its EXIF orientation.
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # EXIF's tag
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags, and a value of the second
# As `warnings.filters` has it: what Pillow's own files say, not what is said of those that call it.
_OF_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

# Kinds by their first bytes. Those that are read, with the feature that Pillow may lack.
_READ = (
  ("JPEG", rb"\xff\xd8\xff", None),
  ("PNG", rb"\x89PNG\r\n\x1a\n", None),
  ("WebP", rb"RIFF....WEBP", "webp"),
  ("GIF", rb"GIF8", None),
  ("BMP", rb"BM", None),
  ("TIFF", rb"II[*+]\x00|MM\x00[*+]", None),
  ("AVIF", rb"....ftypavi[fs]", "avif"),
  ("JPEG 2000", rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "jpg_2000"),
  ("PPM", rb"P[1-6]\s", None),
)
_CONVERT = "which is not read: convert it to JPEG or PNG"
# Those that are not.
_UNREAD = (
  (rb"version https://git-lfs", "it is a Git LFS pointer: git lfs pull fetches the image"),
  (rb"....ftyp(hei|hev|mif1|msf1)", f"it is HEIC, {_CONVERT}"),
  (rb"....ftypcrx |FUJIFILMCCD-RAW", f"it is a camera's raw file, {_CONVERT}"),
  (rb"....ftyp", "it is a film"),
  (rb"RIFF....AVI |\x1aE\xdf\xa3", "it is a film"),
  (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", f"it is JPEG XL, {_CONVERT}"),
  (rb"\x00\x00\x01\x00", f"it is ICO, {_CONVERT}"),
  (rb"8BPS", f"it is a Photoshop file, {_CONVERT}"),
  (rb"%PDF", f"it is PDF, {_CONVERT}"),
  (rb"%!PS", f"it is PostScript, {_CONVERT}"),
  (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ", "it is an archive"),
  (rb"\x00\x05\x16\x07", "it is a file in which macOS keeps attributes of another one"),
  (rb"\x93NUMPY", "it is an array of NumPy"),
  (rb"(?s:.{,1000})<svg", f"it is SVG, {_CONVERT}"),
  (rb"(\xef\xbb\xbf)?\s*<(.*<)?(!doctype html|html|head|body|title|script)\b", "it is a web page"),
  (rb"(\xef\xbb\xbf)?\s*<", "it is XML, as a storage service sends it in place of a file"),
  (rb"\s*[{\[]", "it is JSON, as a web service sends it in place of a file"),
)


class UnreadableImageError(ValueError):
  """Bytes that are no image which can be read; its text is a phrase that says why."""


def decode(content: bytes) -> np.ndarray:
  """The pixels of an encoded image as uint8 RGB `[H, W, 3]`; of several frames, the first.

  Raises:
    UnreadableImageError: no image that can be read.
  """
  try:
    return np.asarray(_rgb(_opened(content)))
  except UnreadableImageError:
    raise
  except Exception as error:  # of a damaged file Pillow raises whatever its decoders stumble over
    raise UnreadableImageError(_reason(content, error)) from error


def why_not_an_image(content: bytes) -> str:
  """Why bytes cannot be read as an image, in a phrase as "it is cut off"; "" where they can."""
  try:
    decode(content)
  except UnreadableImageError as error:
    return str(error)
  return ""


def orientation(content: bytes) -> int:
  """The EXIF orientation that `decode` ignores, 2 to 8; 1 where there is none."""
  _quiet()
  try:
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
      # Of a TIFF file it is part of the format: Pillow has turned the pixels.
      found = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION)
  except Exception:
    return 1
  return found if found in _TURNS else 1


def read_picture(
  path: str | os.PathLike,
  size: int,
  share: float,
  interpolation: Literal["bicubic", "bilinear"],
  turn: bool = False,
) -> np.ndarray:
  """A picture as the evaluation prepares it, scaled by Pillow: uint8 `[size, size, 3]`.

  Pixels agree with `preprocess.center_crop`'s as far as Pillow's scaling agrees with TensorFlow's;
  a test states how far.

  Args:
    path: of the file.
    size: of the square that is cut out of the centre.
    share: the shorter side is scaled to `size / share`.
    interpolation: of scaling.
    turn: whether the EXIF orientation is applied.

  Raises:
    ConfigError: no picture.
  """
  content = paths.read_file(path)
  try:
    image = Image.fromarray(decode(content))
  except UnreadableImageError as error:
    raise ConfigError(f"{os.fspath(path)!r} cannot be read as an image: {error}.") from error
  turned = orientation(content) if turn else 1
  image = image if turned == 1 else image.transpose(_TURNS[turned])
  return _center(image, size, share, interpolation)


def _center(image, size, share, interpolation):
  width, height = image.size
  longest = LONGEST * min(image.size)
  left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
  image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
  shorter = round(size / share)
  target = tuple(shorter * side // min(image.size) for side in image.size)
  image = image if image.size == target else image.resize(target, _KERNELS[interpolation])
  left, top = (round((side - size) / 2) for side in target)
  return np.asarray(image.crop((left, top, left + size, top + size)))


# Decoding.


def _quiet():
  """Pillow warns of what it makes the best of (a damaged directory of frames, odd tags, more than
  89 megapixels), without the file's name.
  """
  # Not `catch_warnings`, which changes the filters of other threads. Only where it is not the first
  # one: a new filter makes Python forget which warnings it has shown.
  if warnings.filters[:1] != [_OF_PILLOW]:
    warnings.filterwarnings("ignore", module=_OF_PILLOW[3].pattern)


def _opened(content):
  _quiet()
  try:
    return _loaded(content)
  except Image.DecompressionBombError:
    raise
  except Exception:
    if _kind(content) != "PNG":
      raise
    return _loaded(_mended(content))


def _loaded(content):
  with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
    image.load()
    return image


def _rgb(image):
  """Of an image of any mode, RGB or what Pillow makes of RGB values of 16 bits: their high byte."""
  tags = getattr(image, "tag_v2", {})
  if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
    # Pillow would cut off what is above 255.
    bits = tags.get(_BITS, (16,))[0]
    gray = np.uint8(np.asarray(image) >> (bits - 8))
    image = Image.fromarray(~gray if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else gray)
  elif image.mode in ("I", "F"):
    raise UnreadableImageError(
      "its values have signs or 32 bits, and nothing says which is white: convert it to 8 bits"
    )
  elif image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
    # Adobe's programs write inks inverted, and their marker. Pillow takes all files for theirs.
    image = ImageChops.invert(image)
  elif image.mode == "La":  # Pillow converts it to its like alone
    image = image.convert("LA")
  elif image.mode == "P" and "transparency" in image.info:
    # Transparency is dropped, and colours below it are kept: Pillow would make them black.
    image = image.convert("RGBA")
  return image.convert("RGB")


def _mended(content):
  """A PNG with checksums that are right, and without chunks that hold no pixels."""
  at, found, parts = 8, {}, []
  while at < len(content):
    (length,), kind = struct.unpack(">I", content[at : at + 4]), content[at + 4 : at + 8]
    body = content[at + 8 : at + 8 + length]
    if kind == b"IDAT":
      parts.append(body)
    else:
      found.setdefault(kind, body)
    at += 12 + length
  width, height = struct.unpack(">II", found[b"IHDR"][:8])
  # Deflated without its header and checksum; never more than 16 bits of four channels, and a byte
  # for each row of seven interlaced parts.
  most = 8 * width * height + 14 * height + 14
  unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
  rows = unpacker.decompress(b"".join(parts)[2:], most)
  if not unpacker.eof:
    raise UnreadableImageError("it is cut off")
  chunks = [(b"IHDR", found[b"IHDR"])]
  chunks += [(b"PLTE", found[b"PLTE"])] if b"PLTE" in found else []
  chunks += [(b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
  return content[:8] + b"".join(
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for kind, body in chunks
  )


# Reasons.


def _kind(content):
  return next((name for name, start, _ in _READ if re.match(start, content, re.DOTALL)), None)


def _reason(content, error):
  """Why bytes cannot be read, by what they are and by what Pillow said."""
  if not content:
    return "it is empty"
  if not content.strip(b"\0"):
    return "it holds nothing but zeros"
  if isinstance(error, Image.DecompressionBombError):
    pixels, most = (int(number) / 1e6 for number in re.findall(r"\d+", str(error))[:2])
    return f"its {pixels:.0f} megapixels are more than the {most:.0f} that Pillow allows"
  if isinstance(error, MemoryError):
    return "it does not fit into memory"
  for name, start, feature in _READ:
    if re.match(start, content, re.DOTALL):
      return _damage(name, feature, content, str(error))
  for start, phrase in _UNREAD:
    if re.match(start, content[:2000], re.DOTALL | re.IGNORECASE):
      return phrase
  return "it is text" if _is_text(content) else "it is of no kind of image that is read"


def _damage(kind, feature, content, said):
  if feature and not features.check(feature):
    return f"it is {kind}, which the installed Pillow does not read: install a newer one"
  if re.search("(?i)truncated|not enough|reached EOF|only got", said) or _ends_early(kind, content):
    return "it is cut off"
  return f"its {kind} data is damaged or of a rare kind"


def _ends_early(kind, content):
  """Whether a file is shorter than it says, or lacks its end."""
  tail, length = content[-64:], len(content)
  if kind in ("JPEG", "JPEG 2000"):
    return b"\xff\xd9" not in tail
  if kind == "TIFF":
    order = "little" if content[:2] == b"II" else "big"
    return int.from_bytes(content[4:8], order) >= length
  if kind == "AVIF":
    at = 0
    while length > at and (size := int.from_bytes(content[at : at + 4], "big")) >= 8:
      at += size
    return at > length
  return {
    "PNG": b"IEND" not in tail,
    "GIF": b";" not in tail,
    "WebP": int.from_bytes(content[4:8], "little") + 8 > length,
    "BMP": int.from_bytes(content[2:6], "little") > length,
  }.get(kind, False)


def _is_text(content):
  # The first 1,000 bytes may end inside a character.
  start = content[:1000].decode("utf-8", "ignore")
  return bool(start) and all(character.isprintable() or character.isspace() for character in start)
