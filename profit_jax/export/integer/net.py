"""The integer net: operators on int8 tensors, as integer kernels of LiteRT and onnxruntime compute.

Every tensor is int8 on a `Grid`: `value = scale * (q - zero)`. An operator computes on its inputs'
values exactly, rounds the result to its own grid and saturates at the ends of int8. `low` narrows
that range: the lower bound of a fused ReLU. `high` narrows it from above.

A convolution computes

    q = clip(round((sum(kernel * (x - zero_x)) + bias) * scale_x * kernel_scale / scale) + zero)

Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, describe this arithmetic.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from profit_jax.data.normalize import Normalization
from profit_jax.export.net import Shape
from profit_jax.kernels.padding import Border

LOW, HIGH = -128, 127


class Grid(NamedTuple):
  """What an int8 tensor's numbers are worth: `scale * (q - zero)`."""

  scale: float
  zero: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Operator:
  """An operator.

  Attributes:
    name: of its result.
    inputs: names of what it reads.
    grid: of its result.
    low: the smallest number of its result.
    high: the largest.
  """

  name: str
  inputs: tuple[str, ...]
  grid: Grid
  low: int = LOW
  high: int = HIGH


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Convolution(Operator):
  """A convolution or a dense layer.

  Attributes:
    kernel: int8 `[K, K, C, F]`; depthwise `[K, K, 1, F]`; dense `[C, F]`.
    kernel_scale: float32 `[F]`.
    bias: int32 `[F]`, in units of the input's scale times `kernel_scale`.
    stride: in both directions.
    border: rows above and below, columns left and right, of the input's zero.
    depthwise: one filter per channel.
  """

  kernel: np.ndarray
  kernel_scale: np.ndarray
  bias: np.ndarray
  stride: int = 1
  border: Border = ((0, 0), (0, 0))
  depthwise: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Constant(Operator):
  """A number: `value`, int8."""

  value: int


class Requantize(Operator):
  """Its input on another grid."""


class Add(Operator):
  """The sum of two tensors; one may be a `Constant`."""


class Multiply(Operator):
  """The product of two tensors; an axis of length 1 is repeated."""


class Maximum(Operator):
  """The larger of two tensors on its own grid."""


class Minimum(Operator):
  """The smaller of two tensors on its own grid."""


class Mean(Operator):
  """The mean over height and width: `[N, H, W, C]` -> `[N, C]`."""


class Reshape(Operator):
  """Another shape; its grid is the input's."""


class Concat(Operator):
  """Channels one after the other; all on its own grid."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pool(Operator):
  """The largest value, or the mean, of every window, on the input's grid.

  Attributes:
    function: max or mean.
    window: height and width.
    strides: in both directions.
    border: above and below, left and right; of `LOW` for max, of the input's zero for mean.
  """

  function: str
  window: tuple[int, int]
  strides: tuple[int, int]
  border: Border


class Codes(NamedTuple):
  """Where a quantizer's codes are: `tensor - zero`."""

  tensor: str
  zero: int


class IntegerNet(NamedTuple):
  """A network on int8.

  Attributes:
    model: its name.
    operators: in an order in which each reads what stands before it.
    shapes: of every tensor, of one example.
    image_grid: of the input, `image`. A pixel p of a uint8 image is p - 128, and the grid's values
      are normalized pixels, next to those where channels are normalized differently.
    logits: the tensor that holds them.
    normalization: of images, which are uint8; None for float images.
    codes: by quantizer.
    weight_bits: that the model was called with.
    act_bits: likewise.
  """

  model: str
  operators: tuple[Operator, ...]
  shapes: dict[str, Shape]
  image_grid: Grid
  logits: str
  normalization: Normalization | None
  codes: dict[str, Codes]
  weight_bits: int
  act_bits: int

  @property
  def bits_name(self) -> str:
    """As `w4a4`."""
    return f"w{self.weight_bits}a{self.act_bits}"
