"""The run that a directory belongs to: its configuration, its data, its lock."""

import json
import re
import shutil
import types

import pytest

from configs import digits_w4
from profit_jax.cli import app
from profit_jax.config import ConfigError, parse
from profit_jax.data.digits import INFO
from profit_jax.models import REGISTRY
from profit_jax.train import run_directory


def settings(**changes):
  config = digits_w4.get_config("mobilenet_v1")
  config.update_from_flattened_dict(changes)
  return parse(config, REGISTRY)


def source(fingerprint="these"):
  return types.SimpleNamespace(info=INFO, fingerprint=lambda: fingerprint)


@pytest.fixture
def run(tmp_path):
  """The directory of a run that has begun."""
  claim(tmp_path, settings(), source())
  (tmp_path / "checkpoints" / "7" / "manifest").mkdir(parents=True)
  return tmp_path


def claim(workdir, settings, source):
  run_directory.claim_workdir(workdir, run_directory.identity_of(settings, source))


def require_same(workdir, settings, source):
  run_directory.require_same_run(workdir, run_directory.identity_of(settings, source))


def test_the_same_run_goes_on_wherever_its_data_lies(run):
  claim(run, settings(**{"data.data_dir": "/elsewhere", "recovery.retries": 2}), source())
  assert json.loads((run / "data.json").read_text()) == {
    "train_examples": 1347,
    "eval_examples": 450,
    "num_classes": 10,
    "fingerprint": "these",
  }


def test_another_configuration_is_refused_before_other_data(run):
  with pytest.raises(ConfigError, match=r"configuration[\s\S]*seed: 0 there, 1 here"):
    claim(run, settings(seed=1), source("others"))


def test_as_many_other_images_are_refused(run):
  for check in (claim, require_same):
    with pytest.raises(ConfigError, match=f"--workdir {run}.* fingerprint"):
      check(run, settings(), source("others"))


def test_a_run_of_a_release_without_fingerprints_goes_on(run):
  (run / "data.json").write_text(
    json.dumps({"train_examples": 1347, "eval_examples": 450, "num_classes": 10})
  )
  claim(run, settings(), source())
  assert (
    run_directory.read_data(run)["fingerprint"] is None
  )  # and what the older release wrote stays


def test_checkpoints_without_a_configuration_are_nobodys(run):
  (run / "config.json").unlink()
  with pytest.raises(ConfigError, match=f"{run}/config.json"):
    claim(run, settings(), source())
  assert not (run / "config.json").exists()
  # Without any checkpoint there is nothing to mix up.
  (run / "checkpoints" / "7" / "manifest").rmdir()
  (run / "checkpoints" / "7").rmdir()
  claim(run, settings(), source())


def test_results_without_checkpoints_are_not_trained_over(run):
  shutil.rmtree(run / "checkpoints")
  claim(run, settings(), source())  # it had not ended: it begins again
  assert "Go on training" in str(run_directory.no_checkpoint(run))
  (run / "result.json").write_text("{}")
  assert run_directory.is_begun(run)
  gone = f"--workdir {run} holds the results of a run that has ended, but its checkpoints .* gone"
  with pytest.raises(ConfigError, match=f"{gone}.*: config.json, data.json, result.json"):
    claim(run, settings(), source())
  assert re.match(gone, str(run_directory.no_checkpoint(run)))
  # Nor where of the results the report alone is there, or its configuration is gone too.
  (run / "result.json").rename(run / "report.md")
  with pytest.raises(ConfigError, match=f"{gone}.*: config.json, data.json, report.md"):
    claim(run, settings(), source())
  (run / "config.json").unlink()
  with pytest.raises(ConfigError, match=gone):
    claim(run, settings(), source())
  assert not (run / "config.json").exists()


