"""Folders of images, a folder for each class: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, or
ROOT/CLASS/*.jpg without splits.
"""

import functools
import hashlib
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from profit_jax import paths
from profit_jax.config import ConfigError, DataSettings
from profit_jax.data import class_order
from profit_jax.data.listing import (
  Entries,
  at_once,
  content,
  entries,
  is_directory,
  is_remote,
  normal_form,
  shown,
  shown_names,
)
from profit_jax.data.picture import SUFFIXES
from profit_jax.data.records import InMemoryRecords, Record, one_line

# Directories of splits, in any case; the first one that is there is taken.
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "val", "test", "valid", "eval", "testing")
_TESTS = ("test", "testing")
_PERCENT = r"\d+(?:\.\d+)?%"
_SHARE = re.compile(_PERCENT)
_PART = re.compile(rf"(?P<name>.+)\[(?P<low>-?{_PERCENT})?:(?P<high>-?{_PERCENT})?\]")
# Class folders that are looked into to tell whether a directory without splits holds classes.
_LOOKED_INTO = 5
# Images of both splits, local and remote, of which the bytes are compared.
_COMPARED, _COMPARED_REMOTELY = 20_000, 16
_STARTS = 4096  # bytes of a file, compared before the rest
_NOTED = 3  # of each kind of entry that is not read


class Folder:
  """The two splits of an image folder.

  Classes are numbered in the order of their names, or of the lines of ROOT/classes.txt.

  Attributes:
    train: records to train on.
    eval: records to evaluate on.
    class_names: folders of the training split, by label.
    notes: what the user should look at, one line each: entries that are not read, evaluation images
      that are trained on, an order of classes that may not be the weights'.
  """

  def __init__(
    self, settings: DataSettings, seed: int = 0, fixed_labels: bool = False, trains: bool = True
  ):
    """Lists the files; they are read later.

    Args:
      settings: validated.
      seed: chooses the evaluation images where `eval_split` is a share.
      fixed_labels: whether weights are loaded whose classifier was trained with some order of the
        classes.
      trains: False takes the evaluation's split for both.

    Raises:
      ConfigError: no such directory or split, a class without images, fewer than two classes, or
        classes that differ between the splits.
    """
    layout = _Layout(_root(settings.data_dir))
    if trains:
      train, evaluation = layout.splits(settings, seed)
    else:
      train = evaluation = layout.evaluated_alone(settings, seed)
    _check_classes(train.tree, evaluation.tree)
    given = class_order.given(layout.root, layout.own, train.tree.classes)
    order = given or [*train.tree.classes]
    for field, split in (("train_split", train), ("eval_split", evaluation)):
      split.check(f"config.data.{field} = {getattr(settings, field)!r}")
    found = (
      layout.note_on_splits(settings, evaluation.tree),
      _note_on_entries(layout.root, dict.fromkeys((train.tree, evaluation.tree))),
      _note_on_overlap(train, evaluation)
      if trains
      else layout.note_on_classes(settings, evaluation.tree),
      class_order.note(layout.root, order) if fixed_labels and not given else None,
    )
    self.notes = tuple(note for note in found if note)
    self.class_names = tuple(name.decode("utf-8", "backslashreplace") for name in order)
    self.train, self.eval = _Files(train, order), _Files(evaluation, order)


def _root(data_dir: str) -> bytes:
  """The folder's path."""
  field = f"config.data.data_dir = {data_dir!r}"
  if not data_dir:
    raise ConfigError(
      f"{field} is not allowed: with config.data.name = folder it must be the folder's path."
    )
  path = os.path.expanduser(paths.without_file_scheme(data_dir))
  root = paths.opened("config.data.data_dir =", path)
  if root.is_dir():
    return os.fsencode(os.fspath(root))
  if not root.exists():
    raise ConfigError(f"{field} is not allowed: there is no such directory.")
  kind = "no directory"
  if os.path.isfile(path):  # of a FIFO, epath says the same, and reading one may wait forever
    if zipfile.is_zipfile(path):
      kind = f"a zip file. Unpack it: unzip {path} -d DIR"
    elif tarfile.is_tarfile(path):
      kind = f"a tar file. Unpack it: tar -xf {path} -C DIR"
  raise ConfigError(f"{field} is not allowed: it is {kind}. Give the folder that holds train.")


