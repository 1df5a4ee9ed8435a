"""Folders as people have them: which files are read, in which order of classes, and what is said
about the rest. Nothing is decoded.
"""

import logging
import os
import shutil
import tarfile
import zipfile

import pytest

from profit_jax import data
from profit_jax.config import ConfigError
from profit_jax.data import HostShard, folder, listing
from profit_jax.data.folder import Folder
from profit_jax.data.records import EpochRequest
from tests.data.pictures import settings


def write(root, *paths):
  """Files with their own paths as content, so that those of two splits differ."""
  for path in paths:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{root.name}/{path}")
  return root


def write_classes(root, classes=("cat", "dog"), images=1):
  return write(root, *(f"{name}/{name}{i}.jpg" for name in classes for i in range(images)))


def write_splits(root, train="train", evaluation="val", classes=("cat", "dog")):
  write_classes(root / train, classes)
  write_classes(root / evaluation, classes)
  return root


def opened(root, seed=0, fixed_labels=False, **changes):
  fields = {f"data.{field}": value for field, value in changes.items()}
  chosen = settings(**{"data.name": "folder", "data.data_dir": str(root), **fields})
  return Folder(chosen.data, seed, fixed_labels)


def names(records):
  return [os.fsdecode(name) for name in records.names()]


def refused(root, message, **changes):
  with pytest.raises(ConfigError, match=message) as error:
    opened(root, **changes)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("train", "evaluation"),
  [
    ("train", "val"),
    ("train", "valid"),
    ("train", "test"),
    ("Training", "Testing"),
    ("TRAIN", "Validation"),
  ],
)
def test_splits_have_the_names_that_people_give_them(tmp_path, train, evaluation):
  found = opened(write_splits(tmp_path, train, evaluation))
  assert found.class_names == ("cat", "dog")
  assert names(found.train) == names(found.eval) == ["cat/cat0.jpg", "dog/dog0.jpg"]
  assert f"/{evaluation}/" in found.eval.name([0, 0])


def test_every_suffix_in_any_case_is_read(tmp_path):
  write_splits(tmp_path)
  write(tmp_path / "train", *(f"cat/0{suffix}" for suffix in listing.SUFFIXES), "cat/A.JPEG")
  assert opened(tmp_path).train.examples == 2 + len(listing.SUFFIXES) + 1


def test_a_validation_split_beside_a_test_split_is_named(tmp_path):
  write_splits(write_splits(tmp_path), evaluation="test")
  assert not opened(tmp_path).notes
  (tmp_path / "val").rename(tmp_path / "valid")
  (note,) = opened(tmp_path).notes
  assert "evaluates on test" in note
  assert "config.data.eval_split=valid" in note
  assert not opened(tmp_path, eval_split="test").notes


# Computed by the first version that read folders: runs that began with it resume.
FINGERPRINTS = (
  "d7c36893470d33af8bc14f7b73f51833a5a7afe5809af103fb17110bb351f72a",
  "c45ae7daf58e1f99cc0e51f17896b20cdd56f9dd97fc00a107150f51d710e8ae",
)


def test_fingerprints_stay_as_they_were(tmp_path):
  write_splits(tmp_path, classes=("cat", "Zoé", "ape 1"))
  found = opened(tmp_path)
  assert (found.train.fingerprint(), found.eval.fingerprint()) == FINGERPRINTS


