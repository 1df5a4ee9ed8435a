"""Nets of the same tensors that compute different things: who says which one a file is, and what is
compared.
"""

import functools
import json

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import base
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, build, check
from profit_jax.train import published, start
from profit_jax.train.progress import Progress, Start, initial_weights, weights_text
from profit_jax.weights.library import load_weights
from profit_jax.weights.naming import QUANTIZER_LEAVES, namings
from profit_jax.weights.save import named_tensors, settings_metadata, write_safetensors
from tests import golden_data
from tests.specs import variable_shapes

SMALL = "mobilenet_v3_small"
PLAIN, TENSORFLOW = "mobilenetv3_small_100", "tf_mobilenetv3_small_100"
STRIDES = (1, 2, 2, 2, 1, 2)


@functools.cache
def ones(model, source):
  """The tensors of a net of 10 classes under a source's names, all of them 1."""
  shapes = variable_shapes(REGISTRY[model](num_classes=10), 224)
  filled = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
  tensors = named_tensors(model, filled, source)
  quantizers = tuple(f".{leaf}" for leaf in ("a", "c"))
  return {name: value for name, value in tensors.items() if not name.endswith(quantizers)}


@pytest.fixture
def file(tmp_path):
  """A timm file that says nothing of itself."""
  write_safetensors(str(tmp_path / "w.safetensors"), ones(SMALL, "timm"), {})
  return tmp_path / "w.safetensors"


def settings_of(path, model=SMALL, **changes):
  config = base.get_config()
  config.update_from_flattened_dict(
    {"model.name": model, "init.weights": str(path), "teacher.model": "none", **changes}
  )
  settings = parse(config, REGISTRY)
  check(settings)
  return settings


def student_of(settings):
  """The student, and the warnings before training."""
  student = start.load_student(settings, 10)
  return student, start.weight_warnings(settings, student, start.Teacher(None, None, None))


def refusal(call, *arguments):
  with pytest.raises(ConfigError) as refused:
    call(*arguments)
  return str(refused.value)


def test_a_file_that_may_be_two_nets_is_told_before_training(file):
  student, warnings = student_of(settings_of(file))
  (line,) = [line for line in warnings if str(file) in line]
  assert "\n" not in line
  for part in (
    f"{PLAIN} of timm (padding='torch', bn_epsilon=1e-05)",
    f"{TENSORFLOW} of timm (padding='same', bn_epsilon=0.001)",
    f"Taken as {PLAIN} of timm",
    "set config.init.variant",
  ):
    assert part in line
  assert student.loaded.variant == PLAIN
  # What the configuration says is what it is taken as.
  configured = {"model.padding": "same", "model.bn_epsilon": 1e-3}
  student, warnings = student_of(settings_of(file, **configured))
  assert student.loaded.variant == TENSORFLOW
  assert any(f"Taken as {TENSORFLOW}" in line for line in warnings)
  assert not any("config.model.padding" in line for line in warnings)


def test_the_user_says_which_net_it_is(file):
  applied = published.apply(settings_of(file, **{"init.variant": f"{TENSORFLOW}.in1k"}))
  assert (applied.settings.model.padding, applied.settings.model.bn_epsilon) == ("same", 1e-3)
  assert set(applied.fields) == {"model.padding", "model.bn_epsilon", "model.channel_rounding"}
  student, warnings = student_of(applied.settings)
  assert (student.loaded.variant, student.loaded.told_by) == (TENSORFLOW, "config.init.variant")
  assert not any(str(file) in line or "padding =" in line for line in warnings)


def test_the_record_has_the_net_and_what_told_it(file):
  settings = settings_of(file)
  began = Start(sha256="0" * 64, variant=TENSORFLOW, variant_by="config.init.variant")
  (told,) = initial_weights(settings, Progress(start=began)).values()
  assert told["variant"] == TENSORFLOW
  assert weights_text(told).endswith(f", {TENSORFLOW} by config.init.variant")
  assert weights_text({"name": "w.pth", "sha256": None}) == "w.pth"  # of an earlier version


def test_a_variant_that_contradicts_the_file_is_refused(file, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"architecture": PLAIN}))
  described = file.rename(tmp_path / "model.safetensors")
  called = tmp_path / f"{PLAIN}-1.safetensors"
  called.write_bytes(described.read_bytes())
  for path, origin in ((described, "config.json"), (called, "its name")):
    settings = settings_of(path, **{"init.variant": TENSORFLOW})
    for call in (published.apply, student_of):
      told = refusal(call, settings)
      for part in (f"config.init.variant = {TENSORFLOW}", str(path), PLAIN, origin):
        assert part in told


def test_the_user_says_more_than_a_name_of_our_own_models(tmp_path):
  path = tmp_path / "mobilenet_v2.npz"  # as torchvision's training script for quantization saves it
  np.savez(path, **ones("mobilenet_v2", "torchvision"))
  variant = {"init.variant": "quantization.mobilenet_v2"}
  applied = published.apply(settings_of(path, "mobilenet_v2", **variant))
  assert applied.settings.model.activation == "relu"
  assert student_of(applied.settings)[0].loaded.variant == "quantization.mobilenet_v2"


@pytest.mark.parametrize(
  ("variant", "parts"),
  [
    ("tf_mobilenetv3_smal_100", ["is not allowed", TENSORFLOW]),
    ("mobilenetv2_100", [f"is mobilenetv2_100 by config.init.variant, not {SMALL}"]),
    ("resnetblur50", ["not supported", "it blurs before its strides"]),
    ("resnet50_dilated", ["not supported", "replace_stride_with_dilation"]),
    ("fcn_resnet50", ["not supported", "it segments images"]),
    ("mobilenet_v3_small", ["the names of the tensors", "are those of timm"]),
  ],
)
def test_a_variant_that_cannot_be_is_refused(file, variant, parts):
  told = refusal(lambda: student_of(settings_of(file, **{"init.variant": variant})))
  assert "\n" not in told
  for part in parts:
    assert part in told


