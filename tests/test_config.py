"""A wrong value is refused with its field, its value and what is allowed."""

import dataclasses
import pathlib
import re

import pytest

from configs import base, digits_w3, digits_w4, mbv2_w4
from profit_jax.config import RENAMED_FIELDS, ConfigError, parse, with_new_names
from profit_jax.data import info
from profit_jax.models import REGISTRY
from profit_jax.train.run_directory import differences


def parsed(config=None, **changes):
  config = config or base.get_config()
  config.update_from_flattened_dict(changes)
  return parse(config, REGISTRY)


@pytest.mark.parametrize("module", [base, digits_w3, digits_w4, mbv2_w4])
def test_shipped_configs_are_valid_and_locked(module):
  config = module.get_config()
  assert config.is_locked
  settings = parsed(config)
  with pytest.raises(dataclasses.FrozenInstanceError):
    settings.seed = 1


@pytest.mark.parametrize(
  ("field", "value", "allowed"),
  [
    ("plan.weight_bits", (8, 1), "2 to 8"),
    ("plan.weight_bits", (9, 4), "2 to 8"),
    ("plan.act_bits", (4, 8), "fall"),
    ("plan.act_bits", (4, 4), "fall"),
    ("plan.weight_bits", (8, 4.5), "whole number"),
    ("plan.profit_bits", (3,), "(8, 5, 4)"),
    ("plan.freeze_fractions", (0.5, 0.2), "none below"),
    ("plan.freeze_fractions", (1.5,), "0 to 1"),
    ("plan.finetune_epochs", 0, "1 or above"),
    ("plan.warmup_epochs", 16, "finetune_epochs = 15"),
    ("plan.full_precision_epochs", 0, "without init.weights"),
    ("model.name", "mobilenet_v9", "mobilenet_v2"),
    ("model.activation", "gelu", "relu6"),
    ("model.strides", (2, 3), "each 1 or 2"),
    ("model.bn_epsilon", 0.0, "above 0"),
    ("model.bn_momentum", 1.0, "below 1"),
    ("model.squeeze_excite", "inside", "before"),
    ("model.pad_value", -0.5, "-0.375"),
    ("model.channel_rounding", "down", "nearest"),
    ("model.padding", "valid", "same"),
    ("init.reset_head", True, "without init.weights"),
    ("model.width", 0.0, "above 0"),
    ("teacher.model", "resnet9000", "self"),
    ("teacher.model", "mobilenet_v2", "a weights file"),
    ("teacher.weights", "t.npz", "self"),
    ("teacher.batch_stats", "both", "running"),
    ("teacher.pad_value", 1.0, "-0.375"),
    ("teacher.strides", (0,), "each 1 or 2"),
    ("data.normalization", "cifar", "imagenet"),
    ("data.name", " ", "folder"),
    ("data.train_split", "", "name of a split"),
    ("data.train_crop", "random", "random_resized_crop"),
    ("data.crop_pct", 1.5, "0.1 to 1"),
    ("data.interpolation", "nearest", "bicubic"),
    ("data.max_broken", -0.1, "0 to 1"),
    ("data.num_readers", 0, "1 to 1024"),
    ("train.batch_size", 0, "1 or above"),
    ("train.learning_rate", float("nan"), "finite"),
    ("train.ema_rate", 1.0, "below 1"),
    ("train.dtype", "float16", "bfloat16"),
    ("seed", -1, "0 or above"),
    ("seed", 2**32, "below 2^32"),
    ("checkpoint.keep", 0, "1 or above"),
  ],
)
def test_wrong_values(field, value, allowed):
  config = base.get_config()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict({field: value})
  named = "teacher.weights" if (field, value) == ("teacher.model", "mobilenet_v2") else field
  with pytest.raises(ConfigError) as error:
    parse(config, REGISTRY)
  assert f"config.{named} = " in str(error.value)
  assert allowed in str(error.value)
  parts = value if isinstance(value, tuple) else (value,)  # the message may show the wrong one only
  assert any(str(part) in str(error.value) for part in parts)


def test_unknown_and_missing_fields():
  config = base.get_config().unlock()
  config.train.batchsize = 3
  with pytest.raises(ConfigError, match="batchsize"):
    parsed(config)
  config = base.get_config().unlock()
  del config.train.momentum
  with pytest.raises(ConfigError, match="momentum"):
    parsed(config)


def test_old_names_are_errors_that_say_the_new_ones():
  for old, new in RENAMED_FIELDS.items():
    config = base.get_config().unlock()
    section, _, name = old.partition(".")
    if section not in config:
      config[section] = {}
    config[section][name] = 0
    with pytest.raises(ConfigError, match=f"`{old}` is now `{new}`"):
      parsed(config)
  with pytest.raises(ConfigError, match=r"'padded' of `data\.train_crop` is now 'pad_crop'"):
    parsed(**{"data.train_crop": "padded"})


def test_a_saved_configuration_of_an_earlier_version_has_the_present_names():
  present = parsed(**{"data.train_crop": "pad_crop", "oscillation.dampening": 0.1}).to_dict()
  old = {name: dict(value) if isinstance(value, dict) else value for name, value in present.items()}
  old["remedy"] = {}
  for before, now in RENAMED_FIELDS.items():
    section, _, name = before.partition(".")
    new_section, _, new_name = now.partition(".")
    old[section][name] = old[new_section].pop(new_name)
  old["data"]["train_crop"] = "padded"
  del old["oscillation"]
  assert with_new_names(old) == present


def test_no_default_stands_twice():
  assigned = re.findall(r"config\.[\w.]+ = ", pathlib.Path(base.__file__).read_text())
  assert not assigned


def test_a_batch_larger_than_the_data():
  with pytest.raises(ConfigError, match=r"batch_size = 1348 .* 1347"):
    info(parsed(**{"data.name": "digits", "train.batch_size": 1348}))


def test_differences_name_the_fields():
  one, two = parsed().to_dict(), parsed(**{"model.width": 0.5, "seed": 3}).to_dict()
  width, seed = differences(one, two)
  for line, parts in ((width, ["model.width", "1.0", "0.5"]), (seed, ["seed", "0", "3"])):
    assert all(part in line for part in parts), line
  assert differences(one, one) == []
