"""What a run starts from: files for the student and the teacher, and their evaluation before
training.
"""

import json
import re

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from configs import base, digits_w4
from profit_jax import checkpoints
from profit_jax.cli import app, to_torch
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, build
from profit_jax.report.console import near_chance
from profit_jax.schedule import plan
from profit_jax.train import start
from profit_jax.weights.save import named_tensors, write_safetensors
from tests import golden_data
from tests.specs import init_variables, variable_shapes
from tests.train.runs import WITHOUT_PLOTS, SaveAt, number
from tests.train.shared import tiny_config
from tests.train.tiny import TinyNet

# Full precision alone: taught by the weights that it starts from.
FULL_PRECISION = {"plan.weight_bits": (), "plan.act_bits": ()}


@pytest.fixture
def weights_file(tmp_path):
  path = tmp_path / "weights.npz"
  np.savez(path, **golden_data.tensors(golden_data.load("trajectory_mobilenet_v2.json")["shapes"]))
  return str(path)


def assert_names(text, *parts):
  """A message names these fields and values."""
  assert [part for part in parts if part not in text] == [], text


def first(config=None, **changes):
  config = config or digits_w4.get_config()
  config.update_from_flattened_dict(changes)
  settings = parse(config, REGISTRY)
  student = start.load_student(settings, 10)
  return settings, student, start.load_teacher(settings, student, 10)


def test_from_random_weights_the_student_has_no_teacher_yet():
  _, student, teacher = first()
  assert student.loaded is None
  assert teacher.spec.model.dropout == 0.0
  assert teacher.variables is None
  assert first(**{"teacher.model": "none"})[2].spec is None


def test_from_a_file_the_student_teaches_itself_from_the_start(weights_file):
  settings, student, teacher = first(**{"init.weights": weights_file})
  jax.tree.map(np.testing.assert_array_equal, student.make(), teacher.variables)
  assert student.file_spec is None
  doubts = start.weight_warnings(settings, student, teacher)
  assert len(doubts) == 2
  # The authors' nets have the published strides.
  assert_names(doubts[0], "strides = (2, 1, 2, 2, 2, 1, 1, 1)", "(2, 1, 2, 2, 2, 1, 2, 1)")
  assert_names(doubts[1], "config.model.activation", "'relu6'", "'relu'")


def test_another_model_teaches_with_its_own_settings(tiny, weights_file):
  changes = {
    "model.name": "tiny",
    "teacher.model": "mobilenet_v2",
    "teacher.weights": weights_file,
    "teacher.width": 0.25,
  }
  changes |= {"teacher.activation": "relu", "teacher.strides": (2, 1, 1, 2, 2, 1, 1, 1)}
  settings, student, teacher = first(**changes)
  assert (
    teacher.spec.model.width,
    teacher.spec.model.activation,
    teacher.spec.model.strides[2],
  ) == (
    0.25,
    "relu",
    1,
  )
  assert teacher.variables["params"]["stem_conv"]["kernel"].shape == (3, 3, 3, 8)
  (doubt,) = start.weight_warnings(settings, student, teacher)
  assert_names(doubt, "config.teacher.strides = (2, 1, 1, ", "(2, 1, 2, 2, 2, 1, 2, 1)")
  assert start.evaluated(student, teacher) == ["teacher"]
  with pytest.raises(ConfigError, match=r"wrong shape: features\.0\.0\.weight"):
    first(**{**changes, "teacher.width": 1.0})


def test_torchvision_v3_is_evaluated_with_its_own_padding_and_teaches_with_it(tmp_path):
  shapes = golden_data.load("importer_shapes.json")["torchvision_mobilenet_v3_small"]
  np.savez(tmp_path / "w.npz", **golden_data.full_precision_tensors(shapes))
  changes = {
    "model.name": "mobilenet_v3_small",
    "init.weights": str(tmp_path / "w.npz"),
    "data.name": "digits",
  }
  settings, student, teacher = first(base.get_config(), **changes)
  assert (
    student.spec.model.pad_value,
    student.file_spec.model.pad_value,
    teacher.spec.model.pad_value,
  ) == (
    -0.375,
    0.0,
    0.0,
  )
  assert start.evaluated(student, teacher) == ["student", "file"]
  # eps is another: torchvision's is named. The padding is not, since it is meant to change.
  (doubt,) = start.weight_warnings(settings, student, teacher)
  assert_names(doubt, "config.model.bn_epsilon", "1e-05", "0.001")
  # Without a teacher there is no phase in which it could.
  changes["teacher.model"] = "none"
  settings, student, teacher = first(base.get_config(), **changes)
  assert_names(
    start.weight_warnings(settings, student, teacher)[1], "config.model.pad_value", "no full-prec"
  )
  # A teacher never adapts: its padding is named too.
  changes = {
    "teacher.model": "mobilenet_v3_small",
    "teacher.weights": changes["init.weights"],
    "teacher.pad_value": -0.375,
  }
  settings, student, teacher = first(digits_w4.get_config(), **changes)
  weight_warnings = [
    text for text in start.weight_warnings(settings, student, teacher) if "pad_value" in text
  ]
  assert_names(weight_warnings[0], "config.teacher.pad_value", "-0.375", "0.0")


