"""TFDS sets of people's own builders: which of their features are read, and which sets are there
where one is not.
"""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from profit_jax import data
from profit_jax.cli import prepare
from profit_jax.config import ConfigError
from profit_jax.data.records import Shard, one_line
from profit_jax.data.tfds import Splits, _in_both, class_keys, require_image_and_label
from tests.data.pictures import settings

F = tfds.features
IMAGE, LABEL = F.Image(shape=(None, None, 3)), F.ClassLabel(names=["cat", "dog"])
SIDE = 16
DEEP = {"rgba": (4, np.uint8), "deep": (3, np.uint16), "deep_grey": (1, np.uint16)}


def pixels(feature, i):
  channels, dtype = DEEP[feature]
  drawn = np.random.default_rng(i).integers(0, np.iinfo(dtype).max, (SIDE, SIDE, channels))
  return drawn.astype(dtype)


def builder(data_dir, features, keys):
  """Of a set that is not prepared."""
  with tfds.core.registered.skip_registration():

    class Own(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")
      name = "own"

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self, features=F.FeaturesDict(features), supervised_keys=keys
        )

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

      def _generate_examples(self):
        for i in range(4):
          yield i, {"kind": i % 2, **{feature: pixels(feature, i) for feature in DEEP}}

  return Own(data_dir=data_dir)


@pytest.mark.parametrize(
  ("features", "keys", "message"),
  [
    (
      {"picture": IMAGE, "kind": LABEL, "id": F.Text()},
      None,
      r"without config.data.image_key: .* picture \(Image of uint8, shape \(None, None, 3\)\), "
      r"kind \(ClassLabel of 2 classes\), id \(Text\)\.$",
    ),
    ({"image": IMAGE, "label": F.Text()}, ("image", "label"), "its label 'label' is Text and must"),
    (
      {"image": IMAGE, "label": F.Scalar(np.int64)},
      ("image", "label"),
      "its label 'label' is Scalar of int64 and must be a .*ClassLabel",
    ),
    (
      {"image": F.Tensor(shape=(28, 28, 1), dtype=np.uint8), "label": LABEL},
      ("image", "label"),
      r"its image 'image' is Tensor of uint8, shape \(28, 28, 1\) and must be a \S+Image\.",
    ),
    (
      {"image": F.Image(shape=(None, None, 1), dtype=np.float32), "label": LABEL},
      ("image", "label"),
      "its image 'image' is Image of float32, .* of uint8 or uint16",
    ),
    ({"image": IMAGE, "label": F.ClassLabel()}, ("image", "label"), "two classes or more"),
  ],
)
def test_a_message_says_which_feature_is_wrong_and_which_there_are(
  tmp_path, features, keys, message
):
  with pytest.raises(ConfigError, match=message) as error:
    class_keys(builder(tmp_path, features, keys))
  assert "\n" not in str(error.value)


def test_fields_choose_the_features(tmp_path):
  own = builder(tmp_path, {"a": IMAGE, "b": IMAGE, "kind": LABEL, "id": F.Text()}, ("a", "kind"))
  assert class_keys(own) == ("a", "kind")
  assert class_keys(own, image_key="b") == ("b", "kind")
  with pytest.raises(ConfigError, match=r"config.data.image_key = 'c' is not allowed: .* b \("):
    class_keys(own, image_key="c")
  with pytest.raises(ConfigError, match="its label 'id' is Text"):
    class_keys(own, label_key="id")


def test_a_set_without_a_class_label_is_not_prepared(tmp_path):
  require_image_and_label(builder(tmp_path, {"picture": IMAGE, "kind": LABEL}, None))
  with pytest.raises(ConfigError, match=r"one image and one class label .* id \(Text\)"):
    require_image_and_label(builder(tmp_path, {"picture": IMAGE, "id": F.Text()}, None))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """A data_dir with the set `own`, of deep and transparent images, without supervised keys."""
  data_dir = tmp_path_factory.mktemp("own")
  images = {
    feature: F.Image(shape=(None, None, channels), dtype=dtype)
    for feature, (channels, dtype) in DEEP.items()
  }
  builder(data_dir, {"kind": LABEL, **images}, None).download_and_prepare()
  return data_dir


