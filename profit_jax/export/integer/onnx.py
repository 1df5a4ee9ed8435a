"""The format `onnx_int8`: an ONNX file of opset 13 whose operators stand between DequantizeLinear
and QuantizeLinear (QDQ), which onnxruntime and its execution providers compute on 8 bits.

Input and output are those of the format `onnx`: `image` uint8 `[N, H, W, C]` (float32, if the net
does not normalize) and `logits` float32 `[N, num_classes]`. Tensors are uint8, what onnxruntime's
kernels are fastest with on x86; kernels are int8 with a scale for each output channel, biases
int32. What looks odd is deliberate (measured with onnxruntime 1.32):

- An upper bound is a Clip of bytes between QuantizeLinear and DequantizeLinear: 0.06 ms for a
  million of them, and the operators around it are fused as without it. A Clip of floats before
  QuantizeLinear would be dropped or would keep the convolution in float32.
- Kernels that are multiplied with 8-bit inputs keep to 7 bits: without VNNI, onnxruntime adds pairs
  of products in 16 bits, which would saturate.
- h-swish is a sum and a product, which onnxruntime computes on bytes: MobileNet-v3 large takes 4.4
  ms, where HardSigmoid between floats took 13.5 ms.
"""

import json
import os
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from profit_jax.export.integer.lower import ONNXRUNTIME as RUNTIME
from profit_jax.export.integer.net import (
  HIGH,
  LOW,
  Add,
  Concat,
  Constant,
  Convolution,
  Grid,
  IntegerNet,
  Maximum,
  Mean,
  Minimum,
  Multiply,
  Operator,
  Pool,
  Requantize,
  Reshape,
)
from profit_jax.export.net import IMAGE
from profit_jax.export.onnx_file import LOGITS, nhwc

__all__ = ["RUNTIME", "Runner", "open_file", "write"]

_OPSET, _IR_VERSION = 13, 7
_CODES = "profit_jax.codes"


def write(net: IntegerNet, path: str | os.PathLike) -> None:
  """Writes the model."""
  graph = _Graph(net)
  dtype = TensorProto.FLOAT if net.normalization is None else TensorProto.UINT8
  model = helper.make_model(
    helper.make_graph(
      graph.nodes,
      f"{net.model}_{net.bits_name}_int8",
      [helper.make_tensor_value_info(IMAGE, dtype, ["N", *net.shapes[IMAGE]])],
      [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["N", *net.shapes[net.logits]])],
      graph.initializers,
    ),
    opset_imports=[helper.make_opsetid("", _OPSET)],
    ir_version=_IR_VERSION,
    producer_name="profit_jax",
  )
  codes = {name: [graph.bytes[place.tensor], place.zero - LOW] for name, place in net.codes.items()}
  helper.set_model_props(model, {_CODES: json.dumps(codes)})
  onnx.checker.check_model(model)
  onnx.save_model(model, os.fspath(path))


