"""Classifies pictures with an exported file: profit predict FILE IMAGE...
(prints the top 5).
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from profit_jax.cli import command
from profit_jax.config import ConfigError
from profit_jax.data.picture import read_picture
from profit_jax.export import card, formats

_AT_ONCE = 16
_PRINTED = 5


def predict(
  file: str | os.PathLike, images: Sequence[str | os.PathLike]
) -> Iterator[list[tuple[str, float]]]:
  """Classifies pictures.

  Args:
    file: exported, its card beside it.
    images: paths of JPEG or PNG files.

  Returns:
    Of each picture the five most probable classes, best first: their names (numbers, where the data
    has no names) and probabilities, 0 to 1.

  Raises:
    ConfigError: a file that is no exported model or not the one of its card, or a picture that is
      none.
  """
  name = formats.of_file(file)
  path = pathlib.Path(file)
  if not path.is_file():
    raise ConfigError(f"{os.fspath(file)!r} does not exist. Give a file that --mode export wrote.")
  content = card.read(file)
  if hashlib.sha256(path.read_bytes()).hexdigest() != content["sha256"]:
    raise ConfigError(
      f"{os.fspath(file)!r} is not the file that its card describes: other bytes. Export it again."
    )
  pixels, classes = (
    content["input"],
    content["class_names"] or list(map(str, range(content["num_classes"]))),
  )
  if pixels["type"] != "uint8" or not {"crop_pct", "interpolation"} <= pixels.keys():
    raise ConfigError(
      f"{os.fspath(file)!r} takes {pixels['type']} images {pixels['shape']} as its model was "
      "trained with, and its card does not say how they are made of pictures. Make them yourself, "
      f"and give them to profit_jax.export.formats.load({name!r}).open_file(file).run(images)."
    )
  pictures = [
    read_picture(image, pixels["image_size"], pixels["crop_pct"], pixels["interpolation"])
    for image in images
  ]
  runner = _opened(name, file, content)
  # All batches have one size, so that JAX compiles one program.
  size = min(_AT_ONCE, len(pictures))
  for first in range(0, len(pictures), size):
    batch = np.stack(pictures[first : first + size])
    logits, _ = runner.run(np.pad(batch, [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)]))
    for row in np.float64(logits[: len(batch)]):
      probabilities = np.exp(row - row.max())
      probabilities /= probabilities.sum()
      best = np.argsort(-row, kind="stable")[:_PRINTED]
      yield [(classes[index], float(probabilities[index])) for index in best]


def _opened(name: str, file: str | os.PathLike, content: dict[str, Any]) -> formats.Runner:
  module = formats.load(name)
  try:
    return module.open_file(file)
  except Exception as error:  # its bytes are the card's: it is the versions that differ
    versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    text = " ".join(str(error).split())
    raise ConfigError(
      f"{os.fspath(file)!r} cannot be opened with the versions installed here: {text} It was "
      f"exported with {versions}. Export the run again, or install those."
    ) from error


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = command.parser("predict", __doc__)
  parser.add_argument(
    "file", help=f"exported: {', '.join(format.suffix for format in formats.FORMATS.values())}"
  )
  parser.add_argument("images", nargs="+", help="JPEG or PNG files")

  def execute(options):
    for image, best in zip(options.images, predict(options.file, options.images), strict=True):
      print(image)
      for name, probability in best:
        print(f"  {100.0 * probability:6.2f} %  {name}")

  return command.run(parser, arguments, execute)