def own_settings(data_dir, **changes):
  fields = {"name": "own", "data_dir": str(data_dir), "label_key": "kind", "image_key": "rgba"}
  chosen = {f"data.{field}": value for field, value in {**fields, **changes}.items()}
  batches = {"train.batch_size": 4, "train.eval_batch_size": 4, "data.crop_pct": 1.0}
  return settings(**batches, **chosen)


@pytest.mark.parametrize("feature", DEEP)
def test_deep_and_transparent_images_are_read_as_numpy_reads_them(own, feature):
  """Alpha is dropped, as in folders; of 16 bits, the upper ones count."""
  (batch,) = data.load(own_settings(own, image_key=feature)).eval_batches(4)

  def expected(i):
    values = pixels(feature, i)
    levels = values / 257 if values.dtype == np.uint16 else values
    return np.broadcast_to(levels[..., :3], (SIDE, SIDE, 3))

  assert sorted(batch["label"]) == [0, 0, 1, 1]
  for image in batch["image"]:
    assert min(np.abs(image - expected(i)).max() for i in range(4)) < 1


@pytest.mark.parametrize(
  ("place", "name", "message"),
  [
    ("", "own:9.9.9", r" holds own:1.0.0\.$"),
    ("", "own/large", r" holds own:1.0.0\.$"),
    ("", "owned", r" holds own\.$"),
    ("own", "own", r"give \S+ as the data_dir\.$"),
    ("own/1.0.0", "own", r"give \S+ as the data_dir\.$"),
    ("", "imagenette/320px-v2", r"not prepared: .* holds own\.$"),
  ],
)
def test_what_is_prepared_is_named(own, place, name, message):
  with pytest.raises(ConfigError, match=message) as error:
    data.load(own_settings(own / place, name=name, image_key="", label_key=""))
  if place:
    assert f"give {own} as the data_dir" in str(error.value)


def test_configurations_that_are_prepared_are_named(tmp_path):
  (tmp_path / "imagenette" / "160px-v2" / "1.0.0").mkdir(parents=True)
  with pytest.raises(ConfigError, match=r" holds imagenette/160px-v2:1.0.0\."):
    data.load(own_settings(tmp_path, name="imagenette/320px-v2", image_key="", label_key=""))


def test_a_file_url_is_the_path(own):
  assert Splits(own_settings(f"file://{own}").data).train.examples == 4


def test_examples_in_both_splits_are_noted(own):
  (note,) = Splits(own_settings(own, eval_split="train[50%:]").data).notes
  assert note.startswith("2 of 2 evaluation images are training images too")
  assert not Splits(own_settings(own).data).notes


def test_parts_of_shards_overlap_where_they_are_of_one_file():
  parts = [Shard("a", 0, 10), Shard("b", 5, 5)]
  assert _in_both(parts, [Shard("a", 8, 10), Shard("b", 0, 7), Shard("c", 0, 5)]) == 4
  assert _in_both(parts, [Shard("a", 10, 2), Shard("b", 0, 5)]) == 0


def test_messages_have_no_names_of_nodes(tmp_path):
  missing = str(tmp_path / "absent")
  for read in (
    lambda: tf.io.read_file(missing),
    lambda: list(tf.data.Dataset.from_tensors(missing).map(tf.io.read_file, 2)),
  ):
    with pytest.raises(tf.errors.NotFoundError) as error:
      read()
    assert "{{" in error.value.message
    assert one_line(error.value) == f"{missing}; No such file or directory"
  assert one_line(ValueError("two\n  lines.")) == "two lines"


def test_what_a_builder_raises_is_one_line(tmp_path, capsys, monkeypatch):
  def fails(self, **options):
    raise tf.errors.NotFoundError(None, None, "{{function_node __wrapped__X}} a file\n is missing")

  own = builder(tmp_path, {"picture": IMAGE, "kind": LABEL}, None)
  monkeypatch.setattr(type(own), "download_and_prepare", fails)
  monkeypatch.setattr(tfds, "builder", lambda *names, **options: own)
  assert prepare.main(["own", f"--data_dir={tmp_path}"]) == 2
  assert "own could not be prepared: a file is missing." in capsys.readouterr().err
