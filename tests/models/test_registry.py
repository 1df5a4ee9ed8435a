"""Every model against the code of its published weights, and what the registry checks."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import base
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, ModelEntry, Naming, build, check, register
from profit_jax.models.mobilenet_v1 import MobileNetV1
from profit_jax.quant.bits import Bits
from profit_jax.weights.load import import_variables
from tests import golden_data
from tests.specs import variable_shapes

ZERO_PAD = {"pad_value": 0.0}
TORCHVISION_V3 = {"pad_value": 0.0, "bn_epsilon": 1e-3}
# golden file, key -> model, its options
PUBLISHED = {
  ("torchvision", "torchvision_mobilenet_v2"): ("mobilenet_v2", {}),
  ("torchvision", "torchvision_mobilenet_v3_large"): ("mobilenet_v3_large", TORCHVISION_V3),
  ("torchvision", "torchvision_resnet101"): ("resnet101", {}),
  ("importer", "torchvision_resnet18"): ("resnet18", {}),
  ("importer", "torchvision_mobilenet_v3_small"): ("mobilenet_v3_small", TORCHVISION_V3),
  ("importer", "torchvision_mobilenet_v2_width035"): ("mobilenet_v2", {"width": 0.35}),
  ("importer", "torchvision_mobilenet_v3_large_width075"): (
    "mobilenet_v3_large",
    {**TORCHVISION_V3, "width": 0.75},
  ),
  ("importer", "timm_mobilenetv1_100"): ("mobilenet_v1", {}),
  ("importer", "timm_mobilenetv2_100"): ("mobilenet_v2", {}),
  ("importer", "timm_mobilenetv3_large_100"): ("mobilenet_v3_large", ZERO_PAD),
  ("importer", "timm_mobilenetv3_small_100"): ("mobilenet_v3_small", ZERO_PAD),
}


@functools.cache
def traced(name, strides=()):
  """Shapes of a model's variables and of every layer's output (`intermediates`) at 224 pixels."""
  model, image = REGISTRY[name](strides=strides), np.zeros((1, 224, 224, 3), np.float32)
  return jax.eval_shape(
    lambda key: model.init_with_output(key, image, capture_intermediates=True)[1],
    jax.random.key(0),
  )


@functools.cache
def small(name, options):
  """Shapes of a model's variables for ten classes, and what applies it to images of 64 pixels."""
  model = REGISTRY[name](num_classes=10, **dict(options))
  return variable_shapes(model, 64), jax.jit(model.apply)


def settings(**changes):
  config = base.get_config()
  config.update_from_flattened_dict(changes)
  return parse(config, REGISTRY)


@pytest.mark.parametrize(("file", "key"), PUBLISHED, ids=lambda value: value)
def test_published_code_has_the_same_logits(file, key):
  name, options = PUBLISHED[file, key]
  template, apply = small(name, tuple(options.items()))
  tensors = golden_data.full_precision_tensors(golden_data.load(f"{file}_shapes.json")[key])
  loaded = import_variables(name, template, tensors, "golden", dtype=np.float64)
  assert loaded.source == key.split("_")[0]
  with jax.enable_x64(True):
    logits = apply(loaded.variables, golden_data.images(f"input:{key}", (2, 3, 64, 64)))
  expected = golden_data.load(f"{file}_logits.npz")[key]
  assert np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max() < 1e-9


# As torchvision's and timm's model tables give them, 1000 classes.
@pytest.mark.parametrize(
  ("model", "count"),
  [
    ("mobilenet_v1", 4_231_976),
    ("mobilenet_v2", 3_504_872),
    ("mobilenet_v3_large", 5_483_032),
    ("mobilenet_v3_small", 2_542_856),
    ("resnet18", 11_689_512),
    ("resnet50", 25_557_032),
    ("resnet101", 44_549_160),
  ],
)
def test_parameter_counts(model, count):
  params = traverse_util.flatten_dict(traced(model)["params"])
  assert (
    sum(np.prod(leaf.shape) for path, leaf in params.items() if not path[-1].startswith("quant"))
    == count
  )


@pytest.mark.parametrize("model", sorted(name for name in REGISTRY if REGISTRY[name].quantized))
def test_every_kernel_is_quantized(model):
  params = traverse_util.flatten_dict(traced(model)["params"])
  layers = [path[:-1] for path in params if path[-1] == "kernel"]
  assert layers
  assert [layer for layer in layers if (*layer, "quant_a") not in params] == []