def test_a_variant_needs_a_file_of_others(tmp_path):
  assert "init.variant" in refusal(lambda: settings_of("", **{"init.variant": PLAIN}))
  changes = {"teacher.model": "self", "teacher.variant": PLAIN}
  assert "teacher.variant" in refusal(lambda: settings_of("w.npz", **changes))
  path = tmp_path / "w.safetensors"
  metadata = settings_metadata(settings_of("").model)
  write_safetensors(str(path), ones(SMALL, "timm"), metadata)
  told = refusal(student_of, settings_of(path, **{"init.variant": PLAIN}))
  assert "records the settings" in told


def test_nets_that_are_not_supported_are_named_too(tmp_path):
  np.savez(tmp_path / "w.npz", **ones("resnet18", "torchvision"))
  changes = {"teacher.model": "resnet18", "teacher.weights": str(tmp_path / "w.npz")}
  settings = settings_of("", **changes)
  student = start.load_student(settings, 10)
  teacher = start.load_teacher(settings, student, 10)
  (line,) = start.weight_warnings(settings, student, teacher)
  assert "resnetblur18 (it blurs before its strides)" in line
  assert "Taken as resnet18 of torchvision; set config.teacher.variant" in line


def test_torchvisions_quantizable_net_and_the_authors_have_no_bound(tmp_path):
  np.savez(tmp_path / "w.npz", **ones("mobilenet_v2", "torchvision"))
  student, warnings = student_of(settings_of(tmp_path / "w.npz", "mobilenet_v2"))
  assert student.loaded.variant == "mobilenet_v2"
  (line,) = warnings
  assert "mobilenet_v2 of torchvision (activation='relu6')" in line
  assert "quantized_mobilenet_v2 of torchvision (activation='relu')" in line


def test_strides_are_compared(file, tmp_path):
  _, warnings = student_of(settings_of(file, **{"model.strides": STRIDES, "init.variant": PLAIN}))
  (line,) = [line for line in warnings if "strides" in line]
  assert f"config.model.strides = {STRIDES}" in line
  assert "(2, 2, 2, 2, 1, 2)" in line
  # A file of ours records them.
  own = tmp_path / "own.safetensors"
  trained = settings_of("", **{"model.strides": STRIDES}).model
  write_safetensors(str(own), ones(SMALL, "timm"), settings_metadata(trained))
  assert student_of(settings_of(own, **{"model.strides": STRIDES}))[1] == []
  (line,) = student_of(settings_of(own))[1]
  assert f"are for {STRIDES}" in line.replace("[", "(").replace("]", ")")


def test_the_library_compares_them_too(file, tmp_path):
  def model(**changes):
    return build(settings_of("", **{f"model.{k}": v for k, v in changes.items()}).model, 10)

  shape = (224, 224, 3)
  own = tmp_path / "own.safetensors"
  write_safetensors(str(own), ones(SMALL, "timm"), settings_metadata(settings_of("").model))
  with pytest.warns(UserWarning, match=r"was trained with strides=\(2, 2, 2, 2, 1, 2\) \(not"):
    load_weights(own, model(strides=STRIDES), shape)
  with pytest.raises(ConfigError, match=r"trained with bn_epsilon=1e-05 \(not 0\.001\)"):
    load_weights(own, model(bn_epsilon=1e-3), shape)
  # Of other codebases, where nothing says which net it is.
  with pytest.warns(UserWarning, match="Nothing says which net") as warned:
    load_weights(file, model(pad_value=0.0), shape)
  assert "set variant to choose" in str(warned[0].message)
  load_weights(file, model(pad_value=0.0), shape, variant=PLAIN)
  with pytest.raises(ConfigError, match=r"is tf_mobilenetv3_small_100, .*padding='same'"):
    load_weights(file, model(), shape, variant=TENSORFLOW)


@pytest.mark.parametrize("key", [f"timm:{TENSORFLOW}", "torchvision:quantization.mobilenet_v2"])
def test_a_file_that_the_user_names_has_the_logits_of_that_net(tmp_path, key):
  source, _, variant = key.partition(":")
  model = SMALL if source == "timm" else "mobilenet_v2"
  shapes = traverse_util.flatten_dict(variable_shapes(REGISTRY[model](num_classes=1000), 64))
  names = namings(model)[source]
  tensors = golden_data.full_precision_tensors(
    {
      name: names.tensor_shape(path, shapes[path].shape)
      for path, name in names.tensor_names(shapes).items()
      if path[-1] not in QUANTIZER_LEAVES
    }
  )
  np.savez(tmp_path / "w.npz", **tensors)
  changes = {"init.variant": variant, "model.pad_value": 0.0}
  settings = published.apply(settings_of(tmp_path / "w.npz", model, **changes)).settings
  variables = start.load_student(settings, 1000).make()
  apply = jax.jit(build(settings.model, 1000).apply)
  found = np.asarray(apply(variables, np.float32(golden_data.variant_image(key))))[0]
  expected = np.array(golden_data.load("variants.json")["variants"][key]["logits"])
  difference = np.abs(found[: expected.size] - expected).max() / np.abs(expected).max()
  assert difference < 1e-3  # float32; with the plain net's settings it is above 0.1
