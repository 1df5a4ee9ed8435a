"""The formats whose runtimes are installed on request: `make test-extras`."""

import importlib.util

import pytest

from profit_jax.export import formats, verify
from tests.export.nets import full_net, images, random_net

RUNTIMES = {"qonnx": "qonnx", "litert": "ai_edge_litert"}


def module_of(name):
  if importlib.util.find_spec(RUNTIMES[name]) is None:
    pytest.skip(f"{RUNTIMES[name]} is not installed")
  return formats.load(name)


@pytest.mark.parametrize(
  ("model", "weight_bits", "act_bits"),
  [
    ("mobilenet_v1", 8, 8),
    ("mobilenet_v2", 3, 3),
    ("mobilenet_v3_large", 4, 4),
    ("mobilenet_v3_small", 2, 2),
  ],
)
@pytest.mark.parametrize("name", RUNTIMES)
# qonnx gives numpy's arrays of one number as numbers.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_computes_the_references_codes(tmp_path, name, model, weight_bits, act_bits):
  module = module_of(name)
  _, _, net = random_net(model, weight_bits, act_bits)
  path = tmp_path / f"net{formats.FORMATS[name].suffix}"
  module.write(net, path)
  compared = verify.compare(net, [images(count=8)], verify.file_codes(module.open_file(path)))
  assert compared.exact, [row for row in compared.rows if row.differing]
  assert compared.logits < 1e-5


@pytest.mark.parametrize(("bits", "limit"), [(4, 2_100_000), (2, 1_150_000)])
def test_size_of_the_published_mobilenet_v2_in_litert(tmp_path, bits, limit):
  path = tmp_path / "net.tflite"
  module_of("litert").write(full_net("mobilenet_v2", bits), path)
  assert path.stat().st_size <= limit


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qonnx_knows_that_all_are_integers(tmp_path):
  module = module_of("qonnx")
  from qonnx.core.modelwrapper import ModelWrapper

  _, _, net = random_net("mobilenet_v2", 4, 4)
  path = tmp_path / "net.qonnx.onnx"
  module.write(net, path)
  model = ModelWrapper(str(path))
  kernels = {model.get_tensor_datatype(f"{layer.name}/kernel").name for layer in net.layers}
  assert kernels == {"INT4"}
  for quantizer in net.quantizers:
    assert model.get_tensor_datatype(quantizer.name).name == (
      "INT4" if quantizer.signed else "UINT4"
    )