class _Tree:
  """A directory of class folders, listed.

  Attributes:
    path: of the directory.
    own: what lies in it, class folders included.
    classes: what lies in each class folder, in the order of their names.
  """

  def __init__(self, path: bytes, hint: str = ""):
    self.path, self.own = path, entries(path)
    if not self.own.folders:
      images = f" It holds {len(self.own.images):,} images itself." if self.own.images else ""
      raise ConfigError(
        f"{shown(path)} holds no class folders: images must lie in {shown(path)}/CLASS/NAME.jpg."
        f"{images}{hint}"
      )
    folders = self.own.folders
    listed = at_once(lambda name: entries(path + b"/" + name), folders)
    self.classes: dict[bytes, Entries] = dict(zip(folders, listed, strict=True))

  def held(self) -> list[tuple[bytes, Entries]]:
    """Each class folder's path, and what lies in it."""
    return [(self.path + b"/" + name, held) for name, held in self.classes.items()]

  def part(self, low: Fraction, high: Fraction) -> "_Part":
    """Of each class, the images from one share of them to another, in the order of names."""
    chosen = {}
    for name, found in self.classes.items():
      # Of two parts that meet, both round alike.
      first, last = (int(len(found.images) * share + Fraction(1, 2)) for share in (low, high))
      chosen[name] = np.arange(first, last)
    return _Part(self, chosen)


class _Part(NamedTuple):
  """Some images of a tree: their numbers among those of each class, rising."""

  tree: _Tree
  chosen: dict[bytes, np.ndarray]

  def names(self, label: bytes) -> list[bytes]:
    """File names of a class."""
    images = self.tree.classes[label].images
    return [images[i] for i in self.chosen[label]]

  def paths(self) -> Iterator[bytes]:
    """Class folder and file name of each image."""
    for label in self.chosen:
      yield from (label + b"/" + name for name in self.names(label))

  def identities(self) -> np.ndarray:
    """Of all images, as `Entries.identities`."""
    numbers = [
      np.array(self.tree.classes[label].identities, np.int64)[chosen]
      for label, chosen in self.chosen.items()
    ]
    return np.concatenate(numbers)

  def check(self, field: str) -> None:
    """Raises a ConfigError where a class has no image."""
    empty = [label for label, chosen in self.chosen.items() if not len(chosen)]
    if empty:
      raise ConfigError(
        f"{field} is not allowed: it leaves no image of {len(empty)} classes of "
        f"{shown(self.tree.path)}, which have too few: {shown_names(empty)}."
      )

  def divided(self, share: Fraction, seed: int, field: str) -> tuple["_Part", "_Part"]:
    """Without a share of each class's images, at least one, and these.

    Names and seed decide which ones, so that the rest keeps its side if images or classes are
    added.
    """
    rest, taken = {}, {}
    for label, chosen in self.chosen.items():
      count = max(1, int(len(chosen) * share + Fraction(1, 2)))
      if count >= len(chosen):
        raise ConfigError(
          f"{field} is not allowed: class {shown(label)} of {shown(self.tree.path)} has "
          f"too few images to divide ({len(chosen)}). Each class needs at least one on both sides."
        )
      drawn = [
        hashlib.blake2b(label + b"/" + name, digest_size=8, key=b"%d" % seed).digest()
        for name in self.names(label)
      ]
      is_taken = np.zeros(len(chosen), bool)
      is_taken[sorted(range(len(chosen)), key=drawn.__getitem__)[:count]] = True
      rest[label], taken[label] = chosen[~is_taken], chosen[is_taken]
    return _Part(self.tree, rest), _Part(self.tree, taken)


