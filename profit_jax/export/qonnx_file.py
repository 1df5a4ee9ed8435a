"""The format `qonnx`: ONNX with `Quant` nodes for FPGA flows such as FINN, executed by the package
qonnx.

    pip install "profit_jax[qonnx]"

The graph is that of `onnx_file.py`, but all codes, those of kernels too, stand in float32 tensors:
a file is as large as one of floats. A kernel is `codes -> Quant`, a quantizer
`[Add(3/8) ->] Mul(n/a) -> Quant`, with scale 1, zero point 0, the number of bits, and a narrow
range where codes are signed (from -7 at 4 bits). From that qonnx infers the types, as `INT4` and
`UINT4`, which the file is annotated with; with another scale they would be no integers. Bit
operations of an image:

    from qonnx.util.inference_cost import inference_cost
    inference_cost(FILE)["total_cost"]["total_bops"]  # zeros in kernels are not counted
    inference_cost(FILE, discount_sparsity=False)["total_cost"]["total_bops"]

The input is float32, with the values of the type `UINT8` if the net normalizes; the batch is 1:
qonnx wants every shape known.
"""

import math
import os
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from qonnx.core.datatype import DataType
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.change_batchsize import ChangeBatchSize
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.transformation.infer_shapes import InferShapes

from profit_jax.export import onnx_file
from profit_jax.export.net import IMAGE, Layer, Mean, Net, Quantizer

_DOMAIN = "qonnx.custom_op.general"
# Executed at once, in pixels: the executor keeps every tensor.
_AT_ONCE = 8 * 224 * 224


def write(net: Net, path: str | os.PathLike) -> None:
  """Writes the model: input `image` float32 `[1, H, W, C]`, output `logits` float32
  `[1, num_classes]`.
  """
  graph = _Graph(net)
  model = helper.make_model(
    helper.make_graph(
      graph.nodes,
      f"{net.model}_{net.bits_name}",
      [helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, [1, *net.image_shape])],
      [helper.make_tensor_value_info(onnx_file.LOGITS, TensorProto.FLOAT, [1, net.num_classes])],
      graph.initializers,
    ),
    opset_imports=[
      helper.make_opsetid("", 13),
      helper.make_opsetid(_DOMAIN, 1),
    ],  # 13: the first with axes as inputs
    ir_version=8,
    producer_name="profit_jax",
  )
  # Here and below without qonnx's clean-up, which copies constants under random names.
  typed = ModelWrapper(model).transform(InferShapes(), cleanup=False)
  typed.set_tensor_datatype(IMAGE, DataType["UINT8" if net.normalization else "FLOAT32"])
  typed = typed.transform(InferDataTypes(), cleanup=False)
  onnx.checker.check_model(typed.model)
  typed.save(os.fspath(path))


class _Graph(onnx_file.Graph):
  """The same with Quant."""

  def image(self) -> str:
    return IMAGE

  def kernel(self, node: Layer, codes: np.ndarray) -> str:
    if not node.quantized:
      return super().kernel(node, codes)
    name = self._array(f"{node.name}/codes", np.ascontiguousarray(codes, np.float32))
    return self._quant(name, f"{node.name}/kernel", node.code_bits or node.bits, signed=True)

  def quantizer(self, node: Quantizer, result: str) -> str:
    return self._quant(self._scaled(node), result, node.bits, node.signed)

  def _mean(self, node: Mean, result: str) -> str:
    # FINN has hardware for this one, not for ReduceMean.
    x = self._op("GlobalAveragePool", [self._names[node.input]], f"{node.name}/pooled")
    return self._op("Flatten", [x], result)

  def _quant(self, x: str, result: str, bits: int, signed: bool) -> str:
    constants = [self._constant(1.0), self._constant(0.0), self._constant(float(bits))]
    options: dict[str, Any] = {
      "signed": int(signed),
      "narrow": int(signed),
      "rounding_mode": "ROUND",
    }
    return self._op("Quant", [x, *constants], result, domain=_DOMAIN, **options)


def open_file(path: str | os.PathLike) -> "Runner":
  """Reads a file that `write` wrote."""
  return Runner(ModelWrapper(os.fspath(path)))


class Runner:
  """The model in qonnx, which executes it node by node, on the CPU."""

  def __init__(self, model: ModelWrapper):
    """Args: model, as read from the file."""
    # Annotated, every tensor of integers would be searched for other values, which takes longer
    # than all the rest.
    del model.graph.quantization_annotation[:]
    constants = {array.name for array in model.graph.initializer}
    quantizers = [
      node
      for node in model.graph.node
      if node.op_type == "Quant" and node.input[0] not in constants
    ]
    self._names = [node.output[0] for node in quantizers]
    self._model = model

  def run(
    self, image: np.ndarray, with_codes: bool = False
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and if asked for every quantizer's codes, NHWC."""
    names = [onnx_file.LOGITS, *(self._names if with_codes else [])]
    size = max(1, _AT_ONCE // math.prod(image.shape[1:-1]))
    parts = [
      self._execute(image[start : start + size], names) for start in range(0, len(image), size)
    ]
    logits, *codes = [np.concatenate(tensors) for tensors in zip(*parts, strict=True)]
    return logits, {
      name: onnx_file.nhwc(array) for name, array in zip(names[1:], codes, strict=True)
    }

  def _execute(self, image: np.ndarray, names: list[str]) -> list[np.ndarray]:
    if self._model.get_tensor_shape(IMAGE)[0] != len(image):
      self._model = self._model.transform(ChangeBatchSize(len(image)), cleanup=False).transform(
        InferShapes(), cleanup=False
      )
    tensors = execute_onnx(
      self._model, {IMAGE: image.astype(np.float32)}, return_full_exec_context=True
    )
    return [tensors[name] for name in names]
