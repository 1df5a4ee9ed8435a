"""What a net costs, layer by layer: bytes, multiply-accumulates, bit operations."""

import math
from typing import NamedTuple

from profit_jax.export.net import FLOAT_BITS, IMAGE, Layer, Net, Quantizer

_PIXEL_BITS = 8
_INT8_BITS = 8


class LayerCost(NamedTuple):
  """A layer's part.

  Attributes:
    layer: its name.
    kind: conv, depthwise or dense.
    kernel: its shape, `[K, K, C, F]`, depthwise `[K, K, 1, F]`, dense `[C, F]`.
    weight_bits: of the kernel; 32 of floats.
    input: what it reads: `image`, or its quantizer: unsigned, symmetric, hswish; or `float`.
    input_bits: of what it reads: 8 of an image's pixels, 32 of floats, float images too.
    macs: multiply-accumulates for one image.
    bops: `macs * weight_bits * input_bits`.
    kernel_bytes: packed.
    float_bytes: of kernel and bias, had they been float32.
  """

  layer: str
  kind: str
  kernel: tuple[int, ...]
  weight_bits: int
  input: str
  input_bits: int
  macs: int
  bops: int
  kernel_bytes: int
  float_bytes: int


def costs(net: Net) -> list[LayerCost]:
  """The cost of every layer, for one image. Additions, means, squeeze-excite products and
  quantizers are not counted.
  """
  shapes, sources = net.shapes(), net.code_sources()
  return [_row(net, layer, shapes[layer.name], sources.get(layer.input)) for layer in net.layers]


def in_int8(row: LayerCost) -> LayerCost:
  """The cost of a layer in an integer file: kernels have 8 bits, and nothing has more."""
  weight_bits, input_bits = min(row.weight_bits, _INT8_BITS), min(row.input_bits, _INT8_BITS)
  return row._replace(
    weight_bits=weight_bits,
    input_bits=input_bits,
    bops=row.macs * weight_bits * input_bits,
    kernel_bytes=math.prod(row.kernel),
  )


def _row(net: Net, layer: Layer, shape: tuple[int, ...], quantizer: Quantizer | None) -> LayerCost:
  if layer.input == IMAGE:
    source, bits = "image", FLOAT_BITS if net.normalization is None else _PIXEL_BITS
  elif quantizer is None:
    source, bits = "float", FLOAT_BITS
  else:
    source, bits = (
      ("symmetric" if quantizer.signed else "hswish" if quantizer.offset else "unsigned"),
      quantizer.bits,
    )
  macs = layer.kernel.size * math.prod(shape[:-1])
  kind = "dense" if layer.dense else "depthwise" if layer.depthwise else "conv"
  packed = -(-layer.kernel.size * layer.field_bits // 8)
  float_bytes = 4 * (layer.kernel.size + layer.kernel.shape[-1])
  return LayerCost(
    layer.name,
    kind,
    layer.kernel.shape,
    layer.bits,
    source,
    bits,
    macs,
    macs * layer.bits * bits,
    packed,
    float_bytes,
  )
