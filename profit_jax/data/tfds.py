"""Any classification set of tensorflow-datasets prepared in a directory, local or gs://."""

import itertools
import os
import re
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from profit_jax import paths
from profit_jax.config import ConfigError, DataSettings, listed
from profit_jax.data.base import MEMORY_LIMIT
from profit_jax.data.records import InMemoryRecords, Record, Shard, ShardedRecords, one_line

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAMED = 10  # features, versions or sets in an error


class Splits:
  """The two splits of a data set.

  Attributes:
    train: records to train on.
    eval: records to evaluate on.
    class_names: of the label.
    notes: what the user should look at, one line each: evaluation images that are trained on.
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
    keys = class_keys(builder, settings.image_key, settings.label_key)
    _require_prepared(builder, settings)
    self._image, self._label = keys
    self.class_names = tuple(builder.info.features[self._label].names)
    evaluation = settings.eval_split or self._first_of("validation", "val", "test")
    eval_shards = self._shards("eval_split", evaluation)
    self.eval = self._records(evaluation, eval_shards)
    self.notes: tuple[str, ...] = ()
    if not trains:
      self.train = self.eval
      return
    train_shards = self._shards("train_split", settings.train_split)
    self.train = self._records(settings.train_split, train_shards)
    if both := _in_both(train_shards, eval_shards):
      self.notes = (
        f"{both} of {self.eval.examples} evaluation images are training images too: accuracy will "
        "not say how well other images are classified.",
      )

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

  def _shards(self, field, split):
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
    return shards

  def _records(self, split, shards):
    info = self._builder.info
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
      info.splits[split].num_examples,
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
    return tfds.builder(name, data_dir=paths.without_file_scheme(data_dir) or None)
  except tfds.core.DatasetNotFoundError as error:
    raise ConfigError(
      f"config.data.name = {name!r} is not allowed: it must be digits, digit_pairs, folder, or a "
      "data set of "
      "tensorflow-datasets; neither its catalogue (https://www.tensorflow.org/datasets/catalog) "
      "nor "
      f"{data_dir or 'its own directory'} has it.{_prepared(name, data_dir)}"
    ) from error
  # A configuration or a version that it does not have.
  except (
    ValueError,
    AssertionError,
    KeyError,
  ) as error:
    raise ConfigError(
      f"config.data.name = {name!r} is not allowed: {one_line(error)}.{_prepared(name, data_dir)}"
    ) from error
  # No network, no permission, no such code, a damaged description: each library has its own.
  except Exception as error:
    login = (
      " For gs://, gcloud auth application-default login." if data_dir.startswith("gs://") else ""
    )
    raise ConfigError(
      f"config.data.name = {name!r} cannot be opened in {data_dir or 'its own directory'}: "
      f"{one_line(error) or type(error).__name__}.{login}"
    ) from error


def _prepared(name: str, data_dir: str) -> str:
  """A sentence about what is prepared in a directory: the set's configurations and versions, or
  other sets; "" where nothing is.
  """
  base = re.split("[/:]", name)[0]
  path = paths.without_file_scheme(data_dir) or tfds.core.constants.DATA_DIR
  try:
    root = epath.Path(os.path.expanduser(path))
    versions = _versions(root / base) if base else []
    if versions:
      return f" {root} holds {listed(versions[:_NAMED])}."
    if base in root.parts and [*_versions(root), *root.glob("dataset_info.json")]:
      above = root.parents[list(reversed(root.parts)).index(base)]
      return f" {root} is in the data set's own directory: give {above} as the data_dir."
    sets = [path.name for path in sorted(root.iterdir()) if path.is_dir() and _versions(path)]
  # Remote file systems raise their own.
  except Exception:
    return ""
  more = ", ..." if len(sets) > _NAMED else ""
  return f" {root} holds {listed(sets[:_NAMED])}{more}." if sets else ""


def _versions(path: epath.Path) -> list[str]:
  """What is prepared of the set in a directory, as `data.name` takes it."""

  def of(directory):
    if not directory.is_dir():
      return []
    return sorted(version.name for version in directory.iterdir() if _VERSION.match(version.name))

  found = [f"{path.name}:{version}" for version in of(path)]
  for below in sorted(path.iterdir()) if path.is_dir() else ():
    if not _VERSION.match(below.name):
      found += [f"{path.name}/{below.name}:{version}" for version in of(below)]
  return found


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


def class_keys(
  builder: tfds.core.DatasetBuilder, image_key: str = "", label_key: str = ""
) -> tuple[str, str]:
  """The names of an example's image and label.

  Args:
    builder: of the set.
    image_key: `data.image_key`; "" is the set's own.
    label_key: `data.label_key`; "" is the set's own.

  Raises:
    ConfigError: they are not known, or are something else than an image and a class label.
  """
  name, features, own = builder.info.full_name, builder.info.features, builder.info.supervised_keys
  if not (own and len(own) == 2 and all(isinstance(key, str) for key in own)):
    own = ("", "")
  keys = image_key or own[0], label_key or own[1]
  for field, key in zip(("image_key", "label_key"), keys, strict=True):
    if key not in features:
      wrong = (
        f"config.data.{field} = {key!r} is not allowed"
        if key
        else f"config.data.name = {name!r} is not allowed without config.data.{field}"
      )
      raise ConfigError(
        f"{wrong}: it must be a data set of one image and one class label per example, and its "
        f"supervised keys are {builder.info.supervised_keys}. Set config.data.image_key and "
        "config.data.label_key to an Image and a ClassLabel of its features: "
        f"{_described(features)}."
      )
  image, label = (features[key] for key in keys)
  if type(image) is not tfds.features.Image:
    _refuse(builder, "image", keys[0], "a tfds.features.Image")
  if np.dtype(image.np_dtype) not in (np.uint8, np.uint16):
    _refuse(builder, "image", keys[0], "of uint8 or uint16")
  if type(label) is not tfds.features.ClassLabel:
    _refuse(builder, "label", keys[1], "a tfds.features.ClassLabel, which has the classes' names")
  if (label.num_classes or 0) < 2:
    _refuse(builder, "label", keys[1], "of two classes or more")
  return keys


def _refuse(builder, role, key, allowed):
  features = builder.info.features
  raise ConfigError(
    f"config.data.name = {builder.info.full_name!r} is not allowed: its {role} {key!r} is "
    f"{_kind(features[key])} and must be {allowed}. Choose another feature with "
    f"config.data.{role}_key, or prepare the set anew. Its features: {_described(features)}."
  )


def _described(features) -> str:
  told = [f"{key} ({_kind(features[key])})" for key in features]
  return listed(told[:_NAMED]) + (", ..." if len(told) > _NAMED else "")


def _kind(feature) -> str:
  name = type(feature).__name__
  if type(feature) is tfds.features.ClassLabel:
    return f"{name} of {feature.num_classes} classes"
  if type(feature) is tfds.features.Text:
    return name
  if isinstance(feature, (tfds.features.Tensor, tfds.features.Image)):
    shape = f", shape {feature.shape}" if feature.shape else ""
    return f"{name} of {np.dtype(feature.np_dtype).name}{shape}"
  return name


def require_image_and_label(builder: tfds.core.DatasetBuilder) -> None:
  """Checks that a set has an image and a class label; which ones, `class_keys` says.

  Raises:
    ConfigError: it has none.
  """
  features = builder.info.features
  kinds = {type(features[key]) for key in features}
  if not kinds >= {tfds.features.Image, tfds.features.ClassLabel}:
    raise ConfigError(
      f"config.data.name = {builder.info.full_name!r} is not allowed: it must be a data set of one "
      f"image and one class label per example. Its features: {_described(features)}."
    )


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
    f"profit prepare {settings.name}{where} (docs/data.md)."
    f"{_prepared(settings.name, settings.data_dir)}{by_hand}"
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
    # Reading a pipe may wait forever.
    if "://" not in path and not os.path.isfile(path):
      raise ConfigError(f"{path} is no regular file. Prepare the data again.")
    total += tf.io.gfile.stat(path).length
    if total > memory_limit:
      return False
  return True


def _in_both(some: list[Shard], others: list[Shard]) -> int:
  """How many examples are in parts of shards and in other ones."""
  return sum(
    max(0, min(one.skip + one.take, other.skip + other.take) - max(one.skip, other.skip))
    for one in some
    for other in others
    if one.path == other.path
  )


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
        f"{self._title} cannot be read: {one_line(error)}. Prepare it again."
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
