"""`--mode export`: verified files with cards, and no file if something differs; then their use."""

import hashlib
import importlib.util
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_image

from profit_jax.cli import app, export, predict
from profit_jax.config import ConfigError
from profit_jax.data import preprocess
from profit_jax.data.picture import read_picture
from profit_jax.export import formats, onnx_file, runtimes, safetensors_file, verify, write
from profit_jax.export.build import build_net
from profit_jax.models import student_spec
from tests.cli.conftest import MODEL, tiny_settings, write_run
from tests.data.kinds import UNREADABLE, kinds
from tests.export.nets import NORMALIZATION, changed, digits, random_variables
from tests.wrong_input import command as run_command

ROOT = pathlib.Path(__file__).parent.parent.parent
STEM = f"{MODEL}_w4a4"


@pytest.fixture(scope="module")
def exported(random_run):
  """Its directory `export`, with all formats."""
  code, printed, err = run_command("--mode=export", f"--workdir={random_run}")
  assert code == 0, err
  lines = [line for line in printed.splitlines() if STEM in line]
  assert len(lines) == len(formats.DEFAULT)
  assert all("top-1 equal" in line for line in lines), lines
  return random_run / "export"


def test_a_run_is_evaluated_from_the_command_line(random_run):
  code, printed, err = run_command("--mode=eval", f"--workdir={random_run}")
  assert code == 0, err
  assert re.match(r"w4a4: top-1 [\d.]+ %, top-5 [\d.]+ % on 450 images", printed)


@pytest.mark.parametrize("name", formats.DEFAULT)
def test_every_file_has_a_card_that_is_true(exported, name):
  path = exported / f"{STEM}{formats.FORMATS[name].suffix}"
  card = json.loads((exported / f"{path.name}.json").read_text())
  assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert card["size"]["bytes"] == path.stat().st_size
  assert (card["weight_bits"], card["act_bits"], card["class_names"]) == (4, 4, list("0123456789"))
  assert card["top1"]["equal"]
  assert card["top1"]["examples"] == 450
  assert card["verification"]["file"]["codes"] > 100_000
  assert card["cost"]["bops"] == sum(
    layer["macs"] * layer["weight_bits"] * layer["input_bits"] for layer in card["layers"]
  )
  assert [phase["name"] for phase in card["training"]["phases"]] == ["w4a4 ft1"]
  assert set(formats.FORMATS[name].packages) <= set(card["versions"])
  found = card["runtime_check"]
  assert found.get("lowest") == runtimes.lowest(name, {4})
  text = (exported / f"{path.name}.md").read_text()
  assert card["sha256"] in text
  assert all(f"| {layer['layer']} |" in text for layer in card["layers"])
  if name == "onnx":
    assert f"| opened by | onnxruntime {found['lowest']} or later (tested: 1.15.0, " in text
    assert "| ONNX | IR version 10, opset ai.onnx 21 |" in text
    assert "- CPUExecutionProvider takes " in text


def test_nothing_else_lies_there(exported):
  assert len(list(exported.iterdir())) == 3 * len(formats.DEFAULT)


def trained_model(top1):
  """What `exported` was made of."""
  settings = tiny_settings()
  return verify.TrainedModel(
    settings=settings,
    width=1.0,
    train_examples=1347,
    source=digits(),
    spec=student_spec(settings, 10),
    variables=random_variables(settings),
    normalization=NORMALIZATION,
    weight_bits=4,
    act_bits=4,
    preparation=(1.0, "bicubic"),
    phases=[],
    weights="raw",
    full_precision_top1=99.0,
    top1=top1,
  )


class OneCodeChanged:
  """The format onnx, but one code of one kernel is wrong."""

  open_file = staticmethod(onnx_file.open_file)

  def write(self, net, path):
    (layer,) = (layer for layer in net.layers if layer.name == "block00/pointwise_conv")
    codes = layer.kernel.copy()
    # Neither channel is all zeros.
    codes[0, 0, 1, 1] += -1 if codes[0, 0, 1, 1] > 0 else 1
    onnx_file.write(changed(net, layer.name, kernel=codes), path)


