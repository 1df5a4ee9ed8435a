"""The same graph with fewer operations: no identities, and non-linearities by their names."""

from collections.abc import Sequence

import numpy as np

from profit_jax.export.trace import Operation, needed

# Two float32 numbers within this are one: half a unit in the last place, and what a reciprocal's
# rounding adds.
_SAME = 2.0**-23


def simplified(operations: Sequence[Operation]) -> list[Operation]:
  """The operations, changed in place, of which the last still gives the output."""
  return _recognized(_composed(_composed(list(operations))))


def users(operations: Sequence[Operation]) -> dict[Operation, list[Operation | None]]:
  """The operations that read each; None stands for the caller, who reads the last."""
  found = {operation: [] for operation in operations}
  for operation in operations:
    for source in operation.inputs:
      found[source].append(operation)
  found[operations[-1]].append(None)
  return found


def _composed(operations: list[Operation]) -> list[Operation]:
  """Without identities; affine maps, bounds and reshapes that follow each other as one."""
  counts = {operation: len(readers) for operation, readers in users(operations).items()}
  stand_ins = {}
  for operation in operations:
    operation.inputs = [stand_ins.get(source, source) for source in operation.inputs]
    if operation.kind == "reshape" and operation.inputs[0].kind == "reshape":
      (inner,) = operation.inputs
      operation.inputs = inner.inputs
      counts[inner] -= 1
      counts[inner.inputs[0]] += counts[inner] > 0
    if _is_identity(operation) or _joins(operation, counts):
      (source,) = operation.inputs
      stand_ins[operation] = source
      counts[source] += counts[operation] - 1
  return needed(operations, stand_ins.get(operations[-1], operations[-1]))


def _is_identity(operation: Operation) -> bool:
  if operation.kind == "reshape":
    return operation.shape == operation.inputs[0].shape
  return _is_affine(operation, 1.0, 0.0)


def _is_affine(operation: Operation, gain: float, shift: float) -> bool:
  """Whether an operation is this affine map, to the precision of float32."""
  return operation.kind == "affine" and all(
    np.allclose(operation.values[name], number, rtol=_SAME, atol=0.0)
    for name, number in (("gain", gain), ("shift", shift))
  )


def _joins(operation: Operation, counts: dict[Operation, int]) -> bool:
  """Joins an affine map or bounds with the same before it, which nothing else reads."""
  if operation.kind not in ("affine", "clip"):
    return False
  (source,) = operation.inputs
  if operation.kind == "affine" and source.kind == "reshape" and counts[source] == 1:
    (before,) = source.inputs
    source = before if before.shape[-1] == source.shape[-1] else source
  if source.kind != operation.kind or counts[source] != 1:
    return False
  first, second = source.values, operation.values
  if operation.kind == "affine":
    source.values = {
      "gain": first["gain"] * second["gain"],
      "shift": first["shift"] * second["gain"] + second["shift"],
    }
    return True
  low, high = (np.clip(first[end], second["low"], second["high"]) for end in ("low", "high"))
  source.values = {"low": float(low), "high": float(high)}
  return True


def _recognized(operations: list[Operation]) -> list[Operation]:
  """With h-swish and hard sigmoid where their formulas were written out."""
  readers = users(operations)
  for operation in operations:
    for function, find in (("hard_sigmoid", _hard_sigmoid), ("hard_swish", _hard_swish)):
      x = find(operation, readers)
      if x is not None:
        operation.kind, operation.inputs = "activation", [x]
        operation.values = {"function": function}
        break
  return needed(operations, operations[-1])


Readers = dict[Operation, list[Operation | None]]


def _hard_sigmoid(operation: Operation, readers: Readers) -> Operation | None:
  """The x of `relu6(x + 3) / 6`, or None."""
  return _gated(operation.inputs[0], readers) if _is_affine(operation, 1.0 / 6.0, 0.0) else None


def _hard_swish(operation: Operation, readers: Readers) -> Operation | None:
  """The x of `x * hard_sigmoid(x)` and of `x * relu6(x + 3) / 6`, or None."""
  if operation.kind == "product":
    for x, other in (operation.inputs, operation.inputs[::-1]):
      if other.values.get("function") == "hard_sigmoid" and other.inputs == [x]:
        return x
  elif _is_affine(operation, 1.0 / 6.0, 0.0):
    (product,) = operation.inputs
    if product.kind == "product" and len(readers[product]) == 1:
      for x, other in (product.inputs, product.inputs[::-1]):
        if _gated(other, readers) is x:
          return x
  return None


def _gated(operation: Operation, readers: Readers) -> Operation | None:
  """The x of `relu6(x + 3)`, which nothing else reads; or None."""
  if not (_is_relu6(operation) and len(readers[operation]) == 1):
    return None
  (shifted,) = operation.inputs
  alone = _is_affine(shifted, 1.0, 3.0) and len(readers[shifted]) == 1
  return shifted.inputs[0] if alone else None


def _is_relu6(operation: Operation) -> bool:
  if operation.kind == "activation":
    return operation.values["function"] == "relu6"
  return operation.kind == "clip" and operation.values == {"low": 0.0, "high": 6.0}