class _Layout:
  """The splits of a root, by name."""

  def __init__(self, root: bytes):
    self.root = root
    self._trees: dict[bytes, _Tree] = {}

  @functools.cached_property
  def own(self) -> Entries:
    """What lies in it."""
    return entries(self.root)

  @property
  def _folders(self) -> list[bytes]:
    return self.own.folders

  def splits(self, settings: DataSettings, seed: int) -> tuple[_Part, _Part]:
    """What is trained on, and what is evaluated on."""
    name, low, high = self._parsed("train_split", settings.train_split)
    path, is_flat = self._trained(name)
    if path is None:
      raise self._absent("train_split", (name,))
    share, field = settings.eval_split, f"config.data.eval_split = {settings.eval_split!r}"
    if _SHARE.fullmatch(share) and self._find((share,)) is None:
      if not 0 < _fraction(share) < 1:
        raise ConfigError(f"{field} is not allowed: a share must be above 0 % and below 100 %.")
      return self._tree(path).part(low, high).divided(_fraction(share), seed, field)
    evaluated, *bounds = self._evaluated(settings.eval_split, name, path, is_flat)
    hint = " config.data.eval_split=10% evaluates on a tenth of the training images instead."
    tree = self._tree(path)
    return tree.part(low, high), self._tree(evaluated, hint).part(*bounds)

  def evaluated_alone(self, settings: DataSettings, seed: int) -> _Part:
    """What is evaluated on, where nothing is trained: the training split need not be there."""
    if _SHARE.fullmatch(settings.eval_split) and self._find((settings.eval_split,)) is None:
      return self.splits(settings, seed)[1]
    name, *_ = self._parsed("train_split", settings.train_split)
    path, *bounds = self._evaluated(settings.eval_split, name, *self._trained(name))
    return self._tree(path).part(*bounds)

  def _trained(self, name):
    """The directory of the training split, None without one; and whether it is a flat root."""
    if name.casefold() != "train":
      return self._find((name,)), False
    path = self._find((name, *TRAIN_NAMES))
    # Of vehicles, a train is a class.
    is_class = path is not None and _is_class(entries(path))
    is_flat = (path is None or is_class) and self._is_flat(path)
    return (self.root if is_flat else path), is_flat

  def _evaluated(self, split, train, train_path, is_flat):
    """The directory of the evaluation's split, and which part of it."""
    if not split:
      path, names, bounds = self._find(EVAL_NAMES), EVAL_NAMES, (Fraction(0), Fraction(1))
      if path is None and is_flat:
        raise self._flat_without_evaluation()
    else:
      name, *bounds = self._parsed("eval_split", split)
      names = (name,)
      path = train_path if name.casefold() == train.casefold() else self._find(names)
    if path is None:
      raise self._absent("eval_split", names)
    return path, *bounds

  def _parsed(self, field, text):
    """A split's name and the part of it, from and to."""
    found = _PART.fullmatch(text)
    if not found or self._find((text,)) is not None:
      if re.fullmatch(r".+\[.*\]", text) and self._find((text,)) is None:
        raise ConfigError(
          f"config.data.{field} = {text!r} is not allowed: a part of a folder is written in "
          "percent of each class, as train[:90%]."
        )
      return text, Fraction(0), Fraction(1)
    low, high = _fraction(found["low"] or "0%"), _fraction(found["high"] or "100%")
    low, high = (bound + (bound < 0) for bound in (low, high))
    if not 0 <= low < high <= 1:
      raise ConfigError(
        f"config.data.{field} = {text!r} is not allowed: the part must begin before it ends, "
        "within 0 % and 100 %."
      )
    return found["name"], low, high

  def _find(self, names: Sequence[str]) -> bytes | None:
    """The directory with the first of these names; in any case, where none has one exactly."""
    for name in names:
      path = self.root + b"/" + os.fsencode(name)
      if is_directory(path):
        return path
    for name in names:
      for folder in self._folders:
        if folder.decode("utf-8", "replace").casefold() == name.casefold():
          return self.root + b"/" + folder
    return None

  def _is_flat(self, train):
    """Whether the root itself is a directory of class folders, others than `train`."""
    if self._find(EVAL_NAMES) is not None:
      return False
    places = (self.root + b"/" + name for name in self._folders[: _LOOKED_INTO + 1])
    return any(entries(path).images for path in places if path != train)

  def _tree(self, path, hint=""):
    """The tree of a directory, one for all of its names."""
    place = path if is_remote(path) else os.path.realpath(path)
    if place not in self._trees:
      self._trees[place] = _Tree(path, hint)
    return self._trees[place]

  def _absent(self, field, names):
    inside = [
      folder
      for folder in self._folders[:_LOOKED_INTO]
      if any(is_directory(self.root + b"/" + folder + b"/" + os.fsencode(name)) for name in names)
    ]
    hint = ""
    if inside:
      hint = f" Give {shown(self.root + b'/' + inside[0])} as config.data.data_dir?"
    elif field == "eval_split":
      hint = " config.data.eval_split=10% evaluates on a tenth of the training images instead."
    wanted = " or ".join(shown(os.fsencode(name)) for name in names)
    return ConfigError(
      f"config.data.{field} is not there: {shown(self.root)} must hold a directory {wanted}; it "
      f"holds {shown_names(self._folders) or 'no directories'}.{hint}"
    )

  def _flat_without_evaluation(self):
    parent, name = os.path.split(self.root)
    hint = ""
    if name.decode("utf-8", "replace").casefold() in TRAIN_NAMES:
      hint = f" If it is the folder of the training split, give {shown(parent)} as its data_dir."
    return ConfigError(
      f"config.data.eval_split is not there: {shown(self.root)} holds class folders "
      f"({shown_names(self._folders)}) and no directories train and val. "
      f"config.data.eval_split=10% evaluates on a tenth of each class and trains on the rest.{hint}"
    )

  def note_on_splits(self, settings: DataSettings, evaluated: _Tree) -> str | None:
    """Tells of a folder `train` that is taken for a class, and of a validation split that is not
    taken, because a test split is there.
    """
    if evaluated.path == self.root:
      path = self._find(TRAIN_NAMES)
      return path and f"{shown(path)} holds images itself: it is one of the classes, no split."
    if settings.eval_split or os.path.basename(evaluated.path).lower().decode() not in _TESTS:
      return None
    other = self._find([name for name in EVAL_NAMES if name not in _TESTS])
    if other is None:
      return None
    taken, left = (shown(os.path.basename(path)) for path in (evaluated.path, other))
    return (
      f"{shown(self.root)} holds {taken} and {left}, and the run evaluates on {taken}, also to "
      f"choose the best weights; config.data.eval_split={left} takes the other."
    )

  def note_on_classes(self, settings: DataSettings, evaluated: _Tree) -> str | None:
    """Tells, where nothing is trained, of a training split with other classes."""
    path, _ = self._trained(self._parsed("train_split", settings.train_split)[0])
    if path is None or path == evaluated.path:
      return None
    differing = sorted({*entries(path).folders} ^ evaluated.classes.keys())
    if not differing:
      return None
    return (
      f"{shown(path)} has other class folders than {shown(evaluated.path)}, whose order gives the "
      f"labels. In one alone: {shown_names(differing)}."
    )