@pytest.mark.parametrize(
  ("model", "last"),
  [
    ("mobilenet_v1", "block12"),
    ("mobilenet_v3_small", "head_norm"),
    ("resnet18", "stage4_block01"),
  ],
)
def test_strides(model, last):
  # The published ones take 224 to 7.
  for strides, pixels in (((), 7), ((*REGISTRY[model].strides[:-1], 1), 14)):
    output = traced(model, strides)["intermediates"][last]["__call__"][0]
    assert output.shape[1:3] == (pixels, pixels)


def test_settings_reach_the_model():
  changes = {
    "model.name": "mobilenet_v3_small",
    "model.squeeze_excite": "before",
    "model.bn_epsilon": 0.002,
  }
  model = build(
    settings(**changes, **{"model.pad_value": 0.0, "model.channel_rounding": "up"}).model, 7
  )
  assert (model.squeeze_excite, model.bn_epsilon, model.pad_value, model.num_classes) == (
    "before",
    0.002,
    0.0,
    7,
  )
  assert model.channel_rounding == "up"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.strides": (2, 1)}, r"model\.strides.*\(2, 1\).*\b8\b"),
    ({"data.image_size": 16}, r"model\.strides.*data\.image_size.*\b16\b.*\b32\b"),
    ({"model.name": "resnet18"}, r"model\.name.*'resnet18'"),
    (
      {"model.name": "resnet18", "model.width": 0.5, "plan.weight_bits": (), "plan.act_bits": ()},
      r"model\.width.*\b0\.5\b",
    ),
    (
      {"teacher.model": "resnet50", "teacher.weights": "x", "teacher.strides": (1,)},
      r"teacher\.strides.*\(1,\).*\b6\b",
    ),
    (
      {"teacher.model": "resnet50", "teacher.weights": "x", "teacher.padding": "same"},
      r"teacher\.padding = 'same'.*resnet50.*'torch'.*mobilenet_v3_large",
    ),
  ],
)
def test_settings_that_do_not_fit_the_model(changes, message):
  with pytest.raises(ConfigError, match=message):
    check(settings(**changes))


class NoClasses(nn.Module):
  """Without a field for the number of classes."""


class Classes(nn.Module):
  """The least that can be registered."""

  num_classes: int = 10


def naming(**fields):
  return Naming(**{"source": "lab", "layer_names": dict, **fields})


@pytest.mark.parametrize(
  ("name", "module", "options", "message"),
  [
    ("self", Classes, {}, r"'self'.*none, self"),
    ("", Classes, {}, r"''.*empty"),
    ("mine", Classes(), {}, r"'mine'.*instance of Classes.*not a class"),
    ("mine", dict, {}, r"dict.*flax\.linen\.Module"),
    ("mine", NoClasses, {}, r"NoClasses.*num_classes"),
    ("mobilenet_v1", Classes, {}, r"'mobilenet_v1'.*mobilenet_v1\.MobileNetV1.*another"),
    ("mine", Classes, {"fixed": {"depth": 3}}, r"Classes.*\bdepth\b"),
    ("mine", Classes, {"names": [naming(), naming()]}, r"lab, lab.*once"),
    ("mine", Classes, {"names": [naming(source="profit_jax")]}, r"profit_jax.*our own"),
    ("mine", MobileNetV1, {"names": [naming(settings={"pad": 0})]}, r"\bpad\b.*bn_epsilon"),
    (
      "mine",
      MobileNetV1,
      {"fixed": {"width": 0.5}, "names": [naming(settings={"width": 1.0})]},
      r"have width\. Allowed.*activation",
    ),
  ],
)
def test_what_cannot_be_registered(name, module, options, message):
  before = dict(REGISTRY)
  with pytest.raises(ConfigError, match=message):
    register(name, **options)(module)
  assert before == REGISTRY


def test_a_model_without_an_option_refuses_it(monkeypatch):
  monkeypatch.setitem(REGISTRY, "mine", ModelEntry(Classes))
  for changes in (
    {"model.width": 0.5},
    {"model.strides": (2, 1)},
    {"model.padding": "same"},
  ):
    with pytest.raises(ConfigError, match=rf"{next(iter(changes))} = .*mine"):
      check(settings(**{"model.name": "mine", **changes}))
  check(settings(**{"model.name": "mine"}))


def test_resnet_refuses_bits():
  model = REGISTRY["resnet18"](num_classes=10)
  with pytest.raises(ValueError, match="ResNet"):
    jax.eval_shape(
      lambda x: model.init(jax.random.key(0), x, Bits(4, 4)), np.zeros((1, 32, 32, 3), np.float32)
    )
