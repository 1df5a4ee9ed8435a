"""The source for encoded images: records -> decoded, augmented batches, by tf.data on all cores."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import tensorflow as tf

from profit_jax.config import ConfigError, DataSettings
from profit_jax.data import picture, preprocess
from profit_jax.data.base import DatasetInfo, HostShard
from profit_jax.data.normalize import Normalization
from profit_jax.data.records import EpochRequest, Records, one_line
from profit_jax.typing import Batch

# Batches in the making at once: while the last images of one are decoded, threads that are free
# begin the next.
_BATCHES_AT_ONCE = 2
_READY_BATCHES = 2
# Broken images that an error message names.
_NAMED = 8

_log = logging.getLogger(__name__)
_log.setLevel(logging.WARNING)  # explicit, because main.py quiets the root


class Splits(Protocol):
  """What a data set opens to: `train` and `eval` records, and `class_names`."""

  train: Records
  eval: Records
  class_names: tuple[str, ...]


def _cores() -> int:
  # Those that this process may use, which a scheduler may have made fewer; macOS does not tell.
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_tensorflow() -> None:
  """TensorFlow only reads images here: it must not take accelerators, nor a core for each part of
  an operation.
  """
  # In a process where it runs already, as in a notebook, it stays as it is.
  with contextlib.suppress(RuntimeError):
    for kind in ("GPU", "TPU"):
      tf.config.set_visible_devices([], kind)
    # Images are many enough to keep the cores busy. With 2 threads in an operation, scaling an
    # image costs 1.0 ms of CPU time, with one 0.6 ms (2 cores).
    tf.config.threading.set_intra_op_parallelism_threads(1)


class Images:
  """A source of encoded images; see `Source`."""

  def __init__(
    self,
    splits: Splits,
    settings: DataSettings,
    normalization: Normalization,
    seed: int,
    shard: HostShard,
  ):
    """Args:
    splits: the data set.
    settings: validated.
    normalization: of the images.
    seed: of order and augmentation.
    shard: whose rows are made.
    """
    self._splits, self._settings, self._seed, self._shard = splits, settings, seed, shard
    self._broken: dict[str, str] = {}  # why, by name, in the order in which they were met
    self.info = DatasetInfo(
      train_examples=splits.train.examples,
      eval_examples=splits.eval.examples,
      num_classes=len(splits.class_names),
      normalization=normalization,
      class_names=splits.class_names,
    )

  def fingerprint(self) -> str:
    """See `Source.fingerprint`."""
    return f"{self._splits.train.fingerprint()} {self._splits.eval.fingerprint()}"

  def train_batches(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """See `Source.train_batches`."""
    wanted = EpochRequest(batch_size, self._shard, start, (self._seed, epoch))
    # Two words, because a seed has two: every place of every epoch has its own.
    first = (
      np.random.SeedSequence((self._seed, epoch)).generate_state(1, np.uint64).astype(np.int64)[0]
    )
    yield from self._batches(
      self._splits.train, wanted, lambda contents, place: self._augment(contents, [first, place])
    )

  def eval_batches(self, batch_size: int) -> Iterator[Batch]:
    """See `Source.eval_batches`."""
    yield from self._batches(
      self._splits.eval,
      EpochRequest(batch_size, self._shard),
      lambda contents, place: self._center(contents),
    )

  def _augment(self, contents, seed):
    settings, seed = self._settings, tf.stack(seed)
    if not settings.augment:
      return self._center(contents)
    if settings.train_crop == "pad_crop":
      image = preprocess.padded_crop(self._center(contents), settings.image_size // 8, seed)
    else:
      image = preprocess.random_resized_crop(
        contents, settings.image_size, settings.interpolation, seed
      )
    return preprocess.random_flip(image, seed)

  def _center(self, contents):
    settings = self._settings
    return preprocess.center_crop(
      contents, settings.image_size, settings.crop_pct, settings.interpolation
    )

  def _batches(self, records: Records, wanted: EpochRequest, pixels) -> Iterator[Batch]:
    size, part = self._settings.image_size, wanted.batch_size // self._shard.count
    cores = _cores()

    def read(record):
      there = record["key"][1] >= 0
      contents, label = tf.cond(there, lambda: records.read(record), lambda: ("", 0))
      return {"contents": contents, "label": label, "place": record["place"], "key": record["key"]}

    def example(row, record):
      image = tf.ensure_shape(pixels(record["contents"], record["place"]), [size, size, 3])
      return {"image": image, "label": record["label"], "row": row}

    nothing = {
      "image": tf.zeros([0, size, size, 3], tf.uint8),
      "label": tf.zeros([0], tf.int32),
      "row": tf.zeros([0], tf.int64),
    }

    def decoded(found):
      """One batch: what TensorFlow cannot decode is left out, leaves its row empty, and is in
      `left_out`.
      """
      rows = tf.data.Dataset.from_tensor_slices((tf.range(part, dtype=tf.int64), found))
      rows = rows.filter(lambda row, record: record["key"][1] >= 0)
      good = rows.map(example, cores, deterministic=True).ignore_errors().batch(part)
      whole = good.concatenate(tf.data.Dataset.from_tensors(nothing)).take(1)
      return whole.map(lambda batch: _with_the_rest(_in_rows(batch, part), found))

    # Read before that: a file that cannot be read is no broken image.
    found = (
      records.rows(wanted).map(read, cores, deterministic=True).batch(part, drop_remainder=True)
    )
    batches = found.interleave(
      decoded,
      cycle_length=_BATCHES_AT_ONCE,
      block_length=1,
      num_parallel_calls=_BATCHES_AT_ONCE,
      deterministic=True,
    )
    # All parallelism is fixed. The tuner sleeps for longer and longer between its looks, and the
    # end of a pass waits until it wakes: passes of 0.8 s took 0.63 or 1.33 s, whatever they did.
    options = tf.data.Options()
    options.autotune.enabled = False
    batches = batches.prefetch(_READY_BATCHES).with_options(options)
    seen = 0
    try:
      for batch in batches.as_numpy_iterator():
        seen += int((batch.pop("key")[:, 1] >= 0).sum())
        left_out = batch.pop("left_out")
        if len(left_out["row"]):
          self._read_again(batch, left_out, records, pixels)
        self._check_labels(batch["label"][batch["mask"]])
        yield batch
    except tf.errors.OpError as error:
      raise ConfigError(
        f"{self._settings.name} cannot be read: {one_line(error)}. Restore the file, or prepare "
        "the data again."
      ) from error
    expected = records.count(wanted)
    if seen != expected:
      raise ConfigError(
        f"{self._settings.name} holds fewer examples than its description says ({seen} instead of "
        f"{expected} in one pass "
        f"of this process): files are cut. Prepare the data again."
      )

  def _check_labels(self, labels: np.ndarray) -> None:
    wrong = sorted({int(label) for label in labels if not 0 <= label < self.info.num_classes})
    if wrong:
      raise ConfigError(
        f"{self._settings.name} has labels {wrong}: they must be 0 to "
        f"{self.info.num_classes - 1}. A split "
        f"without labels? Choose others with config.data.train_split and config.data.eval_split."
      )

  def _read_again(self, batch: Batch, left_out: Batch, records: Records, pixels) -> None:
    """Gives what TensorFlow cannot decode to Pillow, which reads more (PNG with wrong checksums);
    what is broken for it too is noted, and its row stays empty.
    """
    for name in ("image", "label", "mask"):
      batch[name] = batch[name].copy()  # TensorFlow's own memory
    broken = {}
    for row, key, place, label, contents in zip(*map(left_out.get, _LEFT_OUT), strict=True):
      try:
        plain = tf.io.encode_png(picture.decode(contents))
      except picture.UnreadableImageError as error:
        broken[records.name(key)] = str(error)
      else:
        batch["image"][row], batch["label"][row] = pixels(plain, tf.constant(place)), label
        batch["mask"][row] = True
    self._note_broken(broken)

  def _note_broken(self, broken: dict[str, str]) -> None:
    """Names images that cannot be decoded, with the reason of each.

    Raises:
      ConfigError: they are too many.
    """
    share, info = self._settings.max_broken, self.info
    # Of all hosts' images, because a host meets others in every epoch.
    limit = math.ceil(share * (info.train_examples + info.eval_examples))
    for name, reason in broken.items():
      if name in self._broken:
        continue
      self._broken[name] = reason
      if len(self._broken) <= limit:
        _log.warning(
          "skipped a broken image (%d so far, %d are allowed): %s: %s",
          len(self._broken),
          limit,
          # A file's name may have bytes that are not UTF-8, which no terminal takes.
          name.encode(errors="backslashreplace").decode(),
          reason,
        )
    if len(self._broken) > limit:
      listing = "\n  ".join(f"{name!r}: {why}" for name, why in [*self._broken.items()][:_NAMED])
      raise ConfigError(
        f"{len(self._broken)} images cannot be read, more than config.data.max_broken = {share:g} "
        f"of {self._settings.name} allows ({limit}). Repair or remove them, or raise it. The first "
        f"of them:\n  {listing}"
      )


_LEFT_OUT = ("row", "key", "place", "label", "contents")


def _with_the_rest(batch, found):
  """A batch, with its keys and the examples that are not in it."""
  missing = ~batch["mask"] & (found["key"][:, 1] >= 0)
  columns = {**found, "row": tf.range(tf.size(found["label"]))}
  left_out = {name: tf.boolean_mask(columns[name], missing) for name in _LEFT_OUT}
  return {**batch, "key": found["key"], "left_out": left_out}


def _in_rows(batch, part):
  """A batch of `part` rows in which every example stands in its own; `mask` tells which rows are
  filled.
  """

  def scattered():
    index = batch["row"][:, None]
    filled = {
      name: tf.scatter_nd(index, batch[name], [part, *batch[name].shape[1:]])
      for name in ("image", "label")
    }
    return {**filled, "mask": tf.scatter_nd(index, tf.ones_like(batch["row"], tf.bool), [part])}

  def whole():
    return {"image": batch["image"], "label": batch["label"], "mask": tf.fill([part], True)}

  return tf.cond(tf.size(batch["row"]) == part, whole, scattered)
