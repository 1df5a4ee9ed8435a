"""The formats whose runtimes are installed on request: qonnx, litert and litert_packed."""

import importlib.util

import pytest

from profit_jax.export import formats, verify
from tests.export.nets import every_operation, full_net, images, random_net
from tests.export.test_trace import OWN, float_images, mixed_net, own_net

RUNTIMES = {"qonnx": "qonnx", "litert": "ai_edge_litert", "litert_packed": "ai_edge_litert"}
# qonnx converts numpy's arrays of one number to numbers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def module_of(name):
  if importlib.util.find_spec(RUNTIMES[name]) is None:
    pytest.skip(f"{RUNTIMES[name]} is not installed")
  return formats.load(name)


def require_exact(name, net, folder, few):
  module, path = module_of(name), folder / f"net{formats.FORMATS[name].suffix}"
  module.write(net, path)
  compared = verify.compare(net, [few], verify.file_codes(module.open_file(path)))
  assert compared.exact, [row for row in compared.rows if row.differing]
  assert compared.logits < 1e-5


# Both write 3 bits as they write 4.
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_file_computes_the_references_codes(tmp_path, name, bits):
  require_exact(name, every_operation(bits, bits), tmp_path, images(8))


@pytest.mark.parametrize("make", OWN)
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_file_computes_an_own_models_codes(tmp_path, name, make):
  require_exact(name, own_net(make()), tmp_path, float_images(8))


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_file_has_the_bits_of_every_layer(tmp_path, name):
  require_exact(name, mixed_net()[0], tmp_path, images(8))


@pytest.mark.parametrize("name", ["litert", "litert_packed"])
def test_litert_computes_the_references_codes_of_a_whole_net(tmp_path, name):
  # Its delegate joins operations by what surrounds them. qonnx executes node by node.
  require_exact(name, random_net("mobilenet_v3_small", 2, 2)[2], tmp_path, images(8))


@pytest.mark.parametrize(
  ("name", "bits", "limit"),
  [("litert", 4, 3_800_000), ("litert_packed", 4, 2_100_000), ("litert_packed", 2, 1_150_000)],
)
def test_size_of_the_published_mobilenet_v2_in_litert(tmp_path, name, bits, limit):
  path = tmp_path / "net.tflite"
  module_of(name).write(full_net("mobilenet_v2", bits), path)
  assert path.stat().st_size <= limit


def test_xnnpack_takes_all_of_a_litert_file_behind_the_cast(tmp_path):
  module = module_of("litert")
  from ai_edge_litert.interpreter import Interpreter

  path = tmp_path / "net.tflite"
  module.write(random_net("mobilenet_v2", 4, 4)[2], path)
  interpreter = Interpreter(model_path=str(path))
  interpreter.allocate_tensors()
  operators = interpreter._get_ops_details()
  (delegate,) = (each for each in operators if each["op_name"] == "DELEGATE")
  (cast,) = (each for each in operators if each["op_name"] == "CAST")
  assert set(cast["outputs"]) <= set(delegate["inputs"])
  assert list(delegate["outputs"]) == [interpreter.get_output_details()[0]["index"]]


def test_qonnx_knows_that_all_are_integers(tmp_path):
  module = module_of("qonnx")
  from qonnx.core.modelwrapper import ModelWrapper

  net = every_operation(4, 4)
  path = tmp_path / "net.qonnx.onnx"
  module.write(net, path)
  model = ModelWrapper(str(path))
  kernels = {model.get_tensor_datatype(f"{layer.name}/kernel").name for layer in net.layers}
  assert kernels == {"INT4"}
  for quantizer in net.quantizers:
    assert model.get_tensor_datatype(quantizer.name).name == (
      "INT4" if quantizer.signed else "UINT4"
    )
