"""Code-domain net -> integer net: puts every tensor on an int8 grid.

A quantizer's codes keep their steps, so that an int8 tensor uses 2^b of its 256 numbers:

- A layer that one quantizer reads gives its codes directly. Its kernel's scales take the input's
  output scale and the quantizer's interval; a channel of negative gain flips its kernel's codes.
- Biases are whole numbers of the accumulator. Kernel codes are multiplied by the largest factor
  that fits 8 bits (18 at 4 bits), which makes their units as much finer, and biases are chosen so
  that every sum gets its exact code, see `thresholds.py`.
- Tensors that something else reads too (shortcuts, squeeze-excite) are rounded to 8 bits, on a
  range that is measured on images. Their step is an odd fraction of the step of the quantizer that
  reads them. Every boundary between two codes then is a boundary between two of the finer steps,
  and rounding twice gives the same code as rounding once.
- A tensor that only quantizers read needs no range: what saturates there saturates in them.
- The bounds of a quantizer are int8's upper end and a fused ReLU in LiteRT, and int8's lower end
  and a Clip in onnxruntime, see `Runtime`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from profit_jax.config import ConfigError
from profit_jax.export.integer import net as integer
from profit_jax.export.integer import thresholds
from profit_jax.export.integer.net import HIGH, LOW, Grid
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
  Node,
  Pool,
  Product,
  Quantizer,
  Reshape,
  Sum,
  Value,
  inputs,
)
from profit_jax.kernels.padding import border_of

# Float tensors' least and largest values.
Ranges = Mapping[str, tuple[float, float]]
_BOUNDS = {"relu": (0.0, np.inf), "relu6": (0.0, 6.0)}
_EVERYTHING = (-np.inf, np.inf)
# Between int8's ends; one less where the zero, which lies between them, is rounded.
_STEPS = HIGH - LOW
# The steps are widened until a negative bound is one of them, if it is more than 10 steps from 0.
_WORTH_AN_END = 10
# A bias of this size fits int32 beside the sum.
_LARGEST_BIAS = 2.0**28
_SMALLEST_UNIT = 2.0**-20
# Where a tensor's step becomes a fraction of a quantizer's: the least part of the tensor's steps
# that is kept, the least number of fractions, and the largest distance, in steps, of an end between
# two codes from one between two steps.
_LEAST_KEPT = 0.6
_FEWEST_FRACTIONS = 3
_NEAR_END = 0.2


class Runtime(NamedTuple):
  """What differs between runtimes' kernels.

  Attributes:
    fuses_relu: whether a lower bound at zero is part of an operator; codes then end at int8's upper
      end. Otherwise they begin at its lower end, and the upper bound is an operator.
    wide_kernel: the largest number to which kernel codes are multiplied where inputs have 8 bits.
      Codes that are larger themselves, of 8-bit kernels, stay as they are.
  """

  fuses_relu: bool
  wide_kernel: int


LITERT = Runtime(fuses_relu=True, wide_kernel=HIGH)
# Without VNNI, onnxruntime adds pairs of products of uint8 and int8 in int16, which saturates.
ONNXRUNTIME = Runtime(fuses_relu=False, wide_kernel=63)


class Encoded(NamedTuple):
  """Where a tensor of the code-domain net is: its values are `unit * (q - zero)`.

  Attributes:
    tensor: of the integer net.
    grid: of that tensor. Its values are what operators compute with, and need not be the net's.
    unit: the net's value of a step; for images, of each channel.
    zero: the number of the net's value 0, which may lie between two; likewise.
  """

  tensor: str
  grid: Grid
  unit: Any
  zero: Any

  @property
  def factor(self) -> Any:
    """The net's values over the grid's."""
    return self.unit / self.grid.scale

  @property
  def constant(self) -> Any:
    """The net's value where the grid's is 0."""
    return (self.grid.zero - self.zero) * self.unit


class Steps(NamedTuple):
  """What a quantizer makes of a tensor, in the tensor's units: its step, the margin that it adds,
  and the values of its outer codes.
  """

  step: float
  margin: float
  low: float
  high: float


class Target(NamedTuple):
  """Where a result is to be put.

  Attributes:
    name: of the tensor.
    ends: the net's tensor that it holds.
    grid: of the tensor.
    low: its smallest number.
    high: its largest.
    factor: the grid's values over the net's.
    shift: added to the net's values before.
    unit: as `Encoded`.
    zero: likewise.
    lowered: the grid of a second rounding, which saturates at the other end.
    codes: of a quantizer, the smallest and the largest.
  """

  name: str
  ends: str
  grid: Grid
  unit: float
  zero: float
  low: int = LOW
  high: int = HIGH
  factor: float = 1.0
  shift: float = 0.0
  lowered: Grid | None = None
  codes: tuple[int, int] | None = None

  def ends_of_codes(self) -> np.ndarray:
    """Where one code ends and the next begins, on the grid, in steps from its zero."""
    assert self.codes is not None
    low, high = self.codes
    zero = 0.0 if self.lowered is not None else self.zero - self.grid.zero
    return np.arange(low, high) + 0.5 + zero


def lower(net: Net, ranges: Ranges, runtime: Runtime) -> integer.IntegerNet:
  """The integer net.

  Args:
    net: in the code domain.
    ranges: of its float tensors, and of `logits`, see `ranges.measure`.
    runtime: that will compute it.

  Raises:
    ConfigError: an operation that has no integer form.
  """
  return _Lowering(net, ranges, runtime).run()


class _Lowering:
  """Appends operators."""

  def __init__(self, net: Net, ranges: Ranges, runtime: Runtime):
    self._net, self._ranges, self._runtime = net, ranges, runtime
    self._net_shapes = net.shapes()
    self._readers: dict[str, list[Node | None]] = {IMAGE: []}
    for node in net.nodes:
      self._readers[node.name] = []
      for name in {*inputs(node)}:
        self._readers[name].append(node)
    self._readers[net.nodes[-1].name].append(None)
    self._operators: list[integer.Operator] = []
    self._shapes = {IMAGE: net.image_shape}
    self._encoded: dict[str, Encoded] = {IMAGE: self._image()}
    self._passed: set[str] = set()  # tensors that only stand within an operator
    # Of codes of at most 7 bits, by tensor: the largest number, counted from the smallest. Twice
    # these numbers times a kernel's fit int16.
    self._largest: dict[str, int] = {}

  def run(self) -> integer.IntegerNet:
    """The whole net."""
    for node in self._net.nodes:
      if node.name in self._encoded or node.name in self._passed:
        continue  # part of an operator before
      write = _WRITERS.get(type(node))
      if write is None:
        raise ConfigError(
          f"{node.name!r} cannot be computed in integers: {type(node).__name__} has no integer "
          "form. Export it as onnx or litert, whose files compute such operations in float32."
        )
      write(self, node)
    logits = self._plain(self._net.nodes[-1].name)
    return integer.IntegerNet(
      model=self._net.model,
      operators=tuple(self._operators),
      shapes=self._shapes,
      image_grid=self._encoded[IMAGE].grid,
      logits=logits.tensor,
      ends_in_layer=isinstance(self._net.nodes[-1], Layer),
      normalization=self._net.normalization,
      codes={
        quantizer.name: integer.Codes(place.tensor, round(place.zero))
        for quantizer in self._net.quantizers
        for place in [self._encoded[quantizer.name]]
      },
      weight_bits=self._net.weight_bits,
      act_bits=self._net.act_bits,
    )

  # Tensors

  def _image(self) -> Encoded:
    scale = self._net.pixel_scale()
    if scale is None:
      grid = _grid(*self._ranges[IMAGE])
      return Encoded(IMAGE, grid, grid.scale, grid.zero)
    factor, summand = np.float64(scale[0]), np.float64(scale[1])
    zero = LOW - summand / factor
    if len({*factor}) == len({*zero}) == 1:
      return Encoded(IMAGE, Grid(float(factor[0]), round(zero[0])), factor[0], zero[0])
    # The border's pixels are those next to the channels' means.
    grid = Grid(float(np.mean(factor)), round(float(np.mean(zero))))
    return Encoded(IMAGE, grid, factor, zero)

  def _append(self, kind: type[integer.Operator], name: str, shape: Any, **fields: Any) -> str:
    self._operators.append(kind(name=name, **fields))
    self._shapes[name] = shape
    return name

  def _put(
    self, kind: type[integer.Operator], target: Target, read: tuple[str, ...], **fields: Any
  ) -> Encoded:
    """Appends an operator whose result is put on a target."""
    shape = self._net_shapes[target.ends]
    name = target.name if target.lowered is None else f"{target.name}/raised"
    self._append(
      kind, name, shape, inputs=read, grid=target.grid, low=target.low, high=target.high, **fields
    )
    grid = target.grid
    if target.lowered is not None:
      grid = target.lowered
      self._append(integer.Requantize, target.name, shape, inputs=(name,), grid=grid)
    place = Encoded(target.name, grid, target.unit, target.zero)
    self._encoded[target.ends] = place
    if target.codes is not None and target.codes[1] - target.codes[0] < HIGH:
      self._largest[target.name] = target.codes[1] - target.codes[0]
    return place

  def _constant(self, value: float, step: float = 1.0) -> str:
    """A scalar constant of the integer net; step: of the grid of 0. XNNPACK adds only tensors whose
    scales are next to the sum's.
    """
    grid = Grid(abs(value) / HIGH or step, 0)
    return self._append(
      integer.Constant,
      f"constant{len(self._operators)}",
      (),
      inputs=(),
      grid=grid,
      value=int(math.copysign(HIGH, value)) if value else 0,
    )

  def _added(self, name: str, x: Encoded, target: Target) -> Encoded:
    """A tensor on a target: a sum with a constant. `name` says of what."""
    if not math.isclose(x.factor, 1.0, rel_tol=1e-6) and target.unit != 1.0:
      x = self._plain(name, x)
    value = (x.constant + target.shift) / x.factor
    read = x.tensor, self._constant(value, x.grid.scale)
    return self._put(integer.Add, _rescaled(target, x.factor), read)

  def _plain(self, name: str, x: Encoded | None = None) -> Encoded:
    """A tensor whose values are its grid's."""
    place = x or self._encoded[name]
    if name == IMAGE and np.ndim(place.unit):
      return self._normalized()
    if math.isclose(place.factor, 1.0, rel_tol=1e-6) and place.zero == place.grid.zero:
      return place
    own = f"{name}/plain"
    if own in self._encoded:
      return self._encoded[own]
    tensor, grid = place.tensor, place.grid
    if not math.isclose(place.factor, 1.0, rel_tol=1e-6):
      grid = Grid(place.unit, place.grid.zero)
      constant = self._constant(place.factor)
      tensor = self._append(
        integer.Multiply,
        f"{name}/scaled",
        self._net_shapes[name],
        inputs=(tensor, constant),
        grid=grid,
      )
    self._net_shapes[own] = self._net_shapes[name]
    target = self._stream(own, name)._replace(ends=own)
    return self._put(integer.Add, target, (tensor, self._constant(place.constant)))

  def _of_one_unit(self, name: str) -> Encoded:
    """A tensor whose channels have one unit and one zero."""
    x = self._encoded[name]
    return self._normalized() if np.ndim(x.unit) else x

  def _normalized(self) -> Encoded:
    """An image whose channels are normalized differently, on one grid. Layers read it as it is:
    their kernels take the channels' units.
    """
    own = f"{IMAGE}/normalized"
    if own not in self._encoded:
      image, ones = self._encoded[IMAGE], np.ones(self._net.image_shape[-1])
      self._net_shapes[own] = self._net.image_shape
      grid = _grid(*self._ranges[IMAGE])
      target = Target(own, own, grid, grid.scale, grid.zero)
      self._convolve(image, ones.reshape(1, 1, 1, -1), ones, 0.0 * ones, target, depthwise=True)
    return self._encoded[own]

  # Targets

  def _followed(self, name: str) -> tuple[Node | str, tuple[float, float]]:
    """What ends the chain of bounds behind a tensor: a quantizer, or a hard sigmoid, if nothing
    else reads what it reads; or else the last tensor. And the bounds.
    """
    (low, high), passed = _EVERYTHING, []
    while len(self._readers[name]) == 1:
      (reader,) = self._readers[name]
      if isinstance(reader, Quantizer) or _is(reader, "hard_sigmoid"):
        assert reader is not None
        self._passed.update(passed)
        return reader, (low, high)
      bounds = _bounds(reader)
      if reader is None or bounds is None:
        break
      low, high = max(low, bounds[0]), min(high, bounds[1])
      passed.append(name := reader.name)
    self._passed.update(passed[:-1])
    return name, (low, high)

  def _target(self, node: Node, shifts: bool, constant: float = 0.0) -> Target:
    """Where the result of an operator is put that computes a node of the net.

    Args:
      node: the node.
      shifts: whether the operator can add a constant, and scale.
      constant: what is to be added to the operator's result.
    """
    end, bounds = self._followed(node.name)
    if isinstance(end, Quantizer):
      target = self._code_target(end, bounds, rescales=shifts)
      if shifts or abs(target.shift + constant) < 1e-9:
        return target
      end = end.input
    elif isinstance(end, Activation):
      if shifts and bounds == _EVERYTHING:
        return _gate(end)._replace(factor=1.0 / 6.0, shift=3.0)
      end = end.input
    self._passed.discard(end)
    return self._stream(end, end, bounds, constant)

  def _code_target(self, node: Quantizer, bounds: tuple[float, float], rescales: bool) -> Target:
    """The codes of a quantizer.

    Args:
      node: the quantizer.
      bounds: of what it reads.
      rescales: whether the operator can give the codes the scale of the net's values.
    """
    step = 1.0 / node.inverse
    low, high = _code_bounds(node, bounds)
    factor = node.scale / step if rescales else 1.0
    scale, ends = factor * step, {"name": node.name, "ends": node.name, "factor": factor}
    ends["codes"] = low, high
    bordered = low and self._is_bordered(node.name)
    if not low <= 0 <= high and (bordered or not self._runtime.fuses_relu):
      # The grid reaches to code 0: a zero point beyond int8's ends is not allowed.
      first, last = min(low, 0), max(high, 0)
      ends["codes"] = first, last
      zero = HIGH - last if self._runtime.fuses_relu else LOW - first
      return Target(
        **ends,
        grid=Grid(scale, zero),
        unit=1.0,
        zero=float(zero),
        low=zero + low,
        high=zero + high,
        shift=node.margin,
      )
    if not self._runtime.fuses_relu:
      grid = Grid(scale, LOW - low)
      top = LOW + high - low
      return Target(**ends, grid=grid, unit=1.0, zero=float(grid.zero), high=top, shift=node.margin)
    if bordered:
      return Target(
        **ends,
        grid=Grid(scale, HIGH - high),
        unit=1.0,
        zero=float(LOW - low),
        shift=node.margin,
        lowered=Grid(scale, LOW - low),
      )
    zero = HIGH - (high - low)
    return Target(
      **ends,
      grid=Grid(scale, zero),
      unit=1.0,
      zero=float(zero - low),
      low=zero,
      shift=node.margin - low * step,
    )

  def _is_bordered(self, name: str) -> bool:
    """Whether a layer with a border reads a tensor, whose 0 then must be its grid's."""
    for reader in self._readers[name]:
      if isinstance(reader, Layer) and any(map(any, reader.border)):
        return True
      if isinstance(reader, Reshape | Concat | Pool) and self._is_bordered(reader.name):
        return True
    return False

  def _stream(
    self,
    name: str,
    ends: str,
    bounds: tuple[float, float] = _EVERYTHING,
    constant: float = 0.0,
  ) -> Target:
    """A tensor of 8 bits: `name` for the net's tensor `ends`, less a constant."""
    low, high = self._ranges["logits" if ends == self._net.nodes[-1].name else ends]
    readers = self._readers[ends]
    quantizers = self._steps(ends)
    if quantizers and None not in quantizers:
      low = max(low, min(steps.low for steps in quantizers if steps))
      high = min(high, max(steps.high for steps in quantizers if steps))
    if readers and all(_is(node, "hard_swish") for node in readers):
      low = max(bounds[0], -3.0)
      bounds = low, bounds[1]
      high = min(high, max(self._useful(node) for node in readers if node is not None))
    low, high = max(low, bounds[0]) - constant, min(high, bounds[1]) - constant
    step, margin = None, 0.0
    for steps in filter(None, quantizers):  # the last one's, where there are several
      step, margin = steps.step, steps.margin + constant
    bounds = bounds[0] - constant, bounds[1] - constant
    grid = _grid(low, high, bounds, step, margin)
    least, most = (round(min(max(bound / grid.scale + grid.zero, LOW), HIGH)) for bound in bounds)
    zero = grid.zero - constant / grid.scale
    return Target(name, ends, grid, grid.scale, zero, low=least, high=most)

  def _steps(self, name: str) -> list[Steps | None]:
    """How each reader of a tensor quantizes it; None for one that does something else."""
    found: list[Steps | None] = []
    for reader in self._readers[name]:
      if isinstance(reader, Quantizer):
        found.append(Steps(1.0 / reader.inverse, reader.margin, *_code_range(reader)))
      elif isinstance(reader, Value):
        scale, offset = reader.scale, reader.offset
        found += [
          steps
          and Steps(
            steps.step / scale,
            (steps.margin + offset) / scale,
            (steps.low - offset) / scale,
            (steps.high - offset) / scale,
          )
          for steps in self._steps(reader.name)
        ]
      else:
        found.append(None)
    return found

  def _useful(self, node: Node) -> float:
    """The largest input of a h-swish that its readers tell from larger ones."""
    return max(3.0, *(steps.high if steps else np.inf for steps in self._steps(node.name)))

  # Nodes

  def _layer(self, node: Layer) -> None:
    x = self._encoded[node.input]
    bordered = any(map(any, node.border)) and node.input != IMAGE
    if bordered and x.zero != x.grid.zero:
      x = self._plain(node.input)
    self._convolve(
      x,
      node.kernel,
      np.float64(node.multiplier),
      np.float64(node.bias),
      self._target(node, shifts=True),
      stride=node.stride,
      border=border_of(0) if node.dense else node.border,
      depthwise=node.depthwise,
    )

  def _convolve(
    self,
    x: Encoded,
    kernel: np.ndarray,
    multiplier: np.ndarray,
    bias: np.ndarray,
    target: Target,
    **fields: Any,
  ) -> None:
    """A convolution with a multiplier and a bias for each output channel."""
    unit, zero = np.float64(x.unit), np.float64(x.zero)
    axes = tuple(range(kernel.ndim - 1))
    # Of images, each input channel has its own unit and zero: in a kernel [..., C, F], depthwise
    # [..., 1, C].
    shape = (-1,) if fields.get("depthwise") else (-1, 1)
    own = kernel * (unit.reshape(shape) if unit.ndim else 1.0)
    away = x.grid.zero - (zero.reshape(shape) if zero.ndim else zero)
    bias = target.factor * (
      bias + target.shift + multiplier * (own * away * (1.0 if unit.ndim else unit)).sum(axes)
    )
    code_scale = np.abs(multiplier) * target.factor * (1.0 if unit.ndim else unit)
    largest = np.abs(own).max(axes)
    limit = HIGH if x.tensor in self._largest else self._runtime.wide_kernel
    if kernel.dtype == np.int8 and not unit.ndim:
      fits = max(1.0, limit // max(1.0, largest.max()))
    else:
      fits = limit / np.where(largest, largest, 1.0)
    # The value of 1 in the accumulator, on the target's grid: as fine as the kernel allows, but for
    # channels next to constant, whose bias would not fit.
    needed = np.maximum(np.abs(bias) / _LARGEST_BIAS, target.grid.scale * _SMALLEST_UNIT)
    scale = np.maximum(code_scale / fits, needed)
    codes = np.round(own * np.sign(multiplier) * (code_scale / scale)).clip(-HIGH, HIGH)
    bias = bias / scale
    if target.codes is not None and kernel.dtype == np.int8 and not unit.ndim:
      largest = np.abs(kernel.astype(np.int64)).sum(axes) * self._largest.get(x.tensor, 255)
      unscaled = scale == code_scale / fits  # those next to constant have no multiples of codes
      found = thresholds.fitted(
        target.ends_of_codes(),
        (scale / target.grid.scale)[unscaled],
        bias[unscaled],
        fits,
        largest[unscaled],
      )
      scale[unscaled], bias[unscaled] = found.scale * target.grid.scale, found.bias
    self._put(
      integer.Convolution,
      target,
      (x.tensor,),
      kernel=codes.astype(np.int8),
      kernel_scale=np.float32(scale / x.grid.scale),
      bias=np.round(bias).astype(np.int32),
      **fields,
    )

  def _affine(self, node: Affine) -> None:
    target = self._target(node, shifts=True)
    self._line(node, np.float64(node.multiplier), np.float64(node.bias), target)

  def _line(self, node: Node, multiplier: np.ndarray, bias: np.ndarray, target: Target) -> None:
    """`x * multiplier + bias` per channel: a depthwise convolution of one pixel."""
    x, shape = self._encoded[node.input], self._net_shapes[node.input]
    kernel = np.ones((1, 1, 1, shape[-1]))
    if len(shape) == 3:
      self._convolve(x, kernel, multiplier, bias, target, depthwise=True)
      return
    space = (1, 1, shape[-1])
    tensor = self._append(
      integer.Reshape, f"{node.name}/pixel", space, inputs=(x.tensor,), grid=x.grid
    )
    self._net_shapes[inner := f"{node.name}/line"] = space
    self._convolve(
      x._replace(tensor=tensor),
      kernel,
      multiplier,
      bias,
      target._replace(name=inner, ends=inner),
      depthwise=True,
    )
    place = self._encoded[inner]
    name = self._append(
      integer.Reshape, target.name, shape, inputs=(place.tensor,), grid=place.grid
    )
    self._encoded[target.ends] = place._replace(tensor=name)

  def _quantizer(self, node: Quantizer) -> None:
    """A quantizer of a tensor that others read too."""
    x = self._of_one_unit(node.input)
    self._added(node.input, x, self._code_target(node, _EVERYTHING, rescales=False))

  def _activation(self, node: Activation) -> None:
    if node.function == "hard_swish":
      self._hard_swish(node)
    elif node.function == "hard_sigmoid":
      ones = np.ones(self._net_shapes[node.name][-1])
      self._line(node, ones / 6.0, ones / 2.0, _gate(node))
    else:
      self._clip(node)

  def _hard_swish(self, node: Activation) -> None:
    """`relu6(x + 3)`, a sum that saturates at the ends of int8, times x: XNNPACK has no h-swish of
    int8, and onnxruntime computes it in float32.
    """
    x = self._plain(node.input)
    gate = self._append(
      integer.Add,
      f"{node.name}/gate",
      self._net_shapes[node.name],
      inputs=(x.tensor, self._constant(3.0)),
      grid=Grid(6.0 / (HIGH - LOW), LOW),
    )
    target = _rescaled(self._target(node, shifts=False), 1.0 / 6.0)
    self._put(integer.Multiply, target, (x.tensor, gate))

  def _clip(self, node: Activation | Clip) -> None:
    """Bounds of a tensor that others read without them."""
    bounds = _bounds(node)
    assert bounds is not None
    x = self._of_one_unit(node.input)
    self._added(node.input, x, self._stream(node.name, node.name, bounds))

  def _value(self, node: Value) -> None:
    x = self._encoded[node.input]
    unit = node.scale * x.unit
    self._encoded[node.name] = x._replace(unit=unit, zero=x.zero - node.offset / unit)

  def _sum(self, node: Sum) -> None:
    read = self._encoded[node.input], self._encoded[node.other]
    if not all(np.ndim(x.unit) == 0 and math.isclose(x.factor, 1.0, rel_tol=1e-6) for x in read):
      read = self._plain(node.input), self._plain(node.other)
    constant = sum(x.constant for x in read)
    target = self._target(node, shifts=False, constant=constant)
    self._put(integer.Add, target, tuple(self._spatial(node, x) for x in read))

  def _product(self, node: Product) -> None:
    read = self._multiplied(node.input), self._multiplied(node.other)
    factor = read[0].factor * read[1].factor
    target = _rescaled(self._target(node, shifts=False), factor)
    self._put(integer.Multiply, target, tuple(self._spatial(node, x) for x in read))

  def _multiplied(self, name: str) -> Encoded:
    """A tensor whose values are its grid's times a number."""
    x = self._encoded[name]
    return self._plain(name) if np.ndim(x.unit) or x.zero != x.grid.zero else x

  def _spatial(self, node: Elementwise, x: Encoded) -> str:
    """A tensor of channels alone as an image of one pixel, beside one of space."""
    shape = self._shapes[x.tensor]
    if len(shape) == len(self._net_shapes[node.name]):
      return x.tensor
    return self._append(
      integer.Reshape,
      f"{node.name}/pixel",
      (1, 1, shape[-1]),
      inputs=(x.tensor,),
      grid=x.grid,
    )

  def _extreme(self, node: Maximum | Minimum) -> None:
    kind = integer.Maximum if isinstance(node, Maximum) else integer.Minimum
    names = node.input, node.other
    ranges = [self._ranges[name] for name in names]
    grid = _grid(min(low for low, _ in ranges), max(high for _, high in ranges))
    target = Target(node.name, node.name, grid, grid.scale, grid.zero)
    read = tuple(self._on(name, grid, f"{node.name}/{side}") for side, name in enumerate(names))
    self._put(kind, target, read)

  def _on(self, name: str, grid: Grid, own: str) -> str:
    """A tensor of the net on this grid."""
    x = self._plain(name)
    if x.grid == grid:
      return x.tensor
    return self._append(
      integer.Requantize, own, self._net_shapes[name], inputs=(x.tensor,), grid=grid
    )

  def _mean(self, node: Mean) -> None:
    x = self._of_one_unit(node.input)
    self._put(integer.Mean, self._mean_target(node, x), (x.tensor,))

  def _mean_target(self, node: Mean | Pool, x: Encoded) -> Target:
    """The target of a mean of x."""
    target = _rescaled(self._target(node, shifts=False, constant=x.constant), x.factor)
    # A mean of nothing negative needs no ReLU, which runtimes do not fuse with it.
    is_positive = self._low_of(x.tensor) >= x.grid.zero
    if is_positive and target.low <= target.grid.zero:
      return target._replace(low=LOW)
    return target

  def _pool(self, node: Pool) -> None:
    x = self._of_one_unit(node.input)
    fields = {
      "function": node.function,
      "window": node.window,
      "strides": node.strides,
      "border": node.padding,
    }
    if node.function == "max":
      self._same(integer.Pool, node, x, **fields)
      return
    # Its border is of the grid's zero. Its grid is not the input's: on that of codes, it would be
    # rounded to whole codes.
    if any(map(any, node.padding)) and x.zero != x.grid.zero:
      x = self._plain(node.input)
    self._put(integer.Pool, self._mean_target(node, x), (x.tensor,), **fields)

  def _reshape(self, node: Reshape) -> None:
    self._same(integer.Reshape, node, self._of_one_unit(node.input))

  def _same(self, kind: type[integer.Operator], node: Node, x: Encoded, **fields: Any) -> None:
    """An operator whose result has its input's grid."""
    shape, low = self._net_shapes[node.name], self._low_of(x.tensor)
    name = self._append(kind, node.name, shape, inputs=(x.tensor,), grid=x.grid, low=low, **fields)
    self._encoded[node.name] = x._replace(tensor=name)

  def _low_of(self, name: str) -> int:
    """The smallest number of a tensor."""
    return next((node.low for node in self._operators if node.name == name), LOW)

  def _concat(self, node: Concat) -> None:
    read = [self._of_one_unit(name) for name in inputs(node)]
    shape = self._net_shapes[node.name]
    if len({x[1:] for x in read}) == 1:
      name = self._append(
        integer.Concat,
        node.name,
        shape,
        inputs=tuple(x.tensor for x in read),
        grid=read[0].grid,
      )
      self._encoded[node.name] = read[0]._replace(tensor=name)
      return
    grid = self._stream(node.name, node.name).grid
    target = Target(node.name, node.name, grid, grid.scale, grid.zero)
    tensors = tuple(
      self._on(name, grid, f"{node.name}/{place}") for place, name in enumerate(inputs(node))
    )
    self._put(integer.Concat, target, tensors)


def _rescaled(target: Target, factor: float) -> Target:
  """A target of values that are the net's over a factor."""
  grid, lowered = target.grid, target.lowered
  return target._replace(
    grid=grid._replace(scale=grid.scale / factor),
    lowered=lowered and lowered._replace(scale=lowered.scale / factor),
  )


def _gate(node: Activation) -> Target:
  """The target of a hard sigmoid: 0 to 1, the ends of int8."""
  grid = Grid(1.0 / (HIGH - LOW), LOW)
  return Target(node.name, node.name, grid, grid.scale, float(LOW))


def _is(node: Node | None, function: str) -> bool:
  return isinstance(node, Activation) and node.function == function


def _bounds(node: Node | None) -> tuple[float, float] | None:
  """The bounds that a node sets; None if it does something else."""
  if isinstance(node, Clip):
    return node.low, node.high
  return _BOUNDS.get(node.function) if isinstance(node, Activation) else None


def _code_bounds(node: Quantizer, bounds: tuple[float, float]) -> tuple[int, int]:
  """The smallest and the largest code of values within bounds."""
  ends = np.clip((np.float64(bounds) + node.margin) * node.inverse, node.low, node.high)
  low, high = (int(code) for code in np.round(ends))
  return low, high


def _code_range(node: Quantizer) -> tuple[float, float]:
  """The values of a quantizer's outer codes."""
  return node.low / node.inverse - node.margin, node.high / node.inverse - node.margin


def _grid(
  low: float,
  high: float,
  bounds: tuple[float, float] = _EVERYTHING,
  step: float | None = None,
  margin: float = 0.0,
) -> Grid:
  """A grid for values in a range, 0 included.

  Args:
    low: the smallest value.
    high: the largest.
    bounds: an end that is one of these is int8's end.
    step: of a quantizer that reads the values; the grid's is a fraction of it.
    margin: that the quantizer adds.
  """
  low, high = min(low, 0.0), max(high, 0.0)
  scale = (high - low) / (_STEPS - (low < 0.0 < high)) or 1.0 / HIGH
  number = 0 if step is None else _fraction(step / scale, margin / step)
  if step is not None and number:
    scale = step / number
  elif low == bounds[0] and -low > _WORTH_AN_END * scale:
    scale = -low / math.floor(-low / scale)
  if low == bounds[0]:
    zero = LOW - round(low / scale)
  elif high == bounds[1]:
    zero = HIGH - round(high / scale)
  else:
    zero = round(-0.5 - (low + high) / (2.0 * scale))
  return Grid(scale, min(max(zero, LOW), HIGH))


def _fraction(most: float, margin: float) -> int:
  """Into how many steps, at most, a quantizer's step is divided so that the ends between its codes
  are ends between steps too. Ends are at `(k + 1/2 - margin) * number` steps, which should be half
  a step away from a whole number: for margin 0 any odd number serves. 0 where no number comes
  near: ends that lie on whole numbers would round in one direction.
  """

  def away(number: int) -> float:
    place = (0.5 - margin) * number - 0.5
    return round(abs(place - round(place)), 6)

  least = max(_FEWEST_FRACTIONS, math.ceil(_LEAST_KEPT * most))
  numbers = range(math.floor(most), least - 1, -1)
  best = min(numbers, key=away, default=0)
  return best if best and away(best) <= _NEAR_END else 0


_WRITERS: dict[type, Callable[..., None]] = {
  Layer: _Lowering._layer,
  Affine: _Lowering._affine,
  Quantizer: _Lowering._quantizer,
  Activation: _Lowering._activation,
  Clip: _Lowering._clip,
  Value: _Lowering._value,
  Sum: _Lowering._sum,
  Product: _Lowering._product,
  Maximum: _Lowering._extreme,
  Minimum: _Lowering._extreme,
  Mean: _Lowering._mean,
  Pool: _Lowering._pool,
  Reshape: _Lowering._reshape,
  Concat: _Lowering._concat,
}
