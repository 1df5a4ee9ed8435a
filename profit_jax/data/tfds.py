"""Any classification set of tensorflow-datasets prepared in a directory, local or gs://."""

import itertools
import os
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from profit_jax.config import ConfigError, DataSettings
from profit_jax.data.base import MEMORY_LIMIT
from profit_jax.data.records import InMemoryRecords, Record, Shard, ShardedRecords


class Splits:
  """The two splits of a data set.

  Attributes:
    train: records to train on.
    eval: records to evaluate on.
    class_names: of the label.
  """

  def __init__(self, settings: DataSettings, memory_limit: int = MEMORY_LIMIT, trains: bool = True):
    """Opens a data set; its images are read later.

    Args:
      settings: validated.
      memory_limit: in bytes. A split whose files are larger is streamed, not kept in memory.
      trains: False takes the evaluation's split for both.

    Raises:
      ConfigError: one that is unknown, not prepared, not made of images and classes, or lacks a
        split.
    """
    self._settings, self._memory_limit = settings, memory_limit
    self._builder = builder = open_builder(settings.name, settings.data_dir)
    keys = class_keys(builder)
    _require_prepared(builder, settings)
    self._image, self._label = keys
    self.class_names = tuple(builder.info.features[self._label].names)
    train = self._records("train_split", settings.train_split) if trains else None
    self.eval = self._records(
      "eval_split", settings.eval_split or self._first_of("validation", "val", "test")
    )
    self.train = train or self.eval

  def _first_of(self, *names):
    for name in names:
      if name in self._builder.info.splits:
        return name
    raise ConfigError(
      f"config.data.eval_split = '' is not allowed: {self._settings.name} has none of "
      f"{', '.join(names)}, which are tried "
      f"then. Give one of its splits, {', '.join(self._builder.info.splits)}, or a part of one, "
      "as train[90%:]."
    )

  def _records(self, field, split):
    info = self._builder.info
    try:
      found = info.splits[split]
      shards = [Shard(str(part.filename), part.skip, part.take) for part in found.file_instructions]
    except (KeyError, ValueError, AssertionError) as error:
      raise ConfigError(
        f"config.data.{field} = {split!r} is not allowed: {self._settings.name} in "
        f"{info.data_dir} has the splits "
        f"{', '.join(info.splits)}; parts of them are written as train[:90%]."
      ) from error
    if not found.num_examples:
      raise ConfigError(f"config.data.{field} = {split!r} is not allowed: it holds no example.")
    if _fits(shards, self._memory_limit):
      return _InMemory(self._builder, split, self._image, self._label)
    if info.file_format != tfds.core.FileFormat.TFRECORD:
      raise ConfigError(
        f"config.data.name = {self._settings.name!r} is not allowed: {info.data_dir} holds "
        f"{info.file_format.value} "
        "files. Prepare it as TFRecord, in another directory: profit prepare "
        f"{self._settings.name}."
      )
    return _Streamed(
      found.num_examples,
      self._settings.num_readers,
      shards,
      info.features,
      self._image,
      self._label,
    )


def open_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  """The builder of a data set, prepared or not.

  Raises:
    ConfigError: one that neither the catalogue nor the directory has.
  """
  try:
    return tfds.builder(name, data_dir=data_dir or None)
  except tfds.core.DatasetNotFoundError as error:
    raise ConfigError(
      f"config.data.name = {name!r} is not allowed: it must be digits, digit_pairs, folder, or a "
      "data set of "
      "tensorflow-datasets; neither its catalogue (https://www.tensorflow.org/datasets/catalog) "
      "nor "
      f"{data_dir or 'its own directory'} has it."
    ) from error
  # A configuration or a version that it does not have.
  except (
    ValueError,
    AssertionError,
    KeyError,
  ) as error:
    raise ConfigError(
      f"config.data.name = {name!r} is not allowed: {' '.join(str(error).split())[:500]}"
    ) from error
  # No network, no permission, no such code.
  except (
    RuntimeError,
    ImportError,
    OSError,
    tf.errors.OpError,
  ) as error:
    login = (
      " For gs://, gcloud auth application-default login." if data_dir.startswith("gs://") else ""
    )
    raise ConfigError(
      f"config.data.name = {name!r} cannot be opened in {data_dir or 'its own directory'}: "
      f"{' '.join(str(error).split())[:500]}.{login}"
    ) from error


