"""The recipes of `configs/timm_w4.py` have the settings that timm publishes with the weights."""

import json

import pytest

from configs import timm_w4
from profit_jax.config import parse
from profit_jax.models import REGISTRY, check
from profit_jax.schedule import plan
from profit_jax.train import published
from profit_jax.weights import hub
from profit_jax.weights.variants import differing_settings, published_settings
from tests import golden_data

PAGES = golden_data.load("timm_pages.json")


@pytest.fixture(params=timm_w4.RECIPES)
def name(request):
  return request.param


@pytest.fixture
def settings(name):
  return parse(timm_w4.get_config(name), REGISTRY)


@pytest.fixture
def told(name, tmp_path):
  """What is published of the weights."""
  (tmp_path / "config.json").write_text(json.dumps(PAGES[name]))
  return hub.published(str(tmp_path / "model.safetensors"))


def test_it_is_valid_and_a_whole_plan(settings, name):
  check(settings)
  assert len(plan(settings)) == 22
  assert settings.init.weights == f"hf:timm/{name}"


def test_images_are_as_published(settings, told):
  assert told.image_size
  assert told.crop_pct
  assert told.interpolation
  assert told.mean
  assert told.std
  assert published.differences(settings, told, "model") == []


def test_the_net_is_the_published_one(settings, told, name):
  theirs = published_settings(told, settings.model.name, name)
  # Negative padding is a choice.
  assert set(differing_settings(settings.model.name, theirs, settings.model)) <= {"pad_value"}
  assert settings.model.bn_epsilon == PAGES[name]["bn_epsilon"]


def test_the_teachers_images_are_as_published(settings):
  told = hub.published(settings.teacher.weights)
  assert told.architecture == settings.teacher.model
  assert published.differences(settings, told, "teacher") == []


def test_other_weights_are_refused():
  with pytest.raises(ValueError, match=r"vgg16 is not allowed.*mobilenetv2_100\.ra_in1k"):
    timm_w4.get_config("vgg16")
