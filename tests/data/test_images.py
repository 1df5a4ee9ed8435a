"""TFDS sets and image folders: what stands in which batch, on any number of hosts, and what is
refused.
"""

import logging
import shutil

import numpy as np
import pytest

from configs import base
from profit_jax import data
from profit_jax.data import Host
from profit_jax.models import REGISTRY
from profit_jax.settings import ConfigError, parse
from tests.data import pictures

TRAIN, EVAL, SIZE = 24, 10, 16
# A table, which small TFDS sets are too, and shards that are read from front to end.
SOURCES = (
  "folder",
  "stream",
)


def settings(**changes):
  config = base.get_config()
  config.update_from_flattened_dict(
    {
      "data.image_size": SIZE,
      "train.batch_size": 8,
      "train.eval_batch_size": 8,
      "data.readers": 4,
      **changes,
    }
  )
  return parse(config, REGISTRY)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  pictures.write_folder(root / "folder", TRAIN, EVAL)
  pictures.write_tfds(root / "tfds", train=TRAIN, evaluation=EVAL, shards=3)
  return root


@pytest.fixture(params=SOURCES)
def open_source(request, written, monkeypatch):
  """Opens a source, given a host and settings."""
  from profit_jax.data import tfds

  name = "folder" if request.param == "folder" else "cuttings"
  if request.param == "stream":
    monkeypatch.setattr(tfds, "MEMORY_LIMIT", 0)
  directory = str(written / ("folder" if name == "folder" else "tfds"))
  return lambda host=Host(), **changes: data.load(
    settings(**{"data.name": name, "data.data_dir": directory, **changes}), host
  )


def joined(batches, name="image"):
  return np.concatenate([batch[name] for batch in batches])


def as_set(images):
  return {image.tobytes() for image in images}


def assert_equal_batches(some, others):
  assert len(some) == len(others)
  for one, other in zip(some, others, strict=True):
    for name in ("image", "label", "mask"):
      assert np.array_equal(one[name], other[name]), name


def test_batches_keep_the_contract(open_source):
  source = open_source()
  assert (source.facts.train_examples, source.facts.eval_examples, source.facts.num_classes) == (
    TRAIN,
    EVAL,
    3,
  )
  batches = list(source.train_batches(0, 8)) + list(source.eval_batches(8))
  assert len(batches) == 3 + 2
  for batch in batches:
    assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
      "image": (np.uint8, (8, SIZE, SIZE, 3)),
      "label": (np.int32, (8,)),
      "mask": (bool, (8,)),
    }


def test_hosts_share_what_one_alone_would_see(open_source):
  def compare(count, batches):
    parts = [batches(open_source(Host(i, count))) for i in range(count)]
    together = [
      {n: np.concatenate([p[n] for p in own]) for n in own[0]} for own in zip(*parts, strict=True)
    ]
    assert_equal_batches(together, batches(open_source()))

  compare(4, lambda source: list(source.train_batches(3, 8)))
  compare(2, lambda source: list(source.eval_batches(8)))


def test_an_epoch_goes_on_where_it_was_left(open_source):
  whole = list(open_source().train_batches(1, 8))
  assert_equal_batches(list(open_source().train_batches(1, 8, 2)), whole[2:])
  second = open_source(Host(1, 2)).train_batches(1, 8, 1)
  assert np.array_equal(joined(second), np.concatenate([b["image"][4:] for b in whole[1:]]))


def test_epochs_are_functions_of_seed_and_epoch(open_source):
  first = joined(open_source().train_batches(4, 8))
  assert np.array_equal(first, joined(open_source().train_batches(4, 8)))
  assert not as_set(first) & as_set(joined(open_source().train_batches(5, 8)))
  assert not as_set(first) & as_set(joined(open_source(seed=1).train_batches(4, 8)))


def test_an_epoch_shows_every_image_once_in_another_order(open_source):
  source = open_source(**{"data.augment": False})
  first, second = (joined(source.train_batches(epoch, 8)) for epoch in (0, 1))
  assert len(as_set(first)) == TRAIN
  assert as_set(first) == as_set(second)
  assert not np.array_equal(first, second)
  left_out = joined(source.train_batches(0, 9))
  assert len(left_out) == len(as_set(left_out)) == 18  # two batches; six images fill no third one


def test_evaluation_counts_every_image_once(open_source):
  batches = list(open_source().eval_batches(8))
  masks, images, labels = (joined(batches, name) for name in ("mask", "image", "label"))
  assert masks.sum() == len(as_set(images[masks])) == EVAL
  assert sorted(labels[masks]) == sorted(label for _, label in pictures.cuttings(EVAL, 2))
  assert_equal_batches(batches, list(open_source(seed=7).eval_batches(8)))


