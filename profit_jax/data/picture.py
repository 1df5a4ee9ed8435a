"""Pictures as the evaluation prepares them, by PIL alone: for one at a time, where TensorFlow would
take seconds to import.

Pixels agree with `preprocess.center_crop`'s as far as PIL's scaling agrees with TensorFlow's; a
test states how far.
"""

import os
from typing import Literal

import numpy as np
from PIL import Image

from profit_jax.config import ConfigError
from profit_jax.data.base import LONGEST

_KERNELS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def read_picture(
  path: str | os.PathLike, size: int, share: float, interpolation: Literal["bicubic", "bilinear"]
) -> np.ndarray:
  """The centre of a picture as uint8 `[size, size, 3]`: its shorter side is scaled to
  `size / share`.

  Raises:
    ConfigError: no picture.
  """
  try:
    with Image.open(path) as image:
      # Transparency is dropped, as in training: PIL would paste a palette's onto black.
      image = (
        image.convert("RGBA").convert("RGB")
        if "transparency" in image.info
        else image.convert("RGB")
      )
  except Exception as error:  # of a damaged file PIL raises whatever its decoders stumble over
    raise ConfigError(
      f"{os.fspath(path)!r} is not an image that can be read: {error}. Give JPEG or PNG files."
    ) from error
  width, height = image.size
  longest = LONGEST * min(image.size)
  left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
  image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
  shorter = round(size / share)
  target = tuple(shorter * side // min(image.size) for side in image.size)
  image = image if image.size == target else image.resize(target, _KERNELS[interpolation])
  left, top = (round((side - size) / 2) for side in target)
  return np.asarray(image.crop((left, top, left + size, top + size)))
