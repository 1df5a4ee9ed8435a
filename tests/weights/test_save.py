"""The way back, and the round trip."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import traverse_util

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY
from profit_jax.weights.load import load_variables
from profit_jax.weights.naming import QUANTIZER_LEAVES, namings
from profit_jax.weights.save import named_tensors, write_safetensors
from tests import golden_data
from tests.specs import variable_shapes


def shapes(model):
  """Of 10 classes; of MobileNet-v2, the golden's width."""
  options = {"width": 0.5} if model == "mobilenet_v2" else {}
  return variable_shapes(REGISTRY[model](num_classes=10, **options), 64)


@functools.cache
def variables(model):
  """Random float32 values in every leaf; variances are not below 0."""
  rng = np.random.default_rng(0)
  drawn = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes(model))
  flat = traverse_util.flatten_dict(drawn)
  return traverse_util.unflatten_dict(
    {path: np.abs(leaf) if path[-1] == "var" else leaf for path, leaf in flat.items()}
  )


# ResNet-101's names follow the rule of ResNet-50's; our own follow one rule for all models.
@pytest.mark.parametrize(
  ("model", "source"),
  [
    (model, source)
    for model in sorted(REGISTRY.keys() - {"resnet101"})
    for source in namings(model)
    if (model, source) != ("resnet50", "profit_jax")
  ],
)
def test_round_trip_is_bit_identical(tmp_path, model, source):
  given = variables(model)
  tensors = named_tensors(model, given, source)
  file = str(tmp_path / "w.safetensors")
  write_safetensors(file, tensors, {"model": model})
  loaded = load_variables(file, model, given)
  flat = {
    True: traverse_util.flatten_dict(given),
    False: traverse_util.flatten_dict(loaded.variables),
  }
  keeps_quantizers = source in ("authors", "profit_jax")
  for path, value in flat[True].items():
    if keeps_quantizers or path[-1] not in QUANTIZER_LEAVES:
      assert flat[False][path].tobytes() == value.tobytes(), path
  # Back again: the file's tensors, to the bit.
  again = named_tensors(model, loaded.variables, source)
  assert {name: (t.shape, t.tobytes()) for name, t in again.items()} == {
    name: (t.shape, t.tobytes()) for name, t in tensors.items()
  }


@pytest.mark.parametrize(
  ("model", "source", "file", "key"),
  [
    ("mobilenet_v2", "authors", "mobilenet_v2.json", None),
    (
      "mobilenet_v3_large",
      "torchvision",
      "torchvision_shapes.json",
      "torchvision_mobilenet_v3_large",
    ),
    ("mobilenet_v3_small", "timm", "importer_shapes.json", "timm_mobilenetv3_small_100"),
    ("resnet18", "torchvision", "importer_shapes.json", "torchvision_resnet18"),
  ],
)
def test_names_and_shapes_are_those_of_their_state_dict(model, source, file, key):
  expected = golden_data.load(file)
  expected = expected if key is None else expected[key]
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes(model))
  tensors = named_tensors(model, zeros, source)
  assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected


def test_the_header_says_what_it_is(tmp_path):
  write_safetensors(str(tmp_path / "w.safetensors"), {"a": np.zeros(2)}, {"bits": "w4a4"})
  content = (tmp_path / "w.safetensors").read_bytes()
  header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
  assert header["__metadata__"] == {"format": "pt", "bits": "w4a4"}


def test_what_cannot_be_written(tmp_path):
  with pytest.raises(ConfigError, match=r"--names=authors.*mobilenet_v1.*timm"):
    named_tensors("mobilenet_v1", {}, "authors")
  with pytest.raises(ConfigError, match=r"w\.pth.*\.safetensors"):
    write_safetensors(str(tmp_path / "w.pth"), {}, {})
  (tmp_path / "file").touch()
  with pytest.raises(ConfigError, match=r"w\.safetensors"):
    write_safetensors(str(tmp_path / "file" / "w.safetensors"), {}, {})
