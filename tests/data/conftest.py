"""Small data sets that several files read, written once."""

import pytest

from tests.data import pictures


@pytest.fixture(scope="session")
def written(tmp_path_factory):
  """The same images as a folder, `folder`, and as a TFDS set, `tfds`; tests only read them."""
  root = tmp_path_factory.mktemp("data")
  pictures.write_folder(root / "folder")
  pictures.write_tfds(root / "tfds", shards=3)
  return root