def test_a_new_classifier_teaches_nobody_before_it_has_learned(weights_file):
  changes = {"init.weights": weights_file, "init.reset_head": True}
  settings, _, teacher = first(**changes)
  assert teacher.variables is None
  assert [phase.distill for phase in plan(settings)[:2]] == [False, True]
  settings, _, _ = first(**changes, **{"teacher.model": "none"})
  assert plan(settings)[0].kind == "full_precision"
  with pytest.raises(ConfigError, match="full_precision_epochs"):
    first(**changes, **{"plan.full_precision_epochs": 0, "plan.warmup_epochs": 0})


def test_a_resnet_can_be_trained_to_become_a_teacher():
  bits = {"plan.weight_bits": (), "plan.act_bits": ()}
  changes = {"model.name": "resnet18", "model.width": 1.0, "model.strides": (2, 2, 1, 2, 2, 2)}
  _, student, teacher = first(**bits, **changes)
  assert teacher.spec.model.depth == student.spec.model.depth == 18


def test_a_new_head_is_random_and_the_rest_is_the_files(weights_file):
  config = digits_w4.get_config()
  config.update_from_flattened_dict({"init.weights": weights_file, "init.reset_head": True})
  settings = parse(config, REGISTRY)
  with np.load(weights_file) as file:
    student = start.load_student(settings, 7)
    params = student.make()["params"]
    assert params["classifier"]["kernel"].shape == (1280, 7)
    np.testing.assert_allclose(np.std(params["classifier"]["kernel"]), 0.01, rtol=0.1)
    np.testing.assert_allclose(
      params["head_conv"]["kernel"][0, 0].T, file["features.18.0.weight"][:, :, 0, 0], rtol=1e-6
    )


@pytest.mark.parametrize(
  ("top1", "classes", "near"),
  [(10.0, 10, True), (18.9, 10, True), (19.1, 10, False), (0.1, 1000, True), (71.9, 1000, False)],
)
def test_near_chance_is_a_tenth_of_the_way_from_guessing(top1, classes, near):
  assert near_chance(top1, classes) == near


def test_a_run_that_starts_from_a_run_is_evaluated_before_training(finished_run, tmp_path, capsys):
  config = tiny_config(**FULL_PRECISION, **{"init.weights": str(finished_run)})
  app.main(config, str(tmp_path), "train", hooks=WITHOUT_PLOTS)
  printed = capsys.readouterr().out
  assert printed.index("Before training") < printed.index(" fp ")
  assert "NEAR CHANCE" not in printed
  events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
  at_0 = [float(make_ndarray(e.tensor_proto)) for e in events.Tensors("eval/top1") if e.step == 0]
  for text in (printed, (tmp_path / "report.md").read_text()):
    assert f"top-1 {at_0[0]:.2f} %" in text
  # The weights were trained quantized: what they reach without is no baseline.
  result = json.loads((tmp_path / "result.json").read_text())
  first_phase = result["phases"][0]
  assert result["final"]["full_precision_top1"] == max(first_phase["top1"], first_phase["top1_ema"])


def test_a_run_from_a_file_resumes_without_it(finished_run, tmp_path):
  file = tmp_path / "w.safetensors"
  assert to_torch.main([str(finished_run), str(file)]) == 0
  epochs = {"plan.full_precision_epochs": 2}
  config = tiny_config(**FULL_PRECISION, **epochs, **{"init.weights": str(file)})
  with pytest.raises(KeyboardInterrupt):
    app.main(config, str(tmp_path / "run"), "train", hooks=SaveAt([number(1)], stop=True).hooks)
  file.unlink()
  app.main(config, str(tmp_path / "run"), "train", hooks=WITHOUT_PLOTS)
  assert json.loads((tmp_path / "run" / "result.json").read_text())["final"]["top1"] > 20