def _is_class(inside: Entries) -> bool:
  """Whether a directory is a class folder, not one of class folders."""
  return bool(inside.images) and not inside.folders


def _fraction(percent: str) -> Fraction:
  return Fraction(percent.removesuffix("%")) / 100


def _check_classes(train: _Tree, evaluation: _Tree) -> None:
  _check_forms(train, evaluation)
  differing = sorted(train.classes.keys() ^ evaluation.classes.keys())
  if differing:
    broken = sorted({*train.own.broken, *evaluation.own.broken} & {*differing})
    links = f" Broken links: {shown_names(broken)}." if broken else ""
    raise ConfigError(
      f"{shown(train.path)} has {len(train.classes)} classes and {shown(evaluation.path)} has "
      f"{len(evaluation.classes)}; they must be the same folders. In one alone: "
      f"{shown_names(differing)}.{links}"
    )
  for tree in (train, evaluation):
    empty = [name for name, found in tree.classes.items() if not found.images]
    if empty:
      raise _without_images(tree, empty)
  if len(train.classes) < 2:
    raise ConfigError(
      f"{shown(train.path)} has one class, {shown_names([*train.classes])}: a classifier needs two "
      "or more. Images must lie in a folder for each class."
    )


def _check_forms(train, evaluation):
  """Raises where two classes differ in the Unicode form of their names only."""
  forms: dict[str, tuple[bytes, _Tree]] = {}
  for tree in (train, evaluation):
    for name in tree.classes:
      other, there = forms.setdefault(normal_form(name), (name, tree))
      if other != name:
        one, two = (ascii(text.decode("utf-8", "replace")) for text in (other, name))
        raise ConfigError(
          f"Two classes have the same name in two Unicode forms, {one} in {shown(there.path)} and "
          f"{two} in {shown(tree.path)}: rename one of them, so that both are the same."
        )


