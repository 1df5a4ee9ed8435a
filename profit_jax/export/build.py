"""Trained model -> code-domain net: traces the model, simplifies, folds norms into layers.

Every export compares each quantizer's codes with those of the trained network (`verify.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from profit_jax.config import ConfigError
from profit_jax.data.normalize import Normalization
from profit_jax.export import quantizers, reference
from profit_jax.export.net import (
  IMAGE,
  Activation,
  Affine,
  Clip,
  Concat,
  Layer,
  Maximum,
  Mean,
  Minimum,
  Net,
  Node,
  Pool,
  Product,
  Quantizer,
  Reshape,
  Sum,
  Value,
)
from profit_jax.export.simplify import simplified, users
from profit_jax.export.trace import RESERVED, Operation, trace
from profit_jax.kernels.padding import border_of
from profit_jax.nn.spec import ModelSpec
from profit_jax.quant.bits import Bits

_LARGEST = float(np.finfo(np.float32).max)
_BOUNDS = {"relu": (0.0, np.inf), "relu6": (0.0, 6.0)}
_PAIRS = {"sum": Sum, "product": Product, "maximum": Maximum, "minimum": Minimum}


def build_net(
  spec: ModelSpec,
  variables: dict[str, Any],
  *,
  name: str,
  normalization: Normalization | None,
  weight_bits: int,
  act_bits: int,
) -> Net:
  """The code-domain net of a trained model.

  Args:
    spec: the model, with its quantizer.
    variables: its `params` and `batch_stats`, on the host.
    name: of the net.
    normalization: of its images, which are uint8; None takes float32 images as the model does.
    weight_bits: 2 to 8, that the model is called with.
    act_bits: likewise.

  Raises:
    ConfigError: a layer in full precision that no rule keeps there, a border that has no code, a
      quantizer or an operation that files cannot hold.
  """
  bits = spec.bits.at(weight_bits, act_bits)
  operations = simplified(trace(spec.model, variables, spec.input_shape, bits))
  nodes = _Builder(operations, variables, bits).build()
  return Net(name, nodes, spec.input_shape, normalization, weight_bits, act_bits)


class _Builder:
  """Appends nodes. A tensor is the name of the node that computes it."""

  def __init__(self, operations: list[Operation], variables: dict[str, Any], bits: Bits):
    self._operations, self._variables, self._bits = operations, variables, bits
    self._users = users(operations)
    self._paths = {*RESERVED, *(operation.path for operation in operations)}
    self._nodes: dict[str, Node] = {}
    self._names: dict[Operation, str] = {}
    # Of every tensor of codes, and of means of codes: what 1 is worth, and the value of 0.
    self._scales: dict[str, tuple[Any, float]] = {}
    self._quantizers: dict[Operation, quantizers.Activations] = {}

  def build(self) -> tuple[Node, ...]:
    """The nodes of all operations."""
    for operation in self._operations:
      # Some are part of an earlier one's node.
      if operation not in self._names:
        read = [self._names[source] for source in operation.inputs]
        self._names[operation] = _NODES[operation.kind](self, operation, *read)
    self._values(self._names[self._operations[-1]])  # an output of codes gives their values
    return tuple(self._nodes.values())

  def _append(self, kind: type[Node], name: str, **fields: Any) -> str:
    self._nodes[name] = kind(name=name, **fields)
    return name

  def _plain(self, kind: type[Node], name: str, **fields: Any) -> str:
    """A node that is no layer, under this name, or with a number where it is taken."""
    number, free = 2, name
    while free in self._nodes or free in self._paths:
      number, free = number + 1, f"{name}_{number}"
    return self._append(kind, free, **fields)

  def _beside(self, kind: type[Node], x: str, what: str, **fields: Any) -> str:
    """A node of the module in which its input is computed."""
    module = x.rpartition("/")[0]
    return self._plain(kind, f"{module}/{what}" if module else what, input=x, **fields)

  def _params(self, operation: Operation, collection: str = "params") -> Any:
    return functools.reduce(
      lambda tree, part: tree[part], operation.path.split("/"), self._variables[collection]
    )

  def _values(self, x: str) -> str:
    """A tensor of floats: what codes are worth."""
    if x not in self._scales:
      return x
    scale, offset = self._scales[x]
    name = f"{x}/value"
    if name in self._nodes:
      return name
    return self._plain(Value, name, input=x, scale=float(np.float32(scale)), offset=offset)

  def _keep_scale(self, name: str, x: str) -> str:
    if x in self._scales:
      self._scales[name] = self._scales[x]
    return name

  def _image(self, operation: Operation) -> str:
    del operation
    return IMAGE

  def _layer(self, operation: Operation, x: str) -> str:
    """A convolution or a dense layer, and the affine maps behind it that nothing else reads."""
    params, values = self._params(operation), operation.values
    if self._bits.never(operation.path):
      kernel = quantizers.float_kernel(params)
    else:
      kernel = quantizers.quantized_kernel(
        operation.path, params, _qmax(operation, "weights"), values["quantizer"]
      )
    gain = np.ones(kernel.codes.shape[-1])
    shift = np.float64(params["bias"]) if "bias" in params else np.zeros_like(gain)
    parts = [operation]
    while True:
      (follower, *others) = self._users[parts[-1]]
      if others or follower is None or follower.kind not in ("norm", "affine"):
        break
      more, summand = self._line(follower)
      gain, shift = gain * more, shift * more + summand
      parts.append(follower)
    codes, worth = kernel.codes, kernel.scale
    if operation.kind == "conv" and codes.shape[0] > 1:
      x = self._with_border(operation, x)
    scale, offset = self._scales.get(x, (1.0, 0.0))
    sums = codes.sum(axis=tuple(range(codes.ndim - 1)), dtype=np.float64)
    shape = {}
    if operation.kind == "conv":
      shape = {"stride": values["stride"], "depthwise": values["depthwise"]}
      border = border_of(values["margin"])
      if border != border_of((codes.shape[0] - 1) // 2):
        shape["padding"] = border
    elif len(operation.shape) == 3:  # a dense layer at every place
      codes = codes[None, None]
    name = self._append(
      Layer,
      operation.path,
      input=x,
      kernel=codes,
      multiplier=np.float32(scale * worth * gain),
      bias=np.float32(shift + offset * worth * sums * gain),
      bits=kernel.bits,
      code_bits=kernel.code_bits,
      **shape,
    )
    self._names |= dict.fromkeys(parts, name)
    return name

  def _with_border(self, operation: Operation, x: str) -> str:
    """What a convolution reads, where 0 is worth its `pad_value`: floats are shifted."""
    pad_value = operation.values["pad_value"]
    _, offset = self._scales.get(x, (1.0, 0.0))
    if pad_value == offset:
      return x
    if x in self._scales:
      raise ConfigError(
        f"{operation.place}: the layer {operation.path!r} cannot be exported: it reads the codes "
        f"of {x!r}, whose zeros are worth {offset}, and pad_value = {pad_value} lies between two "
        f"codes (paper section 3.3). Train with pad_value = {offset} (MobileNet-v3: "
        f"config.model.pad_value={offset})."
      )
    channels = operation.inputs[0].shape[-1]
    shifted = self._beside(
      Affine,
      x,
      "shifted",
      multiplier=np.ones(channels, np.float32),
      bias=np.full(channels, -pad_value, np.float32),
    )
    self._scales[shifted] = (1.0, pad_value)
    return shifted

  def _line(self, operation: Operation) -> tuple[np.ndarray, np.ndarray]:
    """Gain and shift of an affine map or a normalization."""
    if operation.kind == "affine":
      return operation.values["gain"], operation.values["shift"]
    params, stats = self._params(operation), self._params(operation, "batch_stats")
    spread = np.sqrt(np.float64(stats["var"]) + operation.values["epsilon"])
    gain = np.float64(params["scale"]) / spread
    return gain, np.float64(params["bias"]) - np.float64(stats["mean"]) * gain

  def _affine(self, operation: Operation, x: str) -> str:
    gain, shift = self._line(operation)
    scale, offset = self._scales.get(x, (1.0, 0.0))
    append, name = (
      (self._append, operation.path) if operation.path else (self._plain, f"{x}/affine")
    )
    return append(
      Affine,
      name,
      input=x,
      multiplier=np.float32(gain * scale),
      bias=np.float32(shift + gain * offset),
    )

  def _quantizer(self, operation: Operation, x: str) -> str:
    if self._bits.never(operation.path):
      return self._values(x)
    node, scale = self._numbers(operation)
    fields = {**vars(node), "input": self._values(x)}
    name = self._append(Quantizer, fields.pop("name"), **fields)
    self._scales[name] = scale, node.offset
    return name

  def _numbers(self, operation: Operation) -> quantizers.Activations:
    if operation not in self._quantizers:
      self._quantizers[operation] = quantizers.quantizer(
        operation.path,
        self._params(operation),
        _qmax(operation, "activations"),
        operation.values["codes"],
        operation.values["quantizer"],
      )
    return self._quantizers[operation]

  def _activation(self, operation: Operation, x: str) -> str:
    function, x = operation.values["function"], self._values(x)
    if function in _BOUNDS and self._is_clipped_anyway(operation, *_BOUNDS[function]):
      return x
    return self._plain(Activation, f"{x}/{function}", input=x, function=function)

  def _clip(self, operation: Operation, x: str) -> str:
    low, high = operation.values["low"], operation.values["high"]
    for function, bounds in _BOUNDS.items():
      if bounds == (low, high):
        operation.values["function"] = function
        return self._activation(operation, x)
    x = self._values(x)
    if self._is_clipped_anyway(operation, low, high):
      return x
    return self._plain(
      Clip, f"{x}/clip", input=x, low=max(low, -_LARGEST), high=min(high, _LARGEST)
    )

  def _is_clipped_anyway(self, operation: Operation, low: float, high: float) -> bool:
    """Whether a quantizer reads nothing else, and its own ends lie within these bounds."""
    (reader, *others) = self._users[operation]
    if others or reader is None or reader.kind != "quantizer" or self._bits.never(reader.path):
      return False
    node, ends = self._numbers(reader).node, np.float32([low, high])
    return bool((reference.codes(node, ends) == [node.low, node.high]).all())

  def _mean(self, operation: Operation, x: str) -> str:
    del operation
    return self._keep_scale(self._beside(Mean, x, "mean"), x)

  def _pool(self, operation: Operation, x: str) -> str:
    function = operation.kind.removesuffix("_pool")
    if function == "mean":
      x = self._values(x)
    name = self._beside(Pool, x, operation.kind, function=function, **operation.values)
    return self._keep_scale(name, x)

  def _reshape(self, operation: Operation, x: str) -> str:
    name = self._beside(Reshape, x, "reshape", shape=operation.shape)
    return self._keep_scale(name, x)

  def _concat(self, operation: Operation, *read: str) -> str:
    del operation
    if len({self._scales.get(x) for x in read}) != 1:
      read = tuple(map(self._values, read))
    first, *others = read
    name = self._beside(Concat, first, "concat", others=tuple(others))
    return self._keep_scale(name, first)

  def _pair(self, operation: Operation, *read: str) -> str:
    shapes = [source.shape for source in operation.inputs]
    x, other = map(self._values, read)
    if len(shapes[0]) < len(shapes[1]):
      x, other = other, x
    return self._beside(_PAIRS[operation.kind], x, operation.kind, other=other)


def _qmax(operation: Operation, what: str) -> float:
  if "qmax" not in operation.values:
    raise ConfigError(
      f"{operation.place}: the {what} of the layer {operation.path!r} are in full precision, and "
      "only a model whose weights and activations are all quantized can be exported. A rule with "
      '"float" keeps a layer in full precision on purpose.'
    )
  return operation.values["qmax"]


# Nodes by the kind of an operation: (builder, operation, names of what it reads) -> name.
_NODES: dict[str, Callable[..., str]] = {
  "input": _Builder._image,
  "conv": _Builder._layer,
  "dense": _Builder._layer,
  "norm": _Builder._affine,
  "affine": _Builder._affine,
  "quantizer": _Builder._quantizer,
  "activation": _Builder._activation,
  "clip": _Builder._clip,
  "mean": _Builder._mean,
  "max_pool": _Builder._pool,
  "mean_pool": _Builder._pool,
  "reshape": _Builder._reshape,
  "concat": _Builder._concat,
  **dict.fromkeys(_PAIRS, _Builder._pair),
}
