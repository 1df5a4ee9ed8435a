"""A wrong value is refused with its field, its value and what is allowed."""

import dataclasses
import json
import pathlib
import re

import ml_collections
import pytest

from configs import base, digits_w3, digits_w4, mbv2_w4
from profit_jax.config import FIELDS_NOW_RULES, RENAMED_FIELDS, ConfigError, parse, with_new_names
from profit_jax.data import info
from profit_jax.models import REGISTRY, check
from profit_jax.train.run_directory import differences
from tests.wrong_input import command


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
    ("init.entry", "state_dict", "without init.weights"),
    ("teacher.entry", "state_dict", "without teacher.weights"),
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


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ((("(", 8, 8),), r"\('\(', 8, 8\), whose regular expression is not valid: missing \)"),
    ((("stem_conv", 1, None),), r"'stem_conv', 1, None\) with the bits 1: they must be 2 to 8"),
    ((("stem_conv", None, 9),), r"with the bits 9: .* None \(as the phase says\) or \"float\""),
    ((("stem_conv", "half", None),), "with the bits 'half'"),
    ((("stem_conv", True, None),), "with the bits True"),
    (("stem_conv", 8, None), r"the entry 'stem_conv': it must be a tuple of \(expression"),
    ((("stem_conv", 8),), r"the entry \('stem_conv', 8\)"),
    ((("stem", 8, None),), r"'stem', 8, None\) matches no layer\. .* write '\.\*stem\.\*'"),
    ((("clasifier", 8, 8),), r"'clasifier', 8, 8\) matches no layer\. Near names: classifier"),
    ((("block01/.*", None, 8), ("block01/expand_conv", 8, 8)), "decides nothing"),
  ],
)
def test_wrong_rules(rules, message):
  with pytest.raises(ConfigError, match=rf"config\.quant\.rules( has|:) .*{message}"):
    check(parsed(**{"quant.rules": rules}))


def test_rules_are_read_as_they_were_written():
  rules = ((r"classifier", 8, 8), (r".*depthwise.*", 8, None), (r"stem_conv", "float", None))
  settings = parsed(**{"quant.rules": rules})
  assert settings.quant.rules == rules
  saved = json.loads(json.dumps(settings.to_dict()))
  assert parse(ml_collections.ConfigDict(saved), REGISTRY) == settings
  override = f"--config.quant.rules={rules!r}"
  code, out, err = command("--config=configs/digits_w4.py", "--mode=plan", override)
  assert (code, err) == (0, "")
  assert "22 phases" in out


@pytest.mark.parametrize("field", FIELDS_NOW_RULES)
def test_bits_of_the_ends_are_now_rules(field):
  section, _, name = field.partition(".")
  config = base.get_config().unlock()
  config[section][name] = 8
  with pytest.raises(ConfigError, match=rf"`{field}` is now a rule: config\.quant\.rules = \(\("):
    parsed(config)
  code, _, err = command("--config=configs/digits_w4.py", "--mode=plan", f"--config.{field}=8")
  assert code == 2
  assert f"`{field}` is now a rule" in err


@pytest.mark.parametrize(
  ("model", "bits", "rules"),
  [
    ("mobilenet_v2", (8, 6), [["stem_conv", 8, None], ["classifier", 6, 6]]),
    ("mobilenet_v1", (0, 8), [["classifier", 8, None]]),  # no quantizer of its own before it
    ("own_model", (0, 0), []),
  ],
)
def test_saved_bits_of_the_ends_become_rules(model, bits, rules):
  saved = parsed().to_dict()
  saved["model"]["name"] = model
  saved["quant"] = {"method": "lsq", "per_channel": True} | dict(
    zip(("first_bits", "last_bits"), bits, strict=True)
  )
  quant = with_new_names(saved)["quant"]
  assert quant == {"rules": rules, "method": "lsq", "per_channel": True}


def test_saved_bits_of_the_ends_of_an_own_model_are_refused():
  saved = parsed().to_dict()
  saved["model"]["name"] = "own_model"
  saved["quant"] = {"method": "duq", "per_channel": False, "first_bits": 8, "last_bits": 0}
  with pytest.raises(ConfigError, match=r"first_bits = 8 .* 'own_model' .* earlier version"):
    with_new_names(saved)


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
