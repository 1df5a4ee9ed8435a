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

from profit_jax.config import ConfigError, QuantSettings
from profit_jax.export.net import Quantizer
from profit_jax.quant import duq, qil
from profit_jax.quant.methods import METHODS, per_channel

_LARGEST_CODE = 127  # of int8, without -128


class Kernel(NamedTuple):
  """A quantized kernel, `codes * scale`.

  Attributes:
    codes: int8.
    scale: float64, a scalar or `[F]` for the last axis.
    bits: of the quantizer.
    code_bits: that the codes take, if they are more.
  """

  codes: np.ndarray
  scale: np.ndarray
  bits: int
  code_bits: int | None


def quantized_kernel(
  path: str, params: Mapping[str, Any], steps: float, quant: QuantSettings | None
) -> Kernel:
  """The codes of a layer's kernel.

  Args:
    path: of the layer.
    params: of the layer, on the host.
    steps: as `Levels.weight`.
    quant: which quantizer; None is DuQ.

  Raises:
    ConfigError: codes that do not fit into int8.
  """
  quant = quant or QuantSettings()
  method, kernel = METHODS[quant.method], np.asarray(params["kernel"])
  scalars = {leaf: np.asarray(params[leaf]) for leaf in method.kernel_leaves}
  # Padded to a power of two: the kernels of a net have dozens of shapes, and share few programs.
  last = kernel.shape[-1] if quant.per_channel else 1
  rows = kernel.reshape(-1, last)
  padded = np.pad(rows, [(0, (1 << (len(rows) - 1).bit_length()) - len(rows)), (0, 0)])
  compute = functools.partial(_codes_and_scale, quant.method, quant.per_channel)
  codes = np.asarray(compute(padded, scalars, np.float32(steps))[0])[: len(rows)]
  with jax.enable_x64(True):
    wide = {leaf: np.float64(scalar) for leaf, scalar in scalars.items()}
    scale = np.asarray(compute(np.float64(padded), wide, np.float64(steps))[1])
  bits, largest = round(np.log2(steps + 1)) + 1, int(np.abs(codes).max())
  if largest > _LARGEST_CODE:
    raise ConfigError(
      f"The layer {path!r} cannot be exported: {quant.method} at {bits} bits gives kernel codes up "
      f"to {largest}, and files hold codes up to {_LARGEST_CODE}. Train it with fewer bits."
    )
  needed = largest.bit_length() + 1
  return Kernel(
    codes.reshape(kernel.shape).astype(np.int8), scale, bits, needed if needed > bits else None
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _codes_and_scale(
  method: str, split: bool, kernel: jax.Array, params: Any, steps: jax.Array
) -> tuple[jax.Array, jax.Array]:
  quantize = METHODS[method].kernel
  if split:
    quantized = per_channel(quantize, kernel, params, steps)
  else:
    quantized = quantize(kernel, params, steps)
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
  path: str,
  params: Mapping[str, Any],
  steps: float,
  kind: duq.Kind,
  quant: QuantSettings | None,
) -> Activations:
  """A quantizer of activations as `clip(round((x + margin) * inverse))`; its node reads "".

  Args:
    path: of the layer.
    params: of the layer, on the host.
    steps: as `Levels.act`.
    kind: of the layer.
    quant: which quantizer; None is DuQ.

  Raises:
    ConfigError: a quantizer that is no such function.
  """
  method = "duq" if quant is None else quant.method
  bits, signed = round(np.log2(steps + 1)), kind == "symmetric"
  high = 2 ** (bits - signed) - 1
  with jax.enable_x64(True):
    wide = {leaf: jnp.float64(params[leaf]) for leaf in METHODS[method].act_leaves}
    if METHODS[method].interval is not None:
      interval = METHODS[method].interval(wide, jnp.float64(high), 1)
      low_end, width, scale = np.float64(duq.OFFSET[kind]), interval.a, interval.scale
    elif signed:
      raise ConfigError(
        f"The quantizer {path!r} cannot be exported: {method} gives signed values near 0 the code "
        "0, whatever the step, which files cannot hold. Use duq, lsq or pact, or a model without "
        "symmetric quantizers."
      )
    else:
      low_end, width, scale = qil.line(wide, jnp.float64(high), kind)
    low_end, width, scale = (np.float64(value) for value in (low_end, width, scale))
  node = Quantizer(
    name=path,
    input="",
    inverse=float(np.float32(high / width)),
    margin=float(np.float32(-low_end)) + 0.0,
    low=-high if signed else 0,
    high=high,
    bits=bits,
    scale=float(np.float32(scale)),
    offset=duq.OFFSET[kind],
  )
  return Activations(node, scale)
