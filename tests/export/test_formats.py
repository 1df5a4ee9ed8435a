"""Every format: the codes that a file computes are the reference's, and the files are as small as
they should be.
"""

import json
import sys

import numpy as np
import onnx
import pytest
import safetensors

from profit_jax.config import ConfigError
from profit_jax.export import formats, onnx_file, safetensors_file, verify
from profit_jax.export.packing import unpack
from profit_jax.export.requantize import requantizations
from tests.export.nets import every_operation, full_net, images, random_net


def written(tmp_path, name, net):
  module, path = formats.load(name), tmp_path / f"net{formats.FORMATS[name].suffix}"
  module.write(net, path)
  return module.open_file(path)


# jax and safetensors pack 3 bits as 4.
def test_safetensors_of_another_version_are_refused_by_name(tmp_path):
  path = tmp_path / "net.safetensors"
  for content, message in (
    ({"net": json.dumps({"field_bits": 4, "nodes": []})}, "exported by profit_jax 0.1.0.*again"),
    ({"net": json.dumps({"nodes": [["Spline", "name", "image"]]})}, "Spline.*another version"),
    (None, "no exported file"),
  ):
    safetensors.numpy.save_file({"tensor": np.zeros(1)}, path, content)
    with pytest.raises(ConfigError, match=message):
      safetensors_file.read(path)


@pytest.mark.parametrize(
  ("name", "bits"),
  [
    *((name, bits) for name in formats.DEFAULT for bits in (2, 4, 8)),
    ("onnx", 3),
  ],
)
def test_a_file_computes_the_references_codes(tmp_path, name, bits):
  net = every_operation(bits, bits)
  _, codes = outputs = verify.file_codes(written(tmp_path, name, net))(images())
  compared = verify.compare(net, [images()], lambda _: outputs)
  assert compared.exact, [row for row in compared.rows if row.differing]
  assert compared.logits < 1e-5
  for quantizer in net.quantizers:  # else they would be easy to agree on
    assert len(np.unique(codes[quantizer.name])) >= min(2**bits // 2, 16)


def test_onnxruntime_computes_the_references_codes_of_a_whole_net(tmp_path):
  # Its optimizer joins operations by what surrounds them.
  _, _, net = random_net("mobilenet_v3_small", 2, 2)
  compared = verify.compare(net, [images()], verify.file_codes(written(tmp_path, "onnx", net)))
  assert compared.exact, [row for row in compared.rows if row.differing]
  assert compared.logits < 1e-5


def test_safetensors_give_back_every_number(tmp_path):
  net = every_operation(3, 5)
  safetensors_file.write(net, tmp_path / "net.safetensors")
  back = safetensors_file.read(tmp_path / "net.safetensors")
  assert back[0] == net.model
  assert back[2:] == net[2:]
  for node, other in zip(net.nodes, back.nodes, strict=True):
    assert type(node) is type(other)
    for field, value in vars(node).items():
      np.testing.assert_array_equal(value, getattr(other, field), err_msg=f"{node.name} {field}")


def test_safetensors_are_as_their_documentation_says(tmp_path):
  net = every_operation(4, 4)
  safetensors_file.write(net, tmp_path / "net.safetensors")
  with safetensors.safe_open(tmp_path / "net.safetensors", "numpy") as file:
    assert set(file.keys()) == {
      f"{layer.name}.{what}" for layer in net.layers for what in ("codes", "affine")
    }
    layer = net.layers[3]
    first = file.get_tensor(f"{layer.name}.codes")[0]
  signed = [int(code) - 16 * (code > 7) for code in (first & 15, first >> 4)]
  assert signed == layer.kernel.ravel()[:2].tolist()


@pytest.mark.parametrize(
  ("bits", "kind", "opset"),
  [(2, "INT2", 25), (3, "INT4", 21), (4, "INT4", 21), (5, "INT8", 21), (8, "INT8", 21)],
)
def test_onnx_kernels_are_packed_integers(tmp_path, bits, kind, opset):
  net = every_operation(bits, 4)
  onnx_file.write(net, tmp_path / "net.onnx")
  model = onnx.load(tmp_path / "net.onnx")
  assert [entry.version for entry in model.opset_import] == [opset]
  kernels = {layer.name: layer.kernel for layer in net.layers}
  found = requantizations(net)
  tensors = {
    tensor.name.removesuffix("/codes"): tensor
    for tensor in model.graph.initializer
    if tensor.name.endswith("/codes")
  }
  assert tensors.keys() == kernels.keys()
  assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in tensors.values()} == {kind}
  for name, kernel in kernels.items():
    stored = np.frombuffer(tensors[name].raw_data, np.uint8)
    expected = kernel if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
    if name in found:  # a channel's codes may have their signs changed
      expected = found[name].layer.kernel.transpose(3, 2, 0, 1)
      np.testing.assert_array_equal(abs(found[name].layer.kernel), abs(kernel))
    width = 2 if bits == 2 else 4 if bits <= 4 else 8
    np.testing.assert_array_equal(unpack(stored, width, expected.shape), expected)
  floats = [
    tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
  ]
  assert max(np.prod(tensor.dims) for tensor in floats) == max(
    kernel.shape[-1] for kernel in kernels.values()
  )


@pytest.mark.parametrize(
  ("name", "bits", "limit"),
  [
    ("onnx", 4, 2_000_000),
    ("jax", 4, 2_100_000),
    ("safetensors", 4, 1_900_000),
    ("onnx", 2, 1_150_000),
  ],
)
def test_sizes_of_the_published_mobilenet_v2(tmp_path, name, bits, limit):
  path = tmp_path / "file"
  formats.load(name).write(full_net("mobilenet_v2", bits), path)
  assert path.stat().st_size <= limit


def test_most_of_mobilenet_v2_is_requantized_with_one_multiplication():
  net = full_net("mobilenet_v2", 4)
  assert requantizations(net).keys() == {
    layer.name for layer in net.layers if "expand" in layer.name or "depthwise" in layer.name
  }


def test_names_of_formats():
  assert formats.named(["jax", "onnx", "jax"]) == ["jax", "onnx"]
  for wrong in (["onx"], ["onnx", ""], []):
    with pytest.raises(ConfigError, match=f"--formats={','.join(wrong)} .*onnx, jax"):
      formats.named(wrong)
  suffixes = {
    ".onnx": "onnx",
    ".qonnx.onnx": "qonnx",
    ".tflite": "litert",
    ".packed.tflite": "litert_packed",
  }
  for suffix, name in suffixes.items():
    assert formats.of_file(f"a/b{suffix}") == name
  with pytest.raises(ConfigError, match=r"'net\.pth'"):
    formats.of_file("net.pth")


def test_a_package_that_is_not_installed(monkeypatch):
  monkeypatch.delitem(sys.modules, "profit_jax.export.qonnx_file", raising=False)
  for name in ["qonnx", *(name for name in sys.modules if name.startswith("qonnx."))]:
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ConfigError, match=r"needs qonnx.*pip install \"profit_jax\[qonnx\]\""):
    formats.load("qonnx")
