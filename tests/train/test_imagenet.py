"""ImageNet in miniature: the published configuration on data in the real formats."""

import json
import os
import pathlib

import pytest

from configs import mbv2_w4
from profit_jax.cli import app
from tests.data import pictures
from tests.train.runs import WITHOUT_PLOTS, result_of
from tests.wrong_input import command

ROOT = pathlib.Path(__file__).parents[2]
# A step for every epoch.
ONE_STEP = {
  "plan.full_precision_epochs": 1,
  "plan.finetune_epochs": 1,
  "plan.bn_epochs": 1,
  "plan.sampling_epochs": 1,
  "plan.warmup_epochs": 0,
}


def large_cuttings(count, seed):
  return pictures.cuttings(count, seed, size=(300, 240))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A directory with a TFDS set, `cuttings`, and an image folder."""
  root = tmp_path_factory.mktemp("pictures")
  pictures.write_tfds(root / "tfds", train=5, evaluation=5, make=large_cuttings)
  pictures.write_folder(root / "folder", train=4, evaluation=3, make=large_cuttings)
  return root


def published(**changes):
  """The published configuration with the tiny net, which compiles in a minute."""
  config = mbv2_w4.get_config()
  config.compilation_cache = os.environ["PROFIT_JAX_TESTS_CACHE"]
  config.update_from_flattened_dict({**ONE_STEP, "model.name": "tiny", **changes})
  return config


def test_the_published_configuration_runs_its_22_phases(tiny, tmp_path, capsys):
  # On the digits, because opening a set of files takes TensorFlow a second or two in every epoch.
  changes = {"data.name": "digits", "data.image_size": 16, "train.batch_size": 1344}
  app.main(published(**changes), str(tmp_path), "train", hooks=WITHOUT_PLOTS)
  assert "22 phases, 22 epochs, to w4a4" in capsys.readouterr().out
  result = result_of(tmp_path)
  steps = [(phase["index"], phase["steps"]) for phase in result["phases"]]
  assert steps == [(i, 1) for i in range(1, 23)]
  assert len(result["aiwq"]) == 3
  assert [len(phase["frozen"]) for phase in result["phases"][18:]] == [0, 1, 2, 0]
  assert (result["final"]["weight_bits"], result["final"]["act_bits"]) == (4, 4)


def test_the_published_configuration_trains_on_a_tfds_set(tiny, written, tmp_path):
  # A batch of four has an image for each of the four devices.
  changes = {"data.name": "cuttings", "data.data_dir": str(written / "tfds")}
  changes |= {"data.image_size": 96, "train.batch_size": 4, "train.eval_batch_size": 4}
  changes |= {"plan.weight_bits": (), "plan.act_bits": ()}
  app.main(published(**changes), str(tmp_path), "train", hooks=WITHOUT_PLOTS)
  result = result_of(tmp_path)
  assert (result["model"], result["dataset"]) == ("tiny", "cuttings")
  assert result["phases"][0]["steps"] == 1
  assert result["final"]["examples"] == 5


def test_a_folder_is_trained_on_from_the_command_line(tiny, written, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  run = tmp_path / "run"
  fields = {**ONE_STEP, "model.name": "tiny", "plan.weight_bits": (), "plan.act_bits": ()}
  fields |= {"data.name": "folder", "data.image_size": 64}
  fields |= {"train.batch_size": 4, "train.eval_batch_size": 4}
  fields |= {"compilation_cache": os.environ["PROFIT_JAX_TESTS_CACHE"]}
  line = ["--config=configs/mbv2_w4.py", f"--workdir={run}"]
  line += [f"--config.{field}={value}" for field, value in fields.items()]
  code, printed, err = command(*line, f"--config.data.data_dir={written / 'folder'}")
  assert code == 0, err
  assert "1 phase, 1 epochs, to fp" in printed
  # The run knows its data; a directory that has moved is named again.
  moved = (written / "folder").rename(tmp_path / "moved")
  code, printed, err = command(*line, f"--config.data.data_dir={moved}", "--mode=eval")
  assert code == 0, err
  top1 = json.loads((run / "result.json").read_text())["final"]["top1"]
  assert printed.startswith(f"fp: top-1 {top1:.2f} %, top-5 100.00 % on 3 images")
