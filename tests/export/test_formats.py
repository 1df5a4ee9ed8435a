"""Every format: the codes that a file computes are the reference's, and the files are as small as
they should be.
"""

import sys

import numpy as np
import onnx
import pytest
import safetensors

from profit_jax.export import formats, onnx_file, safetensors_file, verify
from profit_jax.export.packing import unpack
from profit_jax.settings import ConfigError
from tests.export.nets import full_net, images, random_net

DEFAULT = list(formats.DEFAULT)


@pytest.mark.parametrize(
  ("name", "model", "weight_bits", "act_bits"),
  [
    ("onnx", "mobilenet_v1", 8, 8),
    ("onnx", "mobilenet_v2", 3, 3),
    ("onnx", "mobilenet_v3_large", 4, 4),
    ("onnx", "mobilenet_v3_small", 2, 2),
    ("jax", "mobilenet_v3_small", 2, 2),
    ("jax", "mobilenet_v2", 3, 3),
    ("safetensors", "mobilenet_v3_small", 2, 2),
  ],
)
def test_a_file_computes_the_references_codes(tmp_path, name, model, weight_bits, act_bits):
  _, _, net = random_net(model, weight_bits, act_bits)
  module = formats.load(name)
  path = tmp_path / f"net{formats.FORMATS[name].suffix}"
  module.write(net, path)
  compared = verify.compare(net, [images()], verify.file_codes(module.open_file(path)))
  assert compared.exact, [row for row in compared.rows if row.differing]
  assert compared.logits < 1e-5


@pytest.mark.parametrize("model", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"])
def test_safetensors_give_back_every_number(tmp_path, model):
  _, _, net = random_net(model, 3, 5)
  safetensors_file.write(net, tmp_path / "net.safetensors")
  back = safetensors_file.read(tmp_path / "net.safetensors")
  assert back[0] == net.model
  assert back[2:] == net[2:]
  for node, other in zip(net.nodes, back.nodes, strict=True):
    assert type(node) is type(other)
    for field, value in vars(node).items():
      np.testing.assert_array_equal(value, getattr(other, field), err_msg=f"{node.name} {field}")


def test_safetensors_are_as_their_documentation_says(tmp_path):
  _, _, net = random_net("mobilenet_v2", 4, 4)
  safetensors_file.write(net, tmp_path / "net.safetensors")
  with safetensors.safe_open(tmp_path / "net.safetensors", "numpy") as file:
    assert set(file.keys()) == {
      f"{layer.name}.{what}" for layer in net.layers for what in ("codes", "affine")
    }
    layer = net.layers[3]
    low, high = (
      file.get_tensor(f"{layer.name}.codes")[0] & 15,
      file.get_tensor(f"{layer.name}.codes")[0] >> 4,
    )
  signed = [int(code) - 16 * (code > 7) for code in (low, high)]
  assert signed == layer.kernel.ravel()[:2].tolist()


@pytest.mark.parametrize(
  ("bits", "kind", "opset"),
  [(2, "INT2", 25), (3, "INT4", 21), (4, "INT4", 21), (5, "INT8", 21), (8, "INT8", 21)],
)
def test_onnx_kernels_are_packed_integers(tmp_path, bits, kind, opset):
  _, _, net = random_net("mobilenet_v1", bits, 4)
  onnx_file.write(net, tmp_path / "net.onnx")
  model = onnx.load(tmp_path / "net.onnx")
  assert [entry.version for entry in model.opset_import] == [opset]
  kernels = {
    tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith("/codes")
  }
  assert len(kernels) == len(net.layers)
  assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in kernels.values()} == {kind}
  for layer in net.layers:
    raw = np.frombuffer(kernels[f"{layer.name}/codes"].raw_data, np.uint8)
    kernel = layer.kernel if layer.dense else layer.kernel.transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(
      unpack(raw, 2 if bits == 2 else 4 if bits <= 4 else 8, kernel.shape), kernel
    )
  floats = [
    tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
  ]
  assert max(np.prod(tensor.dims) for tensor in floats) == max(
    layer.kernel.shape[-1] for layer in net.layers
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


def test_names_of_formats():
  assert formats.named(["jax", "onnx", "jax"]) == ["jax", "onnx"]
  for wrong in (["onx"], ["onnx", ""], []):
    with pytest.raises(ConfigError, match="must be one of onnx, jax, safetensors, qonnx, litert"):
      formats.named(wrong)
  assert [formats.of_file(f"a/b{suffix}") for suffix in (".onnx", ".qonnx.onnx", ".tflite")] == [
    "onnx",
    "qonnx",
    "litert",
  ]
  with pytest.raises(ConfigError, match="its name must end in one of"):
    formats.of_file("net.pth")


def test_a_package_that_is_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "qonnx", None)
  monkeypatch.delitem(sys.modules, "profit_jax.export.qonnx_file", raising=False)
  with pytest.raises(
    ConfigError, match=r"Format qonnx needs qonnx.*pip install .* requirements-qonnx\.txt"
  ):
    formats.load("qonnx")
