"""A model -> the operations that it computes in evaluation, read from its jaxpr.

In trace mode (`nn/tracing.py`) every layer is one operation. `_RULES` lists the plain operations
that may stand between layers. What depends on constants alone is evaluated. Anything else is an
error that names the line in the model's source and the layer before it.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np
from jax.extend import core

from profit_jax import nn as our_layers
from profit_jax.config import ConfigError
from profit_jax.export.net import IMAGE
from profit_jax.nn import tracing
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import value_of

# Images in the traced batch. More than 1, so that `squeeze` does not take the batch's axis.
_BATCH = 2
RESERVED = (IMAGE, "logits")  # names of tensors that every file has
# Frames of these files are not the user's.
_LIBRARIES = tuple(str(pathlib.Path(module.__file__).parent) for module in (jax, flax, our_layers))
_ALLOWED = (
  "Between the layers of profit_jax.nn, export knows its functions (relu, relu6, hard_swish, "
  "hard_sigmoid, spatial_mean), +, -, *, division by a constant, maximum, minimum, clip, sums and "
  "means over height and width, max and average pooling, reshape, and concatenation of channels; "
  "a constant may differ by channel"
)


@dataclasses.dataclass(eq=False)
class Operation:
  """A tensor, by what computes it.

  Attributes:
    kind: a layer (conv, dense, quantizer, norm), `input`, or a plain operation: activation, mean,
      affine (`gain`, `shift` per channel, float64), clip (`low`, `high`), sum, product, maximum,
      minimum, max_pool, mean_pool (`window`, `strides`, `padding`), reshape, concat, and spread,
      which repeats axes of length 1 and stands only before sum, product, maximum and minimum.
    inputs: what it reads.
    shape: of one example.
    path: of a layer, as `block00/conv`; empty for others.
    place: the line of the model's source, as `model.py:12`.
    values: attributes by name.
  """

  kind: str
  inputs: list["Operation"]
  shape: tuple[int, ...]
  path: str = ""
  place: str = ""
  values: dict[str, Any] = dataclasses.field(default_factory=dict)


def trace(
  model: nn.Module, variables: Any, image_shape: tuple[int, ...], bits: Bits
) -> list[Operation]:
  """The operations of a model's evaluation, each after what it reads; the last gives the output.

  Args:
    model: `(x, bits, train)` -> one array.
    variables: its `params` and `batch_stats`.
    image_shape: of one example, `(H, W, C)`.
    bits: that it is called with, as numbers.

  Raises:
    ConfigError: an operation that no file can hold; a layer whose output is not used; an output
      that does not depend on the images.
  """
  image = jax.ShapeDtypeStruct((_BATCH, *image_shape), np.float32)
  closed = tracing.make_jaxpr(
    lambda x: value_of(model.apply(variables, x, bits, False)),
    image,
    failure="The model cannot be exported",
  )
  walk = _Walk()
  start = walk.add("input", [], image_shape)
  outputs = walk.run(closed.jaxpr, closed.consts, [start], "")
  if not isinstance(outputs[0], Operation):
    raise ConfigError("The model's output does not depend on the images: it cannot be exported.")
  return _used(walk.operations, outputs[0])


def needed(operations: Sequence[Operation], output: Operation) -> list[Operation]:
  """The operations that the output depends on, in their order."""
  found, waiting = set(), [output]
  while waiting:
    operation = waiting.pop()
    if operation not in found:
      found.add(operation)
      waiting += operation.inputs
  return [operation for operation in operations if operation in found]


def _used(operations: Sequence[Operation], output: Operation) -> list[Operation]:
  kept = needed(operations, output)
  for operation in operations:
    if operation.path and operation not in kept:
      raise ConfigError(
        f"{operation.place}: the layer {operation.path!r} is called, but the model's output does "
        "not depend on it. Leave the call out of evaluation to export the model."
      )
  return kept


class _Walk:
  """Interprets a jaxpr: values are constants (arrays) or operations.

  Attributes:
    operations: so far.
  """

  def __init__(self):
    self.operations: list[Operation] = []

  def add(
    self, kind: str, read: list[Operation], shape: Sequence[int], place: str = "", **values: Any
  ) -> Operation:
    """Appends an operation."""
    for operation in read:
      if operation.kind == "spread":
        raise self.refused(
          operation.place,
          "repeating a tensor along an axis, other than in +, *, maximum, minimum",
          operation.inputs,
        )
    operation = Operation(kind, read, tuple(shape), place=place, values=values)
    self.operations.append(operation)
    return operation

  def refused(self, place: str, what: str, read: Sequence[Any]) -> ConfigError:
    """The error of something that export does not know."""
    return ConfigError(
      f"{place or 'The model'}: {what} (after {_nearest(read)}) cannot be exported. {_ALLOWED}."
    )

  def run(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[Any], place: str) -> list[Any]:
    """The results of a jaxpr.

    Args:
      jaxpr: an open one.
      consts: of its constvars.
      given: of its invars.
      place: of the call, if it is inlined.
    """
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *given], strict=True))

    def read(atom):
      return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
      results = self._apply(equation, list(map(read, equation.invars)), _place(equation) or place)
      known.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))

  def _apply(self, equation: Any, read: list[Any], place: str) -> list[Any]:
    primitive, options = equation.primitive, equation.params
    if primitive is tracing.operation_p:
      return [self._layer(read, place, **options)]
    if (inner := tracing.inner_jaxpr(equation)) is not None:
      return self.run(*inner, read, place)
    if not any(isinstance(value, Operation) for value in read):
      results = primitive.bind(*read, **options)
      return results if primitive.multiple_results else [results]
    rule = _RULES.get(primitive.name)
    if rule is None:
      raise self.refused(place, _described(primitive.name), read)
    return [rule(self, read, equation, place)]

  def _layer(
    self, read: list[Any], place: str, kind: str, path: tuple[str, ...], shape: Any, **values: Any
  ) -> Operation:
    x, *qmax = read
    name = "/".join(path)
    if name in RESERVED:
      raise ConfigError(
        f"{place}: the layer {name!r} cannot be exported under this name, which files use for "
        "their own tensors. Choose another."
      )
    if not isinstance(x, Operation):
      raise ConfigError(
        f"{place}: the layer {name or kind!r} reads constants only, so that it cannot be exported."
      )
    if qmax:
      values["qmax"] = float(qmax[0])
    operation = self.add(kind, [x], shape[1:], place, **values)
    operation.path = name
    return operation

  def affine(self, x: Operation, gain: Any, shift: Any, place: str) -> Operation:
    """`x * gain + shift`; both are constants of x's shape, or broadcast to it."""
    values = {
      name: self._per_channel(x, constant, place)
      for name, constant in (("gain", gain), ("shift", shift))
    }
    return self.add("affine", [x], x.shape, place, **values)

  def _per_channel(self, x: Operation, constant: Any, place: str) -> np.ndarray:
    shape = (_BATCH, *x.shape)
    if np.broadcast_shapes(np.shape(constant), shape) != shape:
      raise self.refused(place, "a constant of more elements than the tensor", [x])
    array = np.broadcast_to(np.float64(constant), shape).reshape(-1, x.shape[-1])
    if (array != array[0]).any():
      raise self.refused(place, "a constant that varies over height, width or the batch", [x])
    return array[0].copy()


