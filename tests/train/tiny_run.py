"""The configuration of the shared whole run, for the command line."""

from tests.train.shared import tiny_config


def get_config():
  """See `tests/train/shared.py`."""
  return tiny_config()