def test_folder_and_tfds_give_the_same_pixels(written):
  def evaluation(name, path):
    batches = list(
      data.load(settings(**{"data.name": name, "data.data_dir": str(written / path)})).eval_batches(
        8
      )
    )
    return as_set(joined(batches)[joined(batches, "mask")])

  folder, tfds = evaluation("folder", "folder"), evaluation("cuttings", "tfds")
  assert len(tfds) == EVAL
  # Every fifth is a PNG in the folder, and a JPEG there.
  assert len(folder & tfds) == EVAL - EVAL // 5


# ImageNet's: 50,000 images in 64 readers of 781 or 782.
@pytest.mark.parametrize(("hosts", "batch"), [(1, 256), (2, 1000), (8, 1024), (64, 64), (64, 4096)])
def test_evaluation_of_imagenet_counts_50000_on_any_number_of_hosts(hosts, batch):
  from profit_jax.data.records import Pass, reader_plan, table_rows

  rows = [table_rows(50_000, Pass(batch, Host(i, hosts))) for i in range(hosts)]
  examples = np.concatenate([found for found, _ in rows])
  assert np.array_equal(np.sort(examples[examples >= 0]), np.arange(50_000))
  # As many batches on every host, or they would wait for each other.
  assert len({len(found) for found, _ in rows}) == 1
  plans = [reader_plan(50_000, 64, Pass(batch, Host(i, hosts))) for i in range(hosts)]
  count = sum(len(plan.readers) for plan in plans)
  assert [reader for plan in plans for reader in plan.readers] == list(range(count))
  assert len({(plan.rows, plan.steps) for plan in plans}) == 1
  for reader in range(count):
    own = (reader + 1) * 50_000 // count - reader * 50_000 // count
    assert own <= plans[0].rows * plans[0].steps
  assert count * plans[0].rows == batch


def test_hosts_that_cannot_share_the_readers_are_refused():
  from profit_jax.data.records import Pass, reader_plan

  with pytest.raises(
    ConfigError,
    match=r"data.readers = 64 .* batches of 768, 64 readers .* 3 processes .* multiple of 3",
  ):
    reader_plan(50_000, 64, Pass(768, Host(0, 3)))
  assert len(reader_plan(50_000, 48, Pass(768, Host(0, 3))).readers) == 16


def test_a_batch_that_the_processes_cannot_share_is_refused():
  with pytest.raises(
    ConfigError, match=r"train.batch_size = 8 .* multiple of 3, the number of processes"
  ):
    data.load(settings(**{"data.name": "digits"}), Host(0, 3))


def test_shards_are_cut_where_the_readers_meet():
  from profit_jax.data.records import Shard
  from profit_jax.data.tfds import cut

  shards = [Shard("a", 0, 5), Shard("b", 2, 3), Shard("c", 0, 4)]
  assert cut(shards, 0, 12) == shards
  assert cut(shards, 3, 7) == [Shard("a", 3, 2), Shard("b", 2, 2)]
  assert cut(shards, 5, 8) == [Shard("b", 2, 3)]
  assert cut(shards, 11, 12) == [Shard("c", 3, 1)]


@pytest.fixture
def damaged(tmp_path):
  return pictures.write_folder(tmp_path / "damaged", TRAIN, EVAL, broken=(3, 4))


def test_a_broken_image_leaves_its_row_empty_and_is_named_once(damaged, caplog):
  source = data.load(
    settings(**{"data.name": "folder", "data.data_dir": str(damaged), "data.max_broken": 0.1})
  )
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


def test_a_host_may_meet_every_broken_image_sooner_or_later(damaged):
  changes = {"data.name": "folder", "data.data_dir": str(damaged), "data.max_broken": 0.05}
  host = data.load(settings(**changes), Host(0, 2))
  masks = [batch["mask"] for epoch in range(4) for batch in host.train_batches(epoch, 8)]
  assert 2 <= sum((~mask).sum() for mask in masks) <= 8  # both broken ones, and no end of the run


def test_too_many_broken_images_stop_the_run_with_their_names(damaged):
  source = data.load(
    settings(**{"data.name": "folder", "data.data_dir": str(damaged), "data.max_broken": 0.02})
  )
  with pytest.raises(
    ConfigError, match=r"2 images cannot be decoded[\s\S]*max_broken = 0.02[\s\S]*00[34]\."
  ) as error:
    list(source.train_batches(0, 8))
  assert "003.jpeg" in str(error.value)
  assert "004.png" in str(error.value)


