"""Bit widths: values of the forward pass, so that 8 -> 5 -> 4 bits never recompiles."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from profit_jax.config import MAX_BITS, MIN_BITS, QuantSettings
from profit_jax.quant import base
from profit_jax.quant.duq import DuQ

Width = int | jax.Array | None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["weight", "act"],
  meta_fields=["quantizer", "first", "last", "weight_at_least", "act_at_least", "aiwq_every"],
)
@dataclasses.dataclass(frozen=True)
class Bits:
  """The bit widths of a model's layers, and their quantizer.

  `None` is full precision. It is part of the tree's structure, so that whether a kind of tensor is
  quantized is static (one program each), while its width is a value (the same program).

  Attributes:
    weight: bit width of kernels, 2 to 8; an int or an int32 scalar; or None.
    act: likewise, of activations.
    quantizer: how.
    first: least bits of the first layer's kernel, which a model asks for by `of_first`; 0 for none.
    last: least bits of the last layer's kernel and of its input, by `of_last`; 0 for none.
    weight_at_least: least bits of this layer's kernel; 0 for none.
    act_at_least: likewise, of activations.
    aiwq_every: AIWQ is measured on every n-th image of a batch.

  Raises:
    ValueError: an int outside 2 to 8.
  """

  weight: Width = None
  act: Width = None
  quantizer: base.Quantizer = DuQ()
  first: int = 0
  last: int = 0
  weight_at_least: int = 0
  act_at_least: int = 0
  aiwq_every: int = 1

  def __post_init__(self):
    for name in ("weight", "act"):
      value = getattr(self, name)
      if isinstance(value, int) and not isinstance(value, bool):
        if not MIN_BITS <= value <= MAX_BITS:
          raise ValueError(f"bits must lie in {MIN_BITS}..{MAX_BITS}, got {name}={value}")
        object.__setattr__(self, name, np.int32(value))

  def at(self, weight: Width, act: Width) -> "Bits":
    """The same at other bit widths."""
    return dataclasses.replace(self, weight=weight, act=act)

  def of_first(self) -> "Bits":
    """Those of the first layer."""
    return dataclasses.replace(self, weight_at_least=self.first)

  def of_last(self) -> "Bits":
    """Those of the last layer, and of the quantizer before it."""
    return dataclasses.replace(self, weight_at_least=self.last, act_at_least=self.last)

  def kernel_qmax(self) -> jax.Array | None:
    """The largest code of a kernel, `2^(b-1) - 1`, float32; None in full precision."""
    return _qmax(self.weight, self.weight_at_least, signed=True)

  def act_qmax(self, kind: base.Kind) -> jax.Array | None:
    """The largest code of activations: `2^(b-1) - 1` if they are symmetric, else `2^b - 1`."""
    return _qmax(self.act, self.act_at_least, signed=kind == "symmetric")


def bits_of(settings: QuantSettings) -> Bits:
  """Full precision, with the quantizer and the least bits that a configuration asks for.

  Raises:
    ConfigError: an unknown quantizer.
  """
  quantizer = base.named(settings.method, per_channel=settings.per_channel)
  return Bits(quantizer=quantizer, first=settings.first_bits, last=settings.last_bits)


def _qmax(bits: Width, least: int, *, signed: bool) -> Any:
  if bits is None:
    return None
  if isinstance(bits, np.generic):
    return np.float32(2.0 ** (max(int(bits), least) - signed) - 1)
  bits = jnp.maximum(bits, least) if least else bits
  return (jnp.left_shift(jnp.int32(1), bits - int(signed)) - 1).astype(jnp.float32)
