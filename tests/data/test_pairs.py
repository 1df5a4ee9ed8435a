"""Pairs of digits: labels, determinism, which scans they come from."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from profit_jax.data.base import HostShard
from profit_jax.data.digits import split
from profit_jax.data.pairs import Distortion, Pairs


@pytest.fixture(scope="module")
def source():
  return Pairs(image_size=16, augment=True, seed=0)


@pytest.fixture(scope="module")
def parts():
  """The same source on each of three hosts."""
  return [Pairs(image_size=16, augment=True, seed=0, shard=HostShard(i, 3)) for i in range(3)]


def images_of(batches):
  return np.concatenate([batch["image"][batch["mask"]] for batch in batches])


def test_without_distortion_the_two_digits_stand_beside_each_other():
  # 42 pixels are 3.5 rows and 3 columns for each of a scan's.
  source = Pairs(image_size=42, augment=True, seed=0, distortion=Distortion(0, 0, 0, 0, pieces=0))
  batch = next(source.eval_batches(250))
  scans, digits = load_digits().images, load_digits().target
  evaluated = split(digits)[1]
  for image, label in zip(batch["image"][:20, ..., 0], batch["label"], strict=False):
    # Nearest to the middles of each scan's pixels, a quarter of a row beside them. The last two
    # columns of the first scan and the first two of the second overlap.
    rows, columns = np.rint(3.5 * np.arange(2, 10) + 1.25).astype(int), 3 * np.arange(14) + 1
    grid = image[np.ix_(rows, columns)]
    for digit, seen, own in (
      (label // 10, grid[:, :6], slice(0, 6)),
      (label % 10, grid[:, 8:], slice(2, 8)),
    ):
      candidates = scans[evaluated[digits[evaluated] == digit]][:, :, own]
      # Bilinear: so far beside the middle, a row takes 7 % of its neighbour.
      assert np.abs(candidates / 16 * 255 - seen).max((1, 2)).min() < 0.13 * 255


def test_every_class_and_the_same_evaluation_for_every_seed(source):
  other = Pairs(image_size=16, augment=False, seed=5)
  one, two = list(source.eval_batches(250)), list(other.eval_batches(384))
  assert np.array_equal(images_of(one), images_of(two))
  assert len(images_of(one)) == 1000
  labels = np.concatenate([batch["label"][batch["mask"]] for batch in two])
  assert set(labels) == set(range(100))
  assert {batch["image"].shape for batch in two} == {(384, 16, 16, 3)}


# That equal ones give equal images: `test_hosts_share_the_rows_of_each_batch`.
def test_another_epoch_or_seed_gives_other_images(source):
  first = images_of(source.train_batches(3, 64))
  assert len(first) == 2688
  assert not np.array_equal(first, images_of(source.train_batches(4, 64)))
  other = Pairs(image_size=16, augment=True, seed=1)
  assert not np.array_equal(first, images_of(other.train_batches(3, 64)))


def test_without_augmentation_an_epoch_shows_the_same_images_in_another_order():
  source = Pairs(image_size=16, augment=False, seed=0)
  one, two = (images_of(source.train_batches(epoch, 64)) for epoch in (0, 1))
  assert not np.array_equal(one, two)
  assert sorted(map(bytes, one)) == sorted(map(bytes, two))


@pytest.mark.parametrize(
  "batches", [lambda s: s.train_batches(5, 96, 3), lambda s: s.eval_batches(96)]
)
def test_hosts_share_the_rows_of_each_batch(source, parts, batches):
  for whole, *own in zip(batches(source), *map(batches, parts), strict=True):
    for name, value in whole.items():
      assert np.array_equal(value, np.concatenate([part[name] for part in own])), name


def test_an_epoch_goes_on_where_it_was_left(source):
  assert np.array_equal(
    images_of(source.train_batches(2, 64))[5 * 64 :], images_of(source.train_batches(2, 64, 5))
  )


def test_training_images_can_be_evaluated():
  plain = Pairs(image_size=16, augment=False, seed=0)
  source = Pairs(image_size=16, augment=True, seed=0, evaluated="train")
  assert source.info.eval_examples == 2688
  seen = images_of(source.eval_batches(1000))
  trained = images_of(plain.train_batches(0, 2688))
  assert {image.tobytes() for image in seen} == {image.tobytes() for image in trained}
