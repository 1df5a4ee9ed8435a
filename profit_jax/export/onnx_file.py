"""The format `onnx`: integer codes in packed initializers, executed by onnxruntime.

Kernels of 3 and 4 bits stand as INT4 (opset 21), of 2 bits as INT2 (opset 25), of 5 to 8 as INT8. A
convolution that `requantize.py` finds to have one multiplication is, with its quantizer of b bits,

    Conv(kernel = Cast(codes), bias = offset) -> Relu
      -> Conv(1x1, depthwise: -factor, top + 1.5 * 2^23) -> HardSigmoid(x - 1.5 * 2^23)

in units of which the code 1 is 2^-b. Any other layer is

    Cast(codes) -> Conv -> Mul(multiplier, .) -> Add(bias)

and any other quantizer

    [Add(3/8) ->] Mul(n/a) -> Clip -> QuantizeLinear(scale 1, uint8 or int8)
      -> DequantizeLinear(scale 1)

What looks odd is deliberate (measured with onnxruntime 1.32):

- Kernels are cast, which onnxruntime does once, when it loads the file, so that its fast
  convolution takes them. It does not touch DequantizeLinear before a Conv, in the hope of a
  quantized one, computes it anew with every image and takes a slow convolution: MobileNet-v2 at 224
  pixels 31 ms instead of 9 (one core; the float model 9).
- Conv fuses with Relu and with HardSigmoid, and all stay in onnxruntime's blocked layout, which
  Mul and Add of constants, Clip and QuantizeLinear leave: MobileNet-v2 at 224 pixels 1.25 times the
  float model's time instead of 1.67. HardSigmoid cuts to 0..1, hence the unit; no code exceeds its
  largest, because Relu has cut the sums. Adding 1.5 * 2^23 units rounds, half to even.
- The multiplier is the Mul's first operand: as the second it would be multiplied into the kernel,
  and the sums were no longer whole numbers. The bias stays outside of Conv: between
  DequantizeLinear and QuantizeLinear, onnxruntime rounds it to int32 steps of the two scales, and
  3 % of the codes change without a word.
- The Clip stands before the rounding, where the result is the same: of bytes it is slow (3 of
  12 ms).
- Activation codes are carried in bytes: a Clip before a QuantizeLinear to INT4 does not load, and
  INT4 activations are slower.
- Initializers are raw bytes: as lists of numbers, INT4 files are a third larger.
- Signed codes that are pooled or reshaped pass a Clip that changes nothing: onnxruntime would move
  the DequantizeLinear behind these operations, and fails at its own QuantizeLinear of int8.
- A multiplication by n/a, and no QuantizeLinear with scale a/n, so that JAX computes the same at
  ties.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

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
_KERNEL_TYPES = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}


def write(net: Net, path: str | os.PathLike) -> None:
  """Writes the model: input `image` uint8 `[N, H, W, C]` (float32, if the net does not normalize),
  output `logits` float32 `[N, num_classes]`.
  """
  graph = Graph(net, requantizations(net))
  has_int2 = any(layer.field_bits == 2 for layer in net.layers)
  model = helper.make_model(
    helper.make_graph(
      graph.nodes,
      f"{net.model}_{net.bits_name}",
      [
        helper.make_tensor_value_info(
          IMAGE, helper.np_dtype_to_tensor_dtype(np.dtype(net.image_dtype)), ["N", *net.image_shape]
        )
      ],
      [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["N", net.num_classes])],
      graph.initializers,
    ),
    # The first that have the types of the kernels.
    opset_imports=[helper.make_opsetid("", 25 if has_int2 else 21)],
    ir_version=13 if has_int2 else 10,
    producer_name="profit_jax",
  )
  onnx.checker.check_model(model)
  onnx.save_model(model, os.fspath(path))


class Graph:
  """Appends what the nodes of a net are in ONNX; images are NCHW inside.

  How codes are written is up to `image`, `kernel` and `quantizer`; each returns the name of a
  float32 tensor.

  Attributes:
    nodes: so far.
    initializers: so far.
  """

  def __init__(self, net: Net, found: Mapping[str, Requantization] | None = None):
    """Args: net; found, the layers that are written with their quantizers, by name."""
    self._requantizations = found or {}
    self._requantized_codes = {each.quantizer.name: each for each in self._requantizations.values()}
    within = {name for each in self._requantizations.values() for name in each.activations}
    self.nodes: list[onnx.NodeProto] = []
    self.initializers: list[onnx.TensorProto] = []
    self._known: dict[tuple[float, str], str] = {}
    self._shapes = net.shapes()
    self._moved_codes = {node.input for node in net.nodes if isinstance(node, (Pool, Reshape))}
    x = IMAGE if net.normalization is None else self._normalized(net)
    self._names = {IMAGE: self._moved(x, f"{IMAGE}/nchw", self._shapes[IMAGE], [0, 3, 1, 2])}
    for node in net.nodes:
      if node.name in within:
        continue
      result = LOGITS if node is net.nodes[-1] else node.name
      self._names[node.name] = getattr(self, _WRITERS[type(node)])(node, result)

  def image(self) -> str:
    """The pixels, 0..255, of a net that normalizes them."""
    return self._op("Cast", [IMAGE], f"{IMAGE}/float", to=TensorProto.FLOAT)

  def kernel(self, node: Layer, codes: np.ndarray) -> str:
    """The codes of a kernel, given as int8 `[F, C, K, K]`, depthwise `[F, 1, K, K]`, dense
    `[C, F]`; or floats.
    """
    if not node.quantized:
      return self._array(f"{node.name}/kernel", np.ascontiguousarray(codes))
    raw = pack(np.ascontiguousarray(codes), node.field_bits).tobytes()
    name = f"{node.name}/codes"
    self.initializers.append(
      helper.make_tensor(name, _KERNEL_TYPES[node.field_bits], codes.shape, raw, raw=True)
    )
    return self._op("Cast", [name], f"{node.name}/kernel", to=TensorProto.FLOAT)

  def quantizer(self, node: Quantizer, result: str) -> str:
    """The codes of what `_scaled` gives."""
    if node.name in self._requantized_codes:
      return self._names[self._requantized_codes[node.name].layer.name]
    x, dtype = self._scaled(node), "int8" if node.signed else "uint8"
    ends = [self._constant(float(node.low)), self._constant(float(node.high))]
    x = self._op("Clip", [x, *ends], f"{node.name}/clipped")
    x = self._op(
      "QuantizeLinear", [x, self._constant(1.0), self._constant(0, dtype)], codes_of(node)
    )
    scale = [self._constant(1.0), self._constant(0, dtype)]
    if not (node.signed and node.name in self._moved_codes):
      return self._op("DequantizeLinear", [x, *scale], result)
    x = self._op("DequantizeLinear", [x, *scale], f"{node.name}/unclipped")
    return self._op("Clip", [x, *ends], result)

  def _op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
    self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
    return output

  def _normalized(self, net: Net) -> str:
    factor, summand = net.pixel_scale()
    x = self._op("Mul", [self.image(), self._array(f"{IMAGE}/factor", factor)], f"{IMAGE}/scaled")
    return self._op("Add", [x, self._array(f"{IMAGE}/summand", summand)], f"{IMAGE}/normalized")

  def _moved(self, x: str, result: str, shape: Shape, order: list[int]) -> str:
    """The transposed tensor; itself where it has no space."""
    return self._op("Transpose", [x], result, perm=order) if len(shape) == 3 else x

  def _array(self, name: str, array: np.ndarray) -> str:
    self.initializers.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return name

  def _constant(self, value: float, dtype: str = "float32") -> str:
    """The name of a scalar, which is written once."""
    if (value, dtype) not in self._known:
      self._known[value, dtype] = self._array(f"{dtype}_{value!r}", np.asarray(value, dtype))
    return self._known[value, dtype]

  def _per_channel(self, node: Layer | Affine, what: str) -> str:
    array, spatial = getattr(node, what), len(self._shapes[node.name]) == 3
    if what == "multiplier":
      array = array / self._unit(node.input)
    return self._array(f"{node.name}/{what}", array.reshape(-1, 1, 1) if spatial else array)

  def _affine(self, node: Affine, result: str) -> str:
    return self._line(node, self._names[node.input], result)

  def _line(self, node: Layer | Affine, x: str, result: str) -> str:
    x = self._op("Mul", [self._per_channel(node, "multiplier"), x], f"{node.name}/scaled")
    return self._op("Add", [x, self._per_channel(node, "bias")], result)

  def _layer(self, node: Layer, result: str) -> str:
    if node.name in self._requantizations:
      return self._requantized(self._requantizations[node.name])
    weight = self.kernel(node, node.kernel if node.dense else node.kernel.transpose(3, 2, 0, 1))
    sums = f"{node.name}/sums"
    if node.dense:
      x = self._op("MatMul", [self._names[node.input], weight], sums)
    else:
      x = self._conv(node, [weight], sums)
    return self._line(node, x, result)

  def _conv(self, node: Layer, constants: list[str], result: str) -> str:
    (above, below), (left, right) = node.border
    return self._op(
      "Conv",
      [self._names[node.input], *constants],
      result,
      group=node.kernel.shape[-1] if node.depthwise else 1,
      kernel_shape=node.kernel.shape[:2],
      pads=[above, left, below, right],
      strides=[node.stride] * 2,
    )

  def _requantized(self, found: Requantization) -> str:
    name, quantizer = found.layer.name, found.quantizer
    unit, code = self._unit(found.layer.input), self._unit(quantizer.name)
    weight = self.kernel(found.layer, found.layer.kernel.transpose(3, 2, 0, 1))
    offset = self._array(f"{name}/offset", found.offset * unit)
    x = self._op(
      "Relu", [self._conv(found.layer, [weight, offset], f"{name}/sums")], f"{name}/rest"
    )
    constants = [
      self._array(f"{name}/factor", (found.factor * (-code / unit)).reshape(-1, 1, 1, 1)),
      self._array(f"{name}/top", (found.top + ROUNDING) * code),
    ]
    x = self._op("Conv", [x, *constants], f"{name}/rounded", group=len(found.top))
    beta = -float(ROUNDING * code)
    return self._op("HardSigmoid", [x], codes_of(quantizer), alpha=1.0, beta=beta)

  def _unit(self, name: str) -> np.float32:
    """What a tensor holds for code 1."""
    found = self._requantized_codes.get(name)
    return np.float32(0.5**found.quantizer.bits if found else 1.0)

  def _scaled(self, node: Quantizer) -> str:
    x = self._names[node.input]
    if node.margin:
      x = self._op("Add", [x, self._constant(node.margin)], f"{node.name}/shifted")
    return self._op("Mul", [x, self._constant(node.inverse)], f"{node.name}/scaled")

  def _activation(self, node: Activation, result: str) -> str:
    x = self._names[node.input]
    if node.function == "relu":
      return self._op("Relu", [x], result)
    bounds = [self._constant(0.0), self._constant(6.0)]
    if node.function == "relu6":
      return self._op("Clip", [x, *bounds], result)
    # Not HardSwish and HardSigmoid, which divide before they add: other roundings.
    gate = self._op("Add", [x, self._constant(3.0)], f"{node.name}/shifted")
    gate = self._op("Clip", [gate, *bounds], f"{node.name}/gate")
    if node.function == "hard_swish":
      gate = self._op("Mul", [x, gate], f"{node.name}/gated")
    return self._op("Mul", [gate, self._constant(float(np.float32(1 / 6)))], result)

  def _value(self, node: Value, result: str) -> str:
    x = self._op(
      "Mul", [self._names[node.input], self._constant(node.scale)], f"{node.name}/scaled"
    )
    return self._op("Add", [x, self._constant(node.offset)], result)

  def _mean(self, node: Mean, result: str) -> str:
    axes = self._array(f"{node.name}/axes", np.int64([2, 3]))
    return self._op("ReduceMean", [self._names[node.input], axes], result, keepdims=0)

  def _clip(self, node: Clip, result: str) -> str:
    ends = [self._constant(node.low), self._constant(node.high)]
    return self._op("Clip", [self._names[node.input], *ends], result)

  def _pool(self, node: Pool, result: str) -> str:
    (above, below), (left, right) = node.padding
    kind, options = (
      ("MaxPool", {}) if node.function == "max" else ("AveragePool", {"count_include_pad": 1})
    )
    return self._op(
      kind,
      [self._names[node.input]],
      result,
      kernel_shape=node.window,
      strides=node.strides,
      pads=[above, left, below, right],
      **options,
    )

  def _reshape(self, node: Reshape, result: str) -> str:
    # In the order of NHWC, as in training.
    x, shape = self._names[node.input], node.shape
    x = self._moved(x, f"{node.name}/nhwc", self._shapes[node.input], [0, 2, 3, 1])
    to = self._array(f"{node.name}/shape", np.int64([0, *shape]))  # 0 keeps the batch
    last = f"{node.name}/reshaped" if len(shape) == 3 else result
    return self._moved(self._op("Reshape", [x, to], last), result, shape, [0, 3, 1, 2])

  def _concat(self, node: Concat, result: str) -> str:
    return self._op("Concat", [self._names[name] for name in inputs(node)], result, axis=1)

  def _elementwise(self, node: Elementwise, result: str) -> str:
    x, other = self._names[node.input], self._names[node.other]
    if len(self._shapes[node.other]) < len(self._shapes[node.input]):
      axes = self._array(f"{node.name}/axes", np.int64([2, 3]))
      other = self._op("Unsqueeze", [other, axes], f"{node.name}/scale")
    return self._op(_ELEMENTWISE[type(node)], [x, other], result)


_ELEMENTWISE = {Sum: "Add", Product: "Mul", Maximum: "Max", Minimum: "Min"}
_WRITERS = {  # by name, so that a subclass's method is found
  Layer: "_layer",
  Quantizer: "quantizer",
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


def codes_of(node: Quantizer) -> str:
  """The name of the tensor of a quantizer's codes, uint8 or int8."""
  return f"{node.name}/codes"