class TestWithoutSplits:
  """ROOT/CLASS/NAME.jpg."""

  def test_a_share_of_each_class_is_evaluated(self, tmp_path):
    write_classes(tmp_path, images=30)
    write_classes(tmp_path, ("few",), images=2)
    found = opened(tmp_path, eval_split="10%")
    evaluated, trained = names(found.eval), names(found.train)
    counts = [sum(name.startswith(label) for name in evaluated) for label in found.class_names]
    assert counts == [3, 3, 1]
    assert len({*evaluated, *trained}) == len(evaluated) + len(trained) == 62
    assert sorted(trained) == trained
    assert not found.notes
    assert names(opened(tmp_path, eval_split="10%").eval) == evaluated

  def test_the_seed_chooses_and_other_classes_change_nothing(self, tmp_path):
    write_classes(tmp_path, images=30)
    before, other = (opened(tmp_path, seed=seed, eval_split="10%") for seed in (0, 1))
    assert names(before.eval) != names(other.eval)
    assert before.eval.fingerprint() != other.eval.fingerprint()
    write_classes(tmp_path, ("ape",), images=30)
    assert set(names(before.eval)) < set(names(opened(tmp_path, eval_split="10%").eval))

  def test_a_class_of_one_image_cannot_be_divided(self, tmp_path):
    write_classes(write_classes(tmp_path, images=5), ("one",))
    refused(tmp_path, r"class one of .* has too few images to divide \(1\)", eval_split="10%")

  def test_parts_of_percent(self, tmp_path):
    write_classes(tmp_path, images=5)
    found = opened(tmp_path, train_split="train[:60%]", eval_split="train[60%:]")
    assert names(found.train) == [
      f"{name}/{name}{i}.jpg" for name in ("cat", "dog") for i in (0, 1, 2)
    ]
    assert names(found.eval) == [f"{name}/{name}{i}.jpg" for name in ("cat", "dog") for i in (3, 4)]
    same = opened(tmp_path, train_split="train[:-40%]", eval_split="train[-40%:]")
    assert names(same.train) == names(found.train)
    assert names(same.eval) == names(found.eval)
    third = opened(tmp_path, train_split="train[:60%]", eval_split="33.3%")
    assert {*names(third.train), *names(third.eval)} == {*names(found.train)}

  def test_a_class_may_be_called_train(self, tmp_path):
    write_classes(tmp_path, ("bus", "train"), images=2)
    refused(tmp_path, r"holds class folders \(bus, train\).*config.data.eval_split=10%")
    found = opened(tmp_path, eval_split="50%")
    assert found.class_names == ("bus", "train")
    assert found.notes == (
      f"{tmp_path}/train holds images itself: it is one of the classes, no split.",
    )
    # Without classes, it is a split without class folders.
    shutil.rmtree(tmp_path / "bus")
    refused(tmp_path, "train holds no class folders", eval_split="50%")
    write(tmp_path, "bus/0.jpg", "val/0.jpg")
    refused(tmp_path, "train holds no class folders", eval_split="50%")

  def test_without_a_split_to_evaluate_the_share_is_offered(self, tmp_path):
    write_classes(tmp_path / "train", images=2)
    refused(tmp_path, "eval_split is not there.*config.data.eval_split=10%")
    refused(tmp_path / "train", rf"config.data.eval_split=10% .* give {tmp_path} as its data_dir")
    assert opened(tmp_path, eval_split="50%").eval.examples == 2
    assert opened(tmp_path / "train", eval_split="50%").eval.examples == 2


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("train_split", "train[:1]", "percent"),
    ("train_split", "train[90%:10%]", "begin before it ends"),
    ("train_split", "train[:200%]", "within 0 % and 100 %"),
    ("train_split", "train[:1%]", "leaves no image of 2 classes"),
    ("eval_split", "0%", "above 0 %"),
    ("eval_split", "100%", "below 100 %"),
    ("eval_split", "holdout[:10%]", "directory holdout"),
    ("train_split", "holdout", "directory holdout"),
    ("train_split", "caf\udce9", r"directory caf\\xe9"),
    ("eval_split", "a\nb", r"directory a\\nb"),
  ],
)
def test_wrong_parts_are_refused(tmp_path, field, value, message):
  write_splits(tmp_path)
  refused(tmp_path, f"config.data.{field}.*{message}", **{field: value})


