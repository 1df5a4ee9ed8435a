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
trained.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from profit_jax.data.normalize import Normalization

IMAGE = "image"  # the name of the input: uint8 `[N, H, W, 3]`, normalized by the net


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # arrays have no truth value
class Layer:
  """A convolution (`[N, H, W, C]`) or a dense layer (`[N, C]`), with what follows it per channel.

  Attributes:
    name: its path in the model, as `block00/depthwise_conv`.
    input: what it reads, codes or floats.
    kernel: int8 codes, `[K, K, C, F]`; depthwise `[K, K, 1, F]`; dense `[C, F]`.
    multiplier: float32 `[F]`.
    bias: float32 `[F]`.
    bits: of the kernel.
    stride: in both directions.
  """

  name: str
  input: str
  kernel: np.ndarray
  multiplier: np.ndarray
  bias: np.ndarray
  bits: int
  stride: int = 1
  depthwise: bool = False

  @property
  def dense(self) -> bool:
    """Whether it has no space."""
    return self.kernel.ndim == 2

  @property
  def margin(self) -> int:
    """So many zeros surround the input on every side."""
    return 0 if self.dense else (self.kernel.shape[0] - 1) // 2


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
  """

  name: str
  input: str
  inverse: float
  margin: float
  low: int
  high: int
  bits: int
  scale: float

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
  """The mean over space: `[N, H, W, C]` -> `[N, C]`."""

  name: str
  input: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
  """The sum of a block's output and its shortcut."""

  name: str
  input: str
  other: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
  """Each channel of `input` `[N, H, W, C]` times a number, `other` `[N, C]`: squeeze-excite."""

  name: str
  input: str
  other: str


Node = Layer | Quantizer | Activation | Value | Mean | Sum | Product


class Net(NamedTuple):
  """A network in the code domain.

  Attributes:
    model: its name, as `mobilenet_v2`.
    nodes: in an order in which each reads what stands before it; the last one gives the logits
      `[N, num_classes]`.
    image_size: height and width of the images, in pixels.
    normalization: of the images.
    weight_bits: of all kernels.
    act_bits: of all quantized activations.
  """

  model: str
  nodes: tuple[Node, ...]
  image_size: int
  normalization: Normalization
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
    return self.layers[-1].kernel.shape[-1]

  @property
  def bits_name(self) -> str:
    """As `w4a4`."""
    return f"w{self.weight_bits}a{self.act_bits}"

  def pixel_scale(self) -> tuple[np.ndarray, np.ndarray]:
    """The factor and the summand, float32 `[3]`, that normalize a pixel of 0..255."""
    mean, std = np.float64(self.normalization.mean), np.float64(self.normalization.std)
    return np.float32(1.0 / (255.0 * std)), np.float32(-mean / std)

  def float_fed(self) -> frozenset[str]:
    """The quantizers that read the float stream: what is not a function of one integer accumulator.

    Two runtimes may sum a mean, a shortcut or the image's convolution in another order or
    precision, so that a value at a tie may get one code here and its neighbour there. All other
    quantizers must agree to the last code.
    """
    exact, codes = set(), {node.name for node in self.quantizers}
    for node in self.nodes:
      if (isinstance(node, Layer) and node.input in codes) or (
        isinstance(node, Activation) and node.input in exact
      ):
        exact.add(node.name)
    return frozenset(node.name for node in self.quantizers if node.input not in exact)
