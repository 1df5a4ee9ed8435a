"""TFDS sets and image folders: what stands in which batch, and what is refused."""

import functools
import itertools
import logging
import os
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

from profit_jax import data
from profit_jax.config import ConfigError
from profit_jax.data import HostShard, picture, preprocess
from profit_jax.data.records import EpochRequest, table_rows
from tests.data import pictures
from tests.data.kinds import RGB, UNREADABLE, kinds
from tests.data.pictures import EVAL, SIZE, TRAIN, settings

# A table, which small TFDS sets are too, and shards that are read from front to end.
SOURCES = ("folder", "stream")


@pytest.fixture(scope="module")
def open_source(written):
  """Opens a source, given its name, a host and settings."""

  def opened(name, shard=HostShard(), **changes):
    if name == "folder":
      return load_folder(written / "folder", shard, **changes)
    given = {"data.name": "cuttings", "data.data_dir": str(written / "tfds"), **changes}
    return data.load(settings(**given), shard, memory_limit=0)

  return opened


def load_folder(root, shard=HostShard(), **changes):
  return data.load(
    settings(**{"data.name": "folder", "data.data_dir": str(root), **changes}), shard
  )


@pytest.fixture(scope="module")
def whole(open_source):
  """Gives what one host alone sees of a source: a training epoch, number 1, and an evaluation."""

  @functools.cache
  def passes(name):
    source = open_source(name)
    return list(source.train_batches(1, 8)), list(source.eval_batches(8))

  return passes


def joined(batches, name="image"):
  return np.concatenate([batch[name] for batch in batches])


def as_set(images):
  return {image.tobytes() for image in images}


def assert_equal_batches(some, others):
  assert len(some) == len(others)
  for one, other in zip(some, others, strict=True):
    for name in ("image", "label", "mask"):
      assert np.array_equal(one[name], other[name]), name


@pytest.mark.parametrize("name", SOURCES)
def test_batches_keep_the_contract(open_source, whole, name):
  info = open_source(name).info
  assert (info.train_examples, info.eval_examples, info.num_classes) == (TRAIN, EVAL, 3)
  train, evaluation = whole(name)
  assert (len(train), len(evaluation)) == (3, 2)
  for batch in train + evaluation:
    assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
      "image": (np.uint8, (8, SIZE, SIZE, 3)),
      "label": (np.int32, (8,)),
      "mask": (bool, (8,)),
    }


# `test_records.py` has other numbers of hosts, and other places to begin.
@pytest.mark.parametrize("name", SOURCES)
def test_one_of_two_hosts_has_its_rows_of_the_rest_of_an_epoch(open_source, whole, name):
  train, evaluation = whole(name)
  source = open_source(name, HostShard(1, 2))
  assert_equal_batches(list(source.train_batches(1, 8, 1)), own_rows(train[1:]))
  assert_equal_batches(list(source.eval_batches(8)), own_rows(evaluation))


def own_rows(batches):
  return [{name: value[4:] for name, value in batch.items()} for batch in batches]


@pytest.mark.parametrize("changes", [{"epoch": 2}, {"seed": 1}], ids=["epoch", "seed"])
def test_another_epoch_or_seed_gives_other_images(open_source, whole, changes):
  source = open_source("folder", seed=changes.get("seed", 0))
  other = as_set(joined(source.train_batches(changes.get("epoch", 1), 8)))
  assert len(other) == TRAIN
  assert not other & as_set(joined(whole("folder")[0]))


def test_without_augmentation_an_epoch_has_the_evaluations_pixels(open_source, written):
  epoch = joined(open_source("folder", **{"data.augment": False}).train_batches(0, 8))
  files = [path.read_bytes() for path in (written / "folder" / "train").rglob("*.*")]
  centers = [preprocess.center_crop(tf.constant(f), SIZE, 0.875, "bicubic").numpy() for f in files]
  assert len(as_set(epoch)) == TRAIN
  assert as_set(epoch) == as_set(centers)


@pytest.mark.parametrize("name", SOURCES)
def test_evaluation_counts_every_image_once(whole, name):
  batches = whole(name)[1]
  masks, images, labels = (joined(batches, name) for name in ("mask", "image", "label"))
  assert masks.sum() == len(as_set(images[masks])) == EVAL
  assert sorted(labels[masks]) == sorted(label for _, label in pictures.cuttings(EVAL, 2))


def test_evaluation_does_not_depend_on_the_seed(open_source, whole):
  assert_equal_batches(whole("folder")[1], list(open_source("folder", seed=7).eval_batches(8)))