def _nearest(read: Sequence[Any]) -> str:
  """The layer that was last computed before, in words."""
  waiting = [value for value in read if isinstance(value, Operation)]
  while waiting:
    operation = waiting.pop(0)
    if operation.path:
      return f"layer {operation.path!r}"
    waiting += operation.inputs
  return "the model's input"


def _described(name: str) -> str:
  if name in ("conv_general_dilated", "dot_general"):
    plain, ours = ("Conv", "QuantConv") if name.startswith("conv") else ("Dense", "QuantDense")
    return f"a product outside of our layers ({name}, as of nn.{plain}; {ours} can be)"
  return f"the operation {name}"


def _place(equation: Any) -> str:
  """The line of the model's source that an equation comes from, as `model.py:12`."""
  traceback = equation.source_info.traceback
  for frame in traceback.frames if traceback else ():
    if not frame.file_name.startswith(_LIBRARIES):
      return f"{pathlib.Path(frame.file_name).name}:{frame.line_num}"
  return ""


# Rules: (walk, values read, equation, place) -> operation. At least one value is an operation.
Rule = Callable[[_Walk, list[Any], Any, str], Operation]


def _shape(equation: Any) -> tuple[int, ...]:
  return tuple(equation.outvars[0].aval.shape)


def _pair(kind: str, walk: _Walk, read: list[Any], equation: Any, place: str) -> Operation:
  """An operation on two tensors, neither a constant."""
  shape = _shape(equation)[1:]
  return walk.add(kind, [_repeated(x, shape) for x in read], shape, place)