def _without_images(tree, empty):
  path, first = shown(tree.path), next((name for name in empty if tree.classes[name].folders), None)
  hint = ""
  if first is not None:
    there = shown_names(tree.classes[first].folders, 1)
    hint = (
      f" {shown(first)} holds folders ({there}): images must lie in it directly, not one folder "
      "deeper."
    )
  elif files := [name + b"/" + file for name in empty for file in tree.classes[name].files]:
    hint = f" Files there have other names: {shown_names(files, _NOTED)}."
  return ConfigError(
    f"{len(empty)} class folders of {path} hold no image ({', '.join(SUFFIXES)}): "
    f"{shown_names(empty)}. Remove them from both splits, or fill them.{hint}"
  )


# One, and more of them.
_NOT_READ = {
  "loose": ("file outside class folders", "files outside class folders"),
  "files": (
    "file whose name does not end like an image's",
    "files whose names do not end like an image's",
  ),
  "folders": ("folder inside a class folder", "folders inside class folders"),
  "broken": ("broken link", "broken links"),
  "special": ("FIFO, socket or device", "FIFOs, sockets or devices"),
}


def _note_on_entries(root: bytes, trees: Iterable[_Tree]) -> str | None:
  """Counts and names what lies beside the images and is not read."""
  found: dict[str, list[bytes]] = {kind: [] for kind in _NOT_READ}

  def add(kind, folder, names):
    prefix = (folder + b"/").removeprefix(root + b"/")
    found[kind].extend(prefix + name for name in names)

  for tree in trees:
    loose = sorted([*tree.own.images, *tree.own.files])
    in_root = tree.path == root
    add("loose", tree.path, [n for n in loose if not (in_root and class_order.is_file(n))])
    for path, held in tree.held():
      add("files", path, held.files)
      add("folders", path, held.folders)
    for path, held in [(tree.path, tree.own), *tree.held()]:
      add("broken", path, held.broken)
      add("special", path, held.special)
  told = [
    f"{len(names)} {_NOT_READ[kind][len(names) > 1]} ({shown_names(names, _NOTED)})"
    for kind, names in found.items()
    if names
  ]
  return f"Not read in {shown(root)}: {', '.join(told)}." if told else None


def _note_on_overlap(train: _Part, evaluation: _Part) -> str | None:
  """Tells of images in both splits."""
  total = sum(map(len, evaluation.chosen.values()))
  if train.tree is evaluation.tree:
    both = sum(
      len(np.intersect1d(chosen, evaluation.chosen[label]))
      for label, chosen in train.chosen.items()
    )
    example = ""
  else:
    both, example = _linked(train, evaluation)
    if not both:
      both, example = _copied(train, evaluation)
  if not both:
    return None
  return (
    f"{both} of {total} evaluation images are training images too{example}: accuracy will not say "
    "how well other images are classified."
  )


def _linked(train, evaluation):
  """How many files are in both splits by links, and an example."""
  if is_remote(train.tree.path):
    return 0, ""
  _, *indices = np.intersect1d(train.identities(), evaluation.identities(), return_indices=True)
  if not len(indices[0]):
    return 0, ""
  paths_of = [
    [part.tree.path + b"/" + path for path in part.paths()] for part in (train, evaluation)
  ]
  pairs = [
    (paths_of[0][i], paths_of[1][j])
    for i, j in zip(*indices, strict=True)
    if _is_same(paths_of[0][i], paths_of[1][j])
  ]
  if not pairs:
    return 0, ""
  return len(pairs), f" ({shown(pairs[0][1])} is {shown(pairs[0][0])})"


