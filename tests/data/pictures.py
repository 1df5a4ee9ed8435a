"""Small data sets in the real formats, cut from scikit-learn's two photographs."""

import io
import tarfile

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

# Of sets that TFDS's own code knows: it looks for this version.
VERSIONS = {"cifar10": "3.0.2", "imagenet2012": "5.1.0"}
CLASSES = ("flower", "temple", "wide")


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


def write_folder(root, train=24, evaluation=10, broken=(), make=cuttings):
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


def write_tfds(
  data_dir,
  name="cuttings",
  train=24,
  evaluation=10,
  eval_split="validation",
  shards=1,
  classes=CLASSES,
  make=cuttings,
  shape=(None, None, 3),
  texts=(),
):
  """A prepared TFDS set, through TFDS's own writer; returns its data_dir."""
  import tensorflow_datasets as tfds

  kind = "PNG" if shape[0] else "JPEG"  # what TFDS takes for images of one size: they lose nothing

  with tfds.core.registered.skip_registration():

    class Cuttings(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version(VERSIONS.get(name, "1.0.0"))

      def _info(self):
        features = {
          "image": tfds.features.Image(shape=shape),
          "label": tfds.features.ClassLabel(names=classes),
        }
        features.update({text: tfds.features.Text() for text in texts})
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(features),
          supervised_keys=("image", "label"),
        )

      def _split_generators(self, manager):
        return {
          "train": self._generate_examples(train, 1),
          eval_split: self._generate_examples(evaluation, 2),
        }

      def _generate_examples(self, count, seed):
        for i, (image, label) in enumerate(make(count, seed)):
          yield (
            i,
            {
              "image": io.BytesIO(encoded(image, kind)),
              "label": label,
              **dict.fromkeys(texts, f"{i}"),
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
