"""`profit eval FILE`: accuracy and speed of an exported file, without the model it was made of."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest

import profit_jax as pj
from profit_jax.cli import eval_file, predict
from profit_jax.cli import main as command_line
from profit_jax.config import ConfigError
from profit_jax.export import exported, formats, runtimes, verify
from tests.export import own_models
from tests.export.nets import SIZE, digits, every_operation
from tests.export.test_trace import float_images, own_net
from tests.wrong_input import command as run_command

pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")
CONFIG = "--config=configs/digits_w4.py"
FITS = f"--config.data.image_size={SIZE}"


def card_of(path, **fields):
  """What `profit eval` reads of a card, for a file of `every_operation`."""
  pixels = {"type": "uint8", "shape": [SIZE, SIZE, 3], "image_size": SIZE}
  return {
    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    "input": {**pixels, "crop_pct": 1.0, "interpolation": "bicubic"},
    "num_classes": 10,
    "class_names": list("0123456789"),
    "versions": {"onnxruntime": "1.32.0"},
    "top1": {"file": 12.5, "examples": 450},
    "training": {"dataset": "digits"},
    "runtime_check": {"lowest": "1.23.0"},
    **fields,
  }


def write_file(folder, name="onnx", **fields):
  """An exported file with a card; it was not verified."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"net{formats.FORMATS[name].suffix}"
  formats.load(name).write(every_operation(4, 4), path)
  (folder / f"{path.name}.json").write_text(json.dumps(card_of(path, **fields)))
  return path


@pytest.fixture(scope="module")
def file(tmp_path_factory, random_run):
  """In the directory `export` of a run on the digits."""
  run = tmp_path_factory.mktemp("evaluated") / "run"
  run.mkdir()
  shutil.copy(random_run / "config.json", run)
  return write_file(run / "export")


def correct(file, batches):
  """Right answers and images, counted one by one."""
  runner = formats.load("onnx").open_file(file)
  found = [
    np.argmax(runner.run(image[None])[0]) == label
    for batch in batches
    for image, label, is_image in zip(batch["image"], batch["label"], batch["mask"], strict=True)
    if is_image
  ]
  return sum(found), len(found)


def test_a_file_is_evaluated_on_the_data_of_its_run(file, tmp_path, capsys):
  right, count = correct(file, digits().eval_batches(64))
  assert eval_file.main([str(file), f"--json={tmp_path / 'a.json'}", "--batch_size=64"]) == 0
  first, second, third = capsys.readouterr().out.splitlines()
  assert first == f"digits, split eval (the run {file.parent.parent})"
  line = rf"net.onnx: top-1 {100 * right / count:.2f} %, top-5 [\d.]+ % of 450 images; [\d,.]+ "
  assert re.match(line + r"images/s in batches of 64 \(onnxruntime [\d.]+\)$", second)
  assert third == "Its card: top-1 12.50 % of 450 evaluation images of digits"
  found = json.loads((tmp_path / "a.json").read_text())
  assert found["top1"] == 100 * right / count
  assert found["top1"] < found["top5"] <= 100
  assert found["images_per_second"] > 0
  assert (found["examples"], found["split"], found["format"]) == (450, "eval", "onnx")


def test_training_images_are_evaluated_without_changes(file, capsys):
  assert eval_file.main([str(file), "--split=train", "--threads=1"]) == 0
  printed = capsys.readouterr().out
  right, count = correct(file, digits().train_batches(0, 1347))
  assert f"top-1 {100 * right / count:.2f} %" in printed
  assert "of 1347 images" in printed
  assert "1 thread)" in printed


def test_a_file_elsewhere_needs_a_configuration(file, tmp_path, capsys):
  moved = write_file(tmp_path)
  assert eval_file.main([str(moved)]) == 2
  assert "was trained on digits, and does not lie" in capsys.readouterr().err
  assert eval_file.main([str(moved), CONFIG, FITS]) == 0
  assert eval_file.main([str(moved), f"--workdir={file.parent.parent}"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f"digits, split eval ({CONFIG})"
  assert lines[1].split(";")[0] == lines[4].split(";")[0]


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (["--split=test"], "--split=test is not allowed: digits has the splits eval and train"),
    (["--config.data.name=digit_pairs"], "digit_pairs .* has 100 classes, but .* has 10"),
    (["--config.data.image_size=32"], "image_size = 32 .* takes images of 16 pixels"),
    (["--config.data.image_sise=32"], "data.image_sise is not allowed: .*data.image_size"),
    (["--config.data.image_size=x"], "image_size=x"),
    ([CONFIG, "--workdir=x"], "--config and --workdir are not allowed together"),
    (["--config=absent.py"], "absent.py does not exist"),
    (["--workdir=/nonexistent"], "--workdir /nonexistent"),
    (["--threads=0"], "threads=0"),
    (["--batch_size=0"], "--batch_size=0"),
    (["--batch_size=1025"], "eval_batch_size = 1025"),
    (["--json="], "--json="),
    (["--json=/nonexistent/a.json"], "--json=/nonexistent/a.json"),
  ],
)
def test_what_does_not_fit_ends_in_one_message(file, capsys, arguments, named):
  assert eval_file.main([str(file), *arguments]) == 2
  errors = capsys.readouterr().err
  assert re.search(named, errors)
  assert errors.count("error: ") == 1


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"sha256": "0"}, "other bytes"),
    ({"top1": None}, "net.onnx' lacks top1 or training"),
    ({"training": {}}, "net.onnx' lacks top1 or training"),
    ({"training": {"dataset": "fashion_mnist"}}, "on fashion_mnist, but the run in .* on digits"),
    ({"input": {"type": "float32", "shape": [8], "image_size": 8}}, "profit_jax.evaluate_file"),
    ({"runtime_check": {"lowest": "99.1"}}, r"needs version 99.1 or later.*onnxruntime>=99.1"),
  ],
)
def test_a_card_that_does_not_fit(file, tmp_path, capsys, fields, named):
  other = write_file(tmp_path / "export", **fields)
  shutil.copy(file.parent.parent / "config.json", tmp_path)
  assert eval_file.main([str(other)]) == 2
  assert re.search(named, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["absent.onnx", "net.pth"])