def _is_same(one, two):
  try:
    return os.path.samefile(one, two)
  except OSError:
    return False


def _copied(train, evaluation):
  """How many evaluation images have the bytes of a training image, and an example.

  Of large or remote splits, some images are compared, and only with those of the same name.
  """
  is_far = is_remote(train.tree.path)
  most = _COMPARED_REMOTELY if is_far else _COMPARED
  images = sum(len(chosen) for part in (train, evaluation) for chosen in part.chosen.values())
  if is_far or images > most:
    sides = _of_one_name(train, evaluation, most)
  else:
    parts = (train, evaluation)
    sides = [[part.tree.path + b"/" + path for path in part.paths()] for part in parts]
  keys: dict[bytes, object] = {}
  try:
    for key in (_digest,) if is_far else (os.path.getsize, _start, _digest):
      paths = [path for side in sides for path in side]
      keys = dict(zip(paths, at_once(key, paths), strict=True))
      both = {keys[path] for path in sides[0]} & {keys[path] for path in sides[1]}
      both.discard(0)  # bytes: an empty file is no image
      sides = [[path for path in side if keys[path] in both] for side in sides]
  except (OSError, tf.errors.OpError):  # told when it is read
    return 0, ""
  if not sides[1]:
    return 0, ""
  first = next(path for path in sides[0] if keys[path] == keys[sides[1][0]])
  return len(sides[1]), f" ({shown(sides[1][0])} is a copy of {shown(first)})"


def _of_one_name(train, evaluation, most):
  """At most `most` images of each split whose class and name the other has too."""
  names = sorted(
    label + b"/" + name
    for label in evaluation.chosen
    for name in {*train.names(label)} & {*evaluation.names(label)}
  )
  kept = names[:: max(1, -(-len(names) // most))]
  return [[part.tree.path + b"/" + name for name in kept] for part in (train, evaluation)]


def _start(path):
  with open(path, "rb") as file:
    return file.read(_STARTS)


def _digest(path):
  return hashlib.sha256(content(path)).digest()


class _Files(InMemoryRecords):
  """The images of a split, in the order of classes and names."""

  def __init__(self, part: _Part, order: list[bytes]):
    names = [part.names(label) for label in order]
    counts = [len(found) for found in names]
    self._directory, self._order = part.tree.path, order
    self._first = np.cumsum([0, *counts])
    # A million whole paths take four times as much memory.
    columns = {
      "file": tf.constant([name for found in names for name in found]),
      "label": tf.constant(np.repeat(np.arange(len(order), dtype=np.int32), counts)),
    }
    super().__init__(columns)

  def names(self) -> Iterable[bytes]:
    """See `InMemoryRecords.names`: CLASS/NAME."""
    files = self._columns["file"].numpy()
    for label, name in enumerate(self._order):
      yield from (name + b"/" + file for file in files[self._first[label] : self._first[label + 1]])

  def sample(self) -> Iterable[bytes]:
    """See `InMemoryRecords.sample`: the first of every class, so that two directories whose files
    have the same names differ.

    Raises:
      ConfigError: one cannot be read.
    """
    paths_of_first = map(self._path, self._first[:-1])
    try:
      return at_once(content, paths_of_first)
    except tf.errors.OpError as error:
      told = one_line(error)
    except OSError as error:
      told = f"{shown(os.fsencode(error.filename or ''))}: {error.strerror}"
    raise ConfigError(f"folder cannot be read: {told}. Restore the file.")

  def read(self, record: Record) -> tuple[tf.Tensor, tf.Tensor]:
    """See `InMemoryRecords`."""
    label = record["label"]
    parts = [self._directory, tf.gather(tf.constant(self._order), label), record["file"]]
    return tf.io.read_file(tf.strings.join(parts, "/")), label

  def name(self, key: np.ndarray) -> str:
    """What a log calls the record with this key."""
    return shown(self._path(key[0]))

  def _path(self, index) -> bytes:
    label = int(self._columns["label"][index])
    return b"/".join(
      [self._directory, self._order[label], bytes(self._columns["file"][index].numpy())]
    )
