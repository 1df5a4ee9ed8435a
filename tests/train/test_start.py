"""What a run starts from: files for the student and the teacher, and their evaluation before
training.
"""

import json

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from configs import base, digits_w4
from profit_jax import app, snapshots, to_torch
from profit_jax.models import REGISTRY
from profit_jax.report.console import near_chance
from profit_jax.settings import ConfigError, parse
from profit_jax.train import start
from tests import golden_data
from tests.train.conftest import tiny_config
from tests.train.runs import number, stop_at

SHORT = {
  "plan.full_precision_epochs": 1,
  "plan.finetune_epochs": 1,
  "plan.sampling_epochs": 1,
  "plan.act_bits": (4,),
}
SHORT |= {"plan.weight_bits": (4,)}


@pytest.fixture
def weights_file(tmp_path):
  path = tmp_path / "weights.npz"
  np.savez(path, **golden_data.tensors(golden_data.load("trajectory_mobilenet_v2.json")["shapes"]))
  return str(path)


def first(config=None, **changes):
  config = config or digits_w4.get_config()
  config.update_from_flattened_dict(changes)
  settings = parse(config, REGISTRY)
  student = start.load_student(settings, 10)
  return settings, student, start.load_teacher(settings, student, 10)


def test_from_random_weights_the_student_has_no_teacher_yet():
  _, student, teacher = first()
  assert student.loaded is None
  assert teacher.model.dropout == 0.0
  assert teacher.variables is None
  assert first(**{"teacher.model": "none"})[2] == (None, None, None)


def test_from_a_file_the_student_teaches_itself_from_the_start(weights_file):
  settings, student, teacher = first(**{"init.weights": weights_file})
  jax.tree.map(np.testing.assert_array_equal, student.make(), teacher.variables)
  assert student.file_model is None
  activation = (
    "config.model.activation = 'relu6', but these weights (authors names) are for 'relu'."
  )
  assert start.doubts(settings, student, teacher) == [activation]


def test_another_model_teaches_with_its_own_settings(weights_file):
  changes = {
    "teacher.model": "mobilenet_v2",
    "teacher.weights": weights_file,
    "teacher.width": 0.25,
  }
  changes |= {
    "teacher.activation": "relu",
    "teacher.strides": (2, 1, 1, 2, 2, 1, 1, 1),
    "model.width": 0.5,
  }
  settings, student, teacher = first(**changes)
  assert (teacher.model.width, teacher.model.activation, teacher.model.strides[2]) == (
    0.25,
    "relu",
    1,
  )
  assert teacher.variables["params"]["stem_conv"]["kernel"].shape == (3, 3, 3, 8)
  assert start.doubts(settings, student, teacher) == []
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
  assert (student.model.pad_value, student.file_model.pad_value, teacher.model.pad_value) == (
    -0.375,
    0.0,
    0.0,
  )
  assert start.evaluated(student, teacher) == ["student", "file"]
  # eps is another: torchvision's is named. The padding is not, since it is meant to change.
  epsilon = "config.model.bn_epsilon = 1e-05, but these weights (torchvision names) are for 0.001."
  assert start.doubts(settings, student, teacher) == [epsilon]
  # Without a teacher there is no phase in which it could.
  changes["teacher.model"] = "none"
  settings, student, teacher = first(base.get_config(), **changes)
  assert "no full-precision phase that adapts them" in start.doubts(settings, student, teacher)[1]
  # A teacher never adapts: its padding is named too.
  changes = {
    "teacher.model": "mobilenet_v3_small",
    "teacher.weights": changes["init.weights"],
    "teacher.pad_value": -0.375,
  }
  settings, student, teacher = first(digits_w4.get_config(), **changes)
  assert (
    "config.teacher.pad_value = -0.375, but these weights (torchvision names) are for 0.0."
    in start.doubts(settings, student, teacher)
  )


