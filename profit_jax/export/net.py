"""The code-domain net: a trained network as integer codes and per-channel numbers, plain data that
every format is made of.

With the codes q of a layer's input (value `s_x*q + offset`) and w of its kernel (value `s_w*w`),
and batch normalization as `gain*y + shift` per channel, the layer and the quantizer behind it are

    acc  = conv(q, w)                     integers; exact in float32 below 2^24
    y    = acc * multiplier + bias        multiplier = s_x*s_w*gain
                                          bias = shift + offset*s_w*sum(w)*gain
    code = clip(round((activation(y) + margin) * inverse), low, high)

DuQ quantizes with its interval a and dequantizes with its output scale c: `inverse = n/a` is here,
`s_x = c/n` is in the multiplier of the layers behind. The offset -3/8 of h-swish is the same for
every tap, the border included, whose pad is code 0 (negative padding, paper section 3.3): it folds
into the bias exactly. Shortcuts, means and squeeze-excite stay in floating point, as they were
trained. Shapes are those of one example, `(H, W, C)` or `(C,)`.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from profit_jax.data.normalize import Normalization
from profit_jax.export.packing import field_bits
from profit_jax.kernels.padding import Border, border_of, output_extent

# The name of the input: uint8, normalized by the net, or float32 as it is.
IMAGE = "image"
Shape = tuple[int, ...]
FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # arrays have no truth value
class Layer:
  """A convolution (`[N, H, W, C]`) or a dense layer (`[N, C]`), with what follows it per channel.

  Attributes:
    name: its path in the model, as `block00/depthwise_conv`.
    input: what it reads, codes or floats.
    kernel: int8 codes, `[K, K, C, F]`; depthwise `[K, K, 1, F]`; dense `[C, F]`. Of a layer that a
      rule keeps in full precision, float32.
    multiplier: float32 `[F]`.
    bias: float32 `[F]`.
    bits: of the kernel's quantizer; 32 of floats.
    stride: in both directions.
    depthwise: one filter per channel.
    code_bits: that its codes take as signed integers, if not `bits`: PACT's are odd numbers, twice
      as large.
    padding: rows above and below, columns left and right of the input, all of code 0; None is
      `(K - 1) / 2` on every side.
  """

  name: str
  input: str
  kernel: np.ndarray
  multiplier: np.ndarray
  bias: np.ndarray
  bits: int
  stride: int = 1
  depthwise: bool = False
  code_bits: int | None = None
  padding: Border | None = None

  @property
  def quantized(self) -> bool:
    """Whether the kernel holds codes."""
    return self.kernel.dtype == np.int8

  @property
  def field_bits(self) -> int:
    """Bits of a code in a file: 2, 4 or 8; 32 of a float."""
    if not self.quantized:
      return FLOAT_BITS
    return field_bits(self.code_bits or self.bits)

  @property
  def dense(self) -> bool:
    """Whether it has no space."""
    return self.kernel.ndim == 2

  @property
  def border(self) -> Border:
    """Rows above and below, columns left and right of the input."""
    if self.padding is not None:
      return self.padding
    return border_of(0 if self.dense else (self.kernel.shape[0] - 1) // 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer:
  """Floats to codes: `clip(round((x + margin) * inverse), low, high)`, half to even.

  Attributes:
    name: its path in the model.
    input: what it reads.
    inverse: float32, the steps n over the interval a.
    margin: float32, added before: 0, or 3/8 after h-swish.
    low: the smallest code.
    high: the largest.
    bits: of the codes.
    scale: float32, what a code is worth: c/n. For whoever wants values; the layers have it in their
      multipliers.
    offset: the value of code 0: 0, or -3/8 after h-swish.
  """

  name: str
  input: str
  inverse: float
  margin: float
  low: int
  high: int
  bits: int
  scale: float
  offset: float = 0.0

  @property
  def signed(self) -> bool:
    """Whether codes may be negative."""
    return self.low < 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
  """`relu`, `relu6`, `hard_swish` (`x * relu6(x + 3) * (1/6)`) or `hard_sigmoid`
  (`relu6(x + 3) * (1/6)`).
  """

  name: str
  input: str
  function: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
  """What codes are worth, `codes * scale + offset`: where a shortcut begins behind a quantizer."""

  name: str
  input: str
  scale: float
  offset: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Affine:
  """`x * multiplier + bias` per channel, of codes or floats: what no layer before it can take.

  Attributes:
    name: of the result.
    input: what it reads.
    multiplier: float32 `[C]`.
    bias: float32 `[C]`.
  """

  name: str
  input: str
  multiplier: np.ndarray
  bias: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
  """`min(max(x, low), high)`; an end that is open is the largest float32."""

  name: str
  input: str
  low: float
  high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
  """The largest value, or the mean, of every window.

  Attributes:
    name: of the result.
    input: what it reads, `(H, W, C)`; codes stay codes where the largest is taken.
    function: max or mean.
    window: height and width.
    strides: in both directions.
    padding: above and below, left and right; of lowest values for max, of zeros for mean.
  """

  name: str
  input: str
  function: str
  window: tuple[int, int]
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reshape:
  """Another shape, in the order of `(H, W, C)`: flattening before a dense layer."""

  name: str
  input: str
  shape: Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concat:
  """The channels of `input` and of `others`, one after the other."""

  name: str
  input: str
  others: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
  """The mean over space: `[N, H, W, C]` -> `[N, C]`."""

  name: str
  input: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elementwise:
  """Two tensors, element by element; an axis of length 1 is repeated, `(C,)` over space.

  Attributes:
    name: of the result.
    input: the one with more axes.
    other: the other one.
  """

  name: str
  input: str
  other: str


class Sum(Elementwise):
  """As a block's output and its shortcut."""