class _Graph:
  """Appends what the operators of a net are in ONNX; images are NCHW inside.

  Attributes:
    nodes: so far.
    initializers: so far.
    bytes: the uint8 tensor of each tensor of the net.
  """

  def __init__(self, net: IntegerNet):
    self.nodes: list[onnx.NodeProto] = []
    self.initializers: list[onnx.TensorProto] = []
    self.bytes: dict[str, str] = {}
    self._net = net
    self._grids = {IMAGE: net.image_grid}
    self._floats: dict[str, str] = {}
    x = IMAGE
    if self._spatial(IMAGE):
      x = self._op("Transpose", [IMAGE], f"{IMAGE}/nchw", perm=[0, 3, 1, 2])
    self.bytes[IMAGE] = x
    if net.normalization is None:
      self.bytes[IMAGE] = self._quantize(x, IMAGE, net.image_grid)
    for operator in net.operators:
      self._grids[operator.name] = operator.grid
      _WRITERS[type(operator)](self, operator)
    if LOGITS not in self._floats:
      self._op("Identity", [self._float(net.logits)], LOGITS)

  def _op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
    self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
    return output

  def _array(self, name: str, array: np.ndarray) -> str:
    self.initializers.append(onnx.numpy_helper.from_array(array, name))
    return name

  def _parameters(self, name: str, grid: Grid) -> list[str]:
    return [
      self._array(f"{name}/scale", np.float32(grid.scale)),
      self._array(f"{name}/zero", np.uint8(grid.zero - LOW)),
    ]

  def _quantize(self, x: str, name: str, grid: Grid, low: int = LOW, high: int = HIGH) -> str:
    """Floats as bytes."""
    x = self._op("QuantizeLinear", [x, *self._parameters(f"{name}/to", grid)], f"{name}/bytes")
    if (low, high) == (LOW, HIGH):
      return x
    least = "" if low == LOW else self._array(f"{name}/least", np.uint8(low - LOW))
    most = "" if high == HIGH else self._array(f"{name}/most", np.uint8(high - LOW))
    return self._op("Clip", [x, least, most], f"{name}/clipped")

  def _float(self, name: str) -> str:
    """Bytes as floats. Every reader has its own operator, with which it is fused."""
    count = sum(node.op_type == "DequantizeLinear" for node in self.nodes)
    own = f"{name}/float{count}"
    return self._op(
      "DequantizeLinear", [self.bytes[name], *self._parameters(own, self._grids[name])], own
    )

  def _read(self, operator: Operator) -> list[str]:
    return [self._float(name) for name in operator.inputs]

  def _put(self, operator: Operator, x: str) -> None:
    self.bytes[operator.name] = self._quantize(
      x, operator.name, operator.grid, operator.low, operator.high
    )

  def _spatial(self, name: str) -> bool:
    return len(self._net.shapes[name]) == 3

  def _constant_of(self, name: str, array: np.ndarray, scale: np.ndarray, axis: int = 0) -> str:
    """A kernel or a bias, dequantized for each output channel."""
    read = [
      self._array(f"{name}_codes", np.ascontiguousarray(array)),
      self._array(f"{name}_scale", np.float32(scale)),
      self._array(f"{name}_zero", np.zeros(len(scale), array.dtype)),
    ]
    return self._op("DequantizeLinear", read, name, axis=axis)

  def _convolution(self, node: Convolution) -> None:
    (source,) = node.inputs
    dense = node.kernel.ndim == 2
    kernel = node.kernel.T if dense else node.kernel.transpose(3, 2, 0, 1)
    scale = np.float32(self._grids[source].scale * node.kernel_scale)
    read = [
      self._float(source),
      self._constant_of(f"{node.name}/kernel", kernel, node.kernel_scale),
      self._constant_of(f"{node.name}/bias", node.bias, scale),
    ]
    logits = node.name == self._net.logits
    result = LOGITS if logits else f"{node.name}/sums"
    if dense:
      x = self._op("Gemm", read, result, transB=1)
    else:
      (above, below), (left, right) = node.border
      x = self._op(
        "Conv",
        read,
        result,
        group=node.kernel.shape[-1] if node.depthwise else 1,
        kernel_shape=node.kernel.shape[:2],
        pads=[above, left, below, right],
        strides=[node.stride] * 2,
      )
    if logits:
      self._floats[LOGITS] = x
    else:
      self._put(node, x)

  def _constant(self, node: Constant) -> None:
    self.bytes[node.name] = self._array(node.name, np.uint8(node.value - LOW))

  def _plain(self, node: Operator) -> None:
    self._put(node, self._op(_KINDS[type(node)], self._read(node), f"{node.name}/result"))

  def _requantize(self, node: Requantize) -> None:
    (x,) = self._read(node)
    self._put(node, x)

  def _mean(self, node: Mean) -> None:
    (x,) = self._read(node)
    x = self._op("GlobalAveragePool", [x], f"{node.name}/mean")
    pooled = self._quantize(x, node.name, node.grid, node.low, node.high)
    self.bytes[node.name] = self._op("Flatten", [pooled], f"{node.name}/flat")

  def _pool(self, node: Pool) -> None:
    (above, below), (left, right) = node.border
    options = {
      "kernel_shape": node.window,
      "strides": node.strides,
      "pads": [above, left, below, right],
    }
    if node.function == "max":
      (source,) = node.inputs
      self.bytes[node.name] = self._op(
        "MaxPool", [self.bytes[source]], f"{node.name}/bytes", **options
      )
      return
    x = self._op(
      "AveragePool", self._read(node), f"{node.name}/mean", count_include_pad=1, **options
    )
    self._put(node, x)

  def _reshape(self, node: Reshape) -> None:
    # In the order of NHWC, as in training.
    (source,) = node.inputs
    x, shape = self.bytes[source], self._net.shapes[node.name]
    if self._spatial(source):
      x = self._op("Transpose", [x], f"{node.name}/nhwc", perm=[0, 2, 3, 1])
    to = self._array(f"{node.name}/shape", np.int64([0, *shape]))  # 0 keeps the batch
    x = self._op("Reshape", [x, to], f"{node.name}/reshaped")
    if self._spatial(node.name):
      x = self._op("Transpose", [x], f"{node.name}/nchw", perm=[0, 3, 1, 2])
    self.bytes[node.name] = x

  def _concat(self, node: Concat) -> None:
    read = [self.bytes[name] for name in node.inputs]
    self.bytes[node.name] = self._op("Concat", read, f"{node.name}/bytes", axis=1)


_KINDS = {Add: "Add", Multiply: "Mul", Maximum: "Max", Minimum: "Min"}
_WRITERS = {
  Convolution: _Graph._convolution,
  Constant: _Graph._constant,
  Requantize: _Graph._requantize,
  **dict.fromkeys(_KINDS, _Graph._plain),
  Mean: _Graph._mean,
  Pool: _Graph._pool,
  Reshape: _Graph._reshape,
  Concat: _Graph._concat,
}


def open_file(path: str | os.PathLike, threads: int = 0) -> "Runner":
  """Reads a file that `write` wrote; threads: of onnxruntime, 0 leaves it to it."""
  return Runner(onnx.load_model(os.fspath(path)), threads)


class Runner:
  """The model in onnxruntime, on the CPU."""

  def __init__(self, model: onnx.ModelProto, threads: int = 0):
    """Args: model, as read from the file."""
    self._model, self._threads = model, threads
    self._logits = _session(model, threads)
    self._with_codes: onnxruntime.InferenceSession | None = None
    (text,) = (prop.value for prop in model.metadata_props if prop.key == _CODES)
    self._codes: dict[str, tuple[str, int]] = json.loads(text)

  def run(
    self, image: np.ndarray, with_codes: bool = False
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and if asked for every quantizer's codes, NHWC: those of the same graph, with
    more outputs.
    """
    if not with_codes:
      return self._logits.run([LOGITS], {IMAGE: image})[0], {}
    tensors = sorted({tensor for tensor, _ in self._codes.values()})
    if self._with_codes is None:
      observed = onnx.ModelProto()
      observed.CopyFrom(self._model)
      observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
      self._with_codes = _session(observed, self._threads)
    logits, *arrays = self._with_codes.run([LOGITS, *tensors], {IMAGE: image})
    found = dict(zip(tensors, arrays, strict=True))
    return logits, {
      name: nhwc(np.int16(found[tensor]) - zero) for name, (tensor, zero) in self._codes.items()
    }


def _session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.log_severity_level = 3
  return onnxruntime.InferenceSession(
    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
  )
