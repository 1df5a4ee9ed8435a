"""Data sources, by the name that `config.data.name` takes. TensorFlow is imported in this package only."""

from profit_jax.data import digits
from profit_jax.data.base import Facts, Source
from profit_jax.data.normalize import Normalization
from profit_jax.settings import ConfigError, Settings

# What pretrained weights expect, by the name that `normalization` takes: torchvision's ImageNet statistics; the halves of
# Inception, with which some of timm's were trained; pixels in 0..1.
NORMALIZATIONS = {
  "imagenet": Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
  "inception": Normalization(mean=(0.5,) * 3, std=(0.5,) * 3),
  "none": Normalization(mean=(0.0,) * 3, std=(1.0,) * 3),
}

SOURCES: dict[str, Facts] = {
  "digits": digits.FACTS,
  "imagenet2012": Facts(
    train_examples=1_281_167, eval_examples=50_000, num_classes=1000, normalization=NORMALIZATIONS["imagenet"]
  ),
}


def normalization(name: str, facts: Facts) -> Normalization:
  """What `data.normalization` or `teacher.normalization` stands for: one of `NORMALIZATIONS`, or the data set's own."""
  return facts.normalization if name == "dataset" else NORMALIZATIONS[name]


def check_sizes(settings: Settings) -> Facts:
  """The facts of the configured source.

  Raises:
    ConfigError: a batch that the data cannot fill.
  """
  facts, batch = SOURCES[settings.data.name], settings.train.batch_size
  if batch > facts.train_examples:
    raise ConfigError(
      f"config.train.batch_size = {batch} is larger than the data: {settings.data.name} has {facts.train_examples} "
      f"training images, and an epoch needs at least one full batch. Use {facts.train_examples} or less."
    )
  return facts


def load(settings: Settings) -> Source:
  """Loads the configured source.

  Raises:
    ConfigError: a source that this release cannot read.
  """
  check_sizes(settings)
  if settings.data.name == "digits":
    return digits.Digits(image_size=settings.data.image_size, augment=settings.data.augment, seed=settings.seed)
  raise ConfigError(
    f"config.data.name = {settings.data.name!r} cannot be loaded yet: only --mode plan works with it. "
    f"Train on 'digits' (configs/digits_w4.py)."
  )
