"""Trees of parameters and statistics as a few arrays.

A training step updates and averages its arrays one by one, and of MobileNet-v2's 420 leaves 368 are
small. Packed they are a few vectors, and a few kernels instead of a thousand.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
import optax
from flax import traverse_util

from profit_jax.kernels import target
from profit_jax.nn.spec import WEIGHT, ModelSpec, Path

STATISTICS = "statistics"  # the group of running statistics


class Leaf(NamedTuple):
  """Where a leaf of the tree is.

  Attributes:
    path: in the tree.
    shape: there.
    array: that holds it: a vector (`vector_name`), or its own array.
    own: whether that array is its own.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  array: str
  own: bool


class Packed(flax.struct.PyTreeNode):
  """A nested dictionary as few arrays. `pack` makes it, `unpack` gives the dictionary back.

  Attributes:
    arrays: the vectors of norms (scales and biases), quantizers' scalars and running statistics, as
      far as the tree has such leaves; see `vector_name`. Each weight is a separate array under its
      path, as `block01/expand_conv/kernel`.
    layout: of all leaves; those of a vector lie there in this order.
  """

  arrays: dict[str, Any]
  layout: tuple[Leaf, ...] = flax.struct.field(pytree_node=False)

  def filled(self, tree: Mapping[str, Any]) -> "Packed":
    """With the leaves of another tree, packed alike; arrays of which it has no leaf stay."""
    flat = traverse_util.flatten_dict(tree)
    given = tuple(leaf for leaf in self.layout if leaf.path in flat)
    return self.replace(arrays={**self.arrays, **_arrays(given, flat)})

  def with_kernels(self, tree: Mapping[str, Any]) -> "Packed":
    """With the kernels of another tree; the vectors stay."""
    flat = traverse_util.flatten_dict(tree)
    own = {leaf.array: flat[leaf.path] for leaf in self.layout if leaf.own}
    return self.replace(arrays={**self.arrays, **own})


def vector_name(group: str, dtype: Any) -> str:
  """The name of a group's vector of a dtype, `/norm/float32`; a weight's begins with no slash."""
  return f"/{group}/{np.dtype(dtype).name}"


def group_of(name: str) -> str | None:
  """The group of the vector with this name; None of a weight's array."""
  return name.split("/")[1] if name.startswith("/") else None


def pack(tree: Mapping[str, Any], groups: Mapping[Path, str] | None = None) -> Packed:
  """Packs a nested dictionary; NumPy arrays stay NumPy arrays.

  Args:
    tree: parameters or running statistics.
    groups: of the parameters, `ModelSpec.groups`; None for running statistics.
  """
  flat = traverse_util.flatten_dict(tree)
  layout = tuple(
    _leaf(path, leaf, STATISTICS if groups is None else groups[path])
    for path, leaf in sorted(flat.items())
  )
  return Packed(arrays=_arrays(layout, flat), layout=layout)


def pack_variables(variables: Mapping[str, Any], spec: ModelSpec) -> dict[str, Packed]:
  """Packs a model's `params` and `batch_stats`."""
  return {
    "params": pack(variables["params"], spec.groups),
    "batch_stats": pack(variables["batch_stats"]),
  }


def unpack(tree: Any) -> Any:
  """Replaces every `Packed` in a tree by the nested dictionary that it holds.

  Leaves of an array that an optimizer has masked are left out. NumPy arrays give views. Outside of
  a compiled program take arrays to the host first: on a device every call would dispatch a kernel a
  leaf.
  """
  return jax.tree.map(
    lambda node: _unpacked(node) if isinstance(node, Packed) else node,
    tree,
    is_leaf=lambda node: isinstance(node, Packed),
  )


def _leaf(path: Path, leaf: Any, group: str) -> Leaf:
  own = group == WEIGHT
  array = "/".join(path) if own else vector_name(group, leaf.dtype)
  return Leaf(path, tuple(leaf.shape), array, own)


def _arrays(layout: tuple[Leaf, ...], flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
  arrays: dict[str, Any] = {}
  parts: dict[str, list[Any]] = {}
  for leaf in layout:
    if leaf.own:
      arrays[leaf.array] = flat[leaf.path]
    else:
      parts.setdefault(leaf.array, []).append(flat[leaf.path])
  return arrays | {name: _joined(leaves) for name, leaves in parts.items()}


def _joined(leaves: list[Any]) -> Any:
  if all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves):
    return np.concatenate([np.ravel(leaf) for leaf in leaves])
  return jax.lax.concatenate([jax.lax.reshape(leaf, (leaf.size,)) for leaf in leaves], 0)


def _unpacked(packed: Packed) -> dict[str, Any]:
  flat: dict[Path, Any] = {}
  members: dict[str, list[Leaf]] = {}
  for leaf in packed.layout:
    array = packed.arrays[leaf.array]
    if isinstance(array, optax.MaskedNode):
      continue
    if leaf.own:
      flat[leaf.path] = array
    else:
      members.setdefault(leaf.array, []).append(leaf)
  for name, leaves in members.items():
    parts = split(packed.arrays[name], [math.prod(leaf.shape) for leaf in leaves])
    flat |= {leaf.path: part.reshape(leaf.shape) for leaf, part in zip(leaves, parts, strict=True)}
  return traverse_util.unflatten_dict(flat)


def split(vector: Any, sizes: Sequence[int]) -> list[Any]:
  """The consecutive parts of a vector `[sum(sizes)]`, each `[size]`."""
  if isinstance(vector, np.ndarray):
    return np.split(vector, np.cumsum(sizes)[:-1])
  if not target.current().is_tuned_for("cpu"):
    return list(jax.lax.split(vector, sizes))
  return _split_in_a_branch(vector, tuple(sizes))


# Compiled once: outside of a program `cond` would compile its branches again at every call.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _split_in_a_branch(vector: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
  # XLA on CPU would fuse each slice into its reader. Readers that were alike, and compiled once,
  # then differ by an offset: 1,750 functions for LLVM, not 842, in a step of MobileNet-v2. The
  # branch of a conditional is compiled by itself, see `lowering.own_kernel`.
  first = vector[0].astype(np.float32)
  return jax.lax.cond(
    first == first,
    lambda whole: list(jax.lax.split(whole, sizes)),
    lambda whole: [jax.lax.full((size,), np.nan, whole.dtype) for size in sizes],
    vector,
  )