def test_a_file_that_is_not_what_was_trained_is_not_kept(exported, tmp_path):
  top1 = json.loads((exported / f"{STEM}.onnx.json").read_text())["top1"]["trained"]
  for suffix in ("", ".json", ".md"):  # of an earlier export
    (tmp_path / f"{STEM}.onnx{suffix}").touch()
  screen = Console(file=io.StringIO(), width=100)
  # The second file is a right one; its format does not matter, and onnx needs no compilation.
  modules = {"onnx": OneCodeChanged(), "jax": onnx_file}
  with pytest.raises(write.NotEqual, match=r"^onnx: ") as caught:
    export.export(
      trained_model(top1), list(modules), epath.Path(tmp_path), screen, load=modules.get
    )
  assert caught.value.code == 1
  printed = screen.file.getvalue()
  row = next(line.split() for line in printed.splitlines() if "block00/pointwise_quant" in line)
  assert int(row[2].replace(",", "")) > 0
  assert "NOT EQUAL" in printed
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {f"{STEM}.jax{suffix}" for suffix in ("", ".json", ".md")}


def test_a_net_that_is_not_the_trained_model_is_not_written(tiny_v1, tmp_path, monkeypatch):
  def another_net(*arguments, **options):
    net = build_net(*arguments, **options)
    stem = net.layers[0]
    return changed(net, stem.name, multiplier=np.float32(0.9) * stem.multiplier)

  monkeypatch.setattr(write, "build_net", another_net)
  screen = Console(file=io.StringIO(), width=100)
  with pytest.raises(write.NotEqual, match="nothing was written"):
    export.export(trained_model(100.0), ["onnx"], epath.Path(tmp_path) / "export", screen)
  assert "stem_quant" in screen.file.getvalue()
  assert not list(tmp_path.iterdir())


def test_a_run_with_another_quantizer_is_exported(tiny_v1, tmp_path):
  quant = {
    "quant.method": "lsq",
    "quant.policy": "brevitas",
    "quant.rules": (("classifier", "float", 6),),
  }
  write_run(tmp_path / "lsq", best=True, **quant)
  app.main(None, str(tmp_path / "lsq"), "export", exports=app.Exports(["onnx"]))
  card = json.loads((tmp_path / "lsq" / "export" / f"{STEM}.onnx.json").read_text())
  assert [layer["weight_bits"] for layer in card["layers"]] == [8, 4, 4, 32]
  assert card["policy"]["weights"] == (
    "float32 in classifier; all others, 4 to 8 bits symmetric; 4 to 8 bits of the file each"
  )
  assert "4 to 6 bits" in card["policy"]["activations"]


def test_a_run_that_has_not_reached_its_last_bits(tiny_v1, tmp_path):
  write_run(tmp_path / "early", best=False)
  with pytest.raises(ConfigError, match="no checkpoint"):
    app.main(None, str(tmp_path / "early"), "export")


def test_a_run_whose_weights_stay_in_full_precision(tiny_v1, tmp_path):
  write_run(tmp_path / "half", best=True, **{"plan.weight_bits": ()})
  with pytest.raises(ConfigError, match="ends with a4"):
    app.main(None, str(tmp_path / "half"), "export")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
  path = tmp_path_factory.mktemp("pictures") / "flower.png"
  Image.fromarray(load_sample_image("flower.jpg")).save(path)
  return path


def test_all_formats_predict_the_same(exported, picture):
  found = [
    next(iter(predict.predict(exported / f"{STEM}{formats.FORMATS[name].suffix}", [picture])))
    for name in formats.DEFAULT
  ]
  assert len(found[0]) == 5
  assert all([name for name, _ in best] == [name for name, _ in found[0]] for best in found)
  np.testing.assert_allclose(
    [[p for _, p in best] for best in found], [[p for _, p in found[0]]] * len(found), rtol=1e-5
  )


