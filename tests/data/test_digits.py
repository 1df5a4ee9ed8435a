"""The digits: split, determinism, every evaluation image once."""

import collections

import numpy as np
import pytest
from sklearn.datasets import load_digits

from profit_jax.data.base import HostShard
from profit_jax.data.digits import Digits, split


@pytest.fixture(scope="module")
def source():
  return Digits(image_size=32, augment=True, seed=0)


def test_split_is_stratified_and_disjoint(source):
  labels = load_digits().target
  train, evaluation = split(labels)
  assert (len(train), len(evaluation)) == (1347, 450)
  assert sorted([*train, *evaluation]) == list(range(1797))
  share = np.bincount(labels[train]) / 1347 - np.bincount(labels[evaluation]) / 450
  assert np.abs(share).max() < 0.003
  for each in (source, Digits(image_size=8, augment=False, seed=5)):  # whatever the seed is
    assert np.array_equal(next(each.eval_batches(450))["label"], labels[evaluation])


def test_evaluation_counts_every_image_once(source):
  batches = list(source.eval_batches(128))
  assert {batch["image"].shape for batch in batches} == {(128, 32, 32, 3)}
  seen = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
  assert np.array_equal(seen, next(source.eval_batches(450))["image"])
  assert len(np.unique(seen, axis=0)) == 450
  assert sum(batch["mask"].sum() for batch in batches) == 450


@pytest.fixture(scope="module")
def parts():
  """The same source on each of three hosts."""
  return [Digits(image_size=32, augment=True, seed=0, shard=HostShard(i, 3)) for i in range(3)]


# That equal ones give equal images: `test_hosts_share_the_rows_of_each_batch`.
def test_another_epoch_or_seed_gives_other_images(source):
  def epoch(source, number):
    return np.concatenate([batch["image"] for batch in source.train_batches(number, 64)])

  assert not np.array_equal(epoch(source, 3), epoch(source, 4))
  other = Digits(image_size=32, augment=True, seed=1)
  assert not np.array_equal(epoch(source, 3), epoch(other, 3))


def test_an_epoch_shows_an_image_at_most_once_and_leaves_out_less_than_a_batch():
  source = Digits(image_size=8, augment=False, seed=0)
  seen = np.concatenate([batch["image"][..., 0] for batch in source.train_batches(0, 64)]).reshape(
    -1, 64
  )
  assert len(seen) == 1344
  every = [batch["image"][..., 0].reshape(64) for batch in source.train_batches(1, 1)]
  assert len(every) == 1347
  available = collections.Counter(map(bytes, every))
  assert not collections.Counter(map(bytes, seen)) - available


def test_augmentation_moves_by_at_most_two_pixels(source):
  still = Digits(image_size=32, augment=False, seed=0)
  moved, kept = (next(s.train_batches(0, 64))["image"][..., 0] for s in (source, still))
  offsets = set()
  for image, original in zip(moved, kept, strict=True):
    framed = np.pad(original, 2)
    matches = [
      (y, x)
      for y in range(5)
      for x in range(5)
      if np.array_equal(framed[y : y + 32, x : x + 32], image)
    ]
    assert matches
    offsets.update(matches[:1])
  assert len(offsets) > 10


@pytest.mark.parametrize(
  "batches", [lambda s: s.train_batches(5, 96, 3), lambda s: s.eval_batches(96)]
)
def test_hosts_share_the_rows_of_each_batch(source, parts, batches):
  expected = list(batches(source))
  for whole, *own in zip(expected, *(batches(part) for part in parts), strict=True):
    for name, value in whole.items():
      assert np.array_equal(value, np.concatenate([part[name] for part in own])), name


def test_an_epoch_goes_on_where_it_was_left(source):
  whole, rest = list(source.train_batches(2, 64)), list(source.train_batches(2, 64, 5))
  assert len(rest) == len(whole) - 5
  for one, other in zip(whole[5:], rest, strict=True):
    assert np.array_equal(one["image"], other["image"])


def test_training_images_are_evaluated_as_they_are():
  plain = Digits(image_size=8, augment=False, seed=0)
  source = Digits(image_size=8, augment=True, seed=0, evaluated="train")
  assert source.info.eval_examples == 1347
  batches = list(source.eval_batches(512))
  assert sum(batch["mask"].sum() for batch in batches) == 1347
  seen = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
  whole = next(plain.train_batches(0, 1347))["image"]
  assert {image.tobytes() for image in seen} == {image.tobytes() for image in whole}
  assert plain.info.eval_examples == 450
