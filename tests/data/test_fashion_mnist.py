"""Fashion-MNIST from its four files, with a few images in the same format; and Debian's files."""

import gzip
import hashlib
import pathlib

import numpy as np
import pytest

from configs import cifar10_w4
from profit_jax import data
from profit_jax.cli import prepare
from profit_jax.config import parse
from profit_jax.data import fashion_mnist
from profit_jax.models import REGISTRY

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
TRAIN_IMAGES = "train-images-idx3-ubyte"
_rng = np.random.default_rng(0)
SMALL = {
  TRAIN_IMAGES: _rng.integers(0, 256, (12, 28, 28), np.uint8),
  "train-labels-idx1-ubyte": np.arange(12, dtype=np.uint8) % 10,
  "t10k-images-idx3-ubyte": _rng.integers(0, 256, (6, 28, 28), np.uint8),
  "t10k-labels-idx1-ubyte": np.arange(6, dtype=np.uint8)[::-1] + 1,
}


def idx(array):
  header = bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, ">u4").tobytes()
  return header + array.tobytes()


@pytest.fixture
def files(tmp_path, monkeypatch):
  """A directory with the small set, which is taken for the published one."""
  directory = tmp_path / "files"
  directory.mkdir()
  for name, array in SMALL.items():
    (directory / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
  digests = {name: hashlib.sha256(idx(array)).hexdigest() for name, array in SMALL.items()}
  monkeypatch.setattr(fashion_mnist, "SHA256", digests)
  return directory


def run(files, root):
  return prepare.main(["fashion_mnist", f"--manual_dir={files}", f"--data_dir={root / 'tfds'}"])


def source(root, **changes):
  config = cifar10_w4.get_config()
  changes = {"train.batch_size": 4, "train.eval_batch_size": 4, **changes}
  config.update_from_flattened_dict(
    {"data.name": "fashion_mnist", "data.data_dir": str(root / "tfds"), **changes}
  )
  return data.load(parse(config, REGISTRY))


def test_prepared_files_are_a_tfds_set_of_grey_images_in_three_channels(files, tmp_path):
  # One of the files is unpacked.
  packed = files / f"{TRAIN_IMAGES}.gz"
  (files / TRAIN_IMAGES).write_bytes(gzip.decompress(packed.read_bytes()))
  packed.unlink()
  assert run(files, tmp_path) == 0
  loaded = source(tmp_path, **{"data.image_size": 28, "data.augment": False})
  assert (loaded.info.train_examples, loaded.info.eval_examples) == (12, 6)
  assert loaded.info.class_names[0] == "T-shirt/top"
  for batches, split in ((loaded.train_batches(0, 4), "train"), (loaded.eval_batches(4), "t10k")):
    found = set()
    for batch in batches:
      images, labels = (batch[name][batch["mask"]] for name in ("image", "label"))
      found |= {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    expected = {
      (np.repeat(image[..., None], 3, -1).tobytes(), int(label))
      for image, label in zip(
        SMALL[f"{split}-images-idx3-ubyte"], SMALL[f"{split}-labels-idx1-ubyte"], strict=True
      )
    }
    assert found == expected


def refusal(files, root, capsys):
  assert run(files, root) == 2
  (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
  assert not (root / "tfds" / "fashion_mnist" / "3.0.1").exists()
  return line


def test_a_missing_file_is_named(files, tmp_path, capsys):
  (files / "t10k-labels-idx1-ubyte.gz").unlink()
  line = refusal(files, tmp_path, capsys)
  assert "lacks t10k-labels-idx1-ubyte.gz" in line
  assert "dataset-fashion-mnist" in line


def test_files_of_mnist_are_refused(files, tmp_path, capsys):
  # The same format, other images.
  other = np.random.default_rng(1).integers(0, 256, SMALL[TRAIN_IMAGES].shape, np.uint8)
  (files / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(idx(other)))
  line = refusal(files, tmp_path, capsys)
  assert f"{TRAIN_IMAGES}.gz is not Fashion-MNIST's: it holds 12x28x28 other bytes" in line
  assert "MNIST and other sets have files of the same names" in line


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda packed: packed[: len(packed) // 2], "damaged or cut off"),
    (lambda packed: packed[:400] + b"\0" * 50 + packed[450:], "damaged or cut off"),
    (lambda packed: gzip.decompress(packed)[:5000], "4984 of the 9408 bytes"),
    (lambda packed: gzip.decompress(packed)[:9], "no idx data"),
    (lambda packed: b"", "no idx data"),
    (lambda packed: b"<html>Not found</html>", "no idx data"),
    (lambda packed: gzip.compress(idx(SMALL["train-labels-idx1-ubyte"])), "12 other bytes"),
  ],
)
def test_damaged_files_are_refused(files, tmp_path, capsys, damage, message):
  path = files / f"{TRAIN_IMAGES}.gz"
  path.write_bytes(damage(path.read_bytes()))
  line = refusal(files, tmp_path, capsys)
  assert message in line
  assert str(path) in line


def test_a_plan_knows_its_size_and_normalization_without_the_files():
  config = cifar10_w4.get_config()
  config.update_from_flattened_dict({"data.name": "fashion_mnist"})
  info = data.info(parse(config, REGISTRY))
  assert (info.train_examples, info.eval_examples, info.num_classes) == (60_000, 10_000, 10)
  assert info.normalization.mean == (0.2860,) * 3


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_files_are_the_published_set(tmp_path):
  assert run(DEBIAN, tmp_path) == 0
  loaded = source(tmp_path, **{"data.image_size": 28, "data.augment": False})
  counts, pixels = np.zeros(10, int), []
  for batch in loaded.train_batches(0, 240):
    counts += np.bincount(batch["label"], minlength=10)
    pixels.append(batch["image"][..., 0])
  assert counts.tolist() == [6000] * 10
  values = np.concatenate(pixels).astype(np.float64) / 255
  normalization = loaded.info.normalization
  assert round(values.mean(), 4) == normalization.mean[0]
  assert round(values.std(), 4) == normalization.std[0]
  counts = sum(
    np.bincount(batch["label"][batch["mask"]], minlength=10) for batch in loaded.eval_batches(250)
  )
  assert counts.tolist() == [1000] * 10
