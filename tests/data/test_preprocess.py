"""Decoding, scaling and cutting: agreement with PIL, the rule for random windows, offsets at the
edges.
"""

import functools
import io
import itertools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_images

from profit_jax.data import preprocess

_PIL = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}
_PHOTOGRAPHS = [Image.fromarray(image) for image in load_sample_images().images]  # 640x427
_SEEDS = np.stack([np.arange(2000), np.full(2000, 7)], 1)


def _by_seed(draw, dtype):
  """`draw(seed)` for many seeds. In a traced function a thousand draws take a second; one by one
  they would take ten.
  """
  return tf.function(lambda seeds: tf.map_fn(draw, seeds, fn_output_signature=dtype))


@tf.function(input_signature=[tf.TensorSpec([2], tf.int32), tf.TensorSpec([None, 2], tf.int64)])
def _random_parts(shape, seeds):
  draw = functools.partial(preprocess.random_part, shape)
  return tf.map_fn(draw, seeds, fn_output_signature=tf.int32)


@functools.cache
def _windows(height, width, number=1000):
  return _random_parts(tf.constant([height, width]), tf.constant(_SEEDS[:number])).numpy()


def _encoded(image, kind="JPEG"):
  file = io.BytesIO()
  image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
  return file.getvalue()


def _opened(contents):
  return Image.open(io.BytesIO(contents)).convert("RGB")


def _difference(ours, theirs):
  """Mean and largest absolute difference, in levels."""
  ours, theirs = np.asarray(ours).astype(int), np.asarray(theirs).astype(int)
  assert ours.shape == theirs.shape
  difference = np.abs(ours - theirs)
  return difference.mean(), difference.max()


def _pil_center(image, size, shorter, interpolation="bicubic"):
  """Shorter side to `shorter`, then the centre, by torchvision's rule."""
  width, height = image.size
  target = (
    (shorter, int(shorter * height / width))
    if width <= height
    else (int(shorter * width / height), shorter)
  )
  image = image if target == image.size else image.resize(target, _PIL[interpolation])
  left, top = (int(round((side - size) / 2)) for side in target)  # noqa: RUF046
  return image.crop((left, top, left + size, top + size))


# Agreement with PIL. PIL scales left-right first, then rounds and clips, then scales up-down; here
# nothing is rounded or clipped in between. Measured: 0.09 to 0.21 levels in the mean (0.23 from
# 7x5), and at most one, except where the bicubic kernel overshoots 0 or 255 at a hard edge (11),
# and except in a window's first and last column (17; see
# `test_a_window_of_a_jpeg_is_exact_up_to_its_edge_columns`).
_MEAN, _OVERSHOOT, _EDGE = 0.25, 14, 20


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("photograph", _PHOTOGRAPHS)
def test_evaluation_agrees_with_pil(photograph, interpolation):
  contents = _encoded(photograph)
  ours = preprocess.center_crop(tf.constant(contents), 224, 224 / 256, interpolation)
  assert ours.dtype == tf.uint8
  mean, most = _difference(ours, _pil_center(_opened(contents), 224, 256, interpolation))
  assert mean < _MEAN
  assert most <= (1 if interpolation == "bilinear" else _OVERSHOOT)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("photograph", _PHOTOGRAPHS)
def test_training_agrees_with_pil_on_the_same_window(photograph, interpolation):
  contents = _encoded(photograph)
  for seed in _SEEDS[:4]:
    ours = preprocess.random_resized_crop(
      tf.constant(contents), 224, interpolation, tf.constant(seed)
    )
    top, left, height, width = preprocess.random_part(
      tf.constant([427, 640]), tf.constant(seed)
    ).numpy()
    window = _opened(contents).crop((left, top, left + width, top + height))
    window = np.asarray(window.resize((224, 224), _PIL[interpolation]))
    mean, most = _difference(ours, window)
    assert mean < _MEAN
    assert most <= _EDGE
    if interpolation == "bilinear":  # a kernel that does not overshoot, away from the window's edge
      assert _difference(ours[:, 5:-5], window[:, 5:-5])[1] <= 1


