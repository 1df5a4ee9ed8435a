"""Data sources, by the name that `config.data.name` takes. TensorFlow is imported in this package
only.
"""

import dataclasses
import logging
import re

from profit_jax import optional
from profit_jax.config import ConfigError, Settings
from profit_jax.data import digits, fashion_mnist, pairs
from profit_jax.data.base import MEMORY_LIMIT, DatasetInfo, Evaluated, HostShard, Source
from profit_jax.data.normalize import Normalization

# What pretrained weights expect, by the name that `normalization` takes: torchvision's ImageNet
# statistics; the halves of Inception, with which some of timm's were trained; pixels in 0..1.
NORMALIZATIONS = {
  "imagenet": Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
  "inception": Normalization(mean=(0.5,) * 3, std=(0.5,) * 3),
  "none": Normalization(mean=(0.0,) * 3, std=(1.0,) * 3),
}

_IMAGENET = NORMALIZATIONS["imagenet"]
_CIFAR10 = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
# Of the training images, grey in all three channels.
_FASHION_MNIST = Normalization(mean=(0.2860,) * 3, std=(0.3530,) * 3)
# Data sets that `--mode=plan` knows before they are downloaded; of any other one, its files
# tell.
KNOWN: dict[str, DatasetInfo] = {
  "digits": digits.INFO,
  "digit_pairs": pairs.INFO,
  "imagenet2012": DatasetInfo(
    train_examples=1_281_167, eval_examples=50_000, num_classes=1000, normalization=_IMAGENET
  ),
  "cifar10": DatasetInfo(
    train_examples=50_000, eval_examples=10_000, num_classes=10, normalization=_CIFAR10
  ),
  fashion_mnist.NAME: DatasetInfo(
    train_examples=60_000, eval_examples=10_000, num_classes=10, normalization=_FASHION_MNIST
  ),
}
FOLDER = "folder"
_log = logging.getLogger(__name__)
_log.setLevel(logging.WARNING)  # explicit, because main.py quiets the root
_MADE_OF_DIGITS = {"digits": digits.Digits, "digit_pairs": pairs.Pairs}


def normalization(name: str, info: DatasetInfo) -> Normalization:
  """What `data.normalization` or `teacher.normalization` stands for: one of `NORMALIZATIONS`, or
  the data set's own.
  """
  return info.normalization if name == "dataset" else NORMALIZATIONS[name]


def normalization_of(name: str) -> Normalization:
  """A data set's own normalization; ImageNet's where nothing else is known."""
  known = _known(name)
  return known.normalization if known else _IMAGENET


def eval_preparation(settings: Settings) -> tuple[float, str]:
  """How evaluation images are prepared: the share of their shorter side that is kept, and the
  interpolation.
  """
  return (
    (1.0, "bicubic")
    if settings.data.name in _MADE_OF_DIGITS
    else (settings.data.crop_pct, settings.data.interpolation)
  )


def info(settings: Settings) -> DatasetInfo:
  """What is known of the configured source, for a plan.

  Reads the files of a source only where nothing else says it.

  Raises:
    ConfigError: a source that is not there, or a batch that it cannot fill.
  """
  data = settings.data
  whole = data.train_split == "train" and not data.eval_split
  known = (_known(data.name) if whole else None) or load(settings).info
  _check_batch(settings, known)
  return known


def _known(name: str) -> DatasetInfo | None:
  if name in KNOWN:
    return KNOWN[name]
  base = re.split("[/:]", name)[0]  # without configuration and version, which only TFDS has
  return None if base in _MADE_OF_DIGITS else KNOWN.get(base)


