"""Writes a tensorflow-datasets set into its directory, where `config.data.data_dir` finds it."""

import os

from profit_jax import optional
from profit_jax.config import ConfigError
from profit_jax.data import fashion_mnist


def prepare(name: str, data_dir: str, manual_dir: str) -> str:
  """Downloads and prepares a data set, or finds it prepared; returns what to tell the user.

  Args:
    name: as `config.data.name`.
    data_dir: where to, local or gs://; "" is TFDS's own.
    manual_dir: where files lie that were fetched by hand; "" is `data_dir/downloads/manual`.

  Raises:
    ConfigError: a set that is unknown, or cannot be prepared; tensorflow-datasets is missing.
  """
  optional.require("tfds", "profit prepare")
  import tensorflow_datasets as tfds

  from profit_jax.data.records import one_line
  from profit_jax.data.tfds import fashion_mnist_builder, open_builder, require_image_and_label

  builder = open_builder(name, data_dir)
  require_image_and_label(builder)
  manual_dir = os.path.expanduser(manual_dir)
  if manual_dir and not os.path.isdir(manual_dir) and "://" not in manual_dir:
    raise ConfigError(f"--manual_dir={manual_dir} is not allowed: there is no such directory.")
  if builder.name == fashion_mnist.NAME and manual_dir and not builder.is_prepared():
    builder = fashion_mnist_builder(builder, fashion_mnist.read(manual_dir))
  options = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
  try:
    builder.download_and_prepare(download_config=options)
  except Exception as error:  # its code is another one for each set, and can raise anything
    wanted = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
    hint = f" It needs files that are fetched by hand (--manual_dir): {wanted}" if wanted else ""
    if builder.name == fashion_mnist.NAME:
      hint = f" Without a network: --manual_dir=DIR. {fashion_mnist.DEBIAN}"
    raise ConfigError(
      f"{name} could not be prepared: {one_line(error) or type(error).__name__}.{hint}"
    ) from error
  splits = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
  return f"{name} is in {builder.data_dir}; examples: {splits}."