def test_folder_and_tfds_give_the_same_pixels(whole):
  folder, tfds = (
    as_set(joined(batches)[joined(batches, "mask")])
    for batches in (whole("folder")[1], whole("stream")[1])
  )
  # Every fifth is a PNG in the folder, and a JPEG there.
  assert len(folder & tfds) == EVAL - EVAL // 5


def test_a_batch_that_the_processes_cannot_share_is_refused():
  with pytest.raises(ConfigError, match=r"train.batch_size = 8 .* multiple of 3"):
    data.load(settings(**{"data.name": "digits"}), HostShard(0, 3))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
  return pictures.write_folder(tmp_path_factory.mktemp("damaged"), TRAIN, EVAL, broken=(3, 4))


def test_a_broken_image_leaves_its_row_empty_and_is_named_once(damaged, whole, caplog):
  source = load_folder(damaged, **{"data.max_broken": 0.1})
  with caplog.at_level(logging.WARNING):
    epochs = [list(source.train_batches(epoch, 8)) for epoch in (0, 1)]
  for batches in epochs:
    masks = joined(batches, "mask")
    assert masks.sum() == TRAIN - 2
    assert not joined(batches)[~masks].any()
    assert joined(batches)[masks].any(axis=(1, 2, 3)).all()
  named = [
    record.getMessage() for record in caplog.records if "broken image" in record.getMessage()
  ]
  assert len(named) == 2
  assert sum("003.jpeg" in line for line in named) == sum("004.png" in line for line in named) == 1
  assert all(line.endswith("it is cut off") for line in named)
  # The other images of a batch are what they are without the broken one.
  masks = joined(epochs[1], "mask")
  assert np.array_equal(joined(whole("folder")[0])[masks], joined(epochs[1])[masks])


def test_every_kind_is_read_whatever_its_suffix_and_a_skipped_file_is_given_a_reason(
  tmp_path, caplog
):
  root = tmp_path / "data"
  for split, name in itertools.product(("train", "val"), ("a", "b")):
    (root / split / name).mkdir(parents=True)
  # The first is read by TensorFlow, the others by Pillow, the last two after TensorFlow has failed.
  read = (
    "JPEG",
    "JPEG CMYK without marker",
    "GIF",
    "PNG wrong checksum of the data",
    "PNG without its end",
  )
  for i, name in enumerate(read):
    (root / "train" / "a" / f"{i}.jpg").write_bytes(kinds()[name][0])
  for name in ("page", "pointer", "empty"):
    (root / "train" / "b" / f"{name}.jpg").write_bytes(UNREADABLE[name][0])
  for name in ("a", "b"):
    (root / "val" / name / "0.webp").write_bytes(kinds()["WebP lossless"][0])
  changes = {"data.max_broken": 0.3, "data.crop_pct": 1.0, "data.image_size": 32}
  source = load_folder(root, **changes, **{"data.augment": False})
  with caplog.at_level(logging.WARNING):
    (batch,) = source.train_batches(0, 8)
  seen = as_set(batch["image"][batch["mask"]])
  expected = [
    picture.read_picture(root / "train" / "a" / f"{i}.jpg", 32, 1.0, "bicubic") for i in range(5)
  ]
  assert seen == as_set(expected)
  assert not batch["image"][~batch["mask"]].any()
  lines = "\n".join(sorted(record.getMessage() for record in caplog.records))
  for name in ("page", "pointer", "empty"):
    assert re.search(f"{name}.jpg: {UNREADABLE[name][1]}", lines)
  (images,) = (batch["image"][batch["mask"]] for batch in source.eval_batches(8))
  assert len(images) == 2
  assert all(np.array_equal(image, RGB[:, 8:40]) for image in images)


def test_augmentation_of_what_pillow_reads_is_that_of_tensorflow(tmp_path):
  """A PNG with a wrong checksum is cut, scaled and mirrored as without it."""
  batches = []
  for name, content in (
    ("plain", kinds()["PNG"][0]),
    ("wrong", kinds()["PNG wrong checksum of the data"][0]),
  ):
    for split, label in itertools.product(("train", "val"), ("a", "b")):
      (tmp_path / name / split / label).mkdir(parents=True)
      for i in range(4):
        (tmp_path / name / split / label / f"{i}.png").write_bytes(content)
    batches.append(list(load_folder(tmp_path / name).train_batches(3, 8)))
  assert_equal_batches(*batches)
  assert len(as_set(batches[0][0]["image"])) == 8


def test_a_host_may_meet_every_broken_image(damaged):
  """What is allowed is a share of all images, not of those of one host's epoch."""
  files = sorted(str(path) for path in (damaged / "train").rglob("*.*"))
  broken = {i for i, file in enumerate(files) if file.endswith(("003.jpeg", "004.png"))}

  def met(epoch):
    return broken <= set(table_rows(TRAIN, EpochRequest(8, HostShard(0, 2), shuffle=(0, epoch)))[0])

  shard = load_folder(damaged, HostShard(0, 2), **{"data.max_broken": 0.05})
  masks = [batch["mask"] for batch in shard.train_batches(next(filter(met, range(100))), 8)]
  assert sum((~mask).sum() for mask in masks) == 2