def open_file(path: str | os.PathLike, threads: int = 0) -> "Runner":
  """Reads a file that `write` wrote; threads: of onnxruntime, 0 leaves it to it."""
  return Runner(onnx.load_model(os.fspath(path)), threads)


class Runner:
  """The model in onnxruntime, on the CPU."""

  def __init__(self, model: onnx.ModelProto, threads: int = 0):
    """Args: model, as read from the file."""
    self._model, self._threads = model, threads
    self._logits, self._with_codes = _session(model, threads), None
    self._levels: dict[str, np.float32] = {}

  def run(
    self, image: np.ndarray, with_codes: bool = False
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and if asked for every quantizer's codes, NHWC: those of the same graph, with
    more outputs.
    """
    if not with_codes:
      return self._logits.run([LOGITS], {IMAGE: image})[0], {}
    if self._with_codes is None:
      self._levels = {
        node.output[0]: _levels(node)
        for node in self._model.graph.node
        if node.op_type in ("QuantizeLinear", "HardSigmoid")
      }
      observed = onnx.ModelProto()
      observed.CopyFrom(self._model)
      observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._levels)
      self._with_codes = _session(observed, self._threads)
    logits, *codes = self._with_codes.run([LOGITS, *self._levels], {IMAGE: image})
    return logits, {
      name.removesuffix("/codes"): nhwc(array * levels)
      for (name, levels), array in zip(self._levels.items(), codes, strict=True)
    }


def _levels(node: onnx.NodeProto) -> np.float32:
  """What a quantizer's codes were divided by."""
  options = {each.name: each.f for each in node.attribute}
  return -ROUNDING / np.float32(options.get("beta", -ROUNDING))


def nhwc(codes: np.ndarray) -> np.ndarray:
  """Codes `[N, C, H, W]` as `[N, H, W, C]`; `[N, C]` as they are."""
  return codes.transpose(0, 2, 3, 1) if codes.ndim == 4 else codes


def _session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.log_severity_level = 3
  return onnxruntime.InferenceSession(
    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
  )