def load(
  settings: Settings,
  shard: HostShard = HostShard(),
  *,
  memory_limit: int = MEMORY_LIMIT,
  trains: bool = True,
  evaluated: Evaluated = "eval",
) -> Source:
  """Opens the configured source.

  Args:
    settings: validated.
    shard: whose rows of each batch it gives.
    memory_limit: in bytes. A TFDS split whose files are larger is streamed, not kept in memory.
    trains: whether it is trained on. Otherwise it needs no training split (the evaluation's takes
      its place), and may be smaller than a training batch.
    evaluated: which images the evaluation batches hold.

  Raises:
    ConfigError: a source that is not there or not as it must be, or batches that it cannot fill, or
      hosts not share.
  """
  train = settings.train
  for name in ("batch_size", "eval_batch_size") if trains else ("eval_batch_size",):
    if getattr(train, name) % shard.count:
      raise ConfigError(
        f"config.train.{name} = {getattr(train, name)} is not allowed: it must be a multiple of "
        f"{shard.count}, the number "
        f"of processes."
      )
  if settings.data.name in _MADE_OF_DIGITS:
    source = _MADE_OF_DIGITS[settings.data.name](
      image_size=settings.data.image_size,
      augment=settings.data.augment,
      seed=settings.seed,
      shard=shard,
      evaluated=evaluated,
    )
  else:
    source = _images(settings, shard, memory_limit, trains, evaluated)
  _check_batch(settings, source.info, trains)
  return source


def load_split(settings: Settings, split: str) -> Source:
  """Opens a split of the configured source, to evaluate on it alone.

  Args:
    settings: validated.
    split: "eval", the configured evaluation split; "train", the configured training split, its
      images prepared as the evaluation's; or another one, as `data.eval_split` takes it.

  Raises:
    ConfigError: as `load`, or there is no such split.
  """
  if split == "eval":
    return load(settings, trains=False)
  if split == "train":
    # With both splits: a folder's may be shares of the same images.
    train = dataclasses.replace(settings.train, batch_size=1, accumulation_steps=1)
    return load(dataclasses.replace(settings, train=train), evaluated="train")
  if settings.data.name in _MADE_OF_DIGITS:
    raise ConfigError(
      f"--split={split} is not allowed: {settings.data.name} has the splits eval and train."
    )
  chosen = dataclasses.replace(settings.data, eval_split=split)
  try:
    return load(dataclasses.replace(settings, data=chosen), trains=False)
  except ConfigError as error:
    # It was given as an option. Messages name the field with its value or alone.
    text = str(error).replace(f"config.data.eval_split = {split!r}", f"--split={split}")
    raise ConfigError(text.replace("config.data.eval_split is", f"--split={split} is")) from error


def _images(settings, shard, memory_limit, trains, evaluated):
  # Here, because TensorFlow takes seconds to import, and what needs no images (steps, benchmarks,
  # plans) runs without it.
  packages = ("tensorflow",) if settings.data.name == FOLDER else ()
  optional.require("tfds", f"data.name = {settings.data.name}", *packages)
  from profit_jax.data import images, records

  images.quiet_tensorflow()
  if settings.data.name == FOLDER:
    from profit_jax.data.folder import Folder

    # A teacher's classifier has an order of classes too.
    fixed = bool(settings.teacher.weights) or not settings.new_classifier
    splits = Folder(settings.data, settings.seed, fixed_labels=fixed, trains=trains)
  else:
    from profit_jax.data.tfds import Splits

    splits = Splits(settings.data, memory_limit, trains)
  if evaluated == "train":
    splits.eval = splits.train
  if shard.index == 0:
    for note in splits.notes:
      _log.warning("%s", note)
  # Whether the hosts can share both.
  if trains:
    splits.train.count(records.EpochRequest(settings.train.batch_size, shard, shuffle=(0, 0)))
  splits.eval.count(records.EpochRequest(settings.train.eval_batch_size, shard))
  own = normalization_of(settings.data.name)
  return images.Images(splits, settings.data, own, settings.seed, shard)


_SMALL_BATCH = 1024  # of which nobody minds the padding


def _check_batch(settings, found, trains=True):
  batch = settings.train.batch_size
  if trains and batch > found.train_examples:
    raise ConfigError(
      f"config.train.batch_size = {batch} is larger than the data: {settings.data.name} has "
      f"{found.train_examples} "
      f"training images, and an epoch needs at least one full batch. Use {found.train_examples} "
      "or less."
    )
  evaluated, most = settings.train.eval_batch_size, max(found.eval_examples, _SMALL_BATCH)
  if evaluated > most:
    raise ConfigError(
      f"config.train.eval_batch_size = {evaluated} is not allowed: {settings.data.name} has "
      f"{found.eval_examples} "
      f"evaluation images, and the rest of a batch would be padding. Use {most} or less."
    )