def test_a_relative_run_directory(finished_run, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(finished_run.parent)
  assert to_torch.main([finished_run.name, str(tmp_path / "w.safetensors")]) == 0
  app.main(tiny_config(**{"init.weights": finished_run.name}), "", "eval")
  assert "w4a4: top-1 " in capsys.readouterr().out


def test_weights_of_ours_say_how_they_were_trained(finished_run, tmp_path):
  file = str(tmp_path / "w.safetensors")
  assert to_torch.main([str(finished_run), file]) == 0
  for weights in (file, str(finished_run)):
    config = tiny_config(
      **{"init.weights": weights, "model.activation": "relu", "model.strides": (1,) * 8}
    )
    weight_warnings = start.weight_warnings(*first(config))
    assert len(weight_warnings) == 2
    assert_names(weight_warnings[0], "config.model.activation", "'relu'", "'relu6'")
    assert_names(weight_warnings[1], "config.model.strides")


def test_eval_of_a_file_prints_full_precision_and_the_quantized_net(finished_run, tmp_path, capsys):
  file = str(tmp_path / "w.safetensors")
  assert to_torch.main([str(finished_run), file]) == 0
  assert_names(capsys.readouterr().out, file, "tiny", "33 float32 tensors", "profit_jax")
  # Larger than the training data, which does not matter.
  config = tiny_config(**{"init.weights": file, "train.batch_size": 2000})
  app.main(config, str(tmp_path / "fresh"), "eval")
  lines = capsys.readouterr().out.splitlines()
  final = json.loads((finished_run / "result.json").read_text())["final"]
  assert_names(lines[0], f"{tmp_path}/fresh", file)
  assert_names(lines[1], "in full precision: top-1 ")
  assert not (tmp_path / "fresh").exists()
  assert (
    lines[-1] == f"w4a4: top-1 {final['top1']:.2f} %, top-5 {final['top5']:.2f} % on 450 images"
  )


def test_weights_near_chance_are_loud(tiny, tmp_path, capsys):
  variables = init_variables(TinyNet(), jax.random.key(3), 16)
  write_safetensors(
    str(tmp_path / "w.safetensors"), named_tensors("tiny", variables, "profit_jax"), {}
  )
  changes = {"init.weights": str(tmp_path / "w.safetensors")}
  app.main(tiny_config(**changes), "", "eval")
  printed = capsys.readouterr().out
  assert_names(printed, "NEAR CHANCE", "10.00 %")
  app.main(tiny_config(**changes, **{"init.reset_head": True}), "", "eval")
  printed = capsys.readouterr().out
  assert "NEAR CHANCE" not in printed


def test_another_net_teaches_and_a_bad_one_is_loud(tiny, tmp_path, capsys):
  variables = init_variables(TinyNet(), jax.random.key(3), 16)
  file = str(tmp_path / "w.safetensors")
  write_safetensors(file, named_tensors("tiny", variables, "profit_jax"), {})
  changes = {"teacher.model": "tiny", "teacher.weights": file}
  config = tiny_config(**changes, **FULL_PRECISION)
  app.main(config, str(tmp_path / "run"), "train", hooks=WITHOUT_PLOTS)
  printed = capsys.readouterr().out
  assert "The teacher, in full precision: top-1 " in printed
  assert "TEACHER NEAR CHANCE" in printed
  # From the first phase on: another net needs no full-precision phase to be made.
  events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
  assert [event.step for event in events.Tensors("train/kd")] == [10]


def test_both_paddings_of_a_torchvision_v3_are_evaluated(tmp_path, capsys):
  config = digits_w4.get_config("mobilenet_v3_small")
  config.model.bn_epsilon = 1e-3
  config.compilation_cache = ""
  config.data.image_size = 16
  model = REGISTRY["mobilenet_v3_small"](num_classes=10, width=0.5, strides=config.model.strides)
  variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variable_shapes(model, 16))
  file = str(tmp_path / "w.safetensors")
  write_safetensors(file, named_tensors("mobilenet_v3_small", variables, "torchvision"), {})
  config.init.weights = file
  app.main(config, "", "eval")
  printed = " ".join(capsys.readouterr().out.split())
  assert len(re.findall(r"padding of this run, top-1 [\d.]+ %", printed)) == 1
  assert len(re.findall(r"[\d.]+ % with that of the code behind the file", printed)) == 1


def test_to_torch_says_where_the_other_code_computes_otherwise(tmp_path, capsys):
  # A run's directory as `train/run_state.py` leaves it, without the run.
  settings = parse(digits_w4.get_config(), REGISTRY)
  rng = np.random.default_rng(0)
  shapes = variable_shapes(build(settings.model, 10), 32)
  variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
  (tmp_path / "config.json").write_text(json.dumps(settings.to_dict()))
  (tmp_path / "data.json").write_text(
    json.dumps({"train_examples": 1347, "eval_examples": 450, "num_classes": 10})
  )
  writer = checkpoints.Writer(tmp_path / "checkpoints", keep=1)
  writer.save(5, {"best": variables}, {})
  writer.close()
  file = str(tmp_path / "w.safetensors")
  assert to_torch.main([str(tmp_path), file]) == 0
  told = capsys.readouterr().out
  assert_names(told, "472 float32 tensors", "authors", "activation = 'relu'", "'relu6'")
  # Of small images; the other code has the published strides.
  strides = "strides = (2, 1, 2, 2, 2, 1, 2, 1)", "(2, 1, 2, 2, 2, 1, 1, 1)"
  assert_names(told, *strides)
  assert to_torch.main([str(tmp_path), file, "--names=torchvision"]) == 0
  told = capsys.readouterr().out
  assert "a and c" in told
  assert_names(told, *strides)
  assert "activation" not in told


def test_to_torch_says_what_is_wrong(finished_run, tmp_path, capsys):
  wrong = {
    (str(tmp_path), "w.safetensors"): "holds no run",
    (str(finished_run), "w.pth"): "must be called .safetensors",
    (
      str(finished_run),
      "w.safetensors",
      "--names=authors",
    ): "--names=authors",
  }
  for arguments, message in wrong.items():
    assert to_torch.main(list(arguments)) == 2
    assert message in capsys.readouterr().err
