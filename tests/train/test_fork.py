"""A run that begins with another's first phases is the run that trains them itself."""

import json
import shutil

import pytest
from etils import epath

from profit_jax import checkpoints
from profit_jax.cli import app
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY
from profit_jax.train import fork
from tests.train.runs import (
  WITHOUT_PLOTS,
  assert_same_checkpoint,
  damage,
  newest_of,
  number,
  result_of,
  without_times,
)
from tests.train.shared import tiny_config

# Checkpoints at the ends of the last three phases, which the finished run keeps.
ENDS = {7: number(7), 8: number(8), 9: number(9)}


def shared(ours, theirs):
  return fork.shared_phases(
    parse(tiny_config(**ours), REGISTRY), parse(tiny_config(**theirs), REGISTRY)
  )


# Progressive bits and three fine-tunings, as published.
LONG = {
  "plan.act_bits": (8, 5, 4),
  "plan.weight_bits": (8, 5, 4),
  "plan.freeze_fractions": (0.0, 1 / 3, 2 / 3),
}


@pytest.mark.parametrize(
  ("ours", "count"),
  [
    ({}, 22),
    ({"plan.freeze_fractions": (0.0, 0.0, 0.0)}, 19),
    ({"plan.freeze_fractions": (0.0, 1 / 3)}, 20),
    ({"plan.progressive": False}, 1),
    ({"plan.weight_bits": (8, 5), "plan.profit_bits": (5,)}, 13),
    ({"plan.full_precision_epochs": 3}, 0),
    ({"plan.sampling_every": 2}, 17),
    ({"seed": 1}, 0),
    ({"train.learning_rate": 0.01}, 0),
    ({"checkpoint.keep": 1000, "compilation_cache": "", "recovery.retries": 1}, 22),
  ],
)
def test_phases_in_common(tiny, ours, count):
  ours = {**LONG, **ours}
  assert shared(ours, LONG) == shared(LONG, ours) == count


def test_a_longer_plan_shares_the_shorter_one_but_for_its_last_bits(tiny):
  # At the shorter plan's last bits, w8a4, its best weights are chosen; the longer one has none yet.
  assert shared({**LONG, "plan.weight_bits": (8,), "plan.profit_bits": ()}, LONG) == 10


def test_a_remedy_is_annealed_over_all_phases_of_a_bit_width(tiny):
  remedy = {**LONG, "oscillation.dampening": 0.1}
  assert shared({**remedy, "plan.freeze_fractions": (0.0, 0.0, 0.0)}, remedy) == 10


@pytest.fixture
def other(finished_run, tmp_path):
  """The finished run as it was at the end of its seventh phase."""
  directory = tmp_path / "other"
  shutil.copytree(finished_run, directory)
  for phase in (8, 9):
    shutil.rmtree(directory / "checkpoints" / str(ENDS[phase]))
  return directory


def begun_in(directory, dtype):
  config = json.loads((directory / "config.json").read_text())
  config["train"] = {**config["train"], "dtype": dtype}
  (directory / "config.json").write_text(json.dumps(config))


def test_auto_is_the_arithmetic_of_the_run_or_of_the_one_that_it_begins_with(other, tmp_path):
  def decided(workdir, fork_from):
    settings = parse(tiny_config(**{"train.dtype": "auto"}), REGISTRY)
    return app._with_dtype(settings, workdir, fork_from, None).train.dtype

  run = tmp_path / "run"
  shutil.copytree(other, run)
  begun_in(run, "tfloat32")
  begun_in(other, "bfloat16")
  assert decided(epath.Path(run), str(other)) == "tfloat32"
  assert decided(epath.Path(tmp_path / "empty"), str(other)) == "bfloat16"
  assert decided(None, "") == "float32"


def test_what_an_earlier_release_called_bfloat16_is_not_begun_with(other, tmp_path):
  begun_in(other, "bfloat16")
  config = json.loads((other / "config.json").read_text())
  del config["train"]["kernels"]
  (other / "config.json").write_text(json.dumps(config))
  settings = parse(tiny_config(**{"train.dtype": "auto"}), REGISTRY)
  with pytest.raises(ConfigError, match=f"--fork_from {other} .*earlier release"):
    app.train(settings, epath.Path(tmp_path / "run"), str(other))


def test_a_fork_of_another_plan_ends_as_that_plan_alone_to_the_bit(other, tmp_path, capsys):
  changes = {"plan.freeze_fractions": (1 / 3, 1.0)}
  run, alone = tmp_path / "run", tmp_path / "alone"
  app.main(tiny_config(**changes), str(run), "train", fork_from=str(other), hooks=WITHOUT_PLOTS)
  for text in (capsys.readouterr().out, (run / "report.md").read_text()):
    assert f"phase 7, this is the run in {other}" in " ".join(text.split())
  app.main(tiny_config(**changes), str(alone), "train", hooks=WITHOUT_PLOTS)
  result = without_times(result_of(run))
  assert result.pop("forked_from") == {"run": str(other), "phases": 7}
  assert len(result["phases"][7]["frozen"]) == 3
  assert result == without_times(result_of(alone))
  ours, theirs = newest_of(run), newest_of(alone)
  for name in ("forked_from", "forked_phases"):
    ours.values.pop(name), theirs.values.pop(name)
  assert_same_checkpoint(ours, theirs)
  # It has begun: the same command resumes from its own checkpoints, without the other run.
  shutil.rmtree(other)
  app.main(tiny_config(**changes), str(run), "train", fork_from=str(other), hooks=WITHOUT_PLOTS)


def refused(run, fork_from, **changes):
  with pytest.raises(ConfigError) as error:
    app.main(tiny_config(**changes), str(run), "train", fork_from=str(fork_from))
  assert not run.exists()
  return str(error.value)


def test_what_is_refused(other, tmp_path):
  run = tmp_path / "run"
  assert "holds no run" in refused(run, tmp_path / "absent")
  assert "seed: 0 there, 1 here" in refused(run, other, seed=1)
  message = refused(run, other, **{"plan.freeze_fractions": (0.0, 0.0)})
  assert "6 phases in common" in message
  assert "--config.checkpoint.keep" in message
  assert "first phase is already another one" in refused(
    run, other, **{"plan.full_precision_epochs": 3}
  )
  # What a run goes back to, when its numbers are not finite, depends on when it had saved.
  saved = other / "checkpoints"
  ((_, values, arrays), _) = checkpoints.newest_of(saved, [ENDS[7]])
  shutil.rmtree(saved)
  writer = checkpoints.Writer(saved, keep=3)
  writer.save(ENDS[7], arrays, {**values, "retries": 1})
  writer.close()
  assert "that can be used" in refused(run, other)
  damage(saved / str(ENDS[7]))
  assert "that can be used" in refused(run, other)
  data = json.loads((other / "data.json").read_text())
  (other / "data.json").write_text(json.dumps({**data, "train_examples": 1346}))
  assert "train_examples: 1346 there, 1347 here" in refused(run, other)
  with pytest.raises(ConfigError, match="not allowed with --mode=eval"):
    app.main(tiny_config(), str(other), "eval", fork_from=str(other))
