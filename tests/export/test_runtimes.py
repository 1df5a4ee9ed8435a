"""Which versions open a file, and what the installed one does with it."""

import importlib.util
import json
import pathlib
import re
import tomllib

import pytest

from profit_jax.export import card, formats, operators, runtimes
from profit_jax.export.net import FLOAT_BITS
from tests.export.nets import every_operation

ROOT = pathlib.Path(__file__).parent.parent.parent
KERNELS = {"int2", "int4", "int8", "float32"}
MEASURED = runtimes.facts()["formats"]


def written(folder, name, bits):
  if name.startswith("litert") and importlib.util.find_spec("ai_edge_litert") is None:
    pytest.skip("ai_edge_litert is not installed")
  path = folder / f"net{formats.FORMATS[name].suffix}"
  formats.load(name).write(every_operation(bits, bits), path)
  return path


@pytest.mark.parametrize("name", MEASURED)
def test_every_kind_of_kernel_was_tried_with_the_pinned_version(name):
  found = MEASURED[name]
  assert found["package"] == formats.FORMATS[name].opened_by
  pins = "\n".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
  assert f"\n{found['package']}=={found['versions'][-1]}" in f"\n{pins}"
  assert found["versions"] == sorted(found["versions"], key=runtimes.number)
  for kind in found["kernels"].values():
    opening = found["versions"][found["versions"].index(kind["lowest"]) :]
    assert not {*opening} & kind["fails"].keys()
    # Right below the lowest one, a version fails.
    assert kind["lowest"] == found["versions"][0] or (
      found["versions"][-len(opening) - 1] in kind["fails"]
    )


@pytest.mark.parametrize("name", MEASURED)
def test_every_kind_of_kernel_was_tried(name):
  assert MEASURED[name]["kernels"].keys() == KERNELS


@pytest.mark.parametrize(("extra", "name"), [("onnx", "onnx"), ("litert", "litert")])
def test_an_extra_installs_a_version_that_opens_every_file(extra, name):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  package = MEASURED[name]["package"]
  (bound,) = (
    re.fullmatch(rf"{package}>=([\d.]+)", text)[1]
    for text in project["optional-dependencies"][extra]
    if text.startswith(f"{package}>")
  )
  every = (2, 4, 8, FLOAT_BITS)
  assert (
    runtimes.number(bound) >= runtimes.number(runtimes.lowest(name, every))[: bound.count(".") + 1]
  )


def test_what_a_file_needs_depends_on_its_kernels():
  assert runtimes.lowest("onnx", {8, 2}) == runtimes.lowest("onnx", {2}) == "1.24.1"
  assert runtimes.lowest("onnx", {4, 8}) == runtimes.lowest("onnx", {4}) == "1.23.0"
  assert runtimes.lowest("litert_packed", {2}) == "2.1.0"
  assert runtimes.lowest("litert", {2}) == "1.0.1"
  for unknown in (("safetensors", {4}), ("onnx", set()), ("onnx", {16})):
    assert runtimes.lowest(*unknown) is None


def test_a_newer_jax_may_write_what_no_older_one_opens(monkeypatch):
  pinned = MEASURED["jax"]["versions"][-1]
  for version, known in ((pinned, True), ("0.10.0", True), ("99.0", False), (None, False)):
    monkeypatch.setattr(runtimes, "installed", {"jax": version}.get)
    assert (runtimes.lowest("jax", {4}) is not None) == known


def test_versions_are_compared_as_numbers():
  assert runtimes.number("1.9.0") < runtimes.number("1.10.0rc1") < runtimes.number("1.10.1")
  assert runtimes.installed("no-such-package") is None


@pytest.mark.parametrize(("bits", "ir", "opset"), [(4, 10, 21), (2, 13, 25)])
def test_onnxruntimes_operators(tmp_path, bits, ir, opset):
  found = operators.checked("onnxruntime", written(tmp_path, "onnx", bits))
  assert (found["ir_version"], found["opsets"]) == (ir, {"ai.onnx": opset})
  ((provider, kinds),) = found["operators"].items()
  assert provider == "CPUExecutionProvider"
  assert operators.checked("qonnx", tmp_path / "net.onnx").items() <= found.items()
  layers = every_operation(bits, bits).layers
  assert kinds["MatMul"] == sum(layer.dense for layer in layers)
  assert kinds["Conv"] >= sum(not layer.dense for layer in layers)
  assert found["integer_operators"] == 0


@pytest.mark.parametrize(("name", "bits"), [("litert_packed", 4), ("litert", 4), ("litert", 8)])
def test_operators_that_litert_delegates(tmp_path, name, bits):
  path = written(tmp_path, name, bits)
  found = operators.checked("ai-edge-litert", path)
  taken, left = (found["operators"][who] for who in ("XNNPACK", "LiteRT"))
  layers = every_operation(bits, bits).layers
  kinds = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "DEQUANTIZE")
  assert sum((taken | left).get(kind, 0) for kind in kinds) >= 2 * len(layers)
  assert "MUL" in taken
  assert left["CAST"] == 1
  # Kernels of 4 bits keep their convolutions out of the delegate, those of 8 do not.
  assert ("CONV_2D" in left, found["partitions"] > 1) == ((name == "litert_packed",) * 2)


def test_operators_between_the_parts_of_a_delegate():
  own = [
    {"index": index, "op_name": name, "inputs": inputs, "outputs": [index + 1]}
    for index, (name, inputs) in enumerate(
      [("CAST", [0]), ("ADD", [1]), ("MUL", [2]), ("CONV", [3, 9])]
    )
  ]
  parts = [{"inputs": [1], "outputs": [3]}]
  assert operators._left(own, parts, [4]) == {0: "CAST", 3: "CONV"}
  assert operators._left(own, [], [4]) == dict(enumerate(["CAST", "ADD", "MUL", "CONV"]))


def test_a_runtime_without_a_check():
  assert operators.checked(None, "net.safetensors") == operators.checked("jax", "net.jax") == {}


@pytest.mark.parametrize(
  ("found", "said"),
  [
    ({"partitions": 1, "operators": {"XNNPACK": {"ADD": 2}}}, "takes the whole file, in 1 part."),
    (
      {"partitions": 2, "operators": {"XNNPACK": {"ADD": 2}, "LiteRT": {"CAST": 1}}},
      "2 parts of the file; the operators of LiteRT itself",
    ),
    (
      {"integer_operators": 3, "operators": {"CPU": {"QGemm": 3}}},
      "3 convolutions and products are",
    ),
    ({"integer_operators": 0, "operators": {"CPU": {"Conv": 3}}}, "none is ConvInteger"),
  ],
)
def test_the_card_says_what_falls_back(found, said):
  text = "\n".join(card._operator_lines({"package": "x", "version": "1", **found}))
  assert said in text
  assert "- XNNPACK takes 2: 2 ADD." in text or "- CPU takes 3: 3 " in text


def test_the_facts_are_json_that_the_tool_writes():
  content = json.loads(runtimes.PATH.read_text())
  assert runtimes.PATH.read_text() == json.dumps(content, indent=1) + "\n"


def test_the_documentation_has_the_measured_versions():
  text = (ROOT / "docs" / "export.md").read_text()
  for name in MEASURED:
    package = MEASURED[name]["package"]
    versions = [runtimes.lowest(name, {bits}) for bits in (2, 4, 8)]
    assert f"| `{name}` | {package} | {' | '.join(versions)} |" in text
    assert versions[2] == runtimes.lowest(name, {8, FLOAT_BITS})