@pytest.mark.parametrize("size", [(100, 80), (80, 100), (7, 5), (1, 1)])
def test_small_images_are_enlarged_as_pil_does(size):
  contents = _encoded(_PHOTOGRAPHS[0].resize(size))
  ours = preprocess.resize(_decoded_whole(contents), [224, 200], "bicubic")
  mean, most = _difference(ours, _opened(contents).resize((200, 224), Image.BICUBIC))
  assert mean < _MEAN
  assert most <= _OVERSHOOT


def test_resizing_clips_what_overshoots():
  image = np.zeros((40, 40, 3), np.uint8)
  image[:, 20:] = 255
  ours = preprocess.resize(tf.constant(image), [100, 100], "bicubic")
  mean, most = _difference(ours, Image.fromarray(image).resize((100, 100), Image.BICUBIC))
  assert mean == 0
  assert most == 0


# Kinds of files.


def _decoded_whole(contents):
  image = preprocess.opened(tf.constant(contents))
  return preprocess.decode(image, tf.concat([[0, 0], image.shape], 0))


@pytest.mark.parametrize("size", [(640, 427), (33, 17), (16, 16), (1, 1)])
def test_a_whole_jpeg_is_decoded_exactly(size):
  contents = _encoded(_PHOTOGRAPHS[1].resize(size))
  assert _difference(_decoded_whole(contents), _opened(contents)) == (0, 0)


def test_a_window_of_a_jpeg_is_exact_up_to_its_edge_columns():
  """A JPEG's colour has half the resolution; libjpeg interpolates it without what lies left and
  right of the window.
  """
  contents = _encoded(_PHOTOGRAPHS[1])
  whole, rng = np.asarray(_opened(contents)), np.random.default_rng(0)
  for _ in range(30):
    height, width = rng.integers(1, 300, 2)
    top, left = rng.integers(0, 427 - height + 1), rng.integers(0, 640 - width + 1)
    window = tf.constant([top, left, height, width], tf.int32)
    ours = preprocess.decode(preprocess.opened(tf.constant(contents)), window).numpy()
    theirs = whole[top : top + height, left : left + width]
    assert np.array_equal(ours[:, 1:-1], theirs[:, 1:-1])
    assert _difference(ours, theirs)[1] <= _EDGE


def test_a_window_of_a_png_is_exact():
  contents = tf.constant(_encoded(_PHOTOGRAPHS[1], "PNG"))
  ours = preprocess.decode(preprocess.opened(contents), tf.constant([3, 5, 70, 90]))
  assert np.array_equal(ours, np.asarray(_PHOTOGRAPHS[1])[3:73, 5:95])


def test_grayscale_becomes_rgb():
  gray = _PHOTOGRAPHS[0].convert("L")
  for kind in ("JPEG", "PNG"):
    contents = _encoded(gray, kind)
    assert _difference(_decoded_whole(contents), _opened(contents)) == (0, 0)


@pytest.mark.parametrize("mode", ["RGB", "P", "1"])
def test_png_is_decoded_exactly(mode):
  contents = _encoded(_PHOTOGRAPHS[0].convert(mode), "PNG")
  assert _difference(_decoded_whole(contents), _opened(contents)) == (0, 0)


def test_transparency_is_dropped():
  opaque = np.asarray(_PHOTOGRAPHS[0])
  alpha = np.random.default_rng(0).integers(0, 256, (*opaque.shape[:2], 1), np.uint8)
  contents = _encoded(Image.fromarray(np.concatenate([opaque, alpha], 2), "RGBA"), "PNG")
  assert _difference(_decoded_whole(contents), opaque) == (0, 0)
  assert _difference(_decoded_whole(contents), _opened(contents)) == (0, 0)


def test_sixteen_bits_keep_the_upper_eight():
  deep = np.random.default_rng(0).integers(0, 2**16, (30, 20), np.uint16)
  contents = _encoded(Image.fromarray(deep), "PNG")
  ours = _decoded_whole(contents)
  assert _difference(ours, np.repeat((deep >> 8)[..., None], 3, 2)) == (0, 0)