def _repeated(x: Operation, shape: tuple[int, ...]) -> Operation:
  """An operand of a pair whose result has this shape: without repetition, and `(C,)` where it was
  that.
  """
  (source,) = x.inputs if x.kind == "spread" else [x]
  if source.kind == "reshape" and source.shape != shape:
    (before,) = source.inputs
    return before if before.shape == source.shape[-1:] else source
  return source


def _split(read: list[Any]) -> tuple[Operation, Any]:
  """The tensor and the constant."""
  return (read[0], read[1]) if isinstance(read[0], Operation) else (read[1], read[0])


def _both(read: list[Any]) -> bool:
  return all(isinstance(value, Operation) for value in read)


def _add(walk, read, equation, place):
  if _both(read):
    return _pair("sum", walk, read, equation, place)
  x, constant = _split(read)
  return walk.affine(x, 1.0, constant, place)


def _subtract(walk, read, equation, place):
  if _both(read):
    negative = walk.affine(_repeated(read[1], _shape(equation)[1:]), -1.0, 0.0, place)
    return _pair("sum", walk, [read[0], negative], equation, place)
  if isinstance(read[0], Operation):
    return walk.affine(read[0], 1.0, -np.float64(read[1]), place)
  return walk.affine(read[1], -1.0, read[0], place)


def _multiply(walk, read, equation, place):
  if _both(read):
    return _pair("product", walk, read, equation, place)
  x, constant = _split(read)
  return walk.affine(x, constant, 0.0, place)


def _divide(walk, read, equation, place):
  if isinstance(read[1], Operation):
    raise walk.refused(place, "division by a tensor", read)
  return walk.affine(read[0], 1.0 / np.float64(read[1]), 0.0, place)


def _bound(walk, x, low, high, place):
  ends = [np.unique(np.float64(end)) for end in (low, high)]
  if any(end.size != 1 for end in ends):
    raise walk.refused(place, "a bound that differs by element", [x])
  return walk.add("clip", [x], x.shape, place, low=float(ends[0][0]), high=float(ends[1][0]))


def _maximum(walk, read, equation, place):
  if _both(read):
    return _pair("maximum", walk, read, equation, place)
  x, constant = _split(read)
  return _bound(walk, x, constant, np.inf, place)


def _minimum(walk, read, equation, place):
  if _both(read):
    return _pair("minimum", walk, read, equation, place)
  x, constant = _split(read)
  return _bound(walk, x, -np.inf, constant, place)


def _clamp(walk, read, equation, place):
  low, x, high = read
  if isinstance(low, Operation) or isinstance(high, Operation):
    raise walk.refused(place, "a bound that is computed from the images", read)
  return _bound(walk, x, low, high, place)


def _sum_over_space(walk, read, equation, place):
  (x,) = read
  if len(x.shape) != 3 or tuple(equation.params["axes"]) != (1, 2):
    raise walk.refused(place, f"a sum over the axes {tuple(equation.params['axes'])}", read)
  mean = walk.add("mean", [x], x.shape[-1:], place)
  return walk.affine(mean, float(x.shape[0] * x.shape[1]), 0.0, place)


