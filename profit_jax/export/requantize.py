"""From a convolution's integer sums to codes with one multiplication.

Runtimes pass over memory for every elementwise operation, and the quantizer behind a layer has five
or more:

    code = clip(round((activation(acc * multiplier + bias) + margin) * inverse), 0, high)

If nothing else reads the layer, this is a function of one integer: per channel, a code has a
threshold, the first sum that reaches it. Any line that separates the same integers gives the same
codes:

    rest = max(conv(q, sign * w) + offset, 0)     exact; 0 where the code is the largest
    code = max(round(top - factor * rest), 0)

`requantizations` chooses the line whose thresholds are farthest from integers, and proves for every
code of every channel that float32 cannot round across a threshold, whether a runtime fuses the
multiplication with the addition or not. A layer that has no such line keeps the form above.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from profit_jax.export.net import Activation, Clip, Layer, Net, Node, Quantizer, inputs
from profit_jax.export.reference import codes

# Added to a number below 2^22, then subtracted, it rounds the number: half to even.
ROUNDING = np.float32(1.5 * 2**23)
_MANTISSA = 24  # bits of float32
_SEARCH = 64  # steps; each leaves two thirds of the interval
_TINY = np.finfo(np.float32).tiny


class Requantization(NamedTuple):
  """What replaces a layer's multiplier and bias, its activation and the quantizer behind.

  Attributes:
    layer: the convolution, with its kernel times -1 in channels whose codes rise with the sum.
    activations: names of what stands between the layer and its quantizer.
    quantizer: whose codes are computed.
    offset: float32 `[F]`, added to the sums without rounding.
    factor: float32 `[F]`, not negative.
    top: float32 `[F]`, the largest code of each channel.
  """

  layer: Layer
  activations: tuple[str, ...]
  quantizer: Quantizer
  offset: np.ndarray
  factor: np.ndarray
  top: np.ndarray


def requantizations(net: Net) -> dict[str, Requantization]:
  """The convolutions that can be computed so, by name.

  They read codes. Behind them are a ReLU, ReLU6, clip or nothing, and an unsigned quantizer whose
  codes only convolutions and dense layers read. Dense layers take too little time to matter.
  """
  readers: dict[str, list[Node]] = {}
  for node in net.nodes:
    for name in inputs(node):
      readers.setdefault(name, []).append(node)
  sources, found = net.code_sources(), {}
  for layer in net.layers:
    source = sources.get(layer.input)
    activations, quantizer = _behind(layer, readers)
    if source is None or quantizer is None or layer.dense or not layer.quantized:
      continue
    largest = max(source.high, -source.low)
    requantization = _requantization(layer, activations, quantizer, largest)
    if requantization is not None:
      found[layer.name] = requantization
  return found


def _behind(
  layer: Layer, readers: dict[str, list[Node]]
) -> tuple[list[Activation | Clip], Quantizer | None]:
  """The monotonic activations behind a layer, and the quantizer behind these."""
  activations: list[Activation | Clip] = []
  name = layer.name
  while len(readers.get(name, [])) == 1:
    (node,) = readers[name]
    if isinstance(node, Quantizer):
      all_layers = all(isinstance(reader, Layer) for reader in readers.get(node.name, []))
      return activations, node if all_layers and not node.signed else None
    if not isinstance(node, Clip) and getattr(node, "function", "") not in ("relu", "relu6"):
      break
    activations.append(node)
    name = node.name
  return activations, None


def _requantization(
  layer: Layer, activations: list[Activation | Clip], quantizer: Quantizer, largest: int
) -> Requantization | None:
  """Args: layer; activations; quantizer; largest, code of the input, its sign aside."""
  sign = np.where(layer.multiplier < 0, 1, -1).astype(np.int8)
  kernel = layer.kernel * sign
  if int(kernel.max()) >= 2 ** (layer.field_bits - 1):
    return None  # -8 is an int4, 8 is not
  sums = np.abs(np.int64(layer.kernel)).reshape(-1, len(sign)).sum(0) * largest

  def code(rising: np.ndarray) -> np.ndarray:
    x = np.float32(-sign[:, None] * rising) * layer.multiplier[:, None] + layer.bias[:, None]
    for node in activations:
      x = np.clip(x, *map(np.float32, _bounds(node)))
    return codes(quantizer, x)

  thresholds = _thresholds(code, sums, quantizer.high)
  slope = np.maximum(np.abs(np.float64(layer.multiplier)) * quantizer.inverse, _TINY)
  trained = thresholds.top - (np.float64(layer.bias) + quantizer.margin) * quantizer.inverse
  spacing, start = _line(thresholds, 1.0 / slope)
  line = _rounded(thresholds, start + 0.5 * spacing, 1.0 / spacing)
  # The line that is farthest from the thresholds may be below the code of the smallest sum.
  other = _rounded(thresholds, trained / slope, slope)
  line = np.where(_equal(thresholds, *line), line, other)
  if not _equal(thresholds, *line).all():
    return None
  flipped = dataclasses.replace(layer, kernel=kernel)
  return Requantization(flipped, tuple(node.name for node in activations), quantizer, *line)


def _bounds(node: Activation | Clip) -> tuple[float, float]:
  if isinstance(node, Clip):
    return node.low, node.high
  return 0.0, 6.0 if node.function == "relu6" else np.inf


class _Thresholds(NamedTuple):
  """Where the codes of a layer's channels rise.

  Attributes:
    sums: int `[F]`, the largest sum; the smallest is its negative.
    lowest: int `[F]`, the code of the smallest sum.
    top: int `[F]`, the code of the largest sum.
    numbers: int `[1, high]`, the codes 1, 2, ...
    first: int `[F, high]`, the smallest sum that reaches each code.
    reached: bool `[F, high]`, whether some sum reaches the code and some does not.
  """

  sums: np.ndarray
  lowest: np.ndarray
  top: np.ndarray
  numbers: np.ndarray
  first: np.ndarray
  reached: np.ndarray

  @property
  def constant(self) -> np.ndarray:
    """Whether all sums have one code, `[F]`."""
    return self.lowest == self.top


def _thresholds(
  code: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, high: int
) -> _Thresholds:
  """By bisection of `code`, which rises with the sums `[F, ...]`."""
  lowest, top = np.int64(code(np.stack([-sums, sums], 1))).T
  numbers = np.arange(1, high + 1)[None]
  below = np.repeat(-sums[:, None], high, 1)
  first = -below
  while (first - below > 1).any():
    middle = (first + below) // 2
    reaches = code(middle) >= numbers
    first, below = np.where(reaches, middle, first), np.where(reaches, below, middle)
  reached = (lowest[:, None] < numbers) & (numbers <= top[:, None])
  return _Thresholds(sums, lowest, top, numbers, first, reached)


def _line(thresholds: _Thresholds, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The thresholds `start + spacing * (code - top)`, each between the first sum that reaches the
  code and the sum before, as far as possible from both.

  Args:
    thresholds: of the codes.
    trained: the spacing that the trained numbers have, float64 `[F]`.

  Returns:
    The spacing and the start, float64 `[F]`.
  """
  reached = thresholds.reached | thresholds.constant[:, None]  # no channel has none
  places = thresholds.numbers - thresholds.top[:, None]

  def ends(spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rest = thresholds.first - 0.5 - places * spacing[:, None]
    least = np.min(rest, 1, initial=np.inf, where=reached)
    return least, np.max(rest, 1, initial=-np.inf, where=reached)

  def spread(spacing: np.ndarray) -> np.ndarray:
    least, most = ends(spacing)
    return most - least

  # The trained line separates the same integers, so that its spacing is this near. The spread is
  # convex in the spacing.
  count = reached.sum(1)
  reach = np.where(count > 1, 2.0 / np.maximum(count - 1, 1), 0.0)
  low, high = np.maximum(trained - reach, 0.5 * trained), trained + reach
  for _ in range(_SEARCH):
    third = (high - low) / 3
    left = spread(low + third) <= spread(high - third)
    low, high = np.where(left, low, low + third), np.where(left, high - third, high)
  spacing = (low + high) / 2
  least, most = ends(spacing)
  return spacing, (least + most) / 2


def _rounded(thresholds: _Thresholds, offset: np.ndarray, factor: np.ndarray) -> np.ndarray:
  """Offset, factor and top of a line, float32 `[3, F]`."""
  offset, factor = (np.where(thresholds.constant, 0.0, array) for array in (offset, factor))
  # All sums and the offset are multiples of one power of two that float32 holds.
  unit = np.exp2(np.ceil(np.log2(thresholds.sums + np.abs(offset) + 1)) - _MANTISSA)
  return np.float32([np.round(offset / unit) * unit, factor, thresholds.top])


def _equal(
  thresholds: _Thresholds, offset: np.ndarray, factor: np.ndarray, top: np.ndarray
) -> np.ndarray:
  """Whether each channel reaches every code with the same sums, by more than float32 rounds."""
  margin = (thresholds.numbers.size + 1) * 2.0 ** (2 - _MANTISSA)

  def beyond(sums: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How far the number that is rounded lies above the tie below a code."""
    rest = np.maximum(np.float64(offset)[:, None] - sums, 0.0)
    return np.float64(top)[:, None] - rest * np.float64(factor)[:, None] - codes + 0.5

  reaches = beyond(thresholds.first, thresholds.numbers) >= margin
  before = beyond(thresholds.first - 1, thresholds.numbers) <= -margin
  lowest = thresholds.lowest[:, None]
  floor = (lowest == 0) | (beyond(-thresholds.sums[:, None], lowest) >= margin)
  return (reaches & before | ~thresholds.reached).all(1) & floor.all(1)
