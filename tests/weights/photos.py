"""The photographs of scikit-learn and scikit-image as a net for ImageNet sees them."""

import importlib.util
import pathlib

import numpy as np
from PIL import Image

# Package and file of each.
PHOTOS = {
  "china": ("sklearn", "datasets/images/china.jpg"),
  "flower": ("sklearn", "datasets/images/flower.jpg"),
  "coffee": ("skimage", "data/coffee.png"),
  "chelsea": ("skimage", "data/chelsea.png"),
  "rocket": ("skimage", "data/rocket.jpg"),
}
SHORTER_SIDE, SIZE = 256, 224


def path(name):
  package, file = PHOTOS[name]
  return pathlib.Path(importlib.util.find_spec(package).origin).parent / file


def pixels(name):
  """uint8 `[224, 224, 3]`: the centre, after the shorter side was scaled to 256, bicubic."""
  image = Image.open(path(name)).convert("RGB")
  share = SHORTER_SIDE / min(image.size)
  image = image.resize([round(side * share) for side in image.size], Image.Resampling.BICUBIC)
  left, top = ((side - SIZE) // 2 for side in image.size)
  return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