def test_too_many_broken_images_stop_the_run_with_their_names(damaged):
  source = load_folder(damaged, **{"data.max_broken": 0.02})
  with pytest.raises(ConfigError, match=r"max_broken = 0.02") as error:
    list(source.train_batches(0, 8))
  assert "003.jpeg" in str(error.value)
  assert "004.png" in str(error.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data.train_split": "training"}, r"data.train_split = 'training' .* train, validation"),
    ({"data.eval_split": "test"}, r"data.eval_split = 'test' .* train, validation"),
    ({"data.eval_split": "train[200%:]"}, r"data.eval_split = 'train\[200%:\]'"),
    ({"data.name": "cuttings/large"}, r"data.name = 'cuttings/large'"),
    ({"data.name": "coco"}, "one image and one class label"),
    ({"data.name": "no_such_set"}, "data.name = 'no_such_set' .* catalogue"),
    # Not prepared: the message has the command, and names what must be fetched by hand.
    (
      {"data.name": "imagenette/320px-v2"},
      r"prepare imagenette/320px-v2 --data_dir=\S+ \(docs/data.md\)\. \S+ holds cuttings\.$",
    ),
    (
      {"data.name": "imagenet2012"},
      r"prepare imagenet2012 --data_dir=\S+ --manual_dir=.* ILSVRC2012_img_train.tar",
    ),
  ],
)
def test_wrong_data_sets_are_refused(written, changes, message):
  with pytest.raises(ConfigError, match=message):
    data.load(
      settings(**{"data.name": "cuttings", "data.data_dir": str(written / "tfds"), **changes})
    )


def damaged_copy(written, directory, change):
  """The TFDS set with its first training shard changed: what tests of a run over many epochs would
  meet by accident.
  """
  copy = directory / "tfds"
  shutil.copytree(written / "tfds", copy)
  change(sorted(copy.glob("cuttings/1.0.0/*train*00000*"))[0])
  return settings(**{"data.name": "cuttings", "data.data_dir": str(copy)})


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda shard: shard.write_bytes(shard.read_bytes()[:-100]), "cuttings cannot be read"),
    (lambda shard: shard.write_bytes(b""), "cuttings holds fewer examples"),
    (lambda shard: shard.unlink(), "train.tfrecord-00000-of-00003 does not exist"),
    (lambda shard: (shard.unlink(), os.mkfifo(shard)), "00000-of-00003 is no regular file"),
    (
      lambda shard: (shard.parent / "dataset_info.json").write_text("{"),
      "'cuttings' cannot be opened in .*JSON",
    ),
  ],
  ids=["cut", "empty", "missing", "pipe", "description"],
)
def test_damaged_shards_are_refused(written, tmp_path, change, message):
  with pytest.raises(ConfigError, match=message):
    list(data.load(damaged_copy(written, tmp_path, change), memory_limit=0).train_batches(0, 8))


def test_a_file_that_went_away_is_no_broken_image(tmp_path):
  root = pictures.write_folder(tmp_path, TRAIN, EVAL)
  source = load_folder(root, **{"data.max_broken": 1.0})
  next((root / "train" / "temple").iterdir()).unlink()
  with pytest.raises(ConfigError, match=r"cannot be read: .*train/temple/") as error:
    list(source.train_batches(0, 8))
  assert not re.search(r"\{\{|\[\[|\[Op:", str(error.value))


def fingerprint(name, path):
  return data.load(settings(**{"data.name": name, "data.data_dir": str(path)})).fingerprint()


def test_other_files_have_another_fingerprint(written, tmp_path):
  other = pictures.write_folder(tmp_path, TRAIN, EVAL)
  # Wherever they lie.
  assert fingerprint("folder", written / "folder") == fingerprint("folder", other)
  path = sorted((other / "train" / "wide").iterdir())[0]
  path.rename(path.with_name("renamed.jpg"))
  (other / "train" / "wide" / "._hidden.jpg").write_bytes(b"not an image")
  assert fingerprint("folder", written / "folder") != fingerprint("folder", other)
  assert load_folder(other).info.train_examples == TRAIN


