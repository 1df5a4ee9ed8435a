"""Strict import: from any source's names, or not at all."""

import functools
import types

import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY
from profit_jax.weights.load import import_variables, load_variables
from profit_jax.weights.naming import namings
from profit_jax.weights.variants import differing_settings
from tests import golden_data
from tests.specs import variable_shapes


@functools.cache
def template(model="mobilenet_v2", classes=10, **options):
  if model == "mobilenet_v2":
    options = {"width": 0.5, **options}
  return variable_shapes(REGISTRY[model](num_classes=classes, **options), 64)


@functools.cache
def golden_tensors():
  return golden_data.tensors(golden_data.load("mobilenet_v2.json"))


@pytest.fixture
def tensors():
  """Names to arrays; a test may change the dictionary, but no array."""
  return dict(golden_tensors())


def full_precision(tensors):
  return {
    name: value for name, value in tensors.items() if name.rsplit(".", 1)[-1] not in ("a", "c")
  }


@pytest.mark.parametrize("model", ["mobilenet_v2", "mobilenet_v3_large"])
def test_names_are_a_bijection_onto_the_authors(model):
  names = namings(model)["authors"].tensor_names(traverse_util.flatten_dict(template(model)))
  assert sorted(names.values()) == sorted(golden_data.load(f"{model}.json"))


def test_a_full_precision_file_has_no_quantizers(tensors, tmp_path):
  plain = full_precision(tensors)
  np.savez(tmp_path / "w.npz", **plain, **{"features.0.1.num_batches_tracked": np.array(3)})
  loaded = load_variables(str(tmp_path / "w.npz"), "mobilenet_v2", template())
  # The authors' MobileNet-v2 has torchvision's names.
  assert (loaded.source, loaded.quantizers) == ("torchvision", False)
  kernel = loaded.variables["params"]["block03"]["depthwise_conv"]["kernel"]
  np.testing.assert_allclose(
    kernel[:, :, 0, 5], plain["features.4.conv.1.0.weight"][5, 0], rtol=1e-6
  )
  np.testing.assert_allclose(
    np.logaddexp(loaded.variables["params"]["stem_conv"]["quant_a"], 0), 1.0, rtol=1e-6
  )
  assert loaded.variables["params"]["stem_conv"]["kernel"].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_types_are_converted(tensors, dtype):
  given = {name: value.astype(dtype) for name, value in tensors.items()}
  loaded = import_variables("mobilenet_v2", template(), given, "w.npz")
  assert loaded.quantizers
  kernel = loaded.variables["params"]["head_conv"]["kernel"]
  assert kernel.dtype == np.float32
  np.testing.assert_array_equal(
    kernel[0, 0], given["features.18.0.weight"][:, :, 0, 0].T.astype(np.float32)
  )


def test_every_wrong_tensor_is_listed(tensors):
  del tensors["features.0.0.weight"]
  tensors["surprise"] = np.zeros(3)
  tensors["classifier.1.bias"] = np.zeros(7)
  tensors["features.18.1.bias"] = np.arange(1280)
  tensors["features.18.1.running_var"] = np.full(1280, np.nan)
  with pytest.raises(ConfigError) as error:
    import_variables("mobilenet_v2", template(), tensors, "w.npz")
  told, _, counts, *listing = str(error.value).splitlines()
  assert "Nothing was loaded" in told
  assert "Of the model's 472 tensors 468 fit, 1 missing, 1 of another shape" in counts
  assert counts.endswith("The file has 1 more.")
  assert len(listing) == 5
  for tensor, parts in {
    "features.0.0.weight": ("missing", "(16, 3, 3, 3)"),
    "surprise": ("unexpected", "(3,)"),
    "classifier.1.bias": ("shape", "(7,)", "(10,)"),
    "features.18.1.bias": ("type", "int64"),
    "features.18.1.running_var": ("finite",),
  }.items():
    (line,) = (line for line in listing if tensor in line)
    assert all(part in line for part in parts), line


def test_quantizers_in_part_are_refused(tensors):
  del tensors["relu6.a"]
  with pytest.raises(ConfigError, match=r"relu6\.a"):
    import_variables("mobilenet_v2", template(), tensors, "w.npz")


def test_quantizers_that_nobody_has_set_are_passed_over(tensors):
  # The authors' code leaves a and c as uninitialized memory until the first quantized phase, and
  # saves them.
  zeros = {
    name: np.zeros(1) if name.endswith((".a", ".c")) else value for name, value in tensors.items()
  }
  # Or what was in it: tiny, huge.
  memory = ({**tensors, "relu6.a": np.array([value], np.float32)} for value in (4e-41, 0, -3e30))
  for given in (zeros, {**tensors, "relu6.a": np.array([np.nan])}, *memory):
    loaded = import_variables("mobilenet_v2", template(), given, "w.npz")
    assert (loaded.source, loaded.quantizers) == ("authors", False)
    assert "w.npz" in loaded.notes[0]
    np.testing.assert_allclose(
      np.logaddexp(loaded.variables["params"]["head_quant"]["quant_c"], 0), 1.0, rtol=1e-6
    )
  with pytest.raises(ConfigError, match=r"relu6\.c\b.*\(3,\)"):
    import_variables("mobilenet_v2", template(), {**zeros, "relu6.c": np.zeros(3)}, "w.npz")


