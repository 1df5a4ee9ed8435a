"""scikit-learn's handwritten digits: 1797 real scans of 8x8 pixels (UCI, Alpaydin, Kaynak 1998)."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from PIL import Image

from profit_jax import optional
from profit_jax.data.base import DatasetInfo, Evaluated, HostShard
from profit_jax.data.normalize import Normalization
from profit_jax.typing import Batch

TRAIN_EXAMPLES, EVAL_EXAMPLES = 1347, 450
SPLIT_SEED = 0  # fixed: every run is measured on the same 450 images
INFO = DatasetInfo(
  train_examples=TRAIN_EXAMPLES,
  eval_examples=EVAL_EXAMPLES,
  num_classes=10,
  normalization=Normalization(mean=(0.3,) * 3, std=(0.35,) * 3),
  class_names=tuple("0123456789"),
)


class Digits:
  """The digits, enlarged to `image_size`; training images move by up to 1/16 of their size."""

  info = INFO

  def __init__(
    self,
    *,
    image_size: int,
    augment: bool,
    seed: int,
    shard: HostShard = HostShard(),
    evaluated: Evaluated = "eval",
  ):
    """Args: image_size in pixels; augment: shift the training images; seed: of order and shifts;
    shard: whose rows; evaluated: which images evaluation batches hold.
    """
    scans = load_scans()
    images = np.stack([_enlarge(scan, image_size) for scan in scans.images])
    labels = scans.target.astype(np.int32)
    train, evaluation = split(labels)
    self._train = images[train], labels[train]
    self._eval = images[evaluation], labels[evaluation]
    if evaluated == "train":
      self._eval = self._train
      self.info = dataclasses.replace(INFO, eval_examples=TRAIN_EXAMPLES)
    self._shift = image_size // 16 if augment else 0
    self._seed, self._shard = seed, shard

  def fingerprint(self) -> str:
    """See `Source.fingerprint`."""
    return "scikit-learn's digits"

  def train_batches(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """See `Source.train_batches`."""
    rng = np.random.default_rng((self._seed, epoch))
    images, labels = self._train
    order = rng.permutation(len(labels))
    offsets = rng.integers(0, 2 * self._shift + 1, (len(labels), 2))
    for first in range(start * batch_size, len(labels) - batch_size + 1, batch_size):
      chosen = order[first : first + batch_size][self._shard.rows(batch_size)]
      yield batch(_moved(images[chosen], offsets[chosen], self._shift), labels[chosen], len(chosen))

  def eval_batches(self, batch_size: int) -> Iterator[Batch]:
    """See `Source.eval_batches`."""
    images, labels = self._eval
    rows = self._shard.rows(batch_size)
    for first in range(0, len(labels), batch_size):
      own = slice(first + rows.start, first + rows.stop)
      yield batch(images[own], labels[own], rows.stop - rows.start)


def load_scans():
  """scikit-learn's `Bunch` of the scans.

  Raises:
    ConfigError: scikit-learn is not installed.
  """
  optional.require("digits", "data.name = digits or digit_pairs")
  from sklearn.datasets import load_digits  # here, because it takes a second or two to import

  return load_digits()


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The numbers of the scans to train and to evaluate on, by class in equal shares."""
  from sklearn.model_selection import train_test_split

  numbers = np.arange(len(labels))
  return tuple(
    train_test_split(numbers, train_size=TRAIN_EXAMPLES, stratify=labels, random_state=SPLIT_SEED)
  )


def _enlarge(scan: np.ndarray, size: int) -> np.ndarray:
  """An 8x8 scan with values 0..16 as uint8 `[size, size]`, bicubic."""
  small = Image.fromarray((scan * (255 / 16)).round().astype(np.uint8))
  return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def _moved(images: np.ndarray, offsets: np.ndarray, margin: int) -> np.ndarray:
  """Each image cut at its own offset out of a frame of background `margin` pixels wide."""
  size = images.shape[1]
  framed = np.pad(images, [(0, 0), (margin, margin), (margin, margin)])
  return np.stack(
    [f[y : y + size, x : x + size] for f, (y, x) in zip(framed, offsets, strict=True)]
  )


def batch(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Batch:
  """A batch of grey images `[n, H, W]`, padded to its size."""
  missing = batch_size - len(labels)
  return {
    "image": np.repeat(np.pad(images, [(0, missing), (0, 0), (0, 0)])[..., None], 3, axis=-1),
    "label": np.pad(labels, (0, missing)),
    "mask": np.arange(batch_size) < len(labels),
  }