def test_a_new_classifier_teaches_nobody_before_it_has_learned(weights_file):
  from profit_jax.plan import plan

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
  assert teacher.model.depth == student.model.depth == 18


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
  app.main(tiny_config(**SHORT, **{"init.weights": str(finished_run)}), str(tmp_path), "train")
  printed = capsys.readouterr().out
  assert printed.index("Before training, in full precision: top-1 ") < printed.index(" fp ")
  assert "NEAR CHANCE" not in printed
  events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
  at_0 = [float(make_ndarray(e.tensor_proto)) for e in events.Tensors("eval/top1") if e.step == 0]
  assert f"top-1 {at_0[0]:.2f} %" in printed
  assert (
    f"Before training, in full precision: top-1 {at_0[0]:.2f} %"
    in (tmp_path / "report.md").read_text()
  )
  # The weights were trained quantized: what they reach without is no baseline.
  result = json.loads((tmp_path / "result.json").read_text())
  first_phase = result["phases"][0]
  assert result["final"]["full_precision_top1"] == max(first_phase["top1"], first_phase["top1_ema"])


def test_a_run_from_a_file_goes_on_without_it(finished_run, tmp_path, monkeypatch):
  file = tmp_path / "w.safetensors"
  assert to_torch.main([str(finished_run), str(file)]) == 0
  config = tiny_config(**SHORT, **{"init.weights": str(file)})
  with monkeypatch.context() as patched:
    stop_at(patched, [number(2)])
    with pytest.raises(KeyboardInterrupt):
      app.main(config, str(tmp_path / "run"), "train")
  file.unlink()
  app.main(config, str(tmp_path / "run"), "train")
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
    doubts = start.doubts(*first(config))
    assert len(doubts) == 2
    assert doubts[0].startswith(
      "config.model.activation = 'relu', but these weights (profit_jax names) are for 'relu6'"
    )
    assert "config.model.strides" in doubts[1]


def test_eval_of_a_file_prints_full_precision_and_the_quantized_net(finished_run, tmp_path, capsys):
  file = str(tmp_path / "w.safetensors")
  assert to_torch.main([str(finished_run), file]) == 0
  assert (
    capsys.readouterr().out == f"Wrote {file}: tiny, 33 float32 tensors under profit_jax names.\n"
  )
  app.main(tiny_config(**{"init.weights": file}), str(tmp_path / "fresh"), "eval")
  lines = capsys.readouterr().out.splitlines()
  final = json.loads((finished_run / "result.json").read_text())["final"]
  assert lines[0].startswith(f"{tmp_path}/fresh holds no run: this evaluates ")
  assert lines[1].startswith("Before training, in full precision: top-1 ")
  assert not (tmp_path / "fresh").exists()
  assert (
    lines[-1] == f"w4a4: top-1 {final['top1']:.2f} %, top-5 {final['top5']:.2f} % on 450 images"
  )


def test_weights_near_chance_are_loud(tiny, tmp_path, capsys):
  from profit_jax.models import init_variables
  from profit_jax.weights.save import named_tensors, write_safetensors
  from tests.train.tiny import TinyNet

  variables = init_variables(TinyNet(), jax.random.key(3), 16)
  write_safetensors(
    str(tmp_path / "w.safetensors"), named_tensors("tiny", variables, "profit_jax"), {}
  )
  changes = {"init.weights": str(tmp_path / "w.safetensors")}
  app.main(tiny_config(**changes), "", "eval")
  printed = capsys.readouterr().out
  assert "WARNING: NEAR CHANCE" in printed
  assert "guessing gives 10.00 %" in printed
  app.main(tiny_config(**changes, **{"init.reset_head": True}), "", "eval")
  printed = capsys.readouterr().out
  assert "as it has to be: the classifier is new" in printed
  assert "NEAR CHANCE" not in printed


