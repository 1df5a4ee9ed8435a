"""Quantizers: one class each, their first values, codes with their scales, and bit widths."""

from profit_jax.quant.base import HSWISH_MINIMUM, QUANTIZERS, Kind, Quantizer, named, register
from profit_jax.quant.bits import Bits, bits_of
from profit_jax.quant.duq import DuQ
from profit_jax.quant.lsq import LSQ
from profit_jax.quant.pact import PACT
from profit_jax.quant.qil import QIL
from profit_jax.quant.quantized import Quantized

__all__ = [
  "HSWISH_MINIMUM",
  "LSQ",
  "PACT",
  "QIL",
  "QUANTIZERS",
  "Bits",
  "DuQ",
  "Kind",
  "Quantized",
  "Quantizer",
  "bits_of",
  "named",
  "register",
]