def test_a_file_of_another_model_is_named():
  shapes = golden_data.load("torchvision_shapes.json")["torchvision_resnet101"]
  # Names and shapes are all that matters.
  resnet = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
  with pytest.raises(ConfigError, match=r"config\.model\.name=resnet101"):
    import_variables("mobilenet_v2", template(), resnet, "w.pth")
  with pytest.raises(ConfigError, match=r"config\.teacher\.model=resnet101"):
    import_variables("resnet18", template("resnet18"), resnet, "w.pth", role="teacher")
  with pytest.raises(ConfigError, match=r"config\.model\.width[\s\S]*\bw \(3,\)"):
    import_variables("mobilenet_v2", template(), {"w": np.zeros(3)}, "w.pth")


def test_another_number_of_classes_needs_reset_head(tensors):
  def loaded(**options):
    return import_variables("mobilenet_v2", template(classes=7), tensors, "w.npz", **options)

  with pytest.raises(ConfigError, match=r"config\.init\.reset_head=True"):
    loaded()
  # A teacher's classes are those of the data.
  with pytest.raises(ConfigError, match=r"teacher.*\b7\b") as error:
    loaded(role="teacher")
  assert "reset_head" not in str(error.value)
  nan = {**tensors, "classifier.1.weight": np.full((10, 1280), np.nan)}
  with pytest.raises(ConfigError, match=r"Only values are wrong[\s\S]*classifier\.1\.weight"):
    import_variables("mobilenet_v2", template(), nan, "w.npz")
  head = {
    "kernel": np.full((1280, 7), 0.5),
    "bias": np.zeros(7),
    "quant_a": np.array(0.1),
    "quant_c": np.array(0.2),
  }
  params = loaded(
    new_head={"params": {"classifier": head, "stem_conv": {"kernel": np.zeros(1)}}}
  ).variables["params"]
  np.testing.assert_array_equal(params["classifier"]["kernel"], head["kernel"])
  assert params["classifier"]["quant_a"] == np.float32(0.1)
  np.testing.assert_allclose(
    params["stem_conv"]["kernel"][0, 0, 0], tensors["features.0.0.weight"][:, 0, 0, 0], rtol=1e-6
  )


def test_another_head_behind_another_prefix_can_be_left_out(tensors, tmp_path):
  body = {n: v for n, v in full_precision(tensors).items() if not n.startswith("classifier")}
  given = {f"backbone.{name}": value for name, value in body.items()}
  np.savez(tmp_path / "w.npz", **given, **{"head.weight": np.zeros((5, 1280))})
  head = {"params": {"classifier": {"kernel": np.zeros((1280, 10)), "bias": np.zeros(10)}}}
  path, options = str(tmp_path / "w.npz"), {"new_head": head}
  with pytest.raises(ConfigError, match=r"head\.weight.*config\.init\.entry=backbone"):
    load_variables(path, "mobilenet_v2", template(), **options)
  load_variables(path, "mobilenet_v2", template(), entry="backbone", **options)


def test_a_new_head_does_not_excuse_the_rest(tensors):
  del tensors["features.0.0.weight"]
  head = {"params": {"classifier": {"kernel": np.zeros((1280, 7)), "bias": np.zeros(7)}}}
  with pytest.raises(ConfigError, match=r"\b1 missing[\s\S]*features\.0\.0\.weight"):
    import_variables("mobilenet_v2", template(classes=7), tensors, "w.npz", new_head=head)


def test_settings_of_the_code_behind_a_file(tensors):
  given = types.SimpleNamespace(width=1.0, activation="relu6", bn_epsilon=1e-5, strides=())

  def differing(told):
    return differing_settings("mobilenet_v2", told, given)

  authors = import_variables("mobilenet_v2", template(), tensors, "w.npz")
  torchvision = import_variables("mobilenet_v2", template(), full_precision(tensors), "w.npz")
  assert differing(torchvision.settings) == {}
  assert differing(authors.settings) == {"activation": ("relu", "relu6")}
  # The published strides are the same written out.
  assert differing({"strides": [2, 1, 2, 2, 2, 1, 2, 1]}) == {}
  assert list(differing({"strides": [1] * 8})) == ["strides"]
  # Other codebases' nets have the published ones.
  given.strides = (1,) * 8
  assert differing(torchvision.settings) == {"strides": ((2, 1, 2, 2, 2, 1, 2, 1), (1,) * 8)}


@pytest.mark.parametrize(
  ("prefix", "beside", "entry", "role"),
  [
    ("", "", "", "student"),
    ("module.model.", "", "", "student"),
    ("ema_model.", "model.", "", "student"),
    ("student.", "teacher.", "", "student"),
    ("right.", "left.", "right", "teacher"),
  ],
)
def test_prefixes_and_entries(tensors, tmp_path, prefix, beside, entry, role):
  given = {f"{prefix}{name}": value for name, value in tensors.items()}
  if beside:
    given |= {f"{beside}{name}": np.zeros_like(value) for name, value in tensors.items()}
  np.savez(tmp_path / "w.npz", **given)
  path = str(tmp_path / "w.npz")
  loaded = load_variables(path, "mobilenet_v2", template(), entry=entry, role=role)
  kernel = loaded.variables["params"]["stem_conv"]["kernel"]
  np.testing.assert_allclose(kernel[0, 0, 0], tensors["features.0.0.weight"][:, 0, 0, 0], rtol=1e-6)
  if entry:
    with pytest.raises(ConfigError, match=r"w\.npz.*config\.teacher\.entry=left"):
      load_variables(path, "mobilenet_v2", template(), role=role)
