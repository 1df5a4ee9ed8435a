"""A plain folder of images: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg."""

import concurrent.futures
import os
from collections.abc import Iterable

import tensorflow as tf

from profit_jax import paths
from profit_jax.config import ConfigError, DataSettings
from profit_jax.data.records import InMemoryRecords, Record

SUFFIXES = (".jpg", ".jpeg", ".png")
EVAL_NAMES = ("validation", "val", "test")
# Names asked for at once: a directory on a network takes milliseconds, and there are a thousand of
# them.
_LISTED_AT_ONCE = 16


class Folder:
  """The two splits of an image folder; classes are numbered in the order of their names.

  Attributes:
    train: records to train on.
    eval: records to evaluate on.
    class_names: folders of the training split.
  """

  def __init__(self, settings: DataSettings, trains: bool = True):
    """Lists the files; they are read later.

    Args:
      settings: validated.
      trains: False takes the evaluation's split for both.

    Raises:
      ConfigError: no such directory or split, a class without images, or classes that differ
        between the splits.
    """
    if not settings.data_dir:
      raise ConfigError(
        "config.data.data_dir = '' is not allowed: with config.data.name = folder it must be the "
        "folder's path."
      )
    root = paths.opened("config.data.data_dir =", os.path.expanduser(settings.data_dir))
    if not root.is_dir():
      raise ConfigError(
        f"config.data.data_dir = {settings.data_dir!r} is not allowed: there is no such directory."
      )
    train = _split(root, "train_split", (settings.train_split,)) if trains else None
    evaluation = _split(
      root, "eval_split", (settings.eval_split,) if settings.eval_split else EVAL_NAMES
    )
    train = train or evaluation
    classes, others = _classes(train), _classes(evaluation)
    if classes != others:
      differing = sorted({*classes} ^ {*others})
      raise ConfigError(
        f"{train} has {len(classes)} classes and {evaluation} has {len(others)}; they must be the "
        "same folders. In one "
        f"alone: {', '.join(differing[:10])}{' ...' if len(differing) > 10 else ''}."
      )
    self.class_names = tuple(classes)
    self.train, self.eval = _Files(train, classes), _Files(evaluation, classes)


def _split(root, field, names):
  for name in names:
    if name and (root / name).is_dir():
      return root / name
  there = (
    ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no directories"
  )
  raise ConfigError(
    f"config.data.{field} is not there: {root} must hold a directory {' or '.join(names)}; it "
    f"holds {there}."
  )


def _classes(split):
  paths = [path for path in split.iterdir() if not path.name.startswith(".")]
  with concurrent.futures.ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
    found = sorted(
      path.name
      for path, there in zip(paths, pool.map(lambda path: path.is_dir(), paths), strict=True)
      if there
    )
  if not found:
    raise ConfigError(f"{split} holds no class folders: images must lie in {split}/CLASS/NAME.jpg.")
  return found


class _Files(InMemoryRecords):
  """The images of a split, in the order of classes and names."""

  def __init__(self, split, classes):
    def images(name):
      files = tf.io.gfile.listdir(str(split / name))
      return sorted(
        file for file in files if file.lower().endswith(SUFFIXES) and not file.startswith(".")
      )

    with concurrent.futures.ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
      found = list(pool.map(images, classes))
    empty = [name for name, names in zip(classes, found, strict=True) if not names]
    if empty:
      raise ConfigError(
        f"{len(empty)} class folders of {split} hold no image ({', '.join(SUFFIXES)}): "
        f"{', '.join(empty[:10])}. Remove "
        f"them from both splits, or fill them."
      )
    self._paths = [
      str(split / name / image)
      for name, images in zip(classes, found, strict=True)
      for image in images
    ]
    self._firsts = [
      str(split / name / images[0]) for name, images in zip(classes, found, strict=True)
    ]
    labels = [label for label, images in enumerate(found) for _ in images]
    names = [
      f"{name}/{image}" for name, images in zip(classes, found, strict=True) for image in images
    ]
    super().__init__(
      {"path": tf.constant(self._paths), "label": tf.constant(labels, tf.int32)}, names
    )

  def sample(self) -> Iterable[bytes]:
    """See `InMemoryRecords.sample`: the first of every class, so that two directories whose files
    have the same names differ.

    Raises:
      ConfigError: one cannot be read.
    """

    def content(path):
      with tf.io.gfile.GFile(path, "rb") as file:
        return file.read()

    try:
      with concurrent.futures.ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
        return list(pool.map(content, self._firsts))
    except tf.errors.OpError as error:
      raise ConfigError(
        f"folder cannot be read: {' '.join(error.message.split())[:500]}. Restore the file."
      ) from error

  def read(self, record: Record) -> tuple[tf.Tensor, tf.Tensor]:
    """See `InMemoryRecords`."""
    return tf.io.read_file(record["path"]), record["label"]

  def name(self, key) -> str:
    """What a log calls the record with this key."""
    return self._paths[key[0]]
