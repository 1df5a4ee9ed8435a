"""Quantized tensors as codes and a scale, and what products of codes give.

Codes are floating arrays that hold integers (an integer array passes no gradient). Up to 255 they
are exact in bfloat16 and TF32, so that one cheap pass of a matrix unit multiplies them exactly, and
their sums are exact in float32 below 2^24. Scales are applied after a product, where they cost
nothing.
"""

import abc
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from profit_jax.kernels.affine import Affine


class Deferred(abc.ABC):
  """Stands for an array: operators, `jnp` functions and indexing take `value()`."""

  __array_priority__ = 100  # NumPy's operators leave it to those below

  @abc.abstractmethod
  def value(self) -> jax.Array:
    """The array."""

  def __jax_array__(self) -> jax.Array:
    return self.value()

  def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
    # In NumPy, so that float64 needs no mode of JAX's.
    del copy
    return np.asarray(jax.tree.map(np.asarray, self).value(), dtype)

  def __getitem__(self, index: Any) -> jax.Array:
    return self.value()[index]

  def __len__(self) -> int:
    return self.shape[0]

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """Of the array."""

  @property
  @abc.abstractmethod
  def dtype(self) -> np.dtype:
    """Of the array."""

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of elements."""
    return int(np.prod(self.shape))

  def __add__(self, other: "Operand") -> jax.Array:
    return self.value() + value_of(other)

  def __radd__(self, other: "Operand") -> jax.Array:
    return value_of(other) + self.value()

  def __sub__(self, other: "Operand") -> jax.Array:
    return self.value() - value_of(other)

  def __rsub__(self, other: "Operand") -> jax.Array:
    return value_of(other) - self.value()

  def __mul__(self, other: "Operand") -> jax.Array:
    return self.value() * value_of(other)

  def __rmul__(self, other: "Operand") -> jax.Array:
    return value_of(other) * self.value()

  def __truediv__(self, other: "Operand") -> jax.Array:
    return self.value() / value_of(other)

  def __neg__(self) -> jax.Array:
    return -self.value()


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["codes", "scale", "source"], meta_fields=["offset"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(Deferred):
  """A quantized tensor: `codes * scale + offset`.

  Attributes:
    codes: integers as floating numbers, any shape.
    scale: positive; a scalar, or `[C]` for the last axis. Its gradient is that of the value.
    offset: 0, or -3/8 after h-swish.
    source: for kernels that compute the codes as they read; has no gradient. None elsewhere.
  """

  codes: jax.Array
  scale: jax.Array
  offset: float = 0.0
  source: Affine | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the tensor."""
    return self.codes.shape

  @property
  def dtype(self) -> np.dtype:
    """Of the codes and of the value."""
    return self.codes.dtype

  def value(self) -> jax.Array:
    """The tensor, computed in the dtype of the scale and stored in that of the codes."""
    value = self.codes.astype(self.scale.dtype) * self.scale
    return (value + self.offset if self.offset else value).astype(self.dtype)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["sums", "scale", "shift"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Product(Deferred):
  """What a layer gives that multiplied codes: `sums * scale + shift`.

  Attributes:
    sums: of the products of codes, `[..., C]`.
    scale: positive; a scalar or `[C]`.
    shift: what the input's offset adds, `[C]`; None without an offset.
  """

  sums: jax.Array
  scale: jax.Array
  shift: jax.Array | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the output."""
    return self.sums.shape

  @property
  def dtype(self) -> np.dtype:
    """Of the sums and of the value."""
    return self.sums.dtype

  def value(self) -> jax.Array:
    """The output, computed in the dtype of the scale and stored in that of the sums."""
    value = self.sums.astype(self.scale.dtype) * self.scale
    return (value if self.shift is None else value + self.shift).astype(self.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Unquantized(Deferred):
  """An array where a layer gives codes, or what is pending, in other phases.

  Attributes:
    array: any shape.
  """

  array: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array."""
    return self.array.shape

  @property
  def dtype(self) -> np.dtype:
    """Of the array."""
    return self.array.dtype

  def value(self) -> jax.Array:
    """The array."""
    return self.array


# An array, or what a layer gives instead of one.
Tensor = jax.Array | Deferred
Operand = npt.ArrayLike | Deferred


def value_of(x: Any) -> jax.Array:
  """The array that `x` is or stands for."""
  return x.value() if isinstance(x, Deferred) else x
