"""Any classification set of tensorflow-datasets that lies prepared in a directory, local or gs://."""

import itertools

import tensorflow as tf
import tensorflow_datasets as tfds

from profit_jax.data.records import Record, Shard, Stream, Table
from profit_jax.settings import ConfigError, DataSettings

# A split whose files are smaller is kept in memory, and shuffled as a whole; every host holds all of it.
MEMORY_LIMIT = 512 * 2**20


class Splits:
  """The two splits of a data set.

  Attributes:
    train: records to train on.
    eval: records to evaluate on.
    num_classes: of the label.
  """

  def __init__(self, settings: DataSettings):
    """Opens a data set; its images are read later.

    Raises:
      ConfigError: one that is unknown, not prepared, not made of images and classes, or lacks a split.
    """
    self._settings = settings
    builder = _builder(settings)
    self._builder, info = builder, builder.info
    keys = info.supervised_keys
    features = [info.features[key] for key in keys] if keys and len(keys) == 2 and isinstance(keys[0], str) else []
    if [type(feature) for feature in features] != [tfds.features.Image, tfds.features.ClassLabel]:
      raise ConfigError(
        f"config.data.name = {settings.name!r} is not allowed: it must be a data set of one image and one class label per "
        f"example; its supervised keys are {keys}."
      )
    self._image, self._label = keys
    self.num_classes = features[1].num_classes
    self.train = self._records("train_split", settings.train_split)
    self.eval = self._records("eval_split", settings.eval_split or self._first_of("validation", "val", "test"))

  def _first_of(self, *names):
    for name in names:
      if name in self._builder.info.splits:
        return name
    raise ConfigError(
      f"config.data.eval_split = '' is not allowed: {self._settings.name} has none of {', '.join(names)}, which are tried "
      f"then. Give one of its splits, {', '.join(self._builder.info.splits)}, or a part of one, as train[90%:]."
    )

  def _records(self, field, split):
    info = self._builder.info
    try:
      found = info.splits[split]
      shards = [Shard(str(part.filename), part.skip, part.take) for part in found.file_instructions]
    except (KeyError, ValueError, AssertionError) as error:
      raise ConfigError(
        f"config.data.{field} = {split!r} is not allowed: {self._settings.name} in {info.data_dir} has the splits "
        f"{', '.join(info.splits)}; parts of them are written as train[:90%]."
      ) from error
    if not found.num_examples:
      raise ConfigError(f"config.data.{field} = {split!r} is not allowed: it holds no example.")
    if _fits(shards):
      return _InMemory(self._builder, split, self._image, self._label)
    if info.file_format != tfds.core.FileFormat.TFRECORD:
      raise ConfigError(
        f"config.data.name = {self._settings.name!r} is not allowed: {info.data_dir} holds {info.file_format.value} "
        f"files. Prepare it as TFRecord, in another directory: python -m profit_jax.data.prepare {self._settings.name}."
      )
    return _Streamed(found.num_examples, self._settings.readers, shards, info.features, self._image, self._label)


def open_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  """The builder of a data set, prepared or not.

  Raises:
    ConfigError: one that neither the catalogue nor the directory has.
  """
  try:
    return tfds.builder(name, data_dir=data_dir or None)
  except tfds.core.DatasetNotFoundError as error:
    raise ConfigError(
      f"config.data.name = {name!r} is not allowed: it must be digits, folder, or a data set of tensorflow-datasets; "
      f"neither its catalogue (https://www.tensorflow.org/datasets/catalog) nor {data_dir or 'its own directory'} has it."
    ) from error
  except (ValueError, AssertionError, KeyError) as error:  # a configuration or a version that it does not have
    raise ConfigError(f"config.data.name = {name!r} is not allowed: {' '.join(str(error).split())[:500]}") from error


def _builder(settings):
  builder = open_builder(settings.name, settings.data_dir)
  if not (builder.is_prepared() and builder.info.splits):
    where = f" --data_dir={settings.data_dir}" if settings.data_dir else ""
    by_hand = ""
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
      where += " --manual_dir=DIR"
      by_hand = " DIR must hold its files, which are fetched by hand; docs/data.md says which."
    raise ConfigError(
      f"config.data.name = {settings.name!r} is not prepared: there is no {builder.data_dir}. Prepare it with "
      f"python -m profit_jax.data.prepare {settings.name}{where}.{by_hand}"
    )
  return builder


def _fits(shards: list[Shard]) -> bool:
  """Whether the files of a split may be kept in memory; asks for no more sizes than it must."""
  total = 0
  for path in dict.fromkeys(shard.path for shard in shards):
    # A missing file is found when it is read, with its name.
    total += tf.io.gfile.stat(path).length if tf.io.gfile.exists(path) else 0
    if total > MEMORY_LIMIT:
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


class _InMemory(Table):
  """A small split, its images still encoded."""

  def __init__(self, builder, split, image, label):
    self._title = f"{builder.info.full_name}, split {split}"
    found = builder.as_dataset(
      split=split,
      decoders={image: tfds.decode.SkipDecoding()},
      read_config=tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1),
      shuffle_files=False,
    )
    examples = list(found.map(lambda example: (example[image], example[label])).as_numpy_iterator())
    contents, labels = zip(*examples, strict=True)
    super().__init__({"contents": tf.constant(contents), "label": tf.constant(labels, tf.int32)})

  def read(self, record: Record) -> tuple[tf.Tensor, tf.Tensor]:
    """See `Records.read`."""
    return record["contents"], record["label"]

  def name(self, key) -> str:
    """See `Records.name`."""
    return f"{self._title}, example {key[0]}"


class _Streamed(Stream):
  """A large split."""

  def __init__(self, examples, readers, shards, features, image, label):
    super().__init__(examples, readers, lambda first, last: cut(shards, first, last))
    self._features, self._image, self._label = features, image, label

  def read(self, record: Record) -> tuple[tf.Tensor, tf.Tensor]:
    """See `Records.read`."""
    example = self._features.deserialize_example(record["data"], decoders={self._image: tfds.decode.SkipDecoding()})
    return example[self._image], tf.cast(example[self._label], tf.int32)
