"""A model is one file: weights of another codebase, training, export, and the way back."""

import importlib
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from profit_jax import checkpoints
from profit_jax.cli import to_torch
from profit_jax.config import ConfigError, parse
from profit_jax.export import verify
from profit_jax.models import REGISTRY, student_spec
from profit_jax.train import run_directory, start
from tests.export.nets import NORMALIZATION, images, net_of, random_variables
from tests.traced import deep_check
from tests.wrong_input import command

FILE = pathlib.Path(__file__).with_name("one_file_model.py")
# As PyTorch's code would have them.
SHAPES = {
  "features.0.weight": (8, 3, 3, 3),
  "features.3.weight": (8, 1, 3, 3),
  "features.6.weight": (16, 8, 1, 1),
  "squeeze.weight": (16, 16, 1, 1),
  "squeeze.bias": (16,),
  "fc.weight": (10, 16),
  "fc.bias": (10,),
}
for norm, channels in (("features.1", 8), ("features.4", 8), ("features.7", 16)):
  SHAPES |= {
    f"{norm}.{leaf}": (channels,) for leaf in ("weight", "bias", "running_mean", "running_var")
  }


@pytest.fixture(scope="module", autouse=True)
def pebble():
  """The module, and its model registered. Not by an import above: other tests list the models."""
  yield importlib.import_module("tests.models.one_file_model")
  REGISTRY.pop("pebble", None)


@pytest.fixture
def settings(pebble):
  def with_changes(**changes):
    config = pebble.get_config()
    config.update_from_flattened_dict(changes)
    return parse(config, REGISTRY)

  return with_changes


@pytest.fixture(scope="module")
def foreign():
  rng = np.random.default_rng(0)
  drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
  return {name: np.abs(x) if name.endswith("running_var") else x for name, x in drawn.items()}


@pytest.fixture
def weights_file(foreign, tmp_path):
  counter = {"features.1.num_batches_tracked": np.array(7)}
  safetensors.numpy.save_file({**foreign, **counter}, tmp_path / "w.safetensors")
  return str(tmp_path / "w.safetensors")


def test_a_file_of_the_other_codebase_is_loaded(settings, foreign, weights_file):
  student = start.load_student(settings(**{"init.weights": weights_file}), 10)
  params, stats = (student.make()[name] for name in ("params", "batch_stats"))
  assert student.loaded.source == "torchvision"
  assert not student.loaded.quantizers
  np.testing.assert_array_equal(
    params["depthwise"]["kernel"][:, :, 0, 5], foreign["features.3.weight"][5, 0]
  )
  np.testing.assert_array_equal(
    params["squeeze"]["kernel"][3], foreign["squeeze.weight"][:, 3, 0, 0]
  )
  np.testing.assert_array_equal(params["fc"]["kernel"], foreign["fc.weight"].T)
  np.testing.assert_array_equal(stats["stem_norm"]["mean"], foreign["features.1.running_mean"])


def test_settings_of_the_other_codebase_are_compared(settings, weights_file):
  chosen = settings(**{"init.weights": weights_file, "model.bn_epsilon": 1e-5})
  student = start.load_student(chosen, 10)
  (doubt,) = start.weight_warnings(chosen, student, start.load_teacher(chosen, student, 10))
  assert "config.model.bn_epsilon = 1e-05" in doubt
  assert "0.001" in doubt


def test_its_head_can_be_new(settings, foreign, weights_file):
  chosen = {"init.weights": weights_file}
  with pytest.raises(ConfigError, match=r"config\.init\.reset_head=True"):
    start.load_student(settings(**chosen), 7)
  student = start.load_student(settings(**chosen, **{"init.reset_head": True}), 7)
  params = student.make()["params"]
  assert params["fc"]["kernel"].shape == (16, 7)
  assert np.std(params["fc"]["kernel"]) > 0
  np.testing.assert_array_equal(params["squeeze"]["bias"], foreign["squeeze.bias"])


def test_a_wrong_path_of_the_head_is_named(settings, weights_file, monkeypatch, pebble):
  wrong = type(REGISTRY["pebble"])(pebble.Pebble, names=(pebble.NAMING,))
  monkeypatch.setitem(REGISTRY, "pebble", wrong)
  with pytest.raises(ConfigError, match=r"pebble.*'classifier'.*head="):
    start.load_student(settings(**{"init.weights": weights_file, "init.reset_head": True}), 7)


def test_it_can_be_trained():
  size = {"model.width": 1.0, "model.strides": (), "data.image_size": 16}
  deep_check("mobilenet_v1", {"model.name": "pebble", **size})


def test_its_export_computes_its_codes(settings):
  chosen = settings()
  variables = random_variables(chosen)
  net = net_of(chosen, variables, 4, 4)
  outputs = verify.trained_codes(net, student_spec(chosen, 10), variables, NORMALIZATION)(images())
  compared = verify.compare(net, [images()], lambda _: outputs)
  assert compared.at_ties, [row for row in compared.rows if row.apart]
  assert compared.logits < 1e-5
  assert len(outputs[1]) == 4
  for name, codes in outputs[1].items():  # else they would be easy to agree on
    assert len(np.unique(codes)) >= 4, name


@pytest.fixture
def run(settings, tmp_path):
  """A run's directory as `train/run_state.py` leaves it, and its variables."""
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").write_text(json.dumps(settings().to_dict()))
  counts = {"train_examples": 1347, "eval_examples": 450, "num_classes": 10}
  (workdir / "data.json").write_text(json.dumps(counts))
  variables = random_variables(settings())
  writer = checkpoints.Writer(workdir / "checkpoints", keep=1)
  writer.save(5, {"best": variables}, {})
  writer.close()
  return workdir, variables


def test_to_torch_writes_the_other_codebases_names(run, settings, tmp_path, capsys):
  workdir, variables = run
  file = str(tmp_path / "back.safetensors")
  assert to_torch.main([str(workdir), file]) == 0
  told = capsys.readouterr().out
  assert "torchvision names" in told
  assert "a and c" in told
  assert "bn_epsilon" not in told
  written = safetensors.numpy.load_file(file)
  assert {name: tensor.shape for name, tensor in written.items()} == SHAPES
  # The round trip, to the bit.
  again = start.load_student(settings(**{"init.weights": file}), 10).make()
  for path, value in traverse_util.flatten_dict(variables).items():
    if not path[-1].startswith("quant_"):
      found = traverse_util.flatten_dict(again)[path]
      assert np.asarray(found).tobytes() == np.asarray(value).tobytes(), path


def test_the_command_line_knows_a_model_that_its_configuration_registers(tmp_path, monkeypatch):
  file = tmp_path / "mine.py"
  shutil.copy(FILE, file)
  monkeypatch.delitem(REGISTRY, "pebble")
  for _ in range(2):  # the file is read each time
    code, out, err = command(f"--config={file}", "--mode=plan")
    assert (code, err) == (0, "")
    assert "phases, " in out
  code, _, err = command(f"--config={file}", "--mode=plan", "--config.model.width=0.5")
  assert code == 2
  assert "config.model.width = 0.5" in err
  # Elsewhere the name is another class's.
  other = tmp_path / "other.py"
  other.write_text(file.read_text().replace("class Pebble", "class Other"))
  code, _, err = command(f"--config={other}", "--mode=plan")
  assert code == 2
  assert "Pebble has this name" in err


def test_a_run_of_a_model_that_is_not_registered(run, monkeypatch):
  monkeypatch.delitem(REGISTRY, "pebble")
  with pytest.raises(ConfigError, match=r"config\.json names the model 'pebble'.*--config"):
    run_directory.read_settings(run[0])
