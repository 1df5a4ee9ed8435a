"""The format `litert`: a `.tflite` file, executed by LiteRT (TensorFlow Lite's runtime).

    pip install "profit_jax[litert]"

Input `image` uint8 `[N, H, W, C]` (float32, if the net does not normalize), of which the file says
N = 1: other batches after `resize_tensor_input`. Output `logits` float32 `[N, num_classes]`.
Kernels stand as INT4 (3 and 4 bits), INT2 or INT8 (5 to 8) with scale 1. A layer is

    Dequantize(codes) -> [Pad ->] Conv2D, DepthwiseConv2D or FullyConnected
      -> Mul(multiplier) -> Add(bias)

and a quantizer `[Add(3/8) ->] Mul(n/a) -> Round -> Maximum(low) -> Minimum(high)`, its codes
float32. Kernels are dequantized once, before the first image. What is not obvious:

- The format's own Quantize rounds half away from zero; Round rounds to even, as the trained net
  does.
- `SAME` puts an even border's odd row at the end, where the trained net has it at the beginning:
  hence Pad.
- The file is written with the schema's own classes. Of the converters, those from JAX fix the batch
  and need a net of fake quantization, from which they find the codes again.
"""

import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from profit_jax.export.net import (
  IMAGE,
  Activation,
  Affine,
  Clip,
  Concat,
  Elementwise,
  Layer,
  Maximum,
  Mean,
  Minimum,
  Net,
  Pool,
  Product,
  Quantizer,
  Reshape,
  Sum,
  Value,
  inputs,
)
from profit_jax.export.packing import pack

LOGITS = "logits"
_TYPES = {
  np.dtype(np.float32): schema.TensorType.FLOAT32,
  np.dtype(np.int32): schema.TensorType.INT32,
}
_KERNEL_TYPES = {2: schema.TensorType.INT2, 4: schema.TensorType.INT4, 8: schema.TensorType.INT8}
_CODES = "/codes"  # how the names of tensors with a quantizer's codes end


def write(net: Net, path: str | os.PathLike) -> None:
  """Writes the model."""
  save(net, Graph(net), path)


def save(net: Net, graph: "Graph", path: str | os.PathLike) -> None:
  """Writes a graph of a net."""
  subgraph = schema.SubGraphT()
  subgraph.name = f"{net.model}_{net.bits_name}"
  subgraph.tensors, subgraph.operators = graph.tensors, graph.operators
  subgraph.inputs, subgraph.outputs = [graph.index(IMAGE)], [graph.index(LOGITS)]
  model = schema.ModelT()
  model.version = 3
  model.description = "profit_jax"
  model.operatorCodes, model.buffers, model.subgraphs = (
    graph.operator_codes,
    graph.buffers,
    [subgraph],
  )
  builder = flatbuffers.Builder(1 << 20)
  builder.Finish(model.Pack(builder), b"TFL3")
  pathlib.Path(path).write_bytes(bytes(builder.Output()))


