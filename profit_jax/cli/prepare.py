"""Writes a tensorflow-datasets set into its directory, where `config.data.data_dir` finds it:

    profit prepare cifar10 --data_dir=/data/tfds
    profit prepare imagenet2012 --data_dir=/data/tfds --manual_dir=/data/tars

TFDS's own command, `tfds build`, asks for Apache Beam, even where none is needed.
"""

import argparse
import sys
from collections.abc import Sequence

from profit_jax.config import ConfigError
from profit_jax.data.prepare import prepare


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="profit prepare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "name", help="of the data set, with its configuration where it has several: imagenette/320px-v2"
  )
  parser.add_argument(
    "--data_dir",
    default="",
    help="where to, local or gs://; else $TFDS_DATA_DIR or ~/tensorflow_datasets",
  )
  parser.add_argument("--manual_dir", default="", help="where files lie that were fetched by hand")
  options = parser.parse_args(arguments)
  try:
    print(prepare(options.name, options.data_dir, options.manual_dir))
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0
