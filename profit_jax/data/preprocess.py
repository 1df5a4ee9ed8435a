"""From the bytes of an image to a square of pixels, in TensorFlow operations: they run inside
tf.data, many at once.

Training cuts a random part and scales it (`random_part`, `resize`); evaluation scales the shorter
side and cuts the centre. Of a plain JPEG only the part that is needed is decoded. What TensorFlow
does not read as `picture.decode` does, `picture.decode` reads. Scaling agrees with PIL's;
`tests/data/test_preprocess.py` states how far.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from profit_jax.data import picture
from profit_jax.data.base import LONGEST

# Shares of the area and ratios of width to height that a random part may have (Szegedy et al., CVPR
# 2015), and how often one is drawn before the largest centred one is taken.
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10

Interpolation = Literal["bicubic", "bilinear"]
_KERNELS = {"bicubic": "keyscubic", "bilinear": "triangle"}


class Opened(NamedTuple):
  """An encoded image of which any window can be had.

  Attributes:
    shape: height and width, int32 `[2]`.
    jpeg: the content of a JPEG whose windows TensorFlow decodes alone; "" of any other image.
    pixels: uint8 `[H, W, 3]` of any other image.
  """

  shape: tf.Tensor
  jpeg: tf.Tensor
  pixels: tf.Tensor


def opened(contents: tf.Tensor) -> Opened:
  """Reads the header of an image, and decodes all but plain JPEGs.

  For a JPEG, the tests of its header add 0.002 to 0.014 ms. What works out a window stands outside
  of the `tf.cond`: inside it takes 0.07 ms longer.
  """
  # What lacks its end is cut off: TensorFlow would decode the windows above the cut, and write a
  # line to the terminal for the others.
  is_jpeg = tf.io.is_jpeg(contents) & (tf.strings.substr(contents, -2, 2) == b"\xff\xd9")
  is_png = tf.strings.substr(contents, 0, 8) == b"\x89PNG\r\n\x1a\n"
  header = tf.cond(
    is_jpeg,
    lambda: tf.io.extract_jpeg_shape(contents)[:3],
    lambda: tf.concat([_png_shape(contents), [0]], 0),
  )
  shape, channels = tf.ensure_shape(header[:2], [2]), header[2]
  fits = tf.reduce_prod(tf.cast(shape, tf.int64)) <= _most_pixels()
  plain = is_jpeg & fits & (channels < 4)  # CMYK is read in another way
  pixels = tf.cond(
    plain,
    lambda: tf.zeros([0, 0, 3], tf.uint8),
    lambda: tf.cond(
      is_png & fits, lambda: tf.io.decode_png(contents, channels=3), lambda: _decode(contents)
    ),
  )
  return Opened(
    tf.cond(plain, lambda: shape, lambda: tf.shape(pixels)[:2]),
    tf.cond(plain, lambda: contents, lambda: ""),
    pixels,
  )


def _png_shape(contents):
  size = tf.strings.substr(contents, 16, 8)
  return tf.io.decode_raw(size, tf.int32, little_endian=False)[::-1]


def _most_pixels():
  # Pillow refuses what has twice as many as it warns of.
  return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else 2**62


def _decode(contents):
  def pixels_or_nothing(content):
    try:
      # Outside of a graph it is an array of one object.
      return picture.decode(content if isinstance(content, bytes) else content.item())
    except picture.UnreadableImageError:  # raised here, it would be logged with its traceback
      return np.zeros([0, 0, 3], np.uint8)

  pixels = tf.numpy_function(pixels_or_nothing, [contents], tf.uint8)
  pixels = tf.ensure_shape(pixels, [None, None, 3])
  # Fails where there is nothing.
  return tf.reshape(pixels, tf.concat([tf.maximum(tf.shape(pixels)[:2], 1), [3]], 0))


def decode(image: Opened, window: tf.Tensor) -> tf.Tensor:
  """A window `[top, left, height, width]` of an image as uint8 `[height, width, 3]`."""
  top, left, height, width = tf.unstack(window)
  return tf.cond(
    tf.strings.length(image.jpeg) > 0,
    # The exact inverse DCT is what PIL takes; TensorFlow's default is a faster approximation.
    lambda: tf.io.decode_and_crop_jpeg(
      image.jpeg, window, channels=3, dct_method="INTEGER_ACCURATE"
    ),
    lambda: tf.slice(image.pixels, [top, left, 0], [height, width, 3]),
  )


def random_part(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """A random window `[top, left, height, width]` of an image `[height, width]`.

  Its area is a uniform share of the image's, its ratio log-uniform; what does not fit is drawn
  again.

  Args:
    shape: int32 `[2]`.
    seed: int32 or int64 `[2]`; the window is a function of it.
  """
  draws = _uniform([4, ATTEMPTS], seed)
  limits = tf.cast(shape, tf.float32)
  area = tf.reduce_prod(limits) * (AREA[0] + (AREA[1] - AREA[0]) * draws[0])
  low, high = map(math.log, RATIO)
  # Height to width, width to height.
  ratio = tf.exp([[-1.0], [1.0]] * (low + (high - low) * draws[1]))
  sizes = tf.round(tf.sqrt(area * ratio))  # height, width; [2, ATTEMPTS]
  fits = tf.reduce_all((sizes <= limits[:, None]) & (sizes > 0), axis=0)
  first = tf.argmax(fits, output_type=tf.int32)

  def chosen():
    size = sizes[:, first]
    # From 0 to what is left, both included.
    offset = tf.floor(draws[2:, first] * (limits - size + 1))
    return tf.cast(tf.concat([tf.minimum(offset, limits - size), size], 0), tf.int32)

  return tf.cond(fits[first], chosen, lambda: _widest_part(shape))


def _widest_part(shape):
  """The largest centred window whose ratio is allowed."""
  limits = tf.cast(shape, tf.float32)
  height, width = limits[0], limits[1]
  size = tf.stack(
    [tf.minimum(height, tf.round(width / RATIO[0])), tf.minimum(width, tf.round(height * RATIO[1]))]
  )
  return tf.cast(tf.concat([tf.floor((limits - size) / 2), size], 0), tf.int32)


def resize(
  image: tf.Tensor, size: Sequence[int] | tf.Tensor, interpolation: Interpolation
) -> tf.Tensor:
  """Scales uint8 `[H, W, 3]` to `size` `[2]`, antialiased as PIL does; uint8.

  The same values as `tf.image.resize(..., antialias=True)` in a quarter of the time (0.36 ms of a
  core instead of 1.66 ms, 261x270 to 224x224). Its kernel is fast along the first axis, where it
  adds whole rows, and slow along the second, where it adds three numbers at a time. Here both axes
  take their turn as the first one. They change places as plain float32 matrices: a transpose that
  keeps the channels innermost takes 1.4 times as long in float32 and 2.3 times in uint8.
  """
  height, width = size[0], size[1]
  shape = tf.shape(image)
  rows = _scale_rows(tf.reshape(image, [shape[0], -1]), height, interpolation)  # [height, W * 3]
  columns = tf.reshape(tf.transpose(rows), [shape[1], -1])  # [W, 3 * height]
  # [width * 3, height].
  columns = tf.reshape(_scale_rows(columns, width, interpolation), [-1, height])
  rounded = tf.cast(tf.clip_by_value(tf.transpose(columns), 0.0, 255.0) + 0.5, tf.uint8)
  return tf.reshape(rounded, [height, width, 3])


def _scale_rows(matrix, rows, interpolation):
  """`[H, N]` -> float32 `[rows, N]`."""
  scaled = tf.raw_ops.ScaleAndTranslate(
    images=matrix[None, :, None],
    size=tf.stack([rows, 1]),
    scale=tf.stack([tf.cast(rows, tf.float32) / tf.cast(tf.shape(matrix)[0], tf.float32), 1.0]),
    translation=tf.zeros([2]),
    kernel_type=_KERNELS[interpolation],
    antialias=True,
  )
  return scaled[0, :, 0]


def random_resized_crop(
  contents: tf.Tensor, size: int, interpolation: Interpolation, seed: tf.Tensor
) -> tf.Tensor:
  """A random part of an encoded image, scaled to `[size, size, 3]`; uint8."""
  image = opened(contents)
  return resize(decode(image, random_part(image.shape, seed)), [size, size], interpolation)


def center_crop(
  contents: tf.Tensor, size: int, share: float, interpolation: Interpolation
) -> tf.Tensor:
  """The centre of an encoded image as `[size, size, 3]`: its shorter side is scaled to
  `size / share`; uint8.
  """
  image = opened(contents)
  shape = image.shape
  # A strip of 20,000x10 pixels would become one of 512,000x256: of what is longer than 4 to 1 the
  # ends go first.
  kept = tf.minimum(shape, LONGEST * tf.reduce_min(shape))
  whole, shape = decode(image, tf.concat([(shape - kept) // 2, kept], 0)), kept
  shorter = round(size / share)
  # As torchvision: the longer side is cut to a whole number, the crop's offset is rounded.
  target = tf.cast(
    shorter * tf.cast(shape, tf.int64) // tf.cast(tf.reduce_min(shape), tf.int64), tf.int32
  )
  scaled = tf.cond(
    tf.reduce_all(shape == target), lambda: whole, lambda: resize(whole, target, interpolation)
  )
  offset = tf.cast(tf.round(tf.cast(target - size, tf.float32) / 2), tf.int32)
  return tf.slice(scaled, tf.concat([offset, [0]], 0), [size, size, 3])


def padded_crop(image: tf.Tensor, margin: int, seed: tf.Tensor) -> tf.Tensor:
  """uint8 `[S, S, 3]` cut at a random offset out of a black frame of `margin` pixels."""
  size = image.shape[0]
  offset = tf.random.stateless_uniform([2], seed, 0, 2 * margin + 1, tf.int32)
  framed = tf.pad(image, [(margin, margin), (margin, margin), (0, 0)])
  return tf.slice(framed, tf.concat([offset, [0]], 0), [size, size, 3])


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """Mirrors half of the images, left to right."""
  # Of another seed: the crop has drawn from this one.
  return tf.cond(_uniform([], seed + 1) < 0.5, lambda: tf.reverse(image, [1]), lambda: image)


def _uniform(shape, seed):
  # One operation. `tf.random.stateless_uniform` takes six, and each small one costs a few
  # microseconds in tf.data.
  return tf.raw_ops.StatelessRandomUniform(shape=shape, seed=seed)
