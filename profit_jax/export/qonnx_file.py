"""The format `qonnx`: for FPGA flows, ONNX with `Quant` nodes, executed by the package qonnx.

    pip install -r requirements.txt -r requirements-qonnx.txt

As in `onnx_file.py`, except that all codes stand in float32 tensors, kernels too: a file is as large as one of floats.
A kernel is `codes -> Quant`, a quantizer `[Add(3/8) ->] Mul(n/a) -> Quant`, where Quant has scale 1, zero point 0 and
the number of bits. From these qonnx infers the types, `INT4` or `UINT4`; with another scale they would stay floats:

    from qonnx.util.inference_cost import inference_cost
    inference_cost(FILE)["total_cost"]["total_bops"]      # bit operations of an image

The input is float32 `[1, H, W, 3]` with the values 0..255 of the type `UINT8`, the batch 1: qonnx executes only what
has no open shape (`qonnx.transformation.change_batchsize`).
"""

import os
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from qonnx.core.datatype import DataType
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.change_batchsize import ChangeBatchSize
from qonnx.transformation.infer_shapes import InferShapes

from profit_jax.export import onnx_file
from profit_jax.export.net import IMAGE, Layer, Mean, Net, Quantizer

_DOMAIN = "qonnx.custom_op.general"


def write(net: Net, path: str | os.PathLike) -> None:
  """Writes the model: input `image` float32 `[1, H, W, 3]`, output `logits` float32 `[1, num_classes]`."""
  graph = _Graph(net)
  model = helper.make_model(
    helper.make_graph(
      graph.nodes,
      f"{net.model}_{net.bits_name}",
      [helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, [1, net.image_size, net.image_size, 3])],
      [helper.make_tensor_value_info(onnx_file.LOGITS, TensorProto.FLOAT, [1, net.num_classes])],
      graph.initializers,
    ),
    opset_imports=[helper.make_opsetid("", 13), helper.make_opsetid(_DOMAIN, 1)],  # 13: the first with axes as inputs
    ir_version=8,
    producer_name="profit_jax",
  )
  wrapper = _with_shapes(ModelWrapper(model))
  wrapper.set_tensor_datatype(IMAGE, DataType["UINT8"])
  onnx.checker.check_model(wrapper.model)
  wrapper.save(os.fspath(path))


def _with_shapes(model: ModelWrapper) -> ModelWrapper:
  # Without qonnx's clean-up, which gives tensors other names.
  return model.transform(InferShapes(), cleanup=False)


class _Graph(onnx_file.Graph):
  """The same with codes behind Quant."""

  def image(self) -> str:
    return IMAGE

  def kernel(self, node: Layer, codes: np.ndarray) -> str:
    name = self._array(f"{node.name}/codes", np.ascontiguousarray(codes, np.float32))
    return self._quant(name, f"{node.name}/kernel", node.bits, signed=True)

  def quantizer(self, node: Quantizer, result: str) -> str:
    return self._quant(self.scaled(node), result, node.bits, node.signed)

  def mean(self, node: Mean, result: str) -> str:
    # Not ReduceMean: hardware flows look for this one.
    x = self._op("GlobalAveragePool", [self._names[node.input]], f"{node.name}/pooled")
    return self._op("Flatten", [x], result)

  def _quant(self, x: str, result: str, bits: int, signed: bool) -> str:
    constants = [self._constant(1.0), self._constant(0.0), self._constant(float(bits))]
    # Narrow: from -7 at 4 bits. Unsigned codes reach 15.
    options: dict[str, Any] = {"signed": int(signed), "narrow": int(signed), "rounding_mode": "ROUND"}
    return self._op("Quant", [x, *constants], result, domain=_DOMAIN, **options)


def open_file(path: str | os.PathLike) -> "Runner":
  """Reads a file that `write` wrote."""
  return Runner(ModelWrapper(os.fspath(path)))


class Runner:
  """The model in qonnx, node by node on the CPU; all of its tensors stay in memory until the end."""

  def __init__(self, model: ModelWrapper):
    """Args: model, as read from the file."""
    self._model = model
    constants = {array.name for array in model.graph.initializer}
    self._names = [
      node.output[0] for node in model.graph.node if node.op_type == "Quant" and node.input[0] not in constants
    ]

  def run(self, image: np.ndarray, with_codes: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and if asked for every quantizer's codes, NHWC."""
    if self._model.get_tensor_shape(IMAGE) != list(image.shape):
      self._model = _with_shapes(self._model.transform(ChangeBatchSize(len(image)), cleanup=False))
    tensors = execute_onnx(self._model, {IMAGE: image.astype(np.float32)}, return_full_exec_context=True)
    codes = {name: onnx_file.nhwc(tensors[name]) for name in self._names} if with_codes else {}
    return tensors[onnx_file.LOGITS], codes
