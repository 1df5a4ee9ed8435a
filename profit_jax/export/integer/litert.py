"""The format `litert_int8`: a `.tflite` file in which every operator computes on int8.

    pip install "profit_jax[litert]"

Input `image` int8 `[N, H, W, C]`, a uint8 pixel less 128 (of float images, their numbers on the
input's scale and zero point); the file says N = 1, other batches follow `resize_tensor_input`.
Output `logits` int8 `[N, num_classes]` with a scale and a zero point. Kernels are int8 with a scale
for each output channel, biases int32.

Operators are those that delegates and compilers for accelerators take: CONV_2D, DEPTHWISE_CONV_2D,
FULLY_CONNECTED, ADD, MUL, QUANTIZE, MEAN, PAD, PADV2, pooling, RESHAPE, CONCATENATION,
MAXIMUM and MINIMUM. A lower bound is a fused ReLU.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils

from profit_jax.export.integer.lower import LITERT as RUNTIME
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
from profit_jax.export.net import IMAGE, Shape
from profit_jax.kernels.padding import Border

__all__ = ["RUNTIME", "Runner", "open_file", "write"]

LOGITS = "logits"
_CODES = "profit_jax.codes"  # metadata: by quantizer, the tensor of its codes and the zero
# Of each kind of operator: its options, and the first version that takes int8.
_KINDS = {
  "ADD": (schema.AddOptionsT, 2),
  "AVERAGE_POOL_2D": (schema.Pool2DOptionsT, 2),
  "CONCATENATION": (schema.ConcatenationOptionsT, 2),
  "CONV_2D": (schema.Conv2DOptionsT, 3),
  "DEPTHWISE_CONV_2D": (schema.DepthwiseConv2DOptionsT, 3),
  "FULLY_CONNECTED": (schema.FullyConnectedOptionsT, 4),
  "MAXIMUM": (schema.MaximumMinimumOptionsT, 2),
  "MAX_POOL_2D": (schema.Pool2DOptionsT, 2),
  "MEAN": (schema.ReducerOptionsT, 2),
  "MINIMUM": (schema.MaximumMinimumOptionsT, 2),
  "MUL": (schema.MulOptionsT, 2),
  "PAD": (schema.PadOptionsT, 2),
  "PADV2": (schema.PadV2OptionsT, 2),
  "QUANTIZE": (schema.QuantizeOptionsT, 2),
  "RESHAPE": (schema.ReshapeOptionsT, 1),
}
_INT8, _INT32 = schema.TensorType.INT8, schema.TensorType.INT32
_RELU = schema.ActivationFunctionType.RELU
_RELU6 = schema.ActivationFunctionType.RELU6
_VALID, _SAME = schema.Padding.VALID, schema.Padding.SAME


def write(net: IntegerNet, path: str | os.PathLike) -> None:
  """Writes the model."""
  flatbuffer_utils.write_model(_Graph(net).model(), path)


class _Graph:
  """Appends what the operators of a net are in LiteRT."""

  def __init__(self, net: IntegerNet):
    self._net = net
    self._tensors: dict[str, schema.TensorT] = {}
    self._numbers: dict[str, int] = {}
    self._operators: list[schema.OperatorT] = []
    self._codes: dict[str, schema.OperatorCodeT] = {}
    self._buffers = [schema.BufferT()]
    self._names = {IMAGE: self._tensor(IMAGE, net.shapes[IMAGE], net.image_grid)}
    for operator in net.operators:
      name = LOGITS if operator.name == net.logits else operator.name
      self._names[operator.name] = name
      self._write(operator, name)

  def model(self) -> schema.ModelT:
    """The whole file."""
    codes = json.dumps(
      {name: [self._names[place.tensor], place.zero] for name, place in self._net.codes.items()}
    )
    subgraph = schema.SubGraphT(
      name=f"{self._net.model}_{self._net.bits_name}_int8",
      tensors=list(self._tensors.values()),
      operators=self._operators,
      inputs=[self._numbers[IMAGE]],
      outputs=[self._numbers[LOGITS]],
    )
    return schema.ModelT(
      version=3,
      description="profit_jax",
      operatorCodes=list(self._codes.values()),
      buffers=[*self._buffers, schema.BufferT(data=np.frombuffer(codes.encode(), np.uint8))],
      subgraphs=[subgraph],
      metadata=[schema.MetadataT(name=_CODES, buffer=len(self._buffers))],
    )

  def _write(self, operator: Operator, name: str) -> None:
    """An operator, and behind it the bounds that are no part of it."""
    bounds, names = _separate_bounds(operator), [name]
    for _ in bounds:
      names.append(f"{names[-1]}/unbounded")
    x = names.pop()
    getattr(self, _WRITERS[type(operator)])(operator, x)
    for kind, number in bounds.items():
      bound = self._number(f"{x}/{kind.lower()}", number, operator.grid)
      x = self._op(kind, [x, bound], self._result(operator, names.pop()))

  def _add(self, name: str, tensor: schema.TensorT) -> str:
    self._numbers[name] = len(self._tensors)
    self._tensors[name] = tensor
    return name

  def _tensor(self, name: str, shape: Shape, grid: Grid) -> str:
    """A tensor whose first axis is the batch."""
    return self._add(
      name,
      schema.TensorT(
        name=name,
        shape=[1, *shape],
        shapeSignature=[-1, *shape],
        type=_INT8,
        quantization=_parameters(np.float32([grid.scale]), grid.zero),
      ),
    )

  def _array(
    self, name: str, array: np.ndarray, scale: np.ndarray | None = None, axis: int = 0
  ) -> str:
    """A constant, int8 or int32."""
    if name in self._tensors:
      return name
    content = np.ascontiguousarray(array)
    self._buffers.append(schema.BufferT(data=content.reshape(-1).view(np.uint8)))
    return self._add(
      name,
      schema.TensorT(
        name=name,
        shape=list(content.shape),
        type=_INT8 if content.dtype == np.int8 else _INT32,
        buffer=len(self._buffers) - 1,
        quantization=None if scale is None else _parameters(scale, 0, axis),
      ),
    )

  def _number(self, name: str, number: int, grid: Grid) -> str:
    """A constant of one number."""
    self._array(name, np.int8([number]), np.float32([grid.scale]))
    self._tensors[name].quantization.zeroPoint = np.int64([grid.zero])
    return name

  def _op(self, kind: str, read: list[str], result: str, **options: Any) -> str:
    made, version = _KINDS[kind]
    if kind not in self._codes:
      number = getattr(schema.BuiltinOperator, kind)
      # Readers take the larger of the two; the older field has 7 bits.
      self._codes[kind] = schema.OperatorCodeT(
        builtinCode=number, deprecatedBuiltinCode=min(number, 127), version=version
      )
    self._operators.append(
      schema.OperatorT(
        opcodeIndex=list(self._codes).index(kind),
        inputs=[self._numbers[name] for name in read],
        outputs=[self._numbers[result]],
        builtinOptions=made(**options),
        builtinOptionsType=getattr(schema.BuiltinOptions, made.__name__.removesuffix("T")),
      )
    )
    return result

  def _result(self, operator: Operator, name: str) -> str:
    return self._tensor(name, self._net.shapes[operator.name], operator.grid)

  def _read(self, operator: Operator) -> list[str]:
    return [self._names[name] for name in operator.inputs]

  def _same(self, kind: str, operator: Operator, name: str, **options: Any) -> None:
    self._op(kind, self._read(operator), self._result(operator, name), **options)

  def _convolution(self, node: Convolution, name: str) -> None:
    (x,) = self._read(node)
    (source,) = node.inputs
    depthwise, dense = node.depthwise, node.kernel.ndim == 2
    # [F, K, K, C], depthwise [1, K, K, C], dense [F, C].
    kernel = np.moveaxis(node.kernel, 2 if depthwise else -1, 0)
    options = {"fusedActivationFunction": _activation(node)}
    kind = "FULLY_CONNECTED"
    if not dense:
      padding = _SAME
      if not self._is_same(node, source):
        x, padding = self._padded(x, node.border, f"{name}/padded"), _VALID
      kind = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
      options |= {"padding": padding, "strideH": node.stride, "strideW": node.stride}
    if depthwise:
      options["depthMultiplier"] = 1
    scale = np.float32(self._tensors[x].quantization.scale[0] * node.kernel_scale)
    read = [
      x,
      self._array(f"{name}/kernel", kernel, node.kernel_scale, 3 if depthwise else 0),
      self._array(f"{name}/bias", node.bias, scale),
    ]
    self._op(kind, read, self._result(node, name), **options)

  def _is_same(self, node: Convolution, source: str) -> bool:
    """Whether a border is what SAME gives, whose odd row is at the end."""
    size = node.kernel.shape[0]
    for around, extent in zip(node.border, self._net.shapes[source], strict=False):
      total = max(0, (-(-extent // node.stride) - 1) * node.stride + size - extent)
      if around != (total // 2, total - total // 2):
        return False
    return True

  def _padded(self, x: str, border: Border, name: str, low: bool = False) -> str:
    """A tensor with a border of its zero, or of the lowest number."""
    around = np.int32([[0, 0], *border, [0, 0]])
    if not around.any():
      return x
    tensor = self._tensors[x]
    grid = Grid(tensor.quantization.scale[0], int(tensor.quantization.zeroPoint[0]))
    shape = [int(n) for n in tensor.shape + around.sum(1)]
    self._tensor(name, tuple(shape[1:]), grid)
    read = [x, self._array("borders_" + "_".join(map(str, around.ravel())), around)]
    if low and grid.zero != LOW:
      return self._op("PADV2", [*read, self._number(f"{name}/lowest", LOW, grid)], name)
    return self._op("PAD", read, name)

  def _constant(self, node: Constant, name: str) -> None:
    self._number(name, node.value, node.grid)

  def _binary(self, node: Add | Multiply, name: str) -> None:
    kind = "ADD" if isinstance(node, Add) else "MUL"
    self._same(kind, node, name, fusedActivationFunction=_activation(node))

  def _extreme(self, node: Maximum | Minimum, name: str) -> None:
    self._same("MAXIMUM" if isinstance(node, Maximum) else "MINIMUM", node, name)

  def _requantize(self, node: Requantize, name: str) -> None:
    self._same("QUANTIZE", node, name)

  def _mean(self, node: Mean, name: str) -> None:
    read = [*self._read(node), self._array("space", np.int32([1, 2]))]
    self._op("MEAN", read, self._result(node, name), keepDims=False)

  def _pool(self, node: Pool, name: str) -> None:
    kind = "MAX_POOL_2D" if node.function == "max" else "AVERAGE_POOL_2D"
    (x,) = self._read(node)
    # Where nothing is below zero, zeros are as good as the lowest number, and delegates take them.
    low = node.function == "max" and node.low != node.grid.zero
    x = self._padded(x, node.border, f"{name}/padded", low=low)
    self._op(
      kind,
      [x],
      self._result(node, name),
      padding=_VALID,
      filterHeight=node.window[0],
      filterWidth=node.window[1],
      strideH=node.strides[0],
      strideW=node.strides[1],
    )

  def _reshape(self, node: Reshape, name: str) -> None:
    shape = [-1, *self._net.shapes[node.name]]
    to = self._array("shape_" + "_".join(map(str, shape)), np.int32(shape))
    self._op("RESHAPE", [*self._read(node), to], self._result(node, name), newShape=shape)

  def _concat(self, node: Concat, name: str) -> None:
    self._same("CONCATENATION", node, name, axis=len(self._net.shapes[node.name]))


_WRITERS = {
  Convolution: "_convolution",
  Constant: "_constant",
  Requantize: "_requantize",
  Add: "_binary",
  Multiply: "_binary",
  Maximum: "_extreme",
  Minimum: "_extreme",
  Mean: "_mean",
  Pool: "_pool",
  Reshape: "_reshape",
  Concat: "_concat",
}


def _parameters(scale: np.ndarray, zero: int, axis: int = 0) -> schema.QuantizationParametersT:
  return schema.QuantizationParametersT(
    scale=np.float32(scale),
    zeroPoint=np.full(len(scale), zero, np.int64),
    quantizedDimension=axis if len(scale) > 1 else 0,
  )


def _activation(node: Operator) -> int:
  """The fused activation, a ReLU or ReLU6 where its bounds are the node's and not int8's ends."""
  zero, six = node.grid.zero, node.grid.zero + round(6.0 / node.grid.scale)
  if node.low == zero and node.high == six < HIGH:
    return _RELU6
  return _RELU if node.low == zero != LOW else schema.ActivationFunctionType.NONE


def _separate_bounds(node: Operator) -> dict[str, int]:
  """The bounds of a result that are operators of their own, by the kind of operator."""
  if isinstance(node, Pool | Reshape | Concat):  # which give what they read
    return {}
  low, high = LOW, HIGH
  if isinstance(node, Convolution | Add | Multiply):
    fused = _activation(node)
    low = node.grid.zero if fused in (_RELU, _RELU6) else LOW
    high = node.high if fused == _RELU6 else HIGH
  bounds = {"MAXIMUM": (node.low, low), "MINIMUM": (node.high, high)}
  return {kind: wanted for kind, (wanted, given) in bounds.items() if wanted != given}


def open_file(path: str | os.PathLike, threads: int | None = None) -> "Runner":
  """Reads a file that `write` wrote; threads: of LiteRT, None leaves it to it."""
  return Runner(pathlib.Path(path).read_bytes(), threads)


class Runner:
  """The model in LiteRT, on the CPU."""

  def __init__(self, content: bytes, threads: int | None = None):
    """Args: content, of the file."""
    self._content, self._threads = content, threads
    self._interpreter = Interpreter(model_content=content, num_threads=threads)
    self._watching: Interpreter | None = None
    self._codes: dict[str, tuple[str, int]] = {}

  def run(
    self, image: np.ndarray, with_codes: bool = False
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and if asked for every quantizer's codes: those of the same model, with more
    outputs, so that the same kernels compute it.
    """
    interpreter = self._interpreter
    if with_codes:
      if self._watching is None:
        self._watching = self._with_codes()
      interpreter = self._watching
    (detail,) = interpreter.get_input_details()
    if tuple(detail["shape"]) != image.shape:
      interpreter.resize_tensor_input(detail["index"], image.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(detail["index"], _int8(image, *detail["quantization"]))
    interpreter.invoke()
    details = {detail["name"]: detail for detail in interpreter.get_output_details()}
    scale, zero = details[LOGITS]["quantization"]
    logits = np.float32(interpreter.get_tensor(details[LOGITS]["index"]))
    codes = {
      name: np.int16(interpreter.get_tensor(details[tensor]["index"])) - start
      for name, (tensor, start) in self._codes.items()
      if with_codes
    }
    return np.float32(scale) * (logits - np.float32(zero)), codes

  def _with_codes(self) -> Interpreter:
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(self._content))
    (graph,) = model.subgraphs
    (about,) = (each for each in model.metadata if each.name.decode() == _CODES)
    self._codes = json.loads(bytes(model.buffers[about.buffer].data))
    numbers = {tensor.name.decode(): number for number, tensor in enumerate(graph.tensors)}
    wanted = {LOGITS, *(tensor for tensor, _ in self._codes.values())}
    graph.outputs = [numbers[name] for name in sorted(wanted)]
    content = flatbuffer_utils.convert_object_to_bytearray(model)
    return Interpreter(model_content=bytes(content), num_threads=self._threads)


def _int8(image: np.ndarray, scale: float, zero: int) -> np.ndarray:
  """Images as the file takes them."""
  if image.dtype == np.uint8:
    return (image ^ np.uint8(128)).view(np.int8)
  return np.clip(np.round(image / np.float32(scale)) + zero, LOW, HIGH).astype(np.int8)
