"""The format `litert`: a `.tflite` file, executed by LiteRT (TensorFlow Lite's runtime).

    pip install "profit_jax[litert]"

Input `image` uint8 `[N, H, W, C]` (float32, if the net does not normalize), of which the file says
N = 1: other batches after `resize_tensor_input`. Output `logits` float32 `[N, num_classes]`.
A layer is

    Dequantize(codes) -> [Pad ->] Conv2D, DepthwiseConv2D or FullyConnected
      -> Mul(multiplier) -> Add(bias)

and a quantizer `[Add(3/8) ->] Mul(n/a) -> Round -> Maximum(low) -> Minimum(high)`, its codes
float32. A convolution that `requantize.py` finds to have one multiplication is, with its quantizer,

    Dequantize(codes) -> [Pad ->] Conv2D or DepthwiseConv2D(bias = offset, ReLU)
      -> DepthwiseConv2D(1x1: -factor, top + 1.5 * 2^23) -> Add(-1.5 * 2^23, ReLU)

What is not obvious:

- Kernels are INT8 with scale 1. The XNNPACK delegate dequantizes them once, before the first image,
  and takes all operators behind the image's Cast: MobileNet-v2 at 224 pixels 1.4 times the float
  model's time (one core). It does not take a Dequantize of INT4 or INT2, so that the convolution
  behind one is LiteRT's slow one: 3.4 times. The format `litert_packed` has these, for size.
- The format's own Quantize rounds half away from zero; Round rounds to even, as the trained net
  does.
- `SAME` puts an even border's odd row at the end, where a net with torch's padding has it at the
  beginning: hence Pad. Nets that were trained with SAME have it in the file.
- The file is written with the schema's own classes. Of the converters, those from JAX fix the batch
  and need a net of fake quantization, from which they find the codes again.
"""

import functools
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils

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
  Shape,
  Sum,
  Value,
  inputs,
)
from profit_jax.export.packing import pack
from profit_jax.export.requantize import ROUNDING, Requantization, requantizations

LOGITS = "logits"
_TYPES = {
  np.dtype(np.float32): schema.TensorType.FLOAT32,
  np.dtype(np.int32): schema.TensorType.INT32,
}
_KERNEL_TYPES = {2: schema.TensorType.INT2, 4: schema.TensorType.INT4, 8: schema.TensorType.INT8}
_CODES = "/codes"  # how the names of tensors with a quantizer's codes end
# The options of each kind of operator; RELU and ROUND have none.
_OPTIONS = {
  "ADD": schema.AddOptionsT,
  "AVERAGE_POOL_2D": schema.Pool2DOptionsT,
  "CAST": schema.CastOptionsT,
  "CONCATENATION": schema.ConcatenationOptionsT,
  "CONV_2D": schema.Conv2DOptionsT,
  "DEPTHWISE_CONV_2D": schema.DepthwiseConv2DOptionsT,
  "DEQUANTIZE": schema.DequantizeOptionsT,
  "FULLY_CONNECTED": schema.FullyConnectedOptionsT,
  "MAXIMUM": schema.MaximumMinimumOptionsT,
  "MAX_POOL_2D": schema.Pool2DOptionsT,
  "MEAN": schema.ReducerOptionsT,
  "MINIMUM": schema.MaximumMinimumOptionsT,
  "MUL": schema.MulOptionsT,
  "PAD": schema.PadOptionsT,
  "PADV2": schema.PadV2OptionsT,
  "RESHAPE": schema.ReshapeOptionsT,
}
# Of operators whose first version does not take what they are given here.
_VERSIONS = {"DEQUANTIZE": 6}


def write(net: Net, path: str | os.PathLike, packed: bool = False) -> None:
  """Writes the model; packed: as small as possible, kernels of up to 4 bits as INT4 or INT2."""
  # Requantized layers have three numbers per channel instead of two.
  save(net, Graph(net, {} if packed else requantizations(net), packed), path)


def save(net: Net, graph: "Graph", path: str | os.PathLike) -> None:
  """Writes a graph of a net."""
  subgraph = schema.SubGraphT(
    name=f"{net.model}_{net.bits_name}",
    tensors=list(graph.tensors.values()),
    operators=graph.operators,
    inputs=[graph.index(IMAGE)],
    outputs=[graph.index(LOGITS)],
  )
  model = schema.ModelT(
    version=3,
    description="profit_jax",
    operatorCodes=list(graph.operator_codes.values()),
    buffers=graph.buffers,
    subgraphs=[subgraph],
  )
  flatbuffer_utils.write_model(model, path)


