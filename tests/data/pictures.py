"""Small data sets in the real formats, cut from scikit-learn's two photographs, and settings for
them.
"""

import io
import tarfile
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from configs import base
from profit_jax.config import parse
from profit_jax.models import REGISTRY

TRAIN, EVAL = 24, 10  # images
SIZE = 16  # pixels that a batch has of them
# Of sets that TFDS's own code knows: it looks for this version.
VERSIONS = {"cifar10": "3.0.2", "imagenet2012": "5.1.0"}
CLASSES = ("flower", "temple", "wide")


def settings(**changes):
  """Of a run on such a set, with these fields."""
  config = base.get_config()
  small = {
    "data.image_size": SIZE,
    "train.batch_size": 8,
    "train.eval_batch_size": 8,
    "data.num_readers": 4,
  }
  config.update_from_flattened_dict({**small, **changes})
  return parse(config, REGISTRY)


def cuttings(count, seed=0, size=(96, 72)):
  """`count` windows of the photographs as PIL images, and their classes: the photograph, or, mixed
  in, a wider window.
  """
  rng = np.random.default_rng(seed)
  photographs = [Image.fromarray(photo) for photo in load_sample_images().images]
  found = []
  for i in range(count):
    label = i % len(CLASSES)
    width, height = size if label < 2 else (2 * size[0], size[1])
    photo = photographs[1 - label % 2]
    left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
    found.append((photo.crop((left, top, left + width, top + height)), label))
  return found


def encoded(image, kind="JPEG"):
  """The bytes of a PIL image as a file."""
  file = io.BytesIO()
  image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
  return file.getvalue()


def write_folder(root, train=TRAIN, evaluation=EVAL, broken=(), make=cuttings):
  """An image folder; `broken` are numbers of training images whose files are cut."""
  for split, count, seed in (("train", train, 1), ("val", evaluation, 2)):
    for i, (image, label) in enumerate(make(count, seed)):
      directory = root / split / CLASSES[label]
      directory.mkdir(parents=True, exist_ok=True)
      kind = "PNG" if i % 5 == 4 else "JPEG"
      data = encoded(image, kind)
      (directory / f"{i:03d}.{kind.lower()}").write_bytes(
        data[:200] if split == "train" and i in broken else data
      )
  return root


class Form(NamedTuple):
  """What a TFDS set looks like: its classes, the images' shape, names of text features, the name
  of its second split, and the images' type.
  """

  classes: tuple[str, ...] = CLASSES
  shape: tuple[int | None, ...] = (None, None, 3)
  texts: tuple[str, ...] = ()
  eval_split: str = "validation"
  dtype: type = np.uint8


def write_tfds(
  data_dir, name="cuttings", *, train=TRAIN, evaluation=EVAL, shards=1, make=cuttings, form=Form()
):
  """A prepared TFDS set, through TFDS's own writer; returns its data_dir."""
  import tensorflow_datasets as tfds

  # PNG is what TFDS takes for images of one size: they lose nothing.
  kind = "PNG" if form.shape[0] else "JPEG"

  with tfds.core.registered.skip_registration():

    class Cuttings(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version(VERSIONS.get(name, "1.0.0"))

      def _info(self):
        features = {
          "image": tfds.features.Image(shape=form.shape, dtype=form.dtype),
          "label": tfds.features.ClassLabel(names=form.classes),
        }
        features.update({text: tfds.features.Text() for text in form.texts})
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(features),
          supervised_keys=("image", "label"),
        )

      def _split_generators(self, manager):
        return {
          "train": self._generate_examples(train, 1),
          form.eval_split: self._generate_examples(evaluation, 2),
        }

      def _generate_examples(self, count, seed):
        for i, (image, label) in enumerate(make(count, seed)):
          yield (
            i,
            {
              "image": image if isinstance(image, np.ndarray) else io.BytesIO(encoded(image, kind)),
              "label": label,
              **dict.fromkeys(form.texts, f"{i}"),
            },
          )

  Cuttings.name = name
  options = tfds.download.DownloadConfig(num_shards=shards)
  Cuttings(data_dir=data_dir).download_and_prepare(download_config=options)
  return data_dir


def write_imagenet_archives(directory, train, evaluation):
  """ImageNet's two archives: one of archives per class, and one of pictures. `train` has pictures
  by class and name.
  """
  directory.mkdir(parents=True)

  def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))

  with tarfile.open(directory / "ILSVRC2012_img_train.tar", "w") as archive:
    for synset, pictures in train.items():
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode="w") as own:
        for name, content in pictures.items():
          add(own, name, content)
      add(archive, f"{synset}.tar", inner.getvalue())
  with tarfile.open(directory / "ILSVRC2012_img_val.tar", "w") as archive:
    for i, content in enumerate(evaluation, 1):
      add(archive, f"ILSVRC2012_val_{i:08d}.JPEG", content)
