"""Fashion-MNIST from files on disk: the four files are checked by their content and given to
tensorflow-datasets (TFDS), without a network.

TFDS checks its downloads as compressed files. Debian's package `dataset-fashion-mnist` has the same
images, compressed without a file name in the header, which TFDS refuses.
"""

import gzip
import hashlib
import zlib

import numpy as np
from etils import epath

from profit_jax.config import ConfigError

NAME = "fashion_mnist"
# By split, its images and labels.
FILES = {
  "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
  "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# SHA-256 of the files, unpacked. Source: Debian's package. Its compressed data, with the header of
# the published files, has the MD5 sums that https://github.com/zalandoresearch/fashion-mnist lists.
SHA256 = {
  "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
  "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
  "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
  "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN = "Debian's package dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist."
_UNSIGNED_BYTES = 8  # the type of an idx file's values


def read(directory: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads the four files, each with or without `.gz`, and checks their content.

  Args:
    directory: that has them, local or remote.

  Returns:
    By split, images `[N, 28, 28, 1]` and labels `[N]`, uint8.

  Raises:
    ConfigError: a file that is missing, damaged, or of another data set.
  """
  place = epath.Path(directory)
  arrays = {}
  for split, names in FILES.items():
    images, labels = (_parse(_content(place, name)) for name in names)
    arrays[split] = images[..., None], labels
  return arrays


def _content(directory: epath.Path, name: str) -> bytes:
  """A file's content, unpacked and checked."""
  path = next((p for p in (directory / f"{name}.gz", directory / name) if p.exists()), None)
  if path is None:
    raise ConfigError(
      f"--manual_dir={directory} lacks {name}.gz (or {name}). Fashion-MNIST is the files "
      f"{', '.join(sum(FILES.values(), ()))}, each with or without .gz. {DEBIAN}"
    )
  try:
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
      content = gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    raise ConfigError(
      f"{path} cannot be read: {error or type(error).__name__}. The file is damaged or cut off. "
      f"Fetch it again. {DEBIAN}"
    ) from error
  found = hashlib.sha256(content).hexdigest()
  if found != SHA256[name]:
    raise ConfigError(
      f"{path} is not Fashion-MNIST's: it holds {_describe(content)}, whose SHA-256 is {found} "
      f"instead of {SHA256[name]}. MNIST and other sets have files of the same names. {DEBIAN}"
    )
  return content


def _shape(content: bytes) -> tuple[int, ...] | None:
  """The shape in the header of an idx file of bytes; None where there is no such header."""
  if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTES)):
    return None
  end = 4 + 4 * content[3]
  if len(content) < end:
    return None
  return tuple(int(size) for size in np.frombuffer(content[4:end], ">u4"))


def _describe(content: bytes) -> str:
  shape = _shape(content)
  if shape is None:
    return "no idx data"
  sizes = "x".join(map(str, shape))
  expected, present = int(np.prod(shape, dtype=object)), len(content) - 4 - 4 * len(shape)
  if present < expected:
    return f"{present} of the {expected} bytes that its header announces ({sizes}): it is cut off"
  return f"{sizes} other bytes"


def _parse(content: bytes) -> np.ndarray:
  """The array in an idx file of bytes."""
  shape = _shape(content)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