def test_cmyk_becomes_rgb():
  """Photographs converted by PIL have no black ink; with black ink TensorFlow cuts the fraction
  off.
  """
  contents = _encoded(_PHOTOGRAPHS[0].convert("CMYK"))
  assert _difference(_decoded_whole(contents), _opened(contents)) == (0, 0)
  inks = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8).repeat(16, 0).repeat(16, 1)
  contents = _encoded(Image.fromarray(inks, "CMYK"))
  mean, most = _difference(_decoded_whole(contents), _opened(contents))
  assert mean < 0.6  # measured: 0.53
  assert most <= 1


def test_broken_bytes_are_an_error():
  for contents in (b"", b"no image", _encoded(_PHOTOGRAPHS[0])[:20]):
    with pytest.raises(tf.errors.InvalidArgumentError):
      preprocess.center_crop(tf.constant(contents), 224, 0.875, "bicubic")


# The centre.


@pytest.mark.parametrize(
  "size", [(500, 375), (375, 500), (301, 257), (333, 256), (256, 331), (100, 80), (31, 90)]
)
@pytest.mark.parametrize("shorter", [256, 255])
def test_center_has_torchvisions_offset(size, shorter):
  contents = _encoded(_PHOTOGRAPHS[1].resize(size))
  ours = preprocess.center_crop(tf.constant(contents), 224, 224 / shorter, "bicubic")
  mean, most = _difference(ours, _pil_center(_opened(contents), 224, shorter))
  # One pixel beside would be more than a level in the mean.
  assert mean < _MEAN
  assert most <= _OVERSHOOT


def test_center_of_an_image_that_has_the_size_is_cut_only():
  image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
  ours = preprocess.center_crop(
    tf.constant(_encoded(Image.fromarray(image), "PNG")), 224, 0.875, "bicubic"
  )
  assert np.array_equal(ours, image[16:240, 16:240])


# Random windows.


def test_windows_are_functions_of_the_seed():
  fifty = _windows(375, 500, 50)
  assert np.array_equal(fifty, _windows(375, 500)[:50])  # drawn another time
  assert len(np.unique(fifty, axis=0)) == 50
  other = preprocess.random_part(tf.constant([375, 500]), tf.constant([0, 8])).numpy()
  assert not np.array_equal(other, fifty[0])


@pytest.mark.parametrize(
  ("height", "width"), [(375, 500), (500, 333), (64, 64), (20, 15), (3, 2), (1, 1)]
)
def test_windows_lie_inside_and_have_allowed_area_and_ratio(height, width):
  top, left, rows, columns = _windows(height, width).T
  assert min(top.min(), left.min()) >= 0
  assert min(rows.min(), columns.min()) >= 1
  assert (top + rows).max() <= height
  assert (left + columns).max() <= width
  # Each side was rounded to the next whole number: half a pixel to either side.
  assert ((rows + 0.5) * (columns + 0.5) >= 0.08 * height * width * (1 - 1e-5)).all()
  assert ((columns + 0.5) / (rows - 0.5) >= 3 / 4 - 1e-5).all()
  assert ((columns - 0.5) / (rows + 0.5) <= 4 / 3 + 1e-5).all()


def test_area_share_is_uniform_and_ratio_log_uniform_where_all_fits():
  """Up to a share of 0.75 every ratio fits into a square, so that nothing is drawn again because of
  its size.
  """
  _, _, rows, columns = _windows(4000, 4000, 2000).T
  share, ratio = rows * columns / 4000**2, np.log(columns / rows)
  below = share[share < 0.75]
  # Of 2000 draws; four standard deviations of a bin of ten are 0.04.
  counts = np.histogram(below, 10, (0.08, 0.75))[0] / len(below)
  assert np.abs(counts - 0.1).max() < 0.04
  ratios = ratio[share < 0.75]
  counts = np.histogram(ratios, 10, (np.log(3 / 4), np.log(4 / 3)))[0] / len(ratios)
  assert np.abs(counts - 0.1).max() < 0.04
  assert share.max() > 0.95


