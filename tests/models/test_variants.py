"""Every net of other codebases that a model here says it is: parameters, tensors and logits of
their own code; see `tests/golden/variants.py`.
"""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from profit_jax.models import REGISTRY
from profit_jax.weights.load import import_variables
from profit_jax.weights.naming import QUANTIZER_LEAVES, namings
from tests import golden_data
from tests.specs import variable_shapes

FILE = golden_data.load("variants.json")
GOLDEN = FILE["variants"]
# Variant, `SOURCE:NAME` -> model, its settings
VARIANTS = {
  f"{naming.source}:{variant}": (model, naming.variant_settings(variant))
  for model, entry in REGISTRY.items()
  for naming in entry.names
  for variant in naming.variants
}


@functools.cache
def described(model, settings):
  """Shapes of a model's variables at 1000 classes, and what applies it."""
  module = REGISTRY[model](num_classes=1000, **dict(settings))
  return variable_shapes(module, 64), jax.jit(module.apply)


def of_variant(key):
  model, settings = VARIANTS[key]
  return described(model, tuple(sorted(settings.items())))


def tensor_shapes(key):
  """The shapes of a variant's tensors by the names that its source gives them."""
  template, _ = of_variant(key)
  names = namings(VARIANTS[key][0])[key.partition(":")[0]]
  shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(template).items()}
  return {
    name: names.tensor_shape(path, shapes[path])
    for path, name in names.tensor_names(shapes).items()
    if path[-1] not in QUANTIZER_LEAVES
  }


def test_every_variant_is_compared():
  assert VARIANTS.keys() == GOLDEN.keys()


def test_every_net_with_the_tensors_of_a_variant_is_known_by_name():
  namings = [naming for entry in REGISTRY.values() for naming in entry.names]
  unsupported = {name for naming in namings for name in naming.unsupported}
  # timm's ResNets are torchvision's, by the same names.
  resnets = {f"timm:{name}" for name in ("resnet18", "resnet34", "resnet50", "resnet101")}
  assert FILE["same_tensors"]
  others = {*FILE["same_tensors"]} - resnets
  assert {key.partition(":")[2] for key in others} <= unsupported


@pytest.mark.parametrize("key", GOLDEN)
def test_a_variant_has_the_parameters_and_tensors_of_its_source(key):
  template, _ = of_variant(key)
  params = traverse_util.flatten_dict(template["params"])
  sizes = [leaf.size for path, leaf in params.items() if path[-1] not in QUANTIZER_LEAVES]
  assert sum(sizes) == GOLDEN[key]["parameters"]
  assert golden_data.digest(tensor_shapes(key)) == GOLDEN[key]["tensors"]


@pytest.mark.parametrize("key", GOLDEN)
def test_a_variant_has_the_logits_of_its_source(key):
  template, apply = of_variant(key)
  model, _ = VARIANTS[key]
  tensors = golden_data.full_precision_tensors(tensor_shapes(key))
  loaded = import_variables(model, template, tensors, "golden", dtype=np.float64)
  assert loaded.source == key.partition(":")[0]
  with jax.enable_x64(True):
    logits = apply(loaded.variables, golden_data.variant_image(key))
  expected = np.array(GOLDEN[key]["logits"])
  found = np.asarray(logits)[0, : expected.size]
  assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-9