class Graph:
  """Appends what the nodes of a net are in LiteRT; a tensor is known by its name.

  Attributes:
    tensors: so far.
    operators: so far.
    operator_codes: the kinds of operators.
    buffers: contents of constants; the first is empty.
  """

  def __init__(self, net: Net):
    self.tensors: list[Any] = []
    self.operators: list[Any] = []
    self.operator_codes: list[Any] = []
    self.buffers: list[Any] = [schema.BufferT()]
    self._indices: dict[str, int] = {}
    self._shapes: dict[str, tuple[int, ...]] = {}
    self._names = {IMAGE: self._image(net)}
    for node in net.nodes:
      result = LOGITS if node is net.nodes[-1] else node.name
      self._names[node.name] = getattr(self, _WRITERS[type(node)])(node, result)

  def index(self, name: str) -> int:
    """Where a tensor stands."""
    return self._indices[name]

  def _image(self, net: Net) -> str:
    shape = (1, *net.image_shape)
    if net.normalization is None:
      return self._tensor(IMAGE, shape, schema.TensorType.FLOAT32)
    self._tensor(IMAGE, shape, schema.TensorType.UINT8)
    factor, summand = net.pixel_scale()
    x = self._op("CAST", [IMAGE], f"{IMAGE}/float", shape, schema.CastOptionsT())
    x = self._mul(x, self._array(f"{IMAGE}/factor", factor), f"{IMAGE}/scaled")
    return self._add(x, self._array(f"{IMAGE}/summand", summand), f"{IMAGE}/normalized")

  def _tensor(
    self, name: str, shape: Sequence[int], kind: int, content: bytes | None = None
  ) -> str:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, 0
    if content is None:
      tensor.shapeSignature = [-1, *shape[1:]]
    else:
      buffer = schema.BufferT()
      buffer.data = np.frombuffer(content, np.uint8)
      tensor.buffer = len(self.buffers)
      self.buffers.append(buffer)
    self._indices[name], self._shapes[name] = len(self.tensors), tuple(shape)
    self.tensors.append(tensor)
    return name

  def _array(self, name: str, array: np.ndarray) -> str:
    if name not in self._indices:
      self._tensor(name, array.shape, _TYPES[array.dtype], array.tobytes())
    return name

  def _constant(self, value: float) -> str:
    return self._array(f"float32_{value!r}", np.float32([value]))

  def _op(
    self, kind: str, inputs: list[str], output: str, shape: Sequence[int], options: Any = None
  ) -> str:
    number = getattr(schema.BuiltinOperator, kind)
    known = [code.builtinCode for code in self.operator_codes]
    if number not in known:
      code = schema.OperatorCodeT()
      # Readers take the larger of the two; the older field has 7 bits.
      code.builtinCode, code.deprecatedBuiltinCode, code.version = (
        number,
        min(number, 127),
        _VERSIONS.get(kind, 1),
      )
      self.operator_codes.append(code)
      known.append(number)
    operator = schema.OperatorT()
    operator.opcodeIndex = known.index(number)
    operator.inputs = [self.index(name) if name else -1 for name in inputs]
    self._tensor(output, shape, schema.TensorType.FLOAT32)
    operator.outputs = [self.index(output)]
    if options is not None:
      operator.builtinOptions = options
      operator.builtinOptionsType = getattr(
        schema.BuiltinOptions, type(options).__name__.removesuffix("T")
      )
    self.operators.append(operator)
    return output

  def _mul(self, x: str, other: str, result: str) -> str:
    return self._op("MUL", [x, other], result, self._shapes[x], schema.MulOptionsT())

  def _add(self, x: str, other: str, result: str) -> str:
    return self._op("ADD", [x, other], result, self._shapes[x], schema.AddOptionsT())

  def _between(self, x: str, low: float, high: float, name: str, result: str) -> str:
    shape = self._shapes[x]
    x = self._op(
      "MAXIMUM", [x, self._constant(low)], f"{name}/raised", shape, schema.MaximumMinimumOptionsT()
    )
    return self._op(
      "MINIMUM", [x, self._constant(high)], result, shape, schema.MaximumMinimumOptionsT()
    )

  def _kernel(self, node: Layer) -> str:
    # [F, K, K, C], depthwise [1, K, K, C], dense [F, C].
    codes = node.kernel if node.depthwise else np.moveaxis(node.kernel, -1, 0)
    codes = np.moveaxis(codes, 2, 0) if node.depthwise else codes
    packed = pack(np.ascontiguousarray(codes), node.field_bits).tobytes()
    kind = _KERNEL_TYPES[node.field_bits]
    name = self._tensor(f"{node.name}/kernel_codes", codes.shape, kind, packed)
    tensor = self.tensors[self.index(name)]
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale, tensor.quantization.zeroPoint = np.float32([1.0]), np.int64([0])
    return self._op(
      "DEQUANTIZE", [name], f"{node.name}/kernel", codes.shape, schema.DequantizeOptionsT()
    )

  def _layer(self, node: Layer, result: str) -> str:
    x, kernel, features = self._names[node.input], self._kernel(node), node.kernel.shape[-1]
    self.tensors[self.index(kernel)].shapeSignature = None  # its first axis is no batch
    bias, sums = self._bias(node), f"{node.name}/sums"
    if node.dense:
      x = self._op(
        "FULLY_CONNECTED", [x, kernel, bias], sums, (1, features), schema.FullyConnectedOptionsT()
      )
    else:
      x = self._conv(node, x, kernel, bias)
    return self._scaled(x, node, result)

  def _bias(self, node: Layer) -> str:
    features = node.kernel.shape[-1]
    return self._array(f"zeros_{features}", np.zeros(features, np.float32))

  def _scaled(self, x: str, node: Layer | Affine, result: str) -> str:
    x = self._mul(x, self._array(f"{node.name}/multiplier", node.multiplier), f"{node.name}/scaled")
    return self._add(x, self._array(f"{node.name}/bias", node.bias), result)

  def _conv(self, node: Layer, x: str, kernel: str, bias: str) -> str:
    x = self._padded(x, ((node.margin,) * 2,) * 2, f"{node.name}/padded")
    size, stride = node.kernel.shape[0], node.stride
    space = [(n - size) // stride + 1 for n in self._shapes[x][1:3]]
    options = schema.DepthwiseConv2DOptionsT() if node.depthwise else schema.Conv2DOptionsT()
    options.padding = schema.Padding.VALID
    options.strideH = options.strideW = stride
    options.dilationHFactor = options.dilationWFactor = 1
    if node.depthwise:
      options.depthMultiplier = 1
    kind = "DEPTHWISE_CONV_2D" if node.depthwise else "CONV_2D"
    return self._op(
      kind, [x, kernel, bias], f"{node.name}/sums", (1, *space, node.kernel.shape[-1]), options
    )

  def _padded(
    self, x: str, padding: tuple[tuple[int, int], ...], name: str, value: float = 0.0
  ) -> str:
    if not any(map(any, padding)):
      return x
    (above, below), (left, right) = padding
    content = np.int32([[0, 0], [above, below], [left, right], [0, 0]])
    borders = self._array(f"borders_{above}_{below}_{left}_{right}", content)
    _, height, width, channels = self._shapes[x]
    shape = (1, height + above + below, width + left + right, channels)
    if value:
      return self._op(
        "PADV2", [x, borders, self._constant(value)], name, shape, schema.PadV2OptionsT()
      )
    return self._op("PAD", [x, borders], name, shape, schema.PadOptionsT())

  def _quantizer(self, node: Quantizer, result: str) -> str:
    x = self._names[node.input]
    if node.margin:
      x = self._add(x, self._constant(node.margin), f"{node.name}/shifted")
    x = self._mul(x, self._constant(node.inverse), f"{node.name}/scaled")
    x = self._op("ROUND", [x], f"{node.name}/rounded", self._shapes[x])
    return self._between(x, float(node.low), float(node.high), node.name, result + _CODES)

  def _activation(self, node: Activation, result: str) -> str:
    x = self._names[node.input]
    if node.function == "relu":
      return self._op("RELU", [x], result, self._shapes[x])
    if node.function == "relu6":
      return self._between(x, 0.0, 6.0, node.name, result)
    # Not HardSwish, which is computed in another order: other roundings.
    gate = self._add(x, self._constant(3.0), f"{node.name}/shifted")
    gate = self._between(gate, 0.0, 6.0, node.name, f"{node.name}/gate")
    if node.function == "hard_swish":
      gate = self._mul(x, gate, f"{node.name}/gated")
    return self._mul(gate, self._constant(float(np.float32(1 / 6))), result)

  def _value(self, node: Value, result: str) -> str:
    x = self._mul(self._names[node.input], self._constant(node.scale), f"{node.name}/scaled")
    return self._add(x, self._constant(node.offset), result)

  def _mean(self, node: Mean, result: str) -> str:
    x = self._names[node.input]
    axes = self._array("space", np.int32([1, 2]))
    return self._op("MEAN", [x, axes], result, (1, self._shapes[x][3]), schema.ReducerOptionsT())

  def _affine(self, node: Affine, result: str) -> str:
    return self._scaled(self._names[node.input], node, result)

  def _clip(self, node: Clip, result: str) -> str:
    return self._between(self._names[node.input], node.low, node.high, node.name, result)

  def _pool(self, node: Pool, result: str) -> str:
    largest = node.function == "max"
    lowest = float(np.finfo(np.float32).min) if largest else 0.0
    x = self._padded(self._names[node.input], node.padding, f"{node.name}/padded", lowest)
    options = schema.Pool2DOptionsT()
    options.padding = schema.Padding.VALID
    options.filterHeight, options.filterWidth = node.window
    options.strideH, options.strideW = node.strides
    sizes = zip(self._shapes[x][1:3], node.window, node.strides, strict=True)
    space = [(n - size) // stride + 1 for n, size, stride in sizes]
    kind = "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D"
    return self._op(kind, [x], result, (1, *space, self._shapes[x][3]), options)

  def _reshape(self, node: Reshape, result: str) -> str:
    return self._reshaped(self._names[node.input], node.shape, result)

  def _reshaped(self, x: str, shape: tuple[int, ...], result: str) -> str:
    options = schema.ReshapeOptionsT()
    options.newShape = [-1, *shape]
    name = "shape_" + "_".join(map(str, shape))
    to = self._array(name, np.int32(options.newShape))
    return self._op("RESHAPE", [x, to], result, (1, *shape), options)

  def _concat(self, node: Concat, result: str) -> str:
    read = [self._names[name] for name in inputs(node)]
    options = schema.ConcatenationOptionsT()
    shapes = [self._shapes[x] for x in read]
    options.axis = len(shapes[0]) - 1
    shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    return self._op("CONCATENATION", read, result, shape, options)

  def _elementwise(self, node: Elementwise, result: str) -> str:
    x, other = self._names[node.input], self._names[node.other]
    if len(self._shapes[other]) < len(self._shapes[x]):
      channels = self._shapes[other][1]
      other = self._reshaped(other, (1, 1, channels), f"{node.name}/gate")
    kind, options = _ELEMENTWISE[type(node)]
    shape = np.broadcast_shapes(self._shapes[x], self._shapes[other])
    return self._op(kind, [x, other], result, shape, options())


# Of operators whose first version does not take what they are given here.
_VERSIONS = {"DEQUANTIZE": 6}
_ELEMENTWISE = {
  Sum: ("ADD", schema.AddOptionsT),
  Product: ("MUL", schema.MulOptionsT),
  Maximum: ("MAXIMUM", schema.MaximumMinimumOptionsT),
  Minimum: ("MINIMUM", schema.MaximumMinimumOptionsT),
}
_WRITERS = {
  Layer: "_layer",
  Quantizer: "_quantizer",
  Activation: "_activation",
  Value: "_value",
  Mean: "_mean",
  Affine: "_affine",
  Clip: "_clip",
  Pool: "_pool",
  Reshape: "_reshape",
  Concat: "_concat",
  **dict.fromkeys(_ELEMENTWISE, "_elementwise"),
}


def open_file(path: str | os.PathLike, threads: int | None = None) -> "Runner":
  """Reads a file that `write` wrote; threads: of LiteRT, None leaves it to it."""
  return Runner(pathlib.Path(path).read_bytes(), threads)


class Runner:
  """The model in LiteRT, on the CPU."""

  def __init__(self, content: bytes, threads: int | None = None):
    """Args: content, of the file."""
    self._content, self._threads = content, threads
    self._alone = self._observed = None

  def run(
    self, image: np.ndarray, with_codes: bool = False
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and if asked for every quantizer's codes: those of the same model, its tensors
    kept.
    """
    if not with_codes:
      if self._alone is None:
        self._alone = Interpreter(model_content=self._content, num_threads=self._threads)
      return _invoke(self._alone, image), {}
    if self._observed is None:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of the memory
        self._observed = Interpreter(
          model_content=self._content,
          num_threads=self._threads,
          experimental_preserve_all_tensors=True,
        )
    logits = _invoke(self._observed, image)
    found = {
      detail["name"].removesuffix(_CODES): self._observed.get_tensor(detail["index"])
      for detail in self._observed.get_tensor_details()
      if detail["name"].endswith(_CODES)
    }
    return logits, found


def _invoke(interpreter: Interpreter, image: np.ndarray) -> np.ndarray:
  (detail,) = interpreter.get_input_details()
  if tuple(detail["shape"]) != image.shape:
    interpreter.resize_tensor_input(detail["index"], image.shape)
  interpreter.allocate_tensors()
  interpreter.set_tensor(detail["index"], image)
  interpreter.invoke()
  return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