def test_the_command_prints_the_classes_of_every_picture(exported, picture, capsys):
  file = exported / f"{STEM}.onnx"
  assert predict.main([str(file), str(picture), str(picture)]) == 0
  (best,) = predict.predict(file, [picture])
  lines = capsys.readouterr().out.splitlines()
  assert lines[:6] == lines[6:]
  assert lines[0] == str(picture)
  assert [line.split()[-1] for line in lines[1:6]] == [name for name, _ in best]


@pytest.fixture(scope="module")
def litert(exported):
  """The same net as a LiteRT file, which was not verified."""
  if importlib.util.find_spec("ai_edge_litert") is None:
    pytest.skip("ai_edge_litert is not installed")
  path = exported.parent / "litert" / f"{STEM}.tflite"
  path.parent.mkdir()
  net = safetensors_file.read(exported / f"{STEM}.safetensors")
  formats.load("litert").write(net, path)
  card = json.loads((exported / f"{STEM}.onnx.json").read_text())
  card["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
  (path.parent / f"{path.name}.json").write_text(json.dumps(card))
  return path


@pytest.mark.parametrize("name", ["onnx", "litert", "jax"])
def test_the_example_computes_the_same(exported, picture, name, request):
  file = exported / f"{STEM}{formats.FORMATS[name].suffix}"
  if name == "litert":
    file = request.getfixturevalue("litert")
  done = subprocess.run(
    [sys.executable, "-I", ROOT / "examples" / f"classify_{name}.py", file, picture],
    capture_output=True,
    text=True,
    check=True,
  )
  names, logits = zip(*map(str.split, done.stdout.splitlines()), strict=True)
  expected, probabilities = zip(*next(iter(predict.predict(file, [picture]))), strict=True)
  assert names == expected
  # Of the logarithms of probabilities, only the differences are those of logits.
  np.testing.assert_allclose(np.diff(np.float64(logits)), np.diff(np.log(probabilities)), rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # a script leaves its file to the end of the process
def test_the_example_sees_the_pixels_that_predict_sees(exported, tmp_path, monkeypatch):
  """Or it does not read the file; those few are listed."""

  class Session:
    def __init__(self, *_, **__):
      pass

    def run(self, _, inputs):
      return [np.zeros((1, 10))]

  file, picture = exported / f"{STEM}.onnx", tmp_path / "picture"
  monkeypatch.setattr(sys, "argv", ["", str(file), str(picture)])
  monkeypatch.setattr("onnxruntime.InferenceSession", Session)
  unread = set()
  for name, (content, _) in kinds().items():
    picture.write_bytes(content)
    try:
      found = runpy.run_path(str(ROOT / "examples" / "classify_onnx.py"))
    except (OSError, ValueError, SystemExit):
      unread.add(name)
      continue
    assert np.array_equal(found["pixels"][0], prepared(exported, picture)), name
  damaged = {name for name in kinds() if name.startswith("PNG wrong")} | {"PNG ICC of 3 MB"}
  rare = {"TIFF 12", "TIFF 16", "TIFF 16, white is zero", "TIFF gray, multiplied by alpha"}
  assert unread <= damaged | rare


@pytest.mark.parametrize("name", ["onnx", "litert", "jax"])
def test_the_example_prints_its_usage(name):
  if name == "litert" and importlib.util.find_spec("ai_edge_litert") is None:
    pytest.skip("ai_edge_litert is not installed")
  done = subprocess.run(
    [sys.executable, "-I", ROOT / "examples" / f"classify_{name}.py"],
    capture_output=True,
    text=True,
  )
  assert done.returncode
  suffix = formats.FORMATS[name].suffix
  assert done.stderr.splitlines()[-1] == f"usage: python classify_{name}.py FILE{suffix} IMAGE"


def test_an_exif_orientation_is_told_once_and_applied_on_request(exported, tmp_path, capsys):
  for name in ("one", "two", "plain"):
    kind = "PNG" if name == "plain" else "PNG EXIF"
    (tmp_path / name).write_bytes(kinds()[kind][0])
  files = [str(tmp_path / name) for name in ("one", "two", "plain")]
  assert predict.main([str(exported / f"{STEM}.onnx"), *files]) == 0
  told = capsys.readouterr()
  assert told.err == (
    "The EXIF orientation is ignored, as in training; --exif applies it: "
    f"{tmp_path / 'one'}, {tmp_path / 'two'}\n"
  )
  assert predict.main([str(exported / f"{STEM}.onnx"), "--exif", *files]) == 0
  turned = capsys.readouterr()
  assert not turned.err
  one = told.out.splitlines()[1:6]
  assert one == told.out.splitlines()[13:18]
  assert one != turned.out.splitlines()[1:6]
  assert told.out.splitlines()[13:] == turned.out.splitlines()[13:]


@pytest.mark.parametrize("name", ["page", "pointer", "empty", "HEIC"])
def test_predict_says_why_a_file_is_no_picture(exported, tmp_path, capsys, name):
  (tmp_path / "a.jpg").write_bytes(UNREADABLE[name][0])
  assert predict.main([str(exported / f"{STEM}.onnx"), str(tmp_path / "a.jpg")]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(f"a.jpg' cannot be read as an image: {UNREADABLE[name][1]}", line)


def test_a_name_that_is_not_utf_8_is_printed(exported, picture, tmp_path, capsys):
  path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
  shutil.copy(picture, path)
  assert predict.main([str(exported / f"{STEM}.onnx"), path]) == 0
  assert "caf\\udce9.png" in capsys.readouterr().out


def test_more_pictures_than_fit_at_once(exported, picture):
  file = exported / f"{STEM}.onnx"
  alone = next(iter(predict.predict(file, [picture])))
  many = list(predict.predict(file, [picture] * 17))
  assert len(many) == 17
  assert all([name for name, _ in best] == [name for name, _ in alone] for best in many)


def prepared(exported, picture):
  """A picture as the exported files take it."""
  pixels = json.loads((exported / f"{STEM}.onnx.json").read_text())["input"]
  return read_picture(picture, pixels["image_size"], pixels["crop_pct"], pixels["interpolation"])


def test_arrays_are_classified_like_the_pictures_they_are_made_of(
  exported, picture, tmp_path, capsys
):
  file, image = exported / f"{STEM}.onnx", prepared(exported, picture)
  np.save(tmp_path / "one.npy", image)
  np.save(tmp_path / "two.npy", np.stack([255 - image, image]))
  (expected,) = predict.predict(file, [picture])
  found = list(predict.predict(file, [tmp_path / "one.npy", tmp_path / "two.npy"]))
  assert len(found) == 3
  assert found[0] == found[2] == expected
  assert found[1] != expected
  assert predict.main([str(file), str(tmp_path / "two.npy"), str(picture)]) == 0
  names = capsys.readouterr().out.splitlines()[::6]
  assert names == [f"{tmp_path / 'two.npy'}[0]", f"{tmp_path / 'two.npy'}[1]", str(picture)]


def test_a_model_of_own_arrays_takes_arrays_only(exported, picture, tmp_path, capsys):
  file = tmp_path / f"{STEM}.onnx"
  file.write_bytes((exported / file.name).read_bytes())
  card = json.loads((exported / f"{file.name}.json").read_text())
  del card["input"]["crop_pct"], card["input"]["interpolation"]
  (tmp_path / f"{file.name}.json").write_text(json.dumps(card))
  np.save(tmp_path / "one.npy", prepared(exported, picture))
  assert list(predict.predict(file, [tmp_path / "one.npy"])) == list(
    predict.predict(exported / file.name, [picture])
  )
  assert predict.main([str(file), str(picture)]) == 2
  size = card["input"]["image_size"]
  wanted = f"Give .npy files with uint8 of the shape [{size}, {size}, 3] or [N, {size}, {size}, 3]"
  assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
  ("content", "named"),
  [
    (np.zeros((5, 5, 3), np.uint8), r"uint8 of the shape \[5, 5, 3\]: the model takes uint8"),
    (np.zeros((16, 16, 3), np.float32), "float32 of the shape .*: the model takes uint8"),
    (np.zeros((0, 16, 16, 3), np.uint8), r"\[0, 16, 16, 3\]: the model takes"),
    (np.array([{}]), "no array of numbers"),
    (b"no array", "cannot be read.*numpy.save"),
    (b"PK\3\4", "cannot be read.*numpy.save"),
    (
      b"\x93NUMPY\1\0\x60\0{'descr': '|u1', 'fortran_order': False, 'shape': (9"
      + b"0" * 37
      + b"), }\n",
      "cut off",
    ),
    (None, "No such file"),
  ],
)
def test_what_is_no_array_of_images(exported, tmp_path, content, named):
  file = tmp_path / "array.npy"
  if isinstance(content, bytes):
    file.write_bytes(content)
  elif content is not None:
    np.save(file, content)
  with pytest.raises(ConfigError, match=named):
    list(predict.predict(exported / f"{STEM}.onnx", [file]))


@pytest.mark.parametrize(
  ("make", "named"),
  [
    (lambda file, picture: (file.with_suffix(".pth"), picture), ".onnx, "),
    (lambda file, picture: (file.parent / "absent.onnx", picture), "absent.onnx"),
    (lambda file, picture: (file, ROOT / "main.py"), "main.py"),
    (lambda file, picture: (file, ROOT), str(ROOT)),
    (lambda file, picture: (file, file.parent / "absent.png"), "absent.png"),
  ],
)
def test_wrong_input_of_predict(exported, picture, capsys, make, named):
  assert predict.main(list(map(str, make(exported / f"{STEM}.onnx", picture)))) == 2
  errors = capsys.readouterr().err
  assert named in errors
  assert errors.count("error: ") == 1


@pytest.mark.parametrize("name", ["pipe.npy", "pipe.png", "pipe.onnx", "model.onnx.json"])
def test_predict_does_not_wait_for_a_pipe(exported, tmp_path, capsys, name):
  os.mkfifo(tmp_path / name)
  (tmp_path / "model.onnx").write_bytes(b"")
  model = tmp_path / (name if name == "pipe.onnx" else "model.onnx")
  if name in ("pipe.npy", "pipe.png"):
    model = exported / f"{STEM}.onnx"
  assert predict.main([str(model), str(tmp_path / name)]) == 2
  assert f"{name}' is a special file" in capsys.readouterr().err


def test_a_file_that_was_changed_after_its_verification(exported, picture, tmp_path, capsys):
  file = tmp_path / "net.onnx"
  content = bytearray((exported / f"{STEM}.onnx").read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  assert predict.main([str(file), str(picture)]) == 2
  assert "net.onnx.json" in capsys.readouterr().err
  (tmp_path / "net.onnx.json").write_text((exported / f"{STEM}.onnx.json").read_text())
  assert predict.main([str(file), str(picture)]) == 2
  assert "other bytes" in capsys.readouterr().err


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
  ("size", "share"), [((640, 427), 0.875), ((300, 1000), 0.875), ((700, 100), 1.0), ((32, 32), 1.0)]
)
def test_pictures_are_prepared_as_in_the_evaluation(tmp_path, interpolation, size, share):
  path = tmp_path / "picture.png"
  Image.fromarray(load_sample_image("china.jpg")).resize(size).save(path)
  ours = read_picture(path, 64, share, interpolation)
  theirs = preprocess.center_crop(path.read_bytes(), 64, share, interpolation).numpy()
  # Between the two axes PIL rounds to bytes, and cuts off what bicubic scaling swings beyond 0 and
  # 255, which is most where it enlarges; TensorFlow does neither.
  difference = np.abs(np.int32(ours) - np.int32(theirs))
  assert difference.max() <= (2 if min(size) > 64 else 4)
  assert difference.mean() < 0.3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
  path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
  Image.fromarray(load_sample_image("china.jpg")).resize((64, 64)).convert(mode).save(path)
  assert read_picture(path, 64, 1.0, "bicubic").shape == (64, 64, 3)