def _largest_over_space(walk, read, equation, place):
  (x,) = read
  if len(x.shape) != 3 or tuple(equation.params["axes"]) != (1, 2):
    raise walk.refused(place, f"a maximum over the axes {tuple(equation.params['axes'])}", read)
  sizes = {"window": x.shape[:2], "strides": (1, 1), "padding": ((0, 0), (0, 0))}
  pooled = walk.add("max_pool", [x], (1, 1, x.shape[-1]), place, **sizes)
  return walk.add("reshape", [pooled], x.shape[-1:], place)


def _pool(kind: str, walk: _Walk, read: list[Any], equation: Any, place: str) -> Operation:
  (x,), options = read, equation.params
  window, strides, padding = (
    tuple(options[f"window_{name}"]) if name != "padding" else tuple(options[name])
    for name in ("dimensions", "strides", "padding")
  )
  dilated = {*options["base_dilation"], *options["window_dilation"]} != {1}
  at_ends = [(window[axis], strides[axis], tuple(padding[axis])) for axis in (0, -1)]
  if dilated or len(window) != 4 or any(end != (1, 1, (0, 0)) for end in at_ends):
    raise walk.refused(place, "pooling other than over windows of height and width", read)
  sizes = {
    "window": window[1:3],
    "strides": strides[1:3],
    "padding": tuple(map(tuple, padding[1:3])),
  }
  pooled = walk.add(kind, [x], _shape(equation)[1:], place, **sizes)
  if kind == "max_pool":
    return pooled
  return walk.affine(pooled, float(window[1] * window[2]), 0.0, place)


def _reshape(walk, read, equation, place):
  x, shape = read[0], _shape(equation)
  if equation.params.get("dimensions") or shape[0] != _BATCH or len(shape) not in (2, 4):
    raise walk.refused(place, f"a reshape to {shape} for a batch of {_BATCH}", read)
  return walk.add("reshape", [x], shape[1:], place)


def _broadcast(walk, read, equation, place):
  (x,), shape, axes = read, _shape(equation), tuple(equation.params["broadcast_dimensions"])
  if shape[0] != _BATCH or len(shape) not in (2, 4) or axes[0] != 0:
    raise walk.refused(place, f"a broadcast to {shape} for a batch of {_BATCH}", read)
  # First every axis in its place, then the repetition.
  sizes = dict(zip(axes, (_BATCH, *x.shape), strict=True))
  placed = tuple(sizes.get(axis, 1) for axis in range(len(shape)))[1:]
  if placed != x.shape:
    x = walk.add("reshape", [x], placed, place)
  return x if placed == shape[1:] else walk.add("spread", [x], shape[1:], place)


def _concatenate(walk, read, equation, place):
  if not _both(read) or equation.params["dimension"] != len(read[0].shape):
    raise walk.refused(place, "concatenation other than of channels", read)
  return walk.add("concat", read, _shape(equation)[1:], place)


def _convert(walk, read, equation, place):
  dtype = equation.outvars[0].aval.dtype
  if dtype != np.float32:
    raise walk.refused(place, f"conversion to {dtype}", read)
  return read[0]


def _rule_of_pools(kind):
  return lambda *arguments: _pool(kind, *arguments)


def _same(walk, read, equation, place):
  del walk, equation, place
  return read[0]


_RULES: dict[str, Rule] = {
  "add": _add,
  "add_any": _add,
  "sub": _subtract,
  "neg": lambda walk, read, equation, place: walk.affine(read[0], -1.0, 0.0, place),
  "mul": _multiply,
  "div": _divide,
  "max": _maximum,
  "min": _minimum,
  "clamp": _clamp,
  "reduce_sum": _sum_over_space,
  "reduce_max": _largest_over_space,
  "reduce_window_sum": _rule_of_pools("mean_pool"),
  "reduce_window_max": _rule_of_pools("max_pool"),
  "reshape": _reshape,
  "squeeze": _reshape,
  "expand_dims": _reshape,
  "broadcast_in_dim": _broadcast,
  "concatenate": _concatenate,
  "convert_element_type": _convert,
  "copy": _same,
  "copy_p": _same,
  "optimization_barrier": _same,
  "sharding_constraint": _same,
  "name": _same,
}