class Product(Elementwise):
  """As squeeze-excite, of `(H, W, C)` and `(C,)`."""


class Maximum(Elementwise):
  """The larger of two."""


class Minimum(Elementwise):
  """The smaller of two."""


Node = (
  Layer
  | Quantizer
  | Activation
  | Value
  | Affine
  | Clip
  | Mean
  | Pool
  | Reshape
  | Concat
  | Sum
  | Product
  | Maximum
  | Minimum
)


def inputs(node: Node) -> tuple[str, ...]:
  """The names of what a node reads."""
  if isinstance(node, Concat):
    return (node.input, *node.others)
  return (node.input, node.other) if isinstance(node, Elementwise) else (node.input,)


class Net(NamedTuple):
  """A network in the code domain.

  Attributes:
    model: its name, as `mobilenet_v2`.
    nodes: in an order in which each reads what stands before it; the last one gives the logits
      `[N, num_classes]`.
    image_shape: of an image, `(H, W, C)`.
    normalization: of the images, which are uint8; None takes float32 images as they are.
    weight_bits: that the model was called with. Layers have their own `bits`, which may be more.
    act_bits: likewise, of its quantizers.
  """

  model: str
  nodes: tuple[Node, ...]
  image_shape: Shape
  normalization: Normalization | None
  weight_bits: int
  act_bits: int

  @property
  def layers(self) -> list[Layer]:
    """The convolutions and dense layers, in order."""
    return [node for node in self.nodes if isinstance(node, Layer)]

  @property
  def quantizers(self) -> list[Quantizer]:
    """In order."""
    return [node for node in self.nodes if isinstance(node, Quantizer)]

  @property
  def num_classes(self) -> int:
    """Size of the logits."""
    return self.shapes()[self.nodes[-1].name][-1]

  @property
  def bits_name(self) -> str:
    """As `w4a4`."""
    return f"w{self.weight_bits}a{self.act_bits}"

  @property
  def image_dtype(self) -> type[np.generic]:
    """uint8, or float32 where the net does not normalize."""
    return np.float32 if self.normalization is None else np.uint8

  def pixel_scale(self) -> tuple[np.ndarray, np.ndarray] | None:
    """The factor and the summand, float32 `[C]`, that normalize a pixel of 0..255; None for
    images that are not normalized.
    """
    if self.normalization is None:
      return None
    mean, std = np.float64(self.normalization.mean), np.float64(self.normalization.std)
    return np.float32(1.0 / (255.0 * std)), np.float32(-mean / std)

  def shapes(self) -> dict[str, Shape]:
    """The shape of every tensor, of one example."""
    found = {IMAGE: self.image_shape}
    for node in self.nodes:
      found[node.name] = _shape(node, [found[name] for name in inputs(node)])
    return found

  def code_sources(self) -> dict[str, Quantizer]:
    """The tensors that hold codes, and the quantizer that made them (the first of several)."""
    found = {}
    for node in self.nodes:
      sources = [found.get(name) for name in inputs(node)]
      if isinstance(node, Quantizer):
        found[node.name] = node
      elif _moves_only(node) and all(sources):
        found[node.name] = sources[0]
    return found

  def float_fed(self) -> frozenset[str]:
    """The quantizers that read the float stream: what is not a function of one integer accumulator.

    Two runtimes may sum a mean, a shortcut or the image's convolution in another order or
    precision, so that a value at a tie may get one code here and its neighbour there. All other
    quantizers must agree to the last code.
    """
    exact, codes = set(), self.code_sources()
    for node in self.nodes:
      keeps = isinstance(node, (Activation, Clip)) or _moves_only(node)
      if (isinstance(node, Layer) and node.quantized and node.input in codes) or (
        keeps and exact.issuperset(inputs(node))
      ):
        exact.add(node.name)
    return frozenset(node.name for node in self.quantizers if node.input not in exact)


def _moves_only(node: Node) -> bool:
  """Whether a node gives values that it reads, each unchanged."""
  return isinstance(node, (Reshape, Concat)) or (isinstance(node, Pool) and node.function == "max")


def _shape(node: Node, read: list[Shape]) -> Shape:
  """The shape of what a node gives, from those of what it reads."""
  first = read[0]
  if isinstance(node, Layer):
    if node.dense:
      return (*first[:-1], node.kernel.shape[-1])
    space = output_extent(node.kernel.shape[0], node.stride, node.border, first[:-1])
    return (*space, node.kernel.shape[-1])
  if isinstance(node, Pool):
    sizes = zip(first, node.window, node.strides, node.padding, strict=False)
    space = [(n + sum(around) - size) // stride + 1 for n, size, stride, around in sizes]
    return (*space, first[-1])
  if isinstance(node, Concat):
    return (*first[:-1], sum(shape[-1] for shape in read))
  if isinstance(node, Reshape):
    return node.shape
  return first[-1:] if isinstance(node, Mean) else np.broadcast_shapes(*read)
