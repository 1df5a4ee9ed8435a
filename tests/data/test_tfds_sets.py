"""ImageNet and CIFAR-10 as TFDS's own code prepares them, with a few pictures."""

import numpy as np
import pytest

from configs import cifar10_w4, mbv2_w4
from profit_jax import data
from profit_jax.cli import prepare
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, check
from tests.data import pictures

# Synsets by their place in the list of classes, which TFDS and torchvision share.
SYNSETS = {0: "n01440764", 1: "n01443537", 217: "n02102040"}

SMALL = {"train.batch_size": 3, "train.eval_batch_size": 3}


def settings(config, **changes):
  config.update_from_flattened_dict({"train.batch_size": 4, "train.eval_batch_size": 4, **changes})
  chosen = parse(config, REGISTRY)
  check(chosen)
  return chosen


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
  """What the command of docs/data.md makes of ImageNet's archives."""
  root = tmp_path_factory.mktemp("imagenet")
  images = [image for image, _ in pictures.cuttings(9, size=(120, 90))]
  train = {
    synset: {f"{synset}_{i}.JPEG": pictures.encoded(images[3 * number + i]) for i in range(2)}
    for number, synset in enumerate(SYNSETS.values())
  }
  # As in ImageNet: one picture of CMYK, one of gray.
  train["n01440764"]["n01440764_7.JPEG"] = pictures.encoded(images[2].convert("CMYK"))
  train["n01443537"]["n01443537_7.JPEG"] = pictures.encoded(images[5].convert("L"))
  pictures.write_imagenet_archives(
    root / "tars", train, [pictures.encoded(image) for image in images[:5]]
  )
  code = prepare.main(
    ["imagenet2012", f"--data_dir={root / 'tfds'}", f"--manual_dir={root / 'tars'}"]
  )
  assert code == 0
  return root / "tfds"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["no_such_set"], "no_such_set"),
    (["imagenet2012", "--manual_dir=/absent"], "--manual_dir=/absent"),
    (["imagenet2012"], "(--manual_dir)"),
  ],
)
def test_what_cannot_be_prepared_is_said_in_one_line(tmp_path, capsys, arguments, message):
  assert prepare.main([*arguments, f"--data_dir={tmp_path}"]) == 2
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1
  assert message in errors[0]


def test_imagenet_as_the_guide_prepares_it(imagenet):
  source = data.load(settings(mbv2_w4.get_config(), **{"data.data_dir": str(imagenet)}))
  assert (source.info.train_examples, source.info.eval_examples, source.info.num_classes) == (
    8,
    5,
    1000,
  )
  batches = list(source.train_batches(0, 4))
  # The CMYK and the gray picture are not broken.
  assert all(batch["mask"].all() for batch in batches)
  labels = np.concatenate([batch["label"] for batch in batches])
  assert sorted(labels) == [0, 0, 0, 1, 1, 1, 217, 217]
  assert {batch["image"].shape for batch in batches} == {(4, 224, 224, 3)}
  evaluation = list(source.eval_batches(4))
  assert [batch["mask"].sum() for batch in evaluation] == [4, 1]


def small_images(count, seed):
  return [(image.resize((32, 32)), label) for image, label in pictures.cuttings(count, seed)]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
  directory = tmp_path_factory.mktemp("cifar10")
  names = tuple(str(i) for i in range(10))
  form = pictures.Form(names, shape=(32, 32, 3), texts=("id",), eval_split="test")
  return pictures.write_tfds(
    directory, "cifar10", train=16, evaluation=6, make=small_images, form=form
  )


def test_the_cifar10_preset_sees_whole_small_images(cifar10):
  source = data.load(settings(cifar10_w4.get_config(), **{"data.data_dir": str(cifar10)}))
  assert source.info.normalization.mean == (0.4914, 0.4822, 0.4465)
  images = np.concatenate([batch["image"][batch["mask"]] for batch in source.eval_batches(4)])
  expected = np.stack([np.asarray(image) for image, _ in small_images(6, 2)])
  # Not scaled, not cut.
  assert {image.tobytes() for image in images} == {image.tobytes() for image in expected}
  moved = next(source.train_batches(0, 4))["image"]
  originals = [
    np.pad(np.asarray(image), [(4, 4), (4, 4), (0, 0)]) for image, _ in small_images(16, 1)
  ]
  for image in moved:
    assert any(
      np.array_equal(image, view)
      for original in originals
      for mirrored in (original, original[:, ::-1])
      for view in np.lib.stride_tricks.sliding_window_view(mirrored, (32, 32, 3))[:, :, 0].reshape(
        -1, 32, 32, 3
      )
    )


def test_the_cifar10_preset_keeps_4x4_pixels():
  strides = settings(cifar10_w4.get_config()).model.strides
  assert 32 // np.prod(strides) == 4


def test_tfds_mock_data_works_as_a_source(cifar10):
  import tensorflow_datasets as tfds

  with tfds.testing.mock_data(num_examples=8, data_dir=str(cifar10)):
    source = data.load(settings(cifar10_w4.get_config()))
    batches = list(source.eval_batches(4))
  assert len(batches) == 2
  assert all(batch["mask"].all() and batch["image"].shape == (4, 32, 32, 3) for batch in batches)


def arrays(count, seed, dtype=np.uint16, channels=4):
  values = np.random.default_rng(seed).integers(0, 2**16, (count, 16, 16, channels)).astype(dtype)
  return [(image, i % 3) for i, image in enumerate(values)]


def test_of_four_channels_of_16_bits_the_high_bytes_of_three_are_seen(tmp_path):
  form = pictures.Form(shape=(16, 16, 4), dtype=np.uint16)
  pictures.write_tfds(tmp_path, train=3, evaluation=3, make=arrays, form=form)
  chosen = {"data.name": "cuttings", "data.data_dir": str(tmp_path), "data.crop_pct": 1.0}
  batch = next(data.load(pictures.settings(**chosen, **SMALL)).eval_batches(3))
  expected = np.uint8([(image >> 8)[..., :3] for image, _ in arrays(3, 2)])
  # TFDS shuffles what it writes.
  assert {image.tobytes() for image in batch["image"]} == {image.tobytes() for image in expected}


def test_float_images_are_refused(tmp_path):
  form = pictures.Form(shape=(16, 16, 1), dtype=np.float32)
  pictures.write_tfds(
    tmp_path, train=3, evaluation=3, make=lambda *ask: arrays(*ask, np.float32, 1), form=form
  )
  chosen = {"data.name": "cuttings", "data.data_dir": str(tmp_path)}
  with pytest.raises(ConfigError, match=r"'image'.* float32, .*uint8 or uint16"):
    data.load(pictures.settings(**chosen, **SMALL))