class Graph:
  """Appends what the nodes of a net are in LiteRT.

  Attributes:
    tensors: so far, by name.
    operators: so far.
    operator_codes: the kinds of operators so far, by name.
    buffers: contents of constants; the first is empty.
  """

  def __init__(
    self, net: Net, found: Mapping[str, Requantization] | None = None, packed: bool = False
  ):
    """Args: net; found, the layers that are written with their quantizers, by name; packed, whether
    kernels take fewer than 8 bits.
    """
    self._requantizations, self._packed = found or {}, packed
    self._requantized_codes = {
      each.quantizer.name: each.layer.name for each in self._requantizations.values()
    }
    within = {name for each in self._requantizations.values() for name in each.activations}
    self.tensors: dict[str, schema.TensorT] = {}
    self.operators: list[schema.OperatorT] = []
    self.operator_codes: dict[str, schema.OperatorCodeT] = {}
    self.buffers = [schema.BufferT()]
    self._shapes = {name: (1, *shape) for name, shape in net.shapes().items()}
    self._names = {IMAGE: self._image(net)}
    for node in net.nodes:
      if node.name in within:
        continue
      result = LOGITS if node is net.nodes[-1] else node.name
      self._names[node.name] = getattr(self, _WRITERS[type(node)])(node, result)

  def index(self, name: str) -> int:
    """The number of a tensor."""
    return list(self.tensors).index(name)

  def _image(self, net: Net) -> str:
    shape = self._shapes[IMAGE]
    if net.normalization is None:
      return self._tensor(IMAGE, shape, schema.TensorType.FLOAT32)
    self._tensor(IMAGE, shape, schema.TensorType.UINT8)
    factor, summand = net.pixel_scale()
    x = self._op("CAST", [IMAGE], f"{IMAGE}/float")
    return self._line(x, IMAGE, factor, summand, f"{IMAGE}/normalized")

  def _tensor(self, name: str, shape: Shape, kind: int, content: bytes | None = None) -> str:
    """Adds a tensor: a constant with that content, or else one whose first axis is the batch."""
    self.tensors[name] = schema.TensorT(name=name, shape=list(shape), type=kind)
    if content is None:
      self.tensors[name].shapeSignature = [-1, *shape[1:]]
    else:
      self.tensors[name].buffer = len(self.buffers)
      self.buffers.append(schema.BufferT(data=np.frombuffer(content, np.uint8)))
    return name

  def _array(self, name: str, array: np.ndarray) -> str:
    if name not in self.tensors:
      self._tensor(name, array.shape, _TYPES[array.dtype], array.tobytes())
    return name

  def _constant(self, value: float) -> str:
    return self._array(f"float32_{value!r}", np.float32([value]))

  def _op(
    self, kind: str, inputs: list[str], output: str, shape: Shape | None = None, **options: Any
  ) -> str:
    """Adds an operator; without `shape`, the output has that of the first input."""
    if kind not in self.operator_codes:
      number = getattr(schema.BuiltinOperator, kind)
      self.operator_codes[kind] = schema.OperatorCodeT(
        builtinCode=number,
        # Readers take the larger of the two; the older field has 7 bits.
        deprecatedBuiltinCode=min(number, 127),
        version=_VERSIONS.get(kind, 1),
      )
    self._tensor(output, shape or self.tensors[inputs[0]].shape, schema.TensorType.FLOAT32)
    operator = schema.OperatorT(
      opcodeIndex=list(self.operator_codes).index(kind),
      inputs=[self.index(name) for name in inputs],
      outputs=[self.index(output)],
    )
    if kind in _OPTIONS:
      operator.builtinOptions = _OPTIONS[kind](**options)
      name = _OPTIONS[kind].__name__.removesuffix("T")
      operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
    self.operators.append(operator)
    return output

  def _line(self, x: str, name: str, multiplier: np.ndarray, bias: np.ndarray, result: str) -> str:
    """`x * multiplier + bias`."""
    read = [x, self._array(f"{name}/multiplier", multiplier)]
    x = self._op("MUL", read, f"{name}/scaled")
    return self._op("ADD", [x, self._array(f"{name}/bias", bias)], result)

  def _between(self, x: str, low: float, high: float, name: str, result: str) -> str:
    x = self._op("MAXIMUM", [x, self._constant(low)], f"{name}/raised")
    return self._op("MINIMUM", [x, self._constant(high)], result)

  def _kernel(self, node: Layer) -> str:
    # [F, K, K, C], depthwise [1, K, K, C], dense [F, C].
    codes = np.moveaxis(node.kernel, 2 if node.depthwise else -1, 0)
    if not node.quantized:
      return self._array(f"{node.name}/kernel", np.ascontiguousarray(codes))
    bits = node.field_bits if self._packed else 8
    packed = pack(np.ascontiguousarray(codes), bits).tobytes()
    kind = _KERNEL_TYPES[bits]
    name = self._tensor(f"{node.name}/kernel_codes", codes.shape, kind, packed)
    self.tensors[name].quantization = schema.QuantizationParametersT(
      scale=np.float32([1.0]), zeroPoint=np.int64([0])
    )
    kernel = self._op("DEQUANTIZE", [name], f"{node.name}/kernel")
    self.tensors[kernel].shapeSignature = None  # its first axis is no batch
    return kernel

  def _layer(self, node: Layer, result: str) -> str:
    if node.name in self._requantizations:
      return self._requantized(self._requantizations[node.name])
    x = self._multiplied(node, self._bias(node), f"{node.name}/sums")
    return self._scaled(x, node, result)

  def _multiplied(self, node: Layer, bias: str, result: str, **options: Any) -> str:
    # A layer only lists its padding where it is SAME.
    padding = schema.Padding.VALID if node.padding is None else schema.Padding.SAME
    x = self._names[node.input]
    if padding == schema.Padding.VALID:
      x = self._padded(x, node.border, f"{node.name}/padded")
    kind = "FULLY_CONNECTED"
    if not node.dense:
      kind = "CONV_2D"
      options |= {"padding": padding, "strideH": node.stride, "strideW": node.stride}
    if node.depthwise:
      kind = "DEPTHWISE_CONV_2D"
      options["depthMultiplier"] = 1
    return self._op(kind, [x, self._kernel(node), bias], result, self._shapes[node.name], **options)

  def _requantized(self, found: Requantization) -> str:
    name, relu = found.layer.name, schema.ActivationFunctionType.RELU
    offset = self._array(f"{name}/offset", found.offset)
    x = self._multiplied(found.layer, offset, f"{name}/rest", fusedActivationFunction=relu)
    factor = self._array(f"{name}/factor", -found.factor.reshape(1, 1, 1, -1))
    top = self._array(f"{name}/top", found.top + ROUNDING)
    options = {"padding": schema.Padding.VALID, "strideH": 1, "strideW": 1, "depthMultiplier": 1}
    x = self._op("DEPTHWISE_CONV_2D", [x, factor, top], f"{name}/rounded", **options)
    codes = found.quantizer.name + _CODES
    read = [x, self._constant(-float(ROUNDING))]
    return self._op("ADD", read, codes, fusedActivationFunction=relu)

  def _scaled(self, x: str, node: Layer, result: str) -> str:
    return self._line(x, node.name, node.multiplier, node.bias, result)

  def _bias(self, node: Layer) -> str:
    features = node.kernel.shape[-1]
    return self._array(f"zeros_{features}", np.zeros(features, np.float32))

  def _affine(self, node: Affine, result: str) -> str:
    return self._line(self._names[node.input], node.name, node.multiplier, node.bias, result)

  def _padded(
    self, x: str, padding: tuple[tuple[int, int], ...], name: str, value: float = 0.0
  ) -> str:
    if not any(map(any, padding)):
      return x
    around = np.int32([[0, 0], *padding, [0, 0]])
    borders = self._array("borders_" + "_".join(map(str, around.ravel())), around)
    shape = [int(n) for n in self.tensors[x].shape + around.sum(1)]
    if value:
      return self._op("PADV2", [x, borders, self._constant(value)], name, shape)
    return self._op("PAD", [x, borders], name, shape)

  def _quantizer(self, node: Quantizer, result: str) -> str:
    if node.name in self._requantized_codes:
      return self._names[self._requantized_codes[node.name]]
    x = self._names[node.input]
    if node.margin:
      x = self._op("ADD", [x, self._constant(node.margin)], f"{node.name}/shifted")
    x = self._op("MUL", [x, self._constant(node.inverse)], f"{node.name}/scaled")
    x = self._op("ROUND", [x], f"{node.name}/rounded")
    return self._between(x, float(node.low), float(node.high), node.name, result + _CODES)

  def _activation(self, node: Activation, result: str) -> str:
    x = self._names[node.input]
    if node.function == "relu":
      return self._op("RELU", [x], result)
    if node.function == "relu6":
      return self._between(x, 0.0, 6.0, node.name, result)
    # Not HardSwish, which is computed in another order: other roundings.
    gate = self._op("ADD", [x, self._constant(3.0)], f"{node.name}/shifted")
    gate = self._between(gate, 0.0, 6.0, node.name, f"{node.name}/gate")
    if node.function == "hard_swish":
      gate = self._op("MUL", [x, gate], f"{node.name}/gated")
    return self._op("MUL", [gate, self._constant(float(np.float32(1 / 6)))], result)

  def _value(self, node: Value, result: str) -> str:
    scale, offset = np.float32([[node.scale], [node.offset]])
    return self._line(self._names[node.input], node.name, scale, offset, result)

  def _mean(self, node: Mean, result: str) -> str:
    axes = self._array("space", np.int32([1, 2]))
    return self._op("MEAN", [self._names[node.input], axes], result, self._shapes[node.name])

  def _clip(self, node: Clip, result: str) -> str:
    return self._between(self._names[node.input], node.low, node.high, node.name, result)

  def _pool(self, node: Pool, result: str) -> str:
    kind, lowest = "AVERAGE_POOL_2D", 0.0
    if node.function == "max":
      kind, lowest = "MAX_POOL_2D", float(np.finfo(np.float32).min)
    x = self._padded(self._names[node.input], node.padding, f"{node.name}/padded", lowest)
    height, width = node.window
    return self._op(
      kind,
      [x],
      result,
      self._shapes[node.name],
      padding=schema.Padding.VALID,
      filterHeight=height,
      filterWidth=width,
      strideH=node.strides[0],
      strideW=node.strides[1],
    )

  def _reshape(self, node: Reshape, result: str) -> str:
    return self._reshaped(self._names[node.input], node.shape, result)

  def _reshaped(self, x: str, shape: Shape, result: str) -> str:
    to = self._array("shape_" + "_".join(map(str, shape)), np.int32([-1, *shape]))
    return self._op("RESHAPE", [x, to], result, (1, *shape), newShape=[-1, *shape])

  def _concat(self, node: Concat, result: str) -> str:
    read, shape = [self._names[name] for name in inputs(node)], self._shapes[node.name]
    return self._op("CONCATENATION", read, result, shape, axis=len(shape) - 1)

  def _elementwise(self, node: Elementwise, result: str) -> str:
    other, shape = self._names[node.other], self._shapes[node.name]
    if len(self._shapes[node.other]) < len(shape):
      other = self._reshaped(other, (1, 1, shape[-1]), f"{node.name}/gate")
    return self._op(_ELEMENTWISE[type(node)], [self._names[node.input], other], result, shape)


_ELEMENTWISE = {Sum: "ADD", Product: "MUL", Maximum: "MAXIMUM", Minimum: "MINIMUM"}
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
    # Only the interpreter that keeps all tensors knows the codes; it is slower.
    self._interpreter = functools.cache(
      lambda keeps_all: Interpreter(
        model_content=content, num_threads=threads, experimental_preserve_all_tensors=keeps_all
      )
    )

  def run(
    self, image: np.ndarray, with_codes: bool = False
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and if asked for every quantizer's codes: those of the same model, its tensors
    kept.
    """
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # it warns of the memory that kept tensors take
      interpreter = self._interpreter(with_codes)
    (detail,) = interpreter.get_input_details()
    if tuple(detail["shape"]) != image.shape:
      interpreter.resize_tensor_input(detail["index"], image.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(detail["index"], image)
    interpreter.invoke()
    found = {
      detail["name"].removesuffix(_CODES): interpreter.get_tensor(detail["index"])
      for detail in interpreter.get_tensor_details()
      if with_codes and detail["name"].endswith(_CODES)
    }
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), found