def test_what_is_no_exported_file(tmp_path, capsys, name):
  assert eval_file.main([str(tmp_path / name)]) == 2
  assert name in capsys.readouterr().err


def test_a_file_without_a_card(file, tmp_path, capsys):
  shutil.copy(file, tmp_path)
  assert eval_file.main([str(tmp_path / "net.onnx")]) == 2
  assert "A card lies beside every exported file" in capsys.readouterr().err


def test_data_that_looks_different_is_told(tmp_path, capsys):
  pixels = {"type": "uint8", "shape": [SIZE, SIZE, 3], "image_size": SIZE}
  names = ["zero", *"123456789"]
  other = write_file(
    tmp_path, input={**pixels, "crop_pct": 0.5, "interpolation": "bilinear"}, class_names=names
  )
  assert eval_file.main([str(other), CONFIG, FITS]) == 0
  first, second, *_ = capsys.readouterr().out.splitlines()
  assert "crop_pct 1.0 and interpolation bicubic" in first
  assert "class 0 is '0' there and 'zero' in the card" in second


def test_an_older_runtime_is_refused_by_every_command(file, tmp_path, monkeypatch, capsys):
  np.save(tmp_path / "image.npy", np.zeros((SIZE, SIZE, 3), np.uint8))
  monkeypatch.setattr(runtimes, "installed", {"onnxruntime": "1.20.1"}.get)
  told = (
    "cannot be opened with onnxruntime 1.20.1: it needs version 1.23.0 or later. Install it: pip "
    'install "onnxruntime>=1.23.0". The file was exported with onnxruntime 1.32.0.'
  )
  for main, arguments in ((predict.main, [str(tmp_path / "image.npy")]), (eval_file.main, [])):
    assert main([str(file), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_runtime_that_is_not_installed(file, monkeypatch, capsys):
  monkeypatch.setattr("profit_jax.optional._is_installed", lambda name: name != "onnxruntime")
  assert eval_file.main([str(file)]) == 2
  assert 'pip install "profit_jax[onnx]"' in capsys.readouterr().err


def test_threads_of_a_runtime_that_takes_none(tmp_path):
  checked = exported.read(write_file(tmp_path, "safetensors"))
  with pytest.raises(ConfigError, match=r"threads=2 is not allowed for .*net.safetensors"):
    exported.opened(checked, threads=2)


def test_the_library_evaluates_a_file_on_own_batches(file):
  batches = [
    {"image": batch["image"], "label": batch["label"], "mask": batch["mask"]}
    for batch in digits().eval_batches(100)
  ]
  found = pj.evaluate_file(file, batches)
  right, count = verify.count_correct(
    lambda image: formats.load("onnx").open_file(file).run(image)[0], digits(), 225
  )
  assert (found.top1, found.examples) == (100 * right / count, count)
  assert str(found).startswith(f"net.onnx: top-1 {found.top1:.2f} %")
  with pytest.raises(ConfigError, match="trained on uint8 of the shape"):
    pj.evaluate_file(file, [{"image": np.zeros((2, 8, 8, 3), np.uint8), "label": np.zeros(2, int)}])


def test_the_library_evaluates_a_file_on_floats(tmp_path, capsys):
  net = own_net(own_models.Codes())
  path = tmp_path / "own.onnx"
  formats.load("onnx").write(net, path)
  pixels = {"type": "float32", "shape": net.image_shape, "image_size": net.image_shape[0]}
  card = card_of(path, input=pixels, num_classes=net.num_classes, class_names=[])
  (tmp_path / "own.onnx.json").write_text(json.dumps(card))
  images = float_images(6)
  logits, _ = formats.load("onnx").open_file(path).run(images)
  labels = np.argmax(logits, axis=1)
  batches = [{"image": images[:4], "label": labels[:4]}, {"image": images[4:], "label": labels[4:]}]
  found = pj.evaluate_file(path, batches)
  assert (found.top1, found.top5, found.examples, found.batch_size) == (100.0, 100.0, 6, 4)
  with pytest.raises(ConfigError, match="label"):
    pj.evaluate_file(path, [{"image": images, "label": np.full(6, net.num_classes)}])
  assert eval_file.main([str(path), CONFIG]) == 2
  assert "its data is in a program" in capsys.readouterr().err


def test_a_file_of_uint8_arrays_can_be_given_pictures(tmp_path, capsys):
  pixels = {"type": "uint8", "shape": [SIZE, SIZE, 3], "image_size": SIZE}
  path = write_file(tmp_path, input=pixels, training={"dataset": "own batches"})
  assert eval_file.main([str(path)]) == 2
  assert "its data is in a program" in capsys.readouterr().err
  assert eval_file.main([str(path), CONFIG, FITS]) == 0
  assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["a.onnx"], True),
    (["--workdir", "a.onnx"], False),
    (["--workdir=run", "a.onnx"], True),
    (["--workdir", "run", "a.onnx"], True),
    (["--workdir=run", "--config.seed", "1"], False),
    ([], False),
  ],
)
def test_a_file_makes_eval_another_command(arguments, expected):
  assert command_line._has_file(arguments) == expected


def test_main_py_says_which_command_evaluates_a_file():
  code, _, err = run_command("--mode=eval", "net.onnx")
  assert code == 2
  assert "An exported file is evaluated by: profit eval net.onnx" in err
