"""Bit widths: values of the forward pass, so that 8 -> 5 -> 4 bits never recompiles."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from profit_jax.config import MAX_BITS, MIN_BITS, QuantSettings
from profit_jax.quant import base
from profit_jax.quant.duq import DuQ

Width = int | np.integer | jax.Array | None


@dataclasses.dataclass(frozen=True)
class LayerBits:
  """What a rule says of one layer.

  Attributes:
    path: of a layer with a kernel, or of a quantizer of activations.
    what: which of them.
    least: the least bits, 2 to 8; a phase may have more. None: never quantized.
  """

  path: str
  what: Literal["weight", "act"]
  least: int | None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["weight", "act", "layers"],
  meta_fields=["quantizer", "own", "aiwq_every"],
)
@dataclasses.dataclass(frozen=True)
class Bits:
  """The bit widths of a model's layers, and their quantizer.

  `None` is full precision. It is part of the tree's structure, so that whether a tensor is
  quantized is static (one program each), while its width is a value (the same program).

  Attributes:
    weight: bit width of kernels, 2 to 8; an int or an int32 scalar; or None.
    act: likewise, of activations.
    quantizer: how.
    layers: widths of single layers by path, in place of `weight` (of a convolution or a dense
      layer) or `act` (of a `QuantAct`).
    own: what rules say of single layers; `at` makes `layers` of it.
    aiwq_every: AIWQ is measured on every n-th image of a batch.

  Raises:
    ValueError: an int outside 2 to 8.
  """

  weight: Width = None
  act: Width = None
  quantizer: base.Quantizer = DuQ()
  layers: Mapping[str, Width] = dataclasses.field(default_factory=dict, hash=False)
  own: tuple[LayerBits, ...] = ()
  aiwq_every: int = 1

  def __post_init__(self):
    for name in ("weight", "act"):
      object.__setattr__(self, name, _checked(getattr(self, name), name))
    if isinstance(self.layers, Mapping):  # JAX also rebuilds trees with other things in their place
      layers = {path: _checked(width, path) for path, width in self.layers.items()}
      object.__setattr__(self, "layers", layers)

  def at(self, weight: Width, act: Width) -> "Bits":
    """The same in a phase with these widths; layers with rules have theirs if they are larger."""
    phase = {"weight": weight, "act": act}
    layers = {
      own.path: None if own.least is None else _larger(phase[own.what], own.least)
      for own in self.own
      if phase[own.what] is not None
    }
    return dataclasses.replace(self, weight=weight, act=act, layers=layers)

  def never(self, layer: str) -> bool:
    """Whether a layer is in full precision where others are quantized."""
    return layer in self.layers and self.layers[layer] is None

  def weight_of(self, layer: str) -> Width:
    """The bit width of a layer's kernel."""
    return self.layers.get(layer, self.weight)

  def act_of(self, layer: str) -> Width:
    """The bit width of a quantizer of activations."""
    return self.layers.get(layer, self.act)

  def kernel_qmax(self, layer: str = "") -> jax.Array | None:
    """The largest code of a layer's kernel, `2^(b-1) - 1`, float32; None in full precision."""
    return _qmax(self.weight_of(layer), signed=True)

  def act_qmax(self, kind: base.Kind, layer: str = "") -> jax.Array | None:
    """The largest code of activations: `2^(b-1) - 1` if they are symmetric, else `2^b - 1`."""
    return _qmax(self.act_of(layer), signed=kind == "symmetric")


def bits_of(settings: QuantSettings) -> Bits:
  """Full precision, with the quantizer that a configuration asks for; rules need a model.

  Raises:
    ConfigError: an unknown quantizer.
  """
  per_channel = settings.per_channel or settings.policy == "brevitas"
  return Bits(quantizer=base.named(settings.method, per_channel=per_channel))


def _checked(width: Any, name: str) -> Any:
  if not isinstance(width, int) or isinstance(width, bool):
    return width
  if not MIN_BITS <= width <= MAX_BITS:
    raise ValueError(f"bits must lie in {MIN_BITS}..{MAX_BITS}, got {name}={width}")
  return np.int32(width)


def _larger(width: Any, least: int) -> Any:
  if isinstance(width, (int, np.generic)):
    return np.int32(max(int(width), least))
  return jnp.maximum(width, least)


def largest_code(width: int, *, signed: bool) -> float:
  """The largest code of a width that is known: `2^(width-1) - 1` if signed, else `2^width - 1`."""
  return 2.0 ** (width - signed) - 1


def _qmax(bits: Width, *, signed: bool) -> Any:
  if bits is None:
    return None
  if isinstance(bits, np.generic):
    return np.float32(largest_code(int(bits), signed=signed))
  return (jnp.left_shift(jnp.int32(1), bits - int(signed)) - 1).astype(jnp.float32)