def test_another_net_teaches_and_a_bad_one_is_loud(tiny, tmp_path, capsys):
  from profit_jax.models import variable_shapes
  from profit_jax.weights.save import named_tensors, write_safetensors

  rng = np.random.default_rng(0)
  shapes = variable_shapes(REGISTRY["resnet18"](num_classes=10), 16)
  variables = jax.tree.map(
    lambda leaf: np.abs(rng.normal(0, 0.05, leaf.shape)).astype(np.float32), shapes
  )
  file = str(tmp_path / "w.safetensors")
  write_safetensors(file, named_tensors("resnet18", variables, "torchvision"), {})
  changes = {
    "teacher.model": "resnet18",
    "teacher.weights": file,
    "teacher.strides": (2, 2, 1, 2, 2, 1),
  }
  changes |= {
    "plan.act_bits": (),
    "plan.weight_bits": (4,),
    "plan.profit": False,
    "plan.stabilize": False,
  }
  app.main(tiny_config(**{**SHORT, **changes}), str(tmp_path / "run"), "train")
  printed = capsys.readouterr().out
  assert "The teacher, in full precision: top-1 " in printed
  assert "WARNING: TEACHER NEAR CHANCE" in printed
  # From the first phase on: another net needs no full-precision phase to be made.
  events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
  assert [event.step for event in events.Tensors("train/kd")] == [10, 20]


def test_both_paddings_of_a_torchvision_v3_are_evaluated(tmp_path, capsys):
  from profit_jax.models import init_variables
  from profit_jax.weights.save import named_tensors, write_safetensors

  config = digits_w4.get_config("mobilenet_v3_small")
  config.model.bn_epsilon = 1e-3
  config.compilation_cache = ""
  model = REGISTRY["mobilenet_v3_small"](num_classes=10, width=0.5, strides=config.model.strides)
  variables = init_variables(model, jax.random.key(0), 32)
  file = str(tmp_path / "w.safetensors")
  write_safetensors(file, named_tensors("mobilenet_v3_small", variables, "torchvision"), {})
  config.init.weights = file
  app.main(config, "", "eval")
  printed = " ".join(capsys.readouterr().out.split())
  assert "with the padding of this run, top-1 " in printed
  assert "with that of the code behind the file (450 images; torchvision names)" in printed


def test_to_torch_says_where_the_other_code_computes_otherwise(tmp_path, capsys):
  # A run's directory as `train/checkpoint.py` leaves it, without the run.

  from profit_jax.models import build, variable_shapes

  settings = parse(digits_w4.get_config(), REGISTRY)
  rng = np.random.default_rng(0)
  shapes = variable_shapes(build(settings.model, 10), 32)
  variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
  (tmp_path / "config.json").write_text(json.dumps(settings.to_dict()))
  (tmp_path / "data.json").write_text(
    json.dumps({"train_examples": 1347, "eval_examples": 450, "num_classes": 10})
  )
  writer = snapshots.Writer(tmp_path / "checkpoints", keep=1)
  writer.save(5, {"best": variables}, {})
  writer.close()
  file = str(tmp_path / "w.safetensors")
  assert to_torch.main([str(tmp_path), file]) == 0
  told = capsys.readouterr().out
  assert "472 float32 tensors under authors names" in told
  assert "computes with activation = 'relu', these weights were trained with 'relu6'" in told
  assert to_torch.main([str(tmp_path), file, "--names=torchvision"]) == 0
  told = capsys.readouterr().out
  assert "no place for the quantizers' a and c" in told
  assert "activation" not in told


def test_to_torch_says_what_is_wrong(finished_run, tmp_path, capsys):
  wrong = {
    (str(tmp_path), "w.safetensors"): "holds no run",
    (str(finished_run), "w.pth"): "must be called .safetensors",
    (
      str(finished_run),
      "w.safetensors",
      "--names=authors",
    ): "--names=authors is not allowed: tiny has names in profit_jax",
  }
  for arguments, message in wrong.items():
    assert to_torch.main(list(arguments)) == 2
    assert message in capsys.readouterr().err
