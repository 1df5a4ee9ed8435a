"""`--mode export`: verified files with cards, and no file if something differs; then their use."""

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from profit_jax import app
from profit_jax.data import preprocess
from profit_jax.data.picture import read_picture
from profit_jax.export import command, formats, onnx_file, predict, verify
from profit_jax.settings import ConfigError
from tests.export.conftest import write_run

ROOT = pathlib.Path(__file__).parent.parent.parent
STEM = "mobilenet_v2_w4a4"


@pytest.fixture(scope="module")
def exported(random_run):
  """Its directory `export`, with all formats."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(verify, "CODES", 500_000)
    app.main(None, str(random_run), "export")
  return random_run / "export"


@pytest.mark.parametrize("name", formats.DEFAULT)
def test_every_file_has_a_card_that_is_true(exported, name):
  path = exported / f"{STEM}{formats.FORMATS[name].suffix}"
  card = json.loads((exported / f"{path.name}.json").read_text())
  assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert card["size"]["bytes"] == path.stat().st_size
  assert (card["weight_bits"], card["act_bits"], card["class_names"]) == (4, 4, list("0123456789"))
  assert card["top1"]["equal"]
  assert card["top1"]["examples"] == 450
  assert card["verification"]["file"]["codes"] > 400_000
  assert card["cost"]["bops"] == sum(
    layer["macs"] * layer["weight_bits"] * layer["input_bits"] for layer in card["layers"]
  )
  assert [phase["name"] for phase in card["training"]["phases"]] == ["w4a4 ft1"]
  assert set(formats.FORMATS[name].packages) <= set(card["versions"])
  text = (exported / f"{path.name}.md").read_text()
  assert card["sha256"] in text
  assert all(f"| {layer['layer']} |" in text for layer in card["layers"])


def test_nothing_else_lies_there(exported):
  assert len(list(exported.iterdir())) == 3 * len(formats.DEFAULT)


def changed(net, node_name, **fields):
  nodes = tuple(
    dataclasses.replace(node, **fields) if node.name == node_name else node for node in net.nodes
  )
  return net._replace(nodes=nodes)


def test_a_file_that_is_not_what_was_trained_is_not_kept(exported, monkeypatch, capsys):
  write, path = onnx_file.write, exported / f"{STEM}.onnx"
  before = (
    path.read_bytes(),
    [(exported / f"{path.name}.{kind}").read_text() for kind in ("json", "md")],
  )

  def write_wrong(net, to):
    layer = next(layer for layer in net.layers if layer.name == "block03/project_conv")
    codes = layer.kernel.copy()
    codes[0, 0, 0, 0] += -1 if codes[0, 0, 0, 0] > 0 else 1
    write(changed(net, layer.name, kernel=codes), to)

  monkeypatch.setattr(onnx_file, "write", write_wrong)
  monkeypatch.setattr(verify, "CODES", 500_000)
  try:
    with pytest.raises(command.NotEqual, match="onnx: not what was trained") as caught:
      app.main(None, str(exported.parent), "export", export_formats=["onnx", "safetensors"])
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if "block04/input_quant" in line)
    assert int(row[2].replace(",", "")) > 0
    assert "NOT EQUAL" in printed
    assert "safetensors" in printed.splitlines()[-2]  # the others are written all the same
    assert not list(exported.glob(f"{path.name}*"))
  finally:
    path.write_bytes(before[0])
    for kind, text in zip(("json", "md"), before[1], strict=True):
      (exported / f"{path.name}.{kind}").write_text(text)


def test_another_accuracy_is_not_equal():
  assert verify.top1_equal(440, 440, 450)
  assert not verify.top1_equal(439, 440, 450)
  assert verify.top1_equal(35_001, 35_003, 50_000)  # 70.00 and 70.01 %: two images of 50,000
  assert not verify.top1_equal(35_000, 35_003, 50_000)


def test_a_run_that_has_not_reached_its_last_bits(tmp_path):
  write_run(tmp_path / "early", best=False)
  with pytest.raises(ConfigError, match="no checkpoint at the plan's last bits yet"):
    app.main(None, str(tmp_path / "early"), "export")


def test_a_run_whose_weights_stay_in_full_precision(tmp_path):
  write_run(tmp_path / "half", best=True, **{"plan.weight_bits": ()})
  with pytest.raises(ConfigError, match="the plan ends with a4, and only a run"):
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


def test_the_example_gives_the_same_classes(exported, picture):
  file = exported / f"{STEM}.onnx"
  done = subprocess.run(
    [sys.executable, "-I", ROOT / "examples" / "classify_onnx.py", file, picture],
    capture_output=True,
    text=True,
    check=True,
  )
  expected = [name for name, _ in next(iter(predict.predict(file, [picture])))]
  assert [line.split()[0] for line in done.stdout.splitlines()] == expected


def test_more_pictures_than_fit_at_once(exported, picture):
  file = exported / f"{STEM}.onnx"
  alone = next(iter(predict.predict(file, [picture])))
  many = list(predict.predict(file, [picture] * 17))
  assert len(many) == 17
  assert all([name for name, _ in best] == [name for name, _ in alone] for best in many)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda file, picture: (file.with_suffix(".pth"), picture), "its name must end in one of"),
    (lambda file, picture: (file.parent / "absent.onnx", picture), "does not exist"),
    (lambda file, picture: (file, ROOT / "main.py"), "is not an image that can be read"),
    (lambda file, picture: (file, ROOT), "is not an image that can be read"),
    (lambda file, picture: (file, file.parent / "absent.png"), "is not an image that can be read"),
  ],
)
def test_wrong_input_of_predict(exported, picture, capsys, make, message):
  assert predict.main(list(map(str, make(exported / f"{STEM}.onnx", picture)))) == 2
  errors = capsys.readouterr().err
  assert message in errors
  assert errors.count("error: ") == 1


def test_a_file_that_was_changed_after_its_verification(exported, picture, tmp_path, capsys):
  file = tmp_path / "net.onnx"
  content = bytearray((exported / f"{STEM}.onnx").read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  assert predict.main([str(file), str(picture)]) == 2
  assert "net.onnx.json cannot be read" in capsys.readouterr().err
  (tmp_path / "net.onnx.json").write_text((exported / f"{STEM}.onnx.json").read_text())
  assert predict.main([str(file), str(picture)]) == 2
  assert "is not the file that its card describes" in capsys.readouterr().err


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
