"""What a file that does not fit is told: in 12 lines at most, soon, and which kind it is."""

import functools
import pathlib
import re
import time

import ml_dtypes
import numpy as np
import pytest

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY, Naming, register
from profit_jax.weights import mismatch
from profit_jax.weights.load import import_variables
from profit_jax.weights.naming import namings
from tests import golden_data
from tests.specs import variable_shapes
from tests.train.tiny import TinyNet


@functools.cache
def template(width=1.0):
  return variable_shapes(REGISTRY["mobilenet_v2"](num_classes=10, width=width), 224)


@functools.cache
def of_torch(key):
  """Tensors of nets of 10 classes; names and shapes are all that matters."""
  file = "torchvision_shapes.json" if key == "torchvision_resnet101" else "importer_shapes.json"
  shapes = golden_data.load(file)[key]
  return {name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes.items()}


def v2(width=1.0):
  """Tensors of mobilenet_v2 under torchvision's names."""
  shapes = template(width)
  names = namings("mobilenet_v2")["torchvision"]
  flat = dict(flattened(shapes))
  return {
    name: np.broadcast_to(np.float32(1), names.tensor_shape(path, flat[path]))
    for path, name in names.tensor_names(flat).items()
    if not path[-1].startswith("quant_")
  }


def flattened(tree, path=()):
  for name, value in tree.items():
    if hasattr(value, "shape"):
      yield (*path, name), value.shape
    else:
      yield from flattened(value, (*path, name))


def message(given, model="mobilenet_v2", shapes=None, **options):
  """The message's lines; it came in time."""
  shapes = shapes or template()
  mismatch.kernel_index()
  began = time.process_time()
  with pytest.raises(ConfigError) as refused:
    import_variables(model, shapes, given, "w.pth", **options)
  assert time.process_time() - began < 2
  lines = str(refused.value).splitlines()
  assert len(lines) <= 12
  assert max(map(len, lines)) <= 400
  assert lines[0].startswith(f"w.pth does not hold the weights of {model} as configured")
  return lines


def prefixed(prefix, tensors):
  return {prefix + name: value for name, value in tensors.items()}


@pytest.mark.parametrize(
  ("given", "parts"),
  [
    (lambda: prefixed("net.base.", v2()), ["'net.base.' before those of mobilenet_v2", "Remove"]),
    (lambda: v2(0.5), ["names of mobilenet_v2", "config.model.width=0.5"]),
    (lambda: of_torch("torchvision_mobilenet_v2_width035"), ["config.model.width=0.35"]),
    (lambda: of_torch("torchvision_resnet101"), ["config.model.name=resnet101"]),
    (lambda: of_torch("timm_mobilenetv3_small_100"), ["config.model.name=mobilenet_v3_small"]),
    (
      lambda: prefixed("0.", of_torch("torchvision_resnet18")),
      ["'0.' before those of resnet18", "config.model.name=resnet18"],
    ),
    (
      lambda: {name.removeprefix("features."): value for name, value in v2().items()},
      ["It is a part of mobilenet_v2: its names lack 'features.'"],
    ),
    (lambda: {f"a{i}.weight": np.zeros((3, 4)) for i in range(99)}, ["No known net"]),
  ],
)
def test_the_kind_of_difference_is_named(given, parts):
  _, kind, counts, *listing = message(given())
  for part in parts:
    assert part in kind
  assert "Of the model's 262 tensors" in counts
  # All of them are in a file.
  file = pathlib.Path(re.search(r"listed in (\S+)\.$", listing[-1])[1])
  told = file.read_text().splitlines()
  assert told[0] == "w.pth"
  assert f"All {len(told) - 1} differences" in listing[-1]
  for line in listing[:-1]:
    assert line.strip() in told


def test_a_file_of_width_1():
  assert "set config.model.width=1," in message(v2(), shapes=template(0.5))[1]


def test_counts_make_sense():
  given = prefixed("x.", v2())
  counts = message(given)[2]
  assert counts == "Of the model's 262 tensors 0 fit, 262 missing. The file has 262 more."