class TestOrder:
  """Which label a class has."""

  def test_a_file_fixes_the_order(self, tmp_path):
    write_splits(tmp_path, classes=("ape", "cat", "dog"))
    before = opened(tmp_path).train.fingerprint()
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfdog\r\n\r\nape\r\ncat\r\n")
    found = opened(tmp_path)
    assert found.class_names == ("dog", "ape", "cat")
    assert names(found.eval) == ["dog/dog0.jpg", "ape/ape0.jpg", "cat/cat0.jpg"]
    assert found.train.fingerprint() != before
    assert not found.notes

  @pytest.mark.parametrize(
    ("text", "message"),
    [
      ("cat", "Missing: dog"),
      ("cat\ndog\ncat", "More than once: cat"),
      ("cat\ndog\nbird", "No class folders: bird"),
    ],
  )
  def test_every_class_must_stand_there_once(self, tmp_path, text, message):
    write_splits(tmp_path)
    (tmp_path / "classes.txt").write_text(text)
    refused(tmp_path, f"classes.txt .* {message}")

  @pytest.mark.parametrize(
    ("name", "text"),
    [
      ("classes.txt", "dog\r\ncat \r\n".encode("utf-16")),
      ("Classes.TXT", b"dog\ncat "),
    ],
    ids=["UTF-16", "another case"],
  )
  def test_the_file_as_windows_writes_it(self, tmp_path, name, text):
    write_splits(tmp_path, classes=("cat ", "dog"))
    (tmp_path / name).write_bytes(text)
    assert opened(tmp_path).class_names == ("dog", "cat ")

  @pytest.mark.parametrize(
    ("make", "kind"),
    [
      (os.mkfifo, "no regular file"),
      (os.mkdir, "a folder"),
      (lambda path: path.symlink_to("absent"), "a broken link"),
    ],
    ids=["pipe", "folder", "link"],
  )
  def test_what_is_no_file_is_not_passed_over(self, tmp_path, make, kind):
    make(write_splits(tmp_path) / "classes.txt")
    refused(tmp_path, f"classes.txt is {kind}, and must be a text file")

  def test_a_file_of_no_text_is_refused_in_short(self, tmp_path):
    write_splits(tmp_path)
    (tmp_path / "classes.txt").write_bytes(bytes(range(14, 256)) * 100)
    with pytest.raises(ConfigError, match="Missing: cat, dog") as error:
      opened(tmp_path)
    assert len(str(error.value)) < 1000

  def test_a_file_inside_a_split_is_not_the_order(self, tmp_path):
    write(write_splits(tmp_path), "train/classes.txt")
    assert "1 file outside class folders (train/classes.txt)" in opened(tmp_path).notes[0]

  def test_numbers_in_the_order_of_names_are_noted_where_weights_have_an_order(self, tmp_path):
    write_splits(tmp_path, classes=[str(i) for i in range(12)])
    assert not opened(tmp_path).notes
    (note,) = opened(tmp_path, fixed_labels=True).notes
    assert "0, 1, 10, 11, ...: label 2 is class 10" in note
    assert "classes.txt" in note
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(12))))
    found = opened(tmp_path, fixed_labels=True)
    assert not found.notes
    assert found.class_names == tuple(map(str, range(12)))

  def test_padded_numbers_need_no_note(self, tmp_path):
    write_splits(tmp_path, classes=[f"{i:02d}" for i in range(12)])
    assert not opened(tmp_path, fixed_labels=True).notes


