"""Every kind of image: one meaning in training, evaluation and `predict`, or one reason."""

import io
import os
import re
import warnings

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from profit_jax.config import ConfigError
from profit_jax.data import picture, preprocess
from tests.data.kinds import PHOTO, RGB, UNREADABLE, kinds, saved, without_marker

# TensorFlow refuses them, and `Images` gives them to Pillow.
LEFT_TO_PILLOW = {
  "PNG wrong checksum of the header",
  "PNG wrong checksum of the data",
  "PNG wrong checksum below",
  "PNG wrong checksums",
  "PNG without its end",
}
EXACT = [name for name, (_, made_of) in kinds().items() if made_of is not None]


def in_tensorflow(contents):
  """The pixels that training sees, by name; without what TensorFlow refuses."""

  def whole(name, content):
    image = preprocess.opened(content)
    return name, preprocess.decode(image, tf.concat([[0, 0], image.shape], 0))

  found = tf.data.Dataset.from_tensor_slices((list(contents), list(contents.values())))
  found = found.map(whole, 2, deterministic=True).ignore_errors()
  return {name.decode(): pixels for name, pixels in found.as_numpy_iterator()}


def cut(content, share):
  return content[: int(len(content) * share)]


@pytest.fixture(scope="module")
def trained():
  """In one pass, because each pass traces its operations."""
  contents = {name: content for name, (content, _) in kinds().items()}
  contents |= {f"cut {share} {name}": cut(contents[name], share) for name, share in CUT}
  contents |= {f"no image {name}": content for name, (content, _) in UNREADABLE.items()}
  return in_tensorflow(contents)


@pytest.mark.parametrize("name", kinds())
def test_training_and_predict_read_the_same_pixels(trained, name):
  pixels = picture.decode(kinds()[name][0])
  assert pixels.dtype == np.uint8
  if name in LEFT_TO_PILLOW:
    assert name not in trained
  else:
    assert np.array_equal(trained[name], pixels)


@pytest.mark.parametrize("name", EXACT)
def test_what_loses_nothing_has_the_pixels_that_it_was_made_of(name):
  content, made_of = kinds()[name]
  assert np.array_equal(picture.decode(content), made_of)


LOSSY = ("JPEG", "JPEG 4:4:4",
  "JPEG progressive", "JPEG arithmetic", "JPEG RGB", "JPEG CMYK", "MPO",
  "TIFF JPEG", "TIFF LAB", "WebP", "AVIF", "AVIF alpha")  # fmt: skip


@pytest.mark.parametrize("name", LOSSY)
def test_what_loses_something_is_near(name):
  assert np.abs(picture.decode(kinds()[name][0]) - np.int32(RGB)).mean() < 12


def test_inks_are_inverted_only_where_adobes_marker_says_so():
  paper = saved(Image.new("CMYK", (16, 16)), "JPEG")
  assert (picture.decode(paper) == 255).all()
  assert (picture.decode(without_marker(paper)) == 0).all()


CUT = [(name, share) for name in ("JPEG", "JPEG progressive", "JPEG arithmetic", "PNG", "WebP",
  "GIF", "BMP", "TIFF", "AVIF", "JPEG 2000", "PPM", "PGM 10") for share in (0.3, 0.9)]  # fmt: skip


@pytest.mark.parametrize(("name", "share"), CUT)
def test_what_is_cut_off_is_refused_everywhere(trained, name, share):
  assert picture.why_not_an_image(cut(kinds()[name][0], share)) == "it is cut off"
  assert f"cut {share} {name}" not in trained


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_refusal_says_why(trained, name):
  content, phrase = UNREADABLE[name]
  assert re.search(phrase, picture.why_not_an_image(content))
  assert f"no image {name}" not in trained


def test_no_part_of_a_cut_jpeg_is_seen():
  """The first rows are whole."""
  content = cut(saved(PHOTO.resize((480, 320)), "JPEG"), 0.7)
  with pytest.raises(tf.errors.OpError):
    preprocess.decode(preprocess.opened(tf.constant(content)), tf.constant([0, 0, 8, 8]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_more_pixels_than_pillow_allows_are_refused_everywhere(monkeypatch, kind):
  content = saved(PHOTO.resize((1500, 1000)), kind)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
  assert picture.why_not_an_image(content) == (
    "its 2 megapixels are more than the 1 that Pillow allows"
  )
  assert not in_tensorflow({"large": content})
  # Pillow warns of half as many.
  assert not picture.why_not_an_image(saved(PHOTO.resize((900, 1000)), kind))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
  assert not picture.why_not_an_image(content)


def test_pillows_own_warnings_are_not_shown():
  content = kinds()["MPO"][0]
  at = content.index(b"MPF\0")
  malformed = content[: at + 4] + b"XXXX" + content[at + 8 :]
  with warnings.catch_warnings(record=True) as shown:
    warnings.simplefilter("always")
    Image.open(io.BytesIO(malformed)).close()
    assert shown
    shown.clear()
    picture.decode(malformed)
    assert not shown


# Names and files.


@pytest.mark.parametrize("name", [name for name in kinds() if name.endswith("EXIF")])
def test_an_exif_orientation_is_told_and_applied_on_request(tmp_path, name):
  content = kinds()[name][0]
  (tmp_path / "photo").write_bytes(content)
  assert picture.orientation(content) == 6
  plain, turned = (
    picture.read_picture(tmp_path / "photo", 32, 1.0, "bicubic", turn) for turn in (False, True)
  )
  assert np.array_equal(turned, np.rot90(plain, -1))


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_makes_upright(tmp_path, value):
  """As Pillow's own function does."""
  content = saved(PHOTO.crop((0, 0, 32, 32)), "PNG", orientation=value)
  (tmp_path / "photo.png").write_bytes(content)
  with Image.open(tmp_path / "photo.png") as opened:
    upright = np.asarray(ImageOps.exif_transpose(opened))
  found = picture.read_picture(tmp_path / "photo.png", 32, 1.0, "bicubic", turn=True)
  assert np.array_equal(found, upright)


def test_what_has_no_orientation():
  assert picture.orientation(kinds()["PNG"][0]) == 1
  assert picture.orientation(kinds()["TIFF turned"][0]) == 1  # it is in its pixels
  assert picture.orientation(b"no image") == 1


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda path: path.write_bytes(b"<html>"),
      r"photo.jpg' cannot be read as an image: .*web page",
    ),
    (lambda path: path.mkdir(), "photo.jpg' is a directory"),
    (os.mkfifo, "photo.jpg' is a special file"),
    (lambda path: path.symlink_to("absent"), "photo.jpg' cannot be read: No such file"),
  ],
  ids=["page", "directory", "pipe", "link"],
)
def test_a_file_that_is_no_picture(tmp_path, make, message):
  make(tmp_path / "photo.jpg")
  with pytest.raises(ConfigError, match=message):
    picture.read_picture(tmp_path / "photo.jpg", 32, 1.0, "bicubic")
