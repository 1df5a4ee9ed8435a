"""Trained quantizers as numbers: the codes of kernels, and the affine maps of activations.

Codes are computed by the quantizer itself, in float32 as in training. Scales and intervals are
computed by it too, but in float64, so that the numbers of a net are rounded once.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from profit_jax.config import ConfigError
from profit_jax.export.net import FLOAT_BITS, Quantizer
from profit_jax.quant import base

_LARGEST_CODE = 127  # of int8, without -128


class Kernel(NamedTuple):
  """A kernel, `codes * scale`.

  Attributes:
    codes: int8; of a kernel in full precision, float32.
    scale: float64, a scalar or `[F]` for the last axis.
    bits: of the quantizer; 32 of floats.
    code_bits: that the codes take, if they are more.
  """

  codes: np.ndarray
  scale: np.ndarray
  bits: int
  code_bits: int | None


def quantized_kernel(
  path: str, params: Mapping[str, Any], qmax: float, by: base.Quantizer
) -> Kernel:
  """The codes of a layer's kernel.

  Args:
    path: of the layer.
    params: of the layer, on the host.
    qmax: as `Bits.kernel_qmax`.
    by: the quantizer.

  Raises:
    ConfigError: codes that do not fit into int8.
  """
  kernel = np.asarray(params["kernel"])
  scalars = {leaf: np.asarray(params[leaf]) for leaf in by.kernel_scalars}
  # Padded to a power of two: the kernels of a net have dozens of shapes, and share few programs.
  last = kernel.shape[-1] if by.per_channel else 1
  rows = kernel.reshape(-1, last)
  padded = np.pad(rows, [(0, (1 << (len(rows) - 1).bit_length()) - len(rows)), (0, 0)])
  codes = np.asarray(_codes_and_scale(by, padded, scalars, np.float32(qmax))[0])[: len(rows)]
  with jax.enable_x64(True):
    wide = {leaf: np.float64(scalar) for leaf, scalar in scalars.items()}
    scale = np.asarray(_codes_and_scale(by, np.float64(padded), wide, np.float64(qmax))[1])
  bits, largest = round(np.log2(qmax + 1)) + 1, int(np.abs(codes).max())
  if largest > _LARGEST_CODE:
    raise ConfigError(
      f"The layer {path!r} cannot be exported: {by.method} at {bits} bits gives kernel codes up "
      f"to {largest}, and files hold codes up to {_LARGEST_CODE}. Train it with fewer bits."
    )
  needed = largest.bit_length() + 1
  return Kernel(
    codes.reshape(kernel.shape).astype(np.int8), scale, bits, needed if needed > bits else None
  )


def float_kernel(params: Mapping[str, Any]) -> Kernel:
  """The kernel of a layer that a rule keeps in full precision."""
  return Kernel(np.float32(params["kernel"]), np.float64(1.0), FLOAT_BITS, None)


@functools.partial(jax.jit, static_argnums=0)
def _codes_and_scale(
  by: base.Quantizer, kernel: jax.Array, scalars: Any, qmax: jax.Array
) -> tuple[jax.Array, jax.Array]:
  quantized = by.of_kernel(by.quantize_kernel, kernel, scalars, qmax)
  return quantized.codes, quantized.scale


class Activations(NamedTuple):
  """A quantizer of activations.

  Attributes:
    node: of the net.
    scale: float64, of its codes.
  """

  node: Quantizer
  scale: np.float64


def quantizer(
  path: str, params: Mapping[str, Any], qmax: float, kind: base.Kind, by: base.Quantizer
) -> Activations:
  """A quantizer of activations as `clip(round((x + margin) * inverse))`; its node reads "".

  Args:
    path: of the layer.
    params: of the layer, on the host.
    qmax: as `Bits.act_qmax`.
    kind: of the layer.
    by: the quantizer.

  Raises:
    ConfigError: a quantizer that is no such function.
  """
  signed, high = kind == "symmetric", int(qmax)
  with jax.enable_x64(True):
    wide = {leaf: jnp.float64(params[leaf]) for leaf in by.act_scalars}
    line = by.act_line(wide, jnp.float64(high), kind)
    if line is None:
      raise ConfigError(
        f"The quantizer {path!r} cannot be exported: {by.method} gives signed values near 0 the "
        "code 0, whatever the step, which files cannot hold. Use duq, lsq or pact, or a model "
        "without symmetric quantizers."
      )
    low_end, width, scale = (np.float64(value) for value in line)
  node = Quantizer(
    name=path,
    input="",
    inverse=float(np.float32(high / width)),
    margin=float(np.float32(-low_end)) + 0.0,
    low=-high if signed else 0,
    high=high,
    bits=round(np.log2(high + 1)) + signed,
    scale=float(np.float32(scale)),
    offset=base.OFFSET[kind],
  )
  return Activations(node, scale)