def test_the_other_images_of_a_batch_are_what_they_are_without_the_broken_one(damaged, written):
  def epoch(root):
    source = data.load(
      settings(**{"data.name": "folder", "data.data_dir": str(root), "data.max_broken": 0.1})
    )
    return list(source.train_batches(0, 8))

  whole, lacking = epoch(written / "folder"), epoch(damaged)
  masks = joined(lacking, "mask")
  assert np.array_equal(joined(whole)[masks], joined(lacking)[masks])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data.train_split": "training"}, r"data.train_split = 'training' .* train, validation"),
    ({"data.eval_split": "test"}, r"data.eval_split = 'test' .* train, validation"),
    ({"data.eval_split": "train[200%:]"}, r"data.eval_split = 'train\[200%:\]'"),
    ({"data.name": "cuttings/large"}, r"data.name = 'cuttings/large'"),
    ({"data.name": "coco"}, "must be a data set of one image and one class label per example"),
    (
      {"data.name": "no_such_set"},
      "digits, digit_pairs, folder, or a data set of tensorflow-datasets",
    ),
    (
      {"data.name": "imagenette/320px-v2"},
      r"prepare imagenette/320px-v2 --data_dir=\S+ \(docs/data.md\)\.$",
    ),
    (
      {"data.name": "imagenet2012"},
      r"prepare imagenet2012 --data_dir=\S+ --manual_dir=DIR \(docs/data.md\)\. DIR holds .* "
      r"ILSVRC2012_img_train.tar",
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
    (
      lambda shard: shard.write_bytes(shard.read_bytes()[:-100]),
      "cuttings cannot be read: .* prepare the data again",
    ),
    (lambda shard: shard.write_bytes(b""), "fewer examples than its description says"),
    (lambda shard: shard.unlink(), "train.tfrecord-00000-of-00003 does not exist"),
  ],
  ids=["cut", "empty", "missing"],
)
def test_damaged_shards_are_refused(written, tmp_path, monkeypatch, change, message):
  from profit_jax.data import tfds

  monkeypatch.setattr(tfds, "MEMORY_LIMIT", 0)
  with pytest.raises(ConfigError, match=message):
    list(data.load(damaged_copy(written, tmp_path, change)).train_batches(0, 8))


def test_a_file_that_went_away_is_no_broken_image(tmp_path):
  root = pictures.write_folder(tmp_path, TRAIN, EVAL)
  source = data.load(
    settings(**{"data.name": "folder", "data.data_dir": str(root), "data.max_broken": 1.0})
  )
  next((root / "train" / "temple").iterdir()).unlink()
  with pytest.raises(
    ConfigError, match=r"folder cannot be read: .*train/temple/.* Restore the file"
  ):
    list(source.train_batches(0, 8))


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
  assert (
    data.load(settings(**{"data.name": "folder", "data.data_dir": str(other)})).facts.train_examples
    == TRAIN
  )


def test_classes_that_were_swapped_have_another_fingerprint(tmp_path):
  for split in ("train", "val"):
    for name in ("cat", "dog"):
      (tmp_path / "data" / split / name).mkdir(parents=True)
      (tmp_path / "data" / split / name / "0.jpg").write_bytes(f"a {name}".encode())
  config = {"data.name": "folder", "data.data_dir": str(tmp_path / "data"), "train.batch_size": 1}
  before = data.load(settings(**config)).fingerprint()
  for source, target in (("cat", "other"), ("dog", "cat"), ("other", "dog")):
    (tmp_path / "data" / "train" / source).rename(tmp_path / "data" / "train" / target)
  after = data.load(settings(**config)).fingerprint()
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
  assert data.facts(settings(**{"data.name": "cifar10:3.0.2"})).normalization.mean[0] == 0.4914
  part = {
    "data.name": "cuttings",
    "data.data_dir": str(written / "tfds"),
    "data.train_split": "train[:50%]",
  }
  assert data.facts(settings(**part)).train_examples == 12
  with pytest.raises(ConfigError, match="not prepared"):
    data.facts(settings(**{"data.train_split": "train[:50%]", "data.data_dir": str(written)}))


def test_splits_may_be_parts(written):
  chosen = {"data.train_split": "train[:75%]", "data.eval_split": "train[75%:]"}
  source = data.load(
    settings(**{"data.name": "cuttings", "data.data_dir": str(written / "tfds"), **chosen})
  )
  assert (source.facts.train_examples, source.facts.eval_examples) == (18, 6)


def test_wrong_folders_are_refused(tmp_path):
  def refused(message, **changes):
    with pytest.raises(ConfigError, match=message):
      data.load(settings(**{"data.name": "folder", "data.data_dir": str(tmp_path), **changes}))

  refused("data.data_dir = ''", **{"data.data_dir": ""})
  refused("no such directory", **{"data.data_dir": str(tmp_path / "absent")})
  refused("must hold a directory train; it holds no directories")
  pictures.write_folder(tmp_path)
  refused(
    "data.eval_split .* must hold a directory holdout; it holds train, val",
    **{"data.eval_split": "holdout"},
  )
  (tmp_path / "train" / "void").mkdir()
  refused(r"4 classes and .* has 3; .* In one alone: void")
  (tmp_path / "val" / "void").mkdir()
  (tmp_path / "val" / "void" / "notes.txt").write_text("not an image")
  refused(r"1 class folders of .*train hold no image .*: void")