class TestPlaces:
  """`data_dir` is something else than the folder."""

  def test_an_archive_is_to_be_unpacked(self, tmp_path):
    write_splits(tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
      archive.write(tmp_path / "data" / "train" / "cat" / "cat0.jpg")
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as archive:
      archive.add(tmp_path / "data")
    refused(tmp_path / "data.zip", "is a zip file. Unpack it: unzip")
    refused(tmp_path / "data.tar.gz", "is a tar file. Unpack it: tar -xf")
    refused(tmp_path / "data" / "train" / "cat" / "cat0.jpg", "is no directory")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no directory")

  def test_a_file_url_is_the_path(self, tmp_path):
    root = write_splits(tmp_path / "with space")
    assert opened(f"file://{tmp_path}/with%20space").train.examples == 2
    assert names(opened(f"file://localhost{root}").eval) == names(opened(root).eval)
    assert names(opened(f"file:{root}").eval) == names(opened(root).eval)
    root.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert opened(f"file://{tmp_path}/caf%E9").train.examples == 2

  def test_the_directory_around_it_or_within_it(self, tmp_path):
    write_splits(tmp_path / "unpacked")
    refused(tmp_path, rf"Give {tmp_path}/unpacked as config.data.data_dir")
    refused(tmp_path / "unpacked" / "train" / "cat", "directory train; it holds no directories")

  def test_an_evaluation_without_class_folders(self, tmp_path):
    write_classes(tmp_path / "train", images=2)
    write(tmp_path / "val", "ILSVRC2012_val_1.JPEG", "ILSVRC2012_val_2.JPEG")
    refused(tmp_path, "val holds no class folders.* 2 images itself.*eval_split=10%")

  def test_one_class_is_refused(self, tmp_path):
    write_splits(tmp_path, classes=("all",))
    refused(tmp_path, "has one class, all")


class TestOddEntries:
  """What lies beside the images."""

  def test_what_is_not_read_is_counted_and_named_in_one_line(self, tmp_path):
    root = write_splits(tmp_path)
    write(root / "train", *(f"cat/{i}.txt" for i in range(5)), "cat/more/1.jpg", "loose.jpg")
    write(root / "val", "dog/x.jpg/inside.jpg")
    (root / "train" / "cat" / "gone.jpg").symlink_to(tmp_path / "absent.jpg")
    (root / "train" / "cat" / "loop.jpg").symlink_to("loop.jpg")
    (root / "train" / "gone").symlink_to(tmp_path / "absent")
    os.mkfifo(root / "train" / "dog" / "pipe.jpg")
    (root / "val" / "dog" / "pipe.jpg").symlink_to(root / "train" / "dog" / "pipe.jpg")
    found = opened(root)
    assert names(found.train) == names(found.eval) == ["cat/cat0.jpg", "dog/dog0.jpg"]
    assert found.notes == (
      f"Not read in {root}: 1 file outside class folders (train/loose.jpg), "
      "5 files whose names do not end like an image's (train/cat/0.txt, train/cat/1.txt, "
      "train/cat/2.txt, ...), "
      "2 folders inside class folders (train/cat/more, val/dog/x.jpg), "
      "3 broken links (train/gone, train/cat/gone.jpg, train/cat/loop.jpg), "
      "2 FIFOs, sockets or devices (train/dog/pipe.jpg, val/dog/pipe.jpg).",
    )

  def test_what_systems_leave_is_passed_over(self, tmp_path):
    root = write_splits(tmp_path)
    for place in ("train", "val", "train/cat"):
      write(
        root / place, *(f"{name}/1.jpg" for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"))
      )
    write(root, "train/cat/Thumbs.db", "train/cat/._cat0.jpg", "val/desktop.ini", "val/.DS_Store")
    found = opened(root)
    assert found.class_names == ("cat", "dog")
    assert found.train.examples == 2
    assert not found.notes

  def test_links_to_images_and_classes_are_read(self, tmp_path):
    write_classes(tmp_path / "store", ("a", "b"), images=2)
    for split, i in (("train", 0), ("val", 1)):
      (tmp_path / split / "cat").mkdir(parents=True)
      (tmp_path / split / "cat" / "1.jpg").symlink_to(tmp_path / "store" / "a" / f"a{i}.jpg")
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "store" / "b")
    write(tmp_path / "val", "dog/0.jpg")
    found = opened(tmp_path)
    assert (found.train.examples, found.eval.examples) == (3, 2)
    assert not found.notes

  def test_links_to_themselves_end(self, tmp_path):
    root = write_splits(tmp_path)
    (root / "train" / "cat" / "cat").symlink_to(root / "train" / "cat")
    (root / "train" / "self").symlink_to("self")
    (note,) = opened(root).notes
    assert "1 folder inside a class folder (train/cat/cat), 1 broken link (train/self)" in note
    for split in ("train", "val"):
      (root / split / "all").symlink_to(root / split)
    refused(root, r"hold no image .*: all\. .* all holds folders \(all, ...\)")

  def test_images_one_folder_deeper_are_said_to_be_there(self, tmp_path):
    for split in ("train", "val"):
      write(tmp_path / split, "cat/images/1.jpg", "dog/images/1.jpg")
    refused(tmp_path, r"2 class folders .* cat holds folders \(images\): .* not one folder deeper")

  def test_files_of_other_names_are_said_to_be_there(self, tmp_path):
    for split in ("train", "val"):
      write(tmp_path / split, "cat/IMG_1.HEIC", "dog/IMG_2.HEIC")
    refused(tmp_path, r"hold no image .* have other names: cat/IMG_1.HEIC, dog/IMG_2.HEIC\.$")

  def test_a_class_that_is_a_broken_link_in_one_split(self, tmp_path):
    root = write_splits(tmp_path, classes=("cat", "dog", "elk"))
    shutil.rmtree(root / "train" / "elk")
    (root / "train" / "elk").symlink_to(tmp_path / "absent")
    refused(root, "In one alone: elk. Broken links: elk.")

  def test_names_that_are_no_utf8_are_read(self, tmp_path):
    root = os.fsencode(write_splits(tmp_path))
    for split in (b"train", b"val"):
      os.makedirs(root + b"/" + split + b"/caf\xe9")
      with open(root + b"/" + split + b"/caf\xe9/\xff\n.jpg", "wb") as file:
        file.write(split)
    found = opened(tmp_path)
    assert found.class_names == ("caf\\xe9", "cat", "dog")
    assert found.eval.name([0, 0]) == f"{tmp_path}/val/caf\\xe9/\\xff\\n.jpg"
    assert next(iter(found.eval.sample())) == b"val"
    record = next(iter(found.eval.rows(EpochRequest(1, HostShard()))))
    contents, label = found.eval.read(record)
    assert (contents.numpy(), int(label)) == (b"val", 0)
    assert len(found.train.fingerprint()) == 64

  def test_two_unicode_forms_of_a_class_are_shown_apart(self, tmp_path):
    write_classes(tmp_path / "train", ("caf\u00e9", "dog"))
    write_classes(tmp_path / "val", ("cafe\u0301", "dog"))
    refused(tmp_path, r"'caf\\xe9' in \S+/train and 'cafe\\u0301' in \S+/val")
    write_classes(tmp_path / "train", ("cafe\u0301",))
    refused(tmp_path, r"'cafe\\u0301' in \S+/train and 'caf\\xe9' in \S+/train")


class TestOverlap:
  """Images in both splits."""

  def test_a_split_evaluated_on_itself(self, tmp_path):
    write_splits(tmp_path)
    found, apart = opened(tmp_path, eval_split="train"), opened(tmp_path, eval_split="val")
    (note,) = found.notes
    assert note.startswith("2 of 2 evaluation images are training images too")
    assert not apart.notes
    assert found.eval.fingerprint() != apart.eval.fingerprint()

  def test_parts_that_overlap(self, tmp_path):
    write_classes(tmp_path, images=10)
    (note,) = opened(tmp_path, eval_split="train[-20%:]").notes
    assert note.startswith("4 of 4 evaluation images are training images too")
    parts = {"train_split": "train[:80%]", "eval_split": "train[-20%:]"}
    assert not opened(tmp_path, **parts).notes

  @pytest.mark.parametrize("link", [os.link, os.symlink])
  def test_links_to_training_images(self, tmp_path, link):
    write_splits(tmp_path)
    (tmp_path / "val" / "dog" / "dog0.jpg").unlink()
    link(tmp_path / "train" / "cat" / "cat0.jpg", tmp_path / "val" / "dog" / "dog0.jpg")
    (note,) = opened(tmp_path).notes
    assert note.startswith("1 of 2 evaluation images are training images too")
    assert f"{tmp_path}/val/dog/dog0.jpg is {tmp_path}/train/cat/cat0.jpg" in note

  def test_a_link_to_the_training_split(self, tmp_path):
    write_classes(tmp_path / "train")
    (tmp_path / "val").symlink_to("train")
    assert "2 of 2 evaluation images" in opened(tmp_path).notes[0]

  def test_copies_of_training_images(self, tmp_path):
    write_classes(tmp_path / "train", images=2)
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    (tmp_path / "val" / "cat" / "cat0.jpg").unlink()
    (note,) = opened(tmp_path).notes
    assert note.startswith("3 of 3 evaluation images are training images too")

  def test_one_copy_of_another_name(self, tmp_path, monkeypatch):
    root = write_splits(tmp_path)
    assert not opened(root).notes
    shutil.copy(root / "train" / "cat" / "cat0.jpg", root / "val" / "dog" / "x.png")
    (note,) = opened(root).notes
    assert note.startswith("1 of 3 evaluation images are training images too")
    assert f"{root}/val/dog/x.png is a copy of {root}/train/cat/cat0.jpg" in note
    # Of many, those of one name are compared.
    monkeypatch.setattr(folder, "_COMPARED", 3)
    assert not opened(root).notes
    (root / "val" / "dog" / "dog0.jpg").write_bytes((root / "train/dog/dog0.jpg").read_bytes())
    assert "val/dog/dog0.jpg is a copy of" in opened(root).notes[0]

  def test_empty_files_are_no_copies(self, tmp_path):
    root = write_splits(tmp_path)
    for split in ("train", "val"):
      (root / split / "cat" / "empty.jpg").touch()
    assert not opened(root).notes


def test_an_evaluation_alone_tells_of_other_classes_in_the_training_split(tmp_path):
  write_splits(tmp_path)
  chosen = settings(**{"data.name": "folder", "data.data_dir": str(tmp_path)})
  assert not Folder(chosen.data, trains=False).notes
  (tmp_path / "train" / "cat").rename(tmp_path / "train" / "cats")
  (note,) = Folder(chosen.data, trains=False).notes
  assert note.endswith("whose order gives the labels. In one alone: cat, cats.")
  shutil.rmtree(tmp_path / "train")
  assert not Folder(chosen.data, trains=False).notes


def test_only_the_first_process_tells(tmp_path, caplog):
  write(write_splits(tmp_path), "train/cat/notes.txt")
  fields = {"data.name": "folder", "data.data_dir": str(tmp_path)}
  chosen = settings(**fields, **{"train.batch_size": 2, "train.eval_batch_size": 2})
  with caplog.at_level(logging.WARNING):
    for i in range(2):
      data.load(chosen, HostShard(i, 2))
  (line,) = [record.getMessage() for record in caplog.records]
  assert line.endswith("(train/cat/notes.txt).")


def test_a_remote_directory_is_listed_as_a_local_one(tmp_path):
  """TensorFlow's file systems list local directories too."""
  write(tmp_path, "dog/1.jpg", "cat/1.jpg", "b.JPG", "a.png", "notes.txt", "@eaDir/a", ".hidden")
  local = listing.entries(os.fsencode(tmp_path))
  assert listing._remote_entries(str(tmp_path)) == local._replace(identities=[])
  assert local.images == [b"a.png", b"b.JPG"]
  assert local.folders == [b"cat", b"dog"]


def test_a_directory_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
  def denied(path):
    raise PermissionError(13, "Permission denied", path)

  write_splits(tmp_path)
  monkeypatch.setattr(os, "scandir", denied)
  refused(tmp_path, r"train cannot be listed: Permission denied\.$")