@pytest.mark.parametrize(
  "content",
  ["1e999", "-3", "NaN", "[]", "null", "{}", "[" * 100_000],
  ids=["infinite", "negative", "nan", "list", "null", "section", "deep"],
)
def test_a_damaged_data_json_is_named(run, content):
  (run / "data.json").write_text(
    f'{{"train_examples": {content}, "eval_examples": 450, "num_classes": 10}}'
  )
  with pytest.raises(ConfigError, match=f"{run}/data.json"):
    run_directory.read_data(run)


def test_a_run_says_what_it_took_from_published_settings(run, tmp_path):
  assert run_directory.read_published(run) is None  # of a run without, or of an earlier release
  fields = ("data.crop_pct", "model.padding")
  fresh = tmp_path / "fresh"
  run_directory.claim_workdir(
    fresh, run_directory.identity_of(settings(), source())._replace(published=fields)
  )
  assert run_directory.read_published(fresh) == fields
  claim(fresh, settings(), source())  # it is no part of the identity


@pytest.mark.parametrize("content", ["", "3", '["model.absent"]', '[["model"]]', "[" * 100_000])
def test_a_damaged_published_json_is_named(run, content):
  (run / "published.json").write_text(content)
  with pytest.raises(ConfigError, match=f"{run}/published.json"):
    run_directory.read_published(run)


@pytest.mark.parametrize(
  "content",
  [
    '{"mod.l": 1}',
    '{"keys": {}}',
    '{"model": {"get": 1}}',
    "[" * 100_000,
    '{"a":' * 400 + "1" + "}" * 400,
    '{"model": {"strides": [[[[2]]]]}}',
    "3",
  ],
  ids=["dotted", "method", "method in a section", "deep", "deep sections", "deep lists", "number"],
)
def test_a_damaged_config_json_is_named(run, content):
  (run / "config.json").write_text(content)
  with pytest.raises(ConfigError, match=f"{run}(: |/)config.json"):
    run_directory.read_settings(run)
  with pytest.raises(ConfigError):
    claim(run, settings(), source())


def test_a_directory_in_use_is_left_as_it_is(tmp_path):
  config = digits_w4.get_config("mobilenet_v1")
  config.compilation_cache = ""
  with run_directory.hold(tmp_path / "run"):
    with pytest.raises(ConfigError, match=f"--workdir {tmp_path}/run is in use"):
      app.main(config, str(tmp_path / "run"), "train")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_processes_agree_in_all_but_where_data_and_programs_lie():
  def identity(mode="train", workdir="run", fork_from="", **changes):
    return app.identity(settings(**changes), mode, workdir, fork_from)

  first = identity()
  assert first == identity(**{"data.data_dir": "/elsewhere", "compilation_cache": "/elsewhere"})
  for change in (
    {"recovery.learning_rate_factor": 0.25},
    {"recovery.retries": 1},
    {"checkpoint.keep": 1},
    {"train.learning_rate": 0.5},
    {"mode": "eval"},
    {"workdir": "another"},
    {"fork_from": "another"},
  ):
    assert first != identity(**change), change


def test_a_run_of_a_release_without_later_fields_goes_on(run):
  config = json.loads((run / "config.json").read_text())
  del config["quant"], config["plan"]["refit_bits"]
  del config["model"]["padding"], config["teacher"]["padding"]
  (run / "config.json").write_text(json.dumps(config))
  claim(run, settings(), source())
  assert run_directory.read_settings(run) == settings()
  with pytest.raises(ConfigError, match=r"quant\.method: 'duq' there, 'lsq' here"):
    claim(run, settings(**{"quant.method": "lsq"}), source())


def test_what_an_earlier_release_called_bfloat16_is_refused(run):
  config = json.loads((run / "config.json").read_text())
  del config["train"]["kernels"]
  config["train"]["dtype"] = "bfloat16"
  (run / "config.json").write_text(json.dumps(config))
  with pytest.raises(ConfigError, match=r"earlier release.*train\.dtype=bfloat16"):
    claim(run, settings(**{"train.dtype": "bfloat16"}), source())