def test_another_number_of_classes():
  given = {**v2(), "classifier.1.weight": np.ones((1000, 1280)), "classifier.1.bias": np.ones(1000)}
  kind, counts = message(given)[1:3]
  assert kind.startswith("Only its number of classes differs: 1000, not 10.")
  assert "config.init.reset_head=True" in kind
  assert counts == "Of the model's 262 tensors 260 fit, 2 of another shape."
  assert "A teacher needs those of the data, 10." in message(given, role="teacher")[1]
  assert "reset_head" not in message(given, role="library")[1]


def test_a_missing_classifier():
  given = {name: value for name, value in v2().items() if not name.startswith("classifier")}
  kind = message(given)[1]
  assert kind.startswith("Only its classifier is missing. config.init.reset_head=True")
  assert "reset_head" not in message(given, role="teacher")[1]


@pytest.mark.parametrize("dtype", [np.int8, np.complex64, ml_dtypes.float8_e4m3fn])
def test_tensors_of_another_type(dtype):
  given = {name: np.zeros(value.shape, dtype) for name, value in v2().items()}
  _, kind, counts, first, *_ = message(given)
  assert kind.startswith("Only the type of its numbers is wrong")
  assert counts.endswith("0 fit, 262 of another type.")
  assert first.endswith(f"is {np.dtype(dtype)}, must be floating point")


def test_a_value_that_float32_cannot_have():
  given = {**v2(), "features.0.0.weight": np.full((32, 3, 3, 3), 1e300)}
  assert "features.0.0.weight has NaN, infinite or too large values" in message(given)[3]


def test_values_that_no_training_leaves():
  given = {
    **v2(),
    "features.0.1.running_var": np.linspace(1, -0.25, 32),
    "features.0.0.weight": np.full((32, 3, 3, 3), np.nan),
  }
  _, kind, counts, *listing = message(given)
  assert kind.startswith("Only values are wrong")
  assert "260 fit, 1 not finite, 1 with impossible values" in counts
  assert listing[1].strip() == (
    "impossible: features.0.1.running_var has the value -0.25, but a variance is 0 or above"
  )


def test_a_file_of_ours_says_its_model():
  given = of_torch("timm_mobilenetv3_small_100")
  kind = message(given, recorded="mine")[1]
  assert kind.startswith("It was trained as mine: set config.model.name=mine")


def test_a_name_is_one_line():
  assert "  unexpected: a?b (3,)" in message({**v2(), "a\nb": np.ones(3)})


def test_a_few_differences_are_all_listed():
  given = {**v2(), "extra": np.ones(3)}
  del given["features.5.conv.2.weight"]
  _, kind, counts, *listing = message(given)
  assert "Most of it is mobilenet_v2" in kind
  assert "261 fit, 1 missing. The file has 1 more." in counts
  assert [line.split()[:2] for line in listing] == [
    ["missing:", "features.5.conv.2.weight"],
    ["unexpected:", "extra"],
  ]


class OwnNet(TinyNet):
  """A model of a user."""


def test_a_model_of_the_user_is_recognised():
  naming = Naming(source="own", layer_names=lambda layers: {p: "_".join(p) for p in layers})
  register("own_net", names=(naming,))(OwnNet)
  try:
    shapes = variable_shapes(OwnNet(), 16)
    names = namings("own_net")["own"]
    flat = dict(flattened(shapes))
    tensors = {
      name: np.ones(names.tensor_shape(path, flat[path]))
      for path, name in names.tensor_names(flat).items()
    }
    assert "config.model.name=own_net" in message(tensors)[1]
    assert "'x.' before those of own_net" in message(prefixed("x.", tensors), "own_net", shapes)[1]
  finally:
    del REGISTRY["own_net"]


def of_the_package():
  return {
    name
    for name, entry in REGISTRY.items()
    if entry.module.__module__.startswith("profit_jax.models.")
  }


def test_every_model_of_the_package_is_in_the_index():
  # Otherwise run tools/write_kernels.py.
  assert mismatch.kernel_index().keys() == of_the_package()


def test_the_kernels_are_those_of_the_models():
  for name in sorted(of_the_package()):
    assert mismatch.kernel_index()[name] == mismatch.kernels_of(name)
