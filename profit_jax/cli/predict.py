"""Classifies images with an exported file: profit predict FILE IMAGE... (prints the top 5).

Pictures are prepared as the run's evaluation prepared them. A model of `profit_jax.Trainer` was
trained on a program's own arrays: it takes .npy files of them instead.
"""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from profit_jax import paths
from profit_jax.cli import command
from profit_jax.config import ConfigError
from profit_jax.data.picture import orientation, read_picture
from profit_jax.export import exported, formats

_AT_ONCE = 16
_PRINTED = 5

TopClasses = list[tuple[str, float]]


def predict(
  file: str | os.PathLike, images: Sequence[str | os.PathLike], exif: bool = False
) -> Iterator[TopClasses]:
  """Classifies images.

  Args:
    file: exported, its card beside it.
    images: paths of image files, or of `.npy` files with one array as the model takes it, or
      several `[N, H, W, C]`.
    exif: whether an EXIF orientation is applied. Training ignores it.

  Returns:
    Of each image the five most probable classes, best first: their names (numbers, where the data
    has no names) and probabilities, 0 to 1.

  Raises:
    ConfigError: a file that is no exported model or not the one of its card, or an image that is
      none, or not as the model takes it.
  """
  return (best for _, best in _classified(file, images, exif, []))


def _classified(
  file: str | os.PathLike, images: Sequence[str | os.PathLike], exif: bool, turned: list[str]
) -> Iterator[tuple[str, TopClasses]]:
  """As `predict`, with a name for each image. `turned` gets the names of those with an EXIF
  orientation, before the first one is classified.
  """
  exported_file = exported.read(file)
  content = exported_file.card
  classes = content["class_names"] or list(map(str, range(content["num_classes"])))
  named: list[tuple[str, np.ndarray]] = []
  for image in images:
    if os.fspath(image).lower().endswith(".npy"):
      named += _arrays(os.fspath(image), content["input"])
      continue
    named.append((os.fspath(image), _picture(image, exported_file, exif)))
    turned += [os.fspath(image)] if orientation(paths.read_file(image)) != 1 else []
  runner = exported.opened(exported_file)
  # All batches have one size, so that JAX compiles one program.
  size = min(_AT_ONCE, len(named))
  for first in range(0, len(named), size):
    names, arrays = zip(*named[first : first + size], strict=True)
    batch = np.stack(arrays)
    padding = [(0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)]
    logits, _ = runner.run(np.pad(batch, padding))
    for of, row in zip(names, np.float64(logits[: len(batch)]), strict=True):
      probabilities = np.exp(row - row.max())
      probabilities /= probabilities.sum()
      best = np.argsort(-row, kind="stable")[:_PRINTED]
      yield of, [(classes[index], float(probabilities[index])) for index in best]


def _picture(path: str | os.PathLike, file: exported.ExportedFile, exif: bool) -> np.ndarray:
  """An image file as the model takes it."""
  pixels = file.card["input"]
  if not file.of_pictures:
    raise ConfigError(
      f"{os.fspath(path)!r} cannot be given to {file.path!r}: its model was trained on a "
      f"program's own arrays, and its card does not say how they are made of pictures. Give .npy "
      f"files with {_taken(pixels)}, made as in training."
    )
  return read_picture(path, pixels["image_size"], pixels["crop_pct"], pixels["interpolation"], exif)


def _arrays(name: str, pixels: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
  content = io.BytesIO(paths.read_file(name))
  try:
    array = np.lib.format.read_array(content, allow_pickle=False)
  # Of a damaged header, numpy takes what it says for Python's syntax, and for the memory needed.
  except (ValueError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
    raise ConfigError(
      f"{name!r} cannot be read: it is cut off, or no array of numbers that numpy.save wrote."
    ) from error
  shape, dtype = tuple(pixels["shape"]), np.dtype(pixels["type"])
  alone = array.shape == shape
  fits = array.dtype == dtype or (dtype.kind == "f" and array.dtype.kind == "f")
  if not fits or not (alone or (array.shape[1:] == shape and len(array))):
    raise ConfigError(
      f"{name!r} has {array.dtype} of the shape {list(array.shape)}: the model takes "
      f"{_taken(pixels)}."
    )
  array = array.astype(dtype)
  if not np.isfinite(array).all():
    raise ConfigError(f"{name!r} has NaN or infinity. Remove them.")
  if alone:
    return [(name, array)]
  return [(f"{name}[{index}]", image) for index, image in enumerate(array)]


def _taken(pixels: dict[str, Any]) -> str:
  """What a model takes, in words."""
  shape = ", ".join(map(str, pixels["shape"]))
  return f"{pixels['type']} of the shape [{shape}] or [N, {shape}]"


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = command.parser("predict", __doc__)
  parser.add_argument(
    "file", help=f"exported: {', '.join(format.suffix for format in formats.FORMATS.values())}"
  )
  parser.add_argument("images", nargs="+", help="image files; or .npy files of arrays")
  parser.add_argument(
    "--exif",
    action="store_true",
    help="turn images by their EXIF orientation, as training does not",
  )

  def execute(options):
    turned: list[str] = []
    for image, best in _classified(options.file, options.images, options.exif, turned):
      if turned and not options.exif:
        _tell_turned(turned)
      turned.clear()
      print(_shown(image))
      for name, probability in best:
        print(f"  {100.0 * probability:6.2f} %  {name}")

  return command.run(parser, arguments, execute)


def _tell_turned(names: list[str]) -> None:
  some = ", ".join(map(_shown, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")
  print(
    f"The EXIF orientation is ignored, as in training; --exif applies it: {some}", file=sys.stderr
  )


def _shown(name: str) -> str:
  """A file's name without bytes that are not UTF-8, which a terminal does not take."""
  return name.encode(errors="backslashreplace").decode()
