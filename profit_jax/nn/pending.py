"""Remembers the parts of a layer's output, so that the next layer can compute both at once.

Layers return plain arrays, so that any operation can follow. A `QuantConv` remembers beside its
output the sums of codes and their scale, which a `BatchNorm` takes; a `BatchNorm` remembers what it
normalized, which a `QuantAct` takes. Where that happens, nothing reads the array itself, and the
compiler leaves it out.
"""

import weakref
from typing import Any

import jax

# By the identity of the array: arrays and tracers have no hash.
_made_of: dict[int, tuple[weakref.ref, Any]] = {}


def remember(array: jax.Array, parts: Any) -> jax.Array:
  """Keeps what an array was made of for as long as the array lives; returns the array."""
  key = id(array)
  _made_of[key] = weakref.ref(array, lambda _: _made_of.pop(key, None)), parts
  return array


def parts_of(array: Any) -> Any:
  """What a layer remembered of exactly this array; None for all others."""
  reference, parts = _made_of.get(id(array), (None, None))
  return parts if reference is not None and reference() is array else None
