"""What a `.int8.tflite` file takes and gives without this package: its card, and the example."""

import collections
import importlib.util
import json
import os
import pathlib
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from profit_jax.export import card, formats, operators, runtimes
from profit_jax.export.integer import lower
from tests.export.nets import SIZE, every_operation, images
from tools import npu_operators

ROOT = pathlib.Path(__file__).parent.parent.parent
LITERT = pytest.mark.skipif(
  importlib.util.find_spec("ai_edge_litert") is None, reason="ai_edge_litert is not installed"
)
RANGES = collections.defaultdict(lambda: (-4.0, 4.0))


def written(folder, name):
  """A file of a small net, with what the example reads of a card."""
  module, path = formats.load(name), folder / f"net{formats.FORMATS[name].suffix}"
  net = every_operation(4, 4)
  module.write(lower.lower(net, RANGES, module.RUNTIME) if name.endswith("int8") else net, path)
  pixels = {"image_size": SIZE, "crop_pct": 1.0, "interpolation": "bicubic"}
  content = {"input": pixels, "class_names": list("abcdefghij")}
  (folder / f"{path.name}.json").write_text(json.dumps(content))
  return module, path


@LITERT
def test_the_card_says_what_the_file_takes_and_gives(tmp_path):
  from ai_edge_litert.interpreter import Interpreter

  module, path = written(tmp_path, "litert_int8")
  found = card._interface("litert_int8", path, every_operation(4, 4))
  taken, given = found["file_input"], found["file_output"]
  assert (taken["shape"], given["shape"]) == ([1, SIZE, SIZE, 3], [1, 10])
  assert taken["type"] == given["type"] == "int8"
  # A program that knows the card alone.
  pixel = np.int16(images(1))
  interpreter = Interpreter(os.fspath(path))
  interpreter.allocate_tensors()
  interpreter.set_tensor(0, np.int8(eval(taken["q"], {"pixel": pixel})))
  interpreter.invoke()
  q = np.float32(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
  logits = eval(given["logit"], {"q": q, **given})
  np.testing.assert_allclose(logits, module.open_file(path).run(images(1))[0], rtol=1e-6)
  rows = "\n".join(card._interface_rows(found))
  assert f"| `image`, int8 `[1, {SIZE}, {SIZE}, 3]`, q = pixel - 128; scale " in rows
  assert "logit = scale * (q - zero_point); scale " in rows


@LITERT
def test_the_card_of_a_net_of_float_images(tmp_path):
  module = formats.load("litert_int8")
  net = every_operation(4, 4)._replace(normalization=None)
  module.write(lower.lower(net, RANGES, module.RUNTIME), tmp_path / "net.int8.tflite")
  taken = card._interface("litert_int8", tmp_path / "net.int8.tflite", net)["file_input"]
  assert taken["q"].startswith("round(value / scale) + zero_point")
  assert taken["scale"] == pytest.approx(8 / 254)


def test_other_files_are_what_predict_takes():
  assert card._interface("onnx", pathlib.Path("net.onnx"), None) == {}
  assert card._interface("onnx_int8", pathlib.Path("net.int8.onnx"), None) == {}
  assert card._interface_rows({"input": {}}) == []


@pytest.mark.parametrize(
  ("example", "name"),
  [
    pytest.param("litert", "litert", marks=LITERT),
    pytest.param("litert", "litert_int8", marks=LITERT),
    ("onnx", "onnx_int8"),
  ],
)
@pytest.mark.filterwarnings("ignore")  # a script leaves its file to the end of the process
def test_the_example_classifies(tmp_path, monkeypatch, capsys, example, name):
  module, path = written(tmp_path, name)
  (image,) = images(1)
  Image.fromarray(image).save(tmp_path / "image.png")
  monkeypatch.setattr(sys, "argv", ["", str(path), str(tmp_path / "image.png")])
  runpy.run_path(str(ROOT / "examples" / f"classify_{example}.py"))
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  ((logits,), _) = module.open_file(path).run(image[None])
  best = np.sort(logits)[::-1][:5]
  np.testing.assert_allclose([float(logit) for _, logit in lines], best, rtol=1e-5)
  for class_name, logit in lines:
    assert logits["abcdefghij".index(class_name)] == pytest.approx(float(logit), rel=1e-5)


@LITERT
def test_xnnpack_takes_every_operation(tmp_path):
  _, path = written(tmp_path, "litert_int8")
  found = operators.checked("ai-edge-litert", path)
  assert found["partitions"] == 1
  assert found["operators"].keys() == {"XNNPACK"}


def test_the_lowest_versions_of_integer_files():
  for name in ("onnx_int8", "litert_int8"):
    assert runtimes.lowest(name, {2, 4, 8, 32}) == runtimes.tested(name)[0]


@pytest.mark.parametrize(
  ("output", "found"),
  [
    (
      "   NPU: Conv2D = a (outputs [1])\n   NPU: Conv2D = b (x)\n   CPU: HARD_SWISH = c (x)\n"
      "CPU operators = 1 (33.3%)\nNPU operators = 2 (66.7%)\n",
      {"NPU": {"Conv2D": 2}, "CPU": {"HARD_SWISH": 1}},
    ),
    (
      "CPU operators = 0 (0.0%)\nNPU operators = 2 (100.0%)\n",
      {"NPU": {"not listed": 2}, "CPU": {}},
    ),
  ],
)
def test_what_an_npu_takes_is_counted(tmp_path, output, found):
  vela = tmp_path / "vela"
  vela.write_text(f"#!/bin/sh\ncat << END\n{output}END\n")
  vela.chmod(0o755)
  assert npu_operators.operators(str(vela), tmp_path / "net.tflite", "ethos-u55-128") == found


def test_a_file_that_the_compiler_refuses(tmp_path):
  vela = tmp_path / "vela"
  vela.write_text("#!/bin/sh\necho 'Error: no network'\necho 'Warning: default' >&2\nexit 1\n")
  vela.chmod(0o755)
  with pytest.raises(npu_operators.NotCompiled, match="Error: no network"):
    npu_operators.operators(str(vela), tmp_path / "net.tflite", "ethos-u55-128")