def test_every_offset_occurs():
  """Given the size, the offset is uniform over all positions, the last one included."""
  top, left, rows, columns = _windows(8, 8, 2000).T
  for offset, size in ((top, rows), (left, columns)):
    for side in range(4, 9):
      chosen = offset[size == side]
      assert set(chosen) == set(range(9 - side))
      share = np.bincount(chosen) / len(chosen)
      # Four standard deviations.
      assert np.abs(share - 1 / (9 - side)).max() < 4 * np.sqrt(0.25 / len(chosen))


def test_offset_does_not_depend_on_the_size():
  top, left, rows, columns = _windows(4000, 4000, 2000).T
  place = [top / (4000 - rows + 1), left / (4000 - columns + 1)]
  correlations = np.corrcoef([*place, rows * columns, columns / rows])[np.triu_indices(4, 1)]
  assert np.abs(correlations).max() < 4 / np.sqrt(2000)


@pytest.mark.parametrize(
  ("shape", "window"),
  [
    ((1000, 10), (493, 0, 13, 10)),
    ((10, 1000), (0, 493, 10, 13)),
    ((1, 500), (0, 249, 1, 1)),
  ],
)
def test_an_image_that_no_window_fits_gives_its_largest_centred_one(shape, window):
  assert {tuple(found) for found in _windows(*shape, 20)} == {window}


# Offset and mirror.


def test_padded_crop_cuts_every_offset_out_of_a_black_frame():
  image = np.random.default_rng(0).integers(1, 256, (8, 8, 3), np.uint8)
  framed = np.pad(image, ((2, 2), (2, 2), (0, 0)))
  offsets = list(itertools.product(range(5), range(5)))
  windows = np.stack([framed[y : y + 8, x : x + 8] for y, x in offsets])
  crops = _by_seed(lambda seed: preprocess.padded_crop(tf.constant(image), 2, seed), tf.uint8)
  found = set()
  for ours in crops(_SEEDS[:300]).numpy():
    (place,) = np.flatnonzero((windows == ours).all((1, 2, 3)))
    found.add(place)
  assert len(found) == 25


def test_half_of_the_images_are_mirrored():
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  flip = _by_seed(lambda seed: preprocess.random_flip(tf.constant(image), seed), tf.uint8)
  flips = flip(_SEEDS[:400]).numpy()
  mirrored = np.array([np.array_equal(ours, image[:, ::-1]) for ours in flips])
  assert all(
    np.array_equal(ours, image) for ours, turned in zip(flips, mirrored, strict=True) if not turned
  )
  # Four standard deviations of 400 draws.
  assert abs(mirrored.mean() - 0.5) < 0.1


def test_mirror_does_not_depend_on_the_window():
  image = tf.constant([[[0], [1]]])
  flip = _by_seed(lambda seed: preprocess.random_flip(image, seed)[0, 0, 0], tf.int32)
  windows, flipped = _windows(375, 500), flip(_SEEDS[:1000]).numpy()
  for column in (windows[:, 2] * windows[:, 3], windows[:, 0], windows[:, 1]):
    assert abs(np.corrcoef(column, flipped)[0, 1]) < 4 / np.sqrt(1000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_of_a_long_strip_only_the_middle_is_scaled(kind):
  # All of it would be 102,400x256 pixels.
  strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 4000, 3), np.uint8))
  contents = _encoded(strip, kind)
  middle = _encoded(_opened(contents).crop((1980, 0, 2020, 10)), "PNG")
  whole, part = (
    preprocess.center_crop(image, 224, 0.875, "bicubic").numpy() for image in (contents, middle)
  )
  # The middle 9 columns are seen; a window of a JPEG is exact up to its edge columns.
  assert np.array_equal(whole, part)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_the_size_is_read_from_the_header(mode):
  image = _PHOTOGRAPHS[0].resize((70, 50)).convert(mode)
  assert preprocess.opened(_encoded(image, "PNG")).shape.numpy().tolist() == [50, 70]