def fashion_mnist_builder(
  builder: tfds.core.DatasetBuilder, splits: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> tfds.core.DatasetBuilder:
  """TFDS's builder of Fashion-MNIST, which takes images from memory instead of downloading them.

  Args:
    builder: TFDS's own, not prepared.
    splits: images `[N, 28, 28, 1]` and labels `[N]` by split, as `fashion_mnist.read` gives them.

  Returns:
    A builder of the same data set in the same directory.
  """

  class FromMemory(type(builder), skip_registration=True):
    name = builder.name

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(*arrays) for split, arrays in splits.items()}

    def _generate_examples(self, images, labels):
      for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": image, "label": int(label)}

  # TFDS's directory is DATA_DIR/NAME/VERSION.
  return FromMemory(data_dir=os.fspath(builder.data_path.parent.parent))


def class_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
  """The names of an example's image and label.

  Raises:
    ConfigError: examples are something else.
  """
  keys, features = builder.info.supervised_keys, builder.info.features
  found = (
    [features[key] for key in keys]
    if keys and len(keys) == 2 and all(isinstance(key, str) for key in keys)
    else []
  )
  if [type(feature) for feature in found] != [tfds.features.Image, tfds.features.ClassLabel]:
    raise ConfigError(
      f"config.data.name = {builder.info.full_name!r} is not allowed: it must be a data set of "
      "one image and one class "
      f"label per example; its supervised keys are {keys}."
    )
  return keys


def _require_prepared(builder, settings):
  if builder.is_prepared() and builder.info.splits:
    return
  where = f" --data_dir={settings.data_dir}" if settings.data_dir else ""
  by_hand = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
  if by_hand:
    where, by_hand = f"{where} --manual_dir=DIR", f" DIR holds what is fetched by hand: {by_hand}"
  raise ConfigError(
    f"config.data.name = {settings.name!r} is not prepared: there is no {builder.data_dir}. "
    "Prepare it with "
    f"profit prepare {settings.name}{where} (docs/data.md).{by_hand}"
  )


def _fits(shards: list[Shard], memory_limit: int) -> bool:
  """Whether the files of a split may be kept in memory; asks for no more sizes than it must."""
  total = 0
  for path in dict.fromkeys(shard.path for shard in shards):
    if not tf.io.gfile.exists(path):
      raise ConfigError(
        f"{path} does not exist, though the data set's description names it. Prepare the data "
        "again."
      )
    total += tf.io.gfile.stat(path).length
    if total > memory_limit:
      return False
  return True


def cut(shards: list[Shard], first: int, last: int) -> list[Shard]:
  """The parts of shards that hold the examples `first` to `last - 1` of all of them together."""
  ends = itertools.accumulate(shard.take for shard in shards)
  found = []
  for shard, end in zip(shards, ends, strict=True):
    start = end - shard.take
    low, high = max(first, start), min(last, end)
    if low < high:
      found.append(Shard(shard.path, shard.skip + low - start, high - low))
  return found


class _InMemory(InMemoryRecords):
  """A small split, its images still encoded."""

  def __init__(self, builder, split, image, label):
    self._title = f"{builder.info.full_name}, split {split}"
    found = builder.as_dataset(
      split=split,
      decoders={image: tfds.decode.SkipDecoding()},
      read_config=tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1),
      shuffle_files=False,
    )
    try:
      examples = list(
        found.map(lambda example: (example[image], example[label])).as_numpy_iterator()
      )
    except tf.errors.OpError as error:
      raise ConfigError(
        f"{self._title} cannot be read: {' '.join(error.message.split())[:500]}. Prepare it again."
      ) from error
    contents, labels = zip(*examples, strict=True)
    super().__init__({"contents": tf.constant(contents), "label": tf.constant(labels, tf.int32)})

  def read(self, record: Record) -> tuple[tf.Tensor, tf.Tensor]:
    """See `InMemoryRecords`."""
    return record["contents"], record["label"]

  def sample(self) -> Iterable[bytes]:
    """See `InMemoryRecords.sample`: all of them."""
    return self._columns["contents"].numpy()

  def name(self, key) -> str:
    """What a log calls the record with this key."""
    return f"{self._title}, example {key[0]}"


class _Streamed(ShardedRecords):
  """A large split."""

  def __init__(self, examples, readers, shards, features, image, label):
    super().__init__(examples, readers, lambda first, last: cut(shards, first, last))
    self._features, self._image, self._label = features, image, label

  def read(self, record: Record) -> tuple[tf.Tensor, tf.Tensor]:
    """See `InMemoryRecords`."""
    example = self._features.deserialize_example(
      record["data"], decoders={self._image: tfds.decode.SkipDecoding()}
    )
    return example[self._image], tf.cast(example[self._label], tf.int32)