def test_classes_that_were_swapped_have_another_fingerprint(tmp_path):
  for split in ("train", "val"):
    for name in ("cat", "dog"):
      (tmp_path / "data" / split / name).mkdir(parents=True)
      (tmp_path / "data" / split / name / "0.jpg").write_bytes(f"a {name}".encode())
  before = load_folder(tmp_path / "data", **{"train.batch_size": 1}).fingerprint()
  for source, target in (("cat", "other"), ("dog", "cat"), ("other", "dog")):
    (tmp_path / "data" / "train" / source).rename(tmp_path / "data" / "train" / target)
  after = load_folder(tmp_path / "data", **{"train.batch_size": 1}).fingerprint()
  assert before.split()[0] != after.split()[0]
  assert before.split()[1] == after.split()[1]


def test_small_sets_differ_where_their_images_do(written, tmp_path):
  copy = shutil.copytree(written / "tfds", tmp_path / "copy")
  other = pictures.write_tfds(
    tmp_path / "other",
    train=TRAIN,
    evaluation=EVAL,
    shards=3,
    make=lambda count, seed: pictures.cuttings(count, seed + 5),
  )
  assert fingerprint("cuttings", written / "tfds") == fingerprint("cuttings", copy)
  assert fingerprint("cuttings", written / "tfds") != fingerprint("cuttings", other)


def test_a_plan_knows_published_sets_by_name_and_asks_the_files_for_parts(written):
  assert data.info(settings(**{"data.name": "cifar10:3.0.2"})).normalization.mean[0] == 0.4914
  part = {
    "data.name": "cuttings",
    "data.data_dir": str(written / "tfds"),
    "data.train_split": "train[:50%]",
  }
  assert data.info(settings(**part)).train_examples == 12
  with pytest.raises(ConfigError, match="not prepared"):
    data.info(settings(**{"data.train_split": "train[:50%]", "data.data_dir": str(written)}))


def test_splits_may_be_parts(written):
  chosen = {"data.train_split": "train[:75%]", "data.eval_split": "train[75%:]"}
  source = data.load(
    settings(**{"data.name": "cuttings", "data.data_dir": str(written / "tfds"), **chosen})
  )
  assert (source.info.train_examples, source.info.eval_examples) == (18, 6)


def test_wrong_folders_are_refused(tmp_path):
  def refused(message, **changes):
    with pytest.raises(ConfigError, match=message):
      load_folder(tmp_path, **changes)

  refused("data.data_dir = ''", **{"data.data_dir": ""})
  refused("data.data_dir = '.*/absent'", **{"data.data_dir": str(tmp_path / "absent")})
  refused("data.train_split .* directory train")
  pictures.write_folder(tmp_path)
  refused("data.eval_split .* directory holdout; .* train, val", **{"data.eval_split": "holdout"})
  (tmp_path / "train" / "void").mkdir()
  refused(r"4 classes and .* has 3; .*: void")
  (tmp_path / "val" / "void").mkdir()
  (tmp_path / "val" / "void" / "notes.txt").write_text("not an image")
  refused(r"train hold no image .*: void")


def test_an_evaluation_needs_no_training_split_and_no_training_batch(written, tmp_path):
  pictures.write_folder(tmp_path)
  shutil.rmtree(tmp_path / "train")
  folder = {"data.name": "folder", "data.data_dir": str(tmp_path)}
  tfds = {"data.name": "cuttings", "data.data_dir": str(written / "tfds")}
  for given in (folder, {**tfds, "data.train_split": "absent"}):
    changes = settings(**given, **{"train.batch_size": 5000})
    source = data.load(changes, trains=False)
    assert sum(batch["mask"].sum() for batch in source.eval_batches(8)) == EVAL
    with pytest.raises(ConfigError, match="train"):
      data.load(changes)


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_a_split_is_opened_alone_as_evaluation_images(written, kind):
  name = {"folder": "folder", "tfds": "cuttings"}[kind]
  # A batch larger than the training split, which does not matter.
  fields = {"data.name": name, "data.data_dir": str(written / kind), "train.batch_size": 1000}
  given = settings(**fields)
  found = {split: data.load_split(given, split) for split in ("eval", "train", "train[:50%]")}
  assert {split: source.info.eval_examples for split, source in found.items()} == {
    "eval": EVAL,
    "train": TRAIN,
    "train[:50%]": TRAIN // 2,
  }
  with pytest.raises(ConfigError, match=r"--split=holdout is not"):
    data.load_split(given, "holdout")


def test_the_training_split_lacks_the_share_that_is_evaluated(written):
  given = {"data.name": "folder", "data.data_dir": str(written / "folder" / "train")}
  shared = settings(**given, **{"data.eval_split": "25%"})
  train, evaluated = (data.load_split(shared, split)._splits.eval for split in ("train", "eval"))
  assert (train.examples, evaluated.examples) == (18, 6)
  assert not set(train.names()) & set(evaluated.names())
