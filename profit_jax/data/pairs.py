"""Pairs of handwritten digits, 100 classes: harder images made from scikit-learn's scans (see
`data/digits.py`).

Two digits stand side by side and are read as one number, 00 to 99. Each is turned, sheared, scaled
and moved on its own, and their frames overlap; pieces of other digits lie over them. Training
images are made anew in every epoch, from the scans that `Digits` trains on; the evaluation images
are fixed, from those that it evaluates on.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from profit_jax.data.base import DatasetInfo, Evaluated, HostShard
from profit_jax.data.digits import batch, load_scans, split
from profit_jax.data.normalize import Normalization
from profit_jax.typing import Batch

TRAIN_EXAMPLES, EVAL_EXAMPLES = 2688, 1000
INFO = DatasetInfo(
  train_examples=TRAIN_EXAMPLES,
  eval_examples=EVAL_EXAMPLES,
  num_classes=100,
  normalization=Normalization(mean=(0.24,) * 3, std=(0.3,) * 3),
  class_names=tuple(f"{number:02}" for number in range(100)),
)

_SCAN = 8  # pixels: a scan's side
_PIECE = 3  # pixels of a scan: the side of a piece of another digit
_PART = 96  # images that are drawn at a time
_TRAIN, _ORDER, _EVAL = 1, 2, 3  # streams of random numbers


class Distortion(NamedTuple):
  """How far an image may differ from two scans side by side. The defaults are those of the results
  in `docs/ablation.md`.

  `turn`, `scale`, `shear` and `move` are bounds. Each digit's value is drawn uniformly between the
  bound and its negative.

  Attributes:
    turn: rotation, in radians.
    scale: relative change of width, and of height.
    shear: horizontal offset of a row per row.
    move: offset to each side, in pixels of a scan.
    pieces: number of pieces of other digits that lie over the image.
  """

  turn: float = 0.35
  scale: float = 0.15
  shear: float = 0.25
  move: float = 0.8
  pieces: int = 3


class Pairs:
  """The pairs, as `image_size` pixels in height and width."""

  info = INFO

  def __init__(
    self,
    *,
    image_size: int,
    augment: bool,
    seed: int,
    shard: HostShard = HostShard(),
    distortion: Distortion = Distortion(),
    evaluated: Evaluated = "eval",
  ):
    """Draws the evaluation images.

    Args:
      image_size: in pixels.
      augment: False trains on one epoch's images.
      seed: of the training images.
      shard: whose rows.
      distortion: of training and evaluation images.
      evaluated: which images evaluation batches hold; of "train", those of one epoch.
    """
    self._distortion = distortion
    scans = load_scans()
    self._scans, self._digits = scans.images.astype(np.float32) / 16, scans.target
    self._train, self._eval = split(self._digits)
    self._size, self._augment, self._seed, self._shard = image_size, augment, seed, shard
    if evaluated == "train":
      self._evaluation = self._epoch(0)
      self.info = dataclasses.replace(INFO, eval_examples=TRAIN_EXAMPLES)
      return
    self._evaluation = self._drawn(np.random.default_rng((0, 0, _EVAL)), self._eval, EVAL_EXAMPLES)

  def fingerprint(self) -> str:
    """See `Source.fingerprint`."""
    return "pairs of scikit-learn's digits"

  def train_batches(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """See `Source.train_batches`."""
    # Without augmentation the same images in every epoch, in an order of the epoch's own.
    images, labels = self._epoch(epoch if self._augment else 0)
    order = np.random.default_rng((self._seed, epoch, _ORDER)).permutation(TRAIN_EXAMPLES)
    rows = self._shard.rows(batch_size)
    for first in range(start * batch_size, TRAIN_EXAMPLES - batch_size + 1, batch_size):
      chosen = order[first : first + batch_size][rows]
      yield batch(images[chosen], labels[chosen], len(chosen))

  def eval_batches(self, batch_size: int) -> Iterator[Batch]:
    """See `Source.eval_batches`."""
    images, labels = self._evaluation
    rows = self._shard.rows(batch_size)
    for first in range(0, len(labels), batch_size):
      own = slice(first + rows.start, first + rows.stop)
      yield batch(images[own], labels[own], rows.stop - rows.start)

  def _epoch(self, epoch):
    """The training images that are drawn for an epoch, and their labels."""
    rng = np.random.default_rng((self._seed, epoch, _TRAIN))
    return self._drawn(rng, self._train, TRAIN_EXAMPLES)

  def _drawn(self, rng, among, count):
    """Images uint8 `[count, size, size]` and labels of pairs among some scans."""
    # Few at a time: they stay in the processor's cache.
    parts = [self._part(rng, among, min(_PART, count - first)) for first in range(0, count, _PART)]
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)

  def _part(self, rng, among, count):
    pairs = rng.choice(among, (count, 2))
    # A canvas of 12 rows and 14 columns of a scan's pixels: two scans of 8 columns share two of
    # them.
    height, width = 12.0, 14.0
    places = (np.arange(self._size, dtype=np.float32) + 0.5) / self._size
    y, x = np.meshgrid(places * np.float32(height), places * np.float32(width), indexing="ij")
    image = np.zeros((count, self._size, self._size), np.float32)
    for place in range(2):
      center = height / 2, 4.0 + 6.0 * place
      image = np.maximum(
        image,
        _warped(rng, self._scans[pairs[:, place]], y - center[0], x - center[1], self._distortion),
      )
    for _ in range(self._distortion.pieces):
      image = np.maximum(image, self._piece(rng, among, y, x, count))
    first, second = self._digits[pairs].T
    return np.rint(image * 255).astype(np.uint8), (10 * first + second).astype(np.int32)

  def _piece(self, rng, among, y, x, count):
    """A square of another digit, at half its brightness, somewhere."""
    scans = self._scans[rng.choice(among, count)]
    corner = rng.integers(0, _SCAN - _PIECE + 1, (2, count, 1, 1)).astype(np.float32)
    place = rng.uniform(0, 1, (2, count, 1, 1)).astype(np.float32)
    inside_y, inside_x = y - place[0] * (12.0 - _PIECE), x - place[1] * (14.0 - _PIECE)
    inside = (inside_y >= 0) & (inside_y < _PIECE) & (inside_x >= 0) & (inside_x < _PIECE)
    values = _sampled(scans, inside_y + corner[0] - 0.5, inside_x + corner[1] - 0.5)
    return np.where(inside, values / 2, 0)


def _warped(rng, scans, y, x, most):
  """Scans `[n, 8, 8]` seen at `[size, size]` places relative to their centre, each turned, scaled,
  sheared and moved by at most `most`, a `Distortion`.
  """
  count = len(scans)

  def draw(bound):
    return rng.uniform(-bound, bound, (count, 1, 1)).astype(np.float32)

  # The order of the draws decides the images.
  turn, shear, move_y, move_x = draw(most.turn), draw(most.shear), draw(most.move), draw(most.move)
  scale_y, scale_x = 1 + draw(most.scale), 1 + draw(most.scale)
  y, x = y - move_y, x - move_x
  turned_y, turned_x = np.cos(turn) * y - np.sin(turn) * x, np.sin(turn) * y + np.cos(turn) * x
  middle = (_SCAN - 1) / 2
  return _sampled(
    scans, turned_y / scale_y + middle, (turned_x + shear * turned_y) / scale_x + middle
  )


def _sampled(scans, y, x):
  """Bilinear samples of `[n, 8, 8]` at `[n, size, size]` places in pixels; 0 outside."""
  side, last = _SCAN + 2, np.float32(_SCAN + 0.999)
  pixels = np.pad(scans, [(0, 0), (1, 1), (1, 1)]).ravel()
  y, x = np.clip(y + 1, 0, last), np.clip(x + 1, 0, last)
  top, left = y.astype(np.int32), x.astype(np.int32)
  down, right = y - top.astype(np.float32), x - left.astype(np.float32)
  first = np.arange(len(scans), dtype=np.int32)[:, None, None] * (side * side) + top * side + left
  upper = pixels[first] * (1 - right) + pixels[first + 1] * right
  lower = pixels[first + side] * (1 - right) + pixels[first + side + 1] * right
  return upper * (1 - down) + lower * down
