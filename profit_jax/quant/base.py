"""What a quantizer is, and the registry of those that `config.quant.method` chooses from.

A quantizer maps values to integer codes between `-qmax` and `qmax` (kernels and signed activations)
or between 0 and `qmax` (other activations). It learns scalars for each tensor, or for each output
channel of a kernel. They are leaves whose names begin with `quant_`, stored raw: the value is the
softplus.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import jax

from profit_jax.config import ConfigError
from profit_jax.fields import listed
from profit_jax.quant.quantized import Quantized

if TYPE_CHECKING:
  from profit_jax.quant import duq

Kind = Literal["symmetric", "unsigned", "hswish"]
Slope = Literal["interval", "step", "clip"]
Scalars = Mapping[str, jax.Array]

PREFIX = "quant_"

# h-swish has its minimum, -3/8, at x = -3/2. A convolution whose input is quantized after h-swish
# pads with this value, which is code 0 of its quantizer ("negative padding", paper section 3.3).
HSWISH_MINIMUM = -3.0 / 8.0

# Per kind: the lower clip end in units of `a`, and the offset of the input.
LOWER = {"symmetric": -1.0, "unsigned": 0.0, "hswish": 0.0}
OFFSET = {"symmetric": 0.0, "unsigned": 0.0, "hswish": HSWISH_MINIMUM}


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
  """How kernels and activations are quantized. A subclass is one method, `register`ed by its name.

  Methods take the scalars as they are stored. `qmax` is a float32 scalar, the largest code.

  Attributes:
    per_channel: kernels have scalars for each output channel instead of one set.
    method: the name, for configurations, reports and exported files.
    kernel_scalars: leaves of a kernel's quantizer.
    act_scalars: leaves of an activation's.
    unscaled: leaves that stay where values grow by a factor; all others grow by it, with the same
      codes.
    one_interval: a kernel's codes are `round(clip(w / a, -1, 1) * qmax)`, with the interval a in
      `quant_a`. Dampening and freezing of codes need that.
  """

  per_channel: bool = False

  method: ClassVar[str] = ""
  kernel_scalars: ClassVar[tuple[str, ...]] = ()
  act_scalars: ClassVar[tuple[str, ...]] = ()
  unscaled: ClassVar[tuple[str, ...]] = ()
  one_interval: ClassVar[bool] = False

  @abc.abstractmethod
  def quantize_kernel(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> Quantized:
    """A kernel's codes and scale, with straight-through gradients; one set of scalars."""

  @abc.abstractmethod
  def quantize_act(self, x: jax.Array, scalars: Scalars, qmax: jax.Array, kind: Kind) -> Quantized:
    """The codes and scale of activations `[N, ...]`, with straight-through gradients."""

  @abc.abstractmethod
  def kernel_codes(self, kernel: jax.Array, scalars: Scalars, qmax: jax.Array) -> jax.Array:
    """Integers of a kernel's shape, in any dtype, that fit into 8 bits; one for each value."""

  @abc.abstractmethod
  def kernel_clipped(self, kernel: jax.Array, scalars: Scalars) -> jax.Array:
    """Whether each element lies beyond the interval: bool, of the kernel's shape."""

  @abc.abstractmethod
  def act_clipped(self, x: jax.Array, scalars: Scalars, kind: Kind) -> jax.Array:
    """Whether each element lies beyond the interval: bool, of the activations' shape."""

  @abc.abstractmethod
  def first_kernel(self, kernel: jax.Array, qmax: jax.Array) -> dict[str, jax.Array]:
    """The first values of a kernel's scalars, positive."""

  @abc.abstractmethod
  def first_act(
    self, x: jax.Array, qmax: jax.Array, kind: Kind, largest: float | None
  ) -> dict[str, jax.Array]:
    """The first values of an activation's scalars, positive; `largest` bounds the interval."""

  def act_interval(self, scalars: Scalars, qmax: jax.Array, features: int) -> "duq.Interval | None":
    """The `duq.Interval` of activations with `features` elements an example.

    None where this method's activation quantizer is not one interval.
    """
    del scalars, qmax, features
    return None

  def act_line(
    self, scalars: Scalars, qmax: jax.Array, kind: Kind
  ) -> tuple[jax.Array | float, jax.Array, jax.Array] | None:
    """Activations as an affine map, for export: `(begin, width, scale)`.

    The codes are `round(clip((x - begin) / width, low, 1) * qmax)`, low being -1 for symmetric ones
    and 0 for others; their values are `codes * scale` plus the kind's offset. None where a method's
    codes are no such function.
    """
    interval = self.act_interval(scalars, qmax, 1)
    return None if interval is None else (OFFSET[kind], interval.a, interval.scale)

  def fit_kernel(self, kernel: jax.Array, qmax: jax.Array) -> dict[str, jax.Array] | None:
    """Scalars with which the quantized kernel is nearest to the kernel; None where not offered."""
    del kernel, qmax
    return None

  def of_kernel(self, function: Callable[..., Any], kernel: jax.Array, *rest: Any) -> Any:
    """A function of a kernel, of each channel where scalars are per channel.

    Args:
      function: a method of this class that takes a kernel first.
      kernel: `[..., C]`.
      *rest: scalars (with a leading axis C where they are per channel) and `qmax`, as the function
        takes them.

    Returns:
      What the function gives; arrays of the kernel's shape keep it, and scalars become `[C]`.
    """
    return per_channel(function, kernel, *rest) if self.per_channel else function(kernel, *rest)


def per_channel(function: Callable[..., Any], kernel: jax.Array, *rest: Any) -> Any:
  """A function of a kernel and scalars, applied to each output channel (the last axis).

  Args:
    function: takes the kernel `[...]` of one channel, then the rest.
    kernel: `[..., C]`.
    *rest: a mapping of scalars `[C]`, which is split, or arrays that all channels share.
  """

  def of_channel(k, *r):
    result = function(k, *r)
    return (result.codes, result.scale) if isinstance(result, Quantized) else (result, ())

  axes = (-1, *(0 if isinstance(value, Mapping) else None for value in rest))
  shape = jax.eval_shape(of_channel, kernel[..., 0], *jax.tree.map(_first_of, rest))
  # The channels are the last axis of arrays of the kernel's shape, and the only one of scalars.
  out = jax.tree.map(lambda leaf: -1 if leaf.ndim else 0, shape)
  values, scale = jax.vmap(of_channel, in_axes=axes, out_axes=out)(kernel, *rest)
  return values if isinstance(scale, tuple) else Quantized(values, scale)


def _first_of(leaf: Any) -> Any:
  return leaf[0] if getattr(leaf, "ndim", 0) else leaf


_Class = TypeVar("_Class", bound=type[Quantizer])
QUANTIZERS: dict[str, type[Quantizer]] = {}


def register(cls: _Class) -> _Class:
  """Makes a quantizer known under its `method`."""
  QUANTIZERS[cls.method] = cls
  return cls


def named(method: str, *, per_channel: bool = False) -> Quantizer:
  """The quantizer that `config.quant.method` names.

  Raises:
    ConfigError: there is none of that name.
  """
  if method not in QUANTIZERS:
    raise ConfigError(
      f"config.quant.method = {method!r} is not allowed: it must be one of {listed(QUANTIZERS)}."
    )
  return QUANTIZERS[method](per_channel=per_channel)
