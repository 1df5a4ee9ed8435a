"""Writes a tensorflow-datasets set into its directory, where `config.data.data_dir` finds it:

    profit prepare cifar10 --data_dir=/data/tfds
    profit prepare imagenet2012 --data_dir=/data/tfds --manual_dir=/data/tars

TFDS's own command, `tfds build`, asks for Apache Beam, even where none is needed.
"""

from collections.abc import Sequence

from profit_jax.cli import command
from profit_jax.data.prepare import prepare


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = command.parser("prepare", __doc__)
  parser.add_argument(
    "name", help="of the data set, with its configuration where it has several: imagenette/320px-v2"
  )
  parser.add_argument(
    "--data_dir",
    default="",
    help="where to, local or gs://; else $TFDS_DATA_DIR or ~/tensorflow_datasets",
  )
  parser.add_argument("--manual_dir", default="", help="where files lie that were fetched by hand")

  def execute(options):
    print(prepare(options.name, options.data_dir, options.manual_dir))

  return command.run(parser, arguments, execute)
