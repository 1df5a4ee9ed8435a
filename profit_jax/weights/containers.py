"""Where the weights are among everything else that a checkpoint holds."""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from profit_jax.fields import listed
from profit_jax.weights.formats import RefusedError, some
from profit_jax.weights.torch_file import StandIn, array_of

# Entries that training scripts use, in the order in which they are taken: first averaged weights
# (EMA), which are those that scripts evaluate; then raw ones.
AVERAGED = (
  *("state_dict_ema", "model_ema", "model_ema_state_dict", "ema_state_dict", "ema_model"),
  *("params_ema", "ema", "ema_weights", "ema_net", "net_ema"),
  *("average_model", "averaged_model", "swa_model", "swa_state_dict"),
)
RAW = (
  *("model", "state_dict", "model_state_dict", "model_state", "net", "network", "params"),
  *("weights", "checkpoint", "student", "teacher", "module", "backbone"),
)
_KNOWN = frozenset((*AVERAGED, *RAW))
# Entries of no known name that hold no weights, though they may hold tensors.
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|amp|loss|criterion|hyper|callback|loop|rng", re.I)
_DEEPEST = 4  # entries within entries
# Values that are looked through for tensors beside a net's.
_MOST_LOOKED_AT = 100_000
_CODE = "needs code, which is not run here, for"
_PLAIN = "In PyTorch, save the plain weights: torch.save(model.state_dict(), FILE)."


class Chosen(NamedTuple):
  """The weights in a checkpoint.

  Attributes:
    tensors: by their names.
    notes: which entry they are, and what was passed over.
    rest: of the entry that was asked for, what is no entry: the beginning of names.
    entries: of the file, that hold weights.
  """

  tensors: dict[str, np.ndarray]
  notes: tuple[str, ...] = ()
  rest: str = ""
  entries: tuple[str, ...] = ()


def chosen(tree: Any, entry: str, field: str) -> Chosen:
  """The weights in what `torch.save` was given.

  Args:
    tree: what `torch_file.read` returns.
    entry: to take, `NAME` or `NAME/NAME`; "" takes the first of `AVERAGED` and `RAW` that holds
      weights, else the only entry that does.
    field: that has `entry`, for messages.

  Raises:
    RefusedError: no weights, several that none is the first of, or tensors that need code.
  """
  path, rest = _path(tree, entry, field)
  place = _at(tree, path)
  notes = [_note(tree, path, field)] if path else []
  tensors, skipped = _tensors(place)
  if skipped:
    notes.append(f"Passed over beside the tensors: {some(skipped)}.")
  entries = tuple(str(name) for name, value in tree.items() if _holds_weights(value))
  return Chosen(tensors, tuple(notes), rest, entries)


def places(tree: Any, entry: str) -> list[Mapping[Any, Any]]:
  """What holds the weights that `chosen` takes: the whole tree, and each entry of an entry; none
  where it would refuse.
  """
  try:
    path, _ = _path(tree, entry, "")
  except RefusedError:
    return []
  return [_at(tree, path[:depth]) for depth in range(len(path) + 1)]


def _path(tree: Any, entry: str, field: str) -> tuple[list[str], str]:
  """The entries in which the weights are, and what of `entry` names none."""
  if not _is_container(tree):
    raise RefusedError(_no_weights(tree))
  path, rest = _followed(tree, entry)
  place = _at(tree, path)
  if not _is_container(place):
    raise RefusedError(f"{_no_weights(place)} It is the entry {'/'.join(path)!r}.")
  while len(path) < _DEEPEST and (step := _next(place, field)) is not None:
    path.append(step)
    place = place[step]
  return path, rest


def _is_container(value: Any) -> bool:
  """Whether a value is a dictionary, or an object with items that is no whole net."""
  if type(value) is StandIn:
    return bool(value) and not value.is_module
  return isinstance(value, Mapping)


def _followed(tree: Mapping[Any, Any], entry: str) -> tuple[list[str], str]:
  """The entries that `entry` names, and what of it names none."""
  place, path, rest = tree, [], entry
  while rest and _is_container(place):
    step, _, after = (rest, "", "") if rest in place else rest.partition("/")
    if step not in place:
      break
    path.append(step)
    place, rest = place[step], after
  return path, rest


def _at(tree: Any, path: Collection[str]) -> Any:
  for step in path:
    tree = tree[step]
  return tree


def _next(place: Mapping[Any, Any], field: str) -> str | None:
  """The entry that holds the weights; None where `place` itself does, or nothing."""
  known = [name for name in (*AVERAGED, *RAW) if _holds_weights(place.get(name))]
  if known:
    return known[0]
  if _has_tensors(place):
    return None
  others = [
    name
    for name, value in place.items()
    if type(name) is str and not _NO_WEIGHTS.search(name) and _holds_weights(value)
  ]
  if len(others) > 1:
    raise RefusedError(
      f"holds several weights: the entries {some(others)}. Choose one by {field}={others[0]}."
    )
  return others[0] if others else None


def _holds_weights(value: Any) -> bool:
  """Whether there are tensors in an entry, or in known entries of it."""
  level, seen = [value], set()
  for _ in range(_DEEPEST):
    # Entries may be the same ones many times.
    level = [each for each in level if _is_container(each) and id(each) not in seen]
    if any(map(_has_tensors, level)):
      return True
    seen.update(map(id, level))
    within = {id(each[name]): each[name] for each in level for name in _KNOWN & each.keys()}
    level = [*within.values()]
  return False


def _has_tensors(place: Mapping[Any, Any]) -> bool:
  """Whether there are tensors that have names and are no single number (as a best accuracy)."""
  return any(
    type(name) is str and (_is_weight(value) or _needs_code(name, value))
    for name, value in place.items()
  )


def _is_weight(value: Any) -> bool:
  array = array_of(value)
  if array is not None:
    return array.ndim > 0
  return type(value) is StandIn and value.name.startswith(("torch._utils.", "torch._tensor."))


def _note(tree: Mapping[Any, Any], path: list[str], field: str) -> str:
  """Which entry was taken, and what is beside it."""
  beside = _at(tree, path[:-1])
  others = [str(name) for name, value in beside.items() if name != path[-1] and value is not None]
  told = f"The weights are the entry {'/'.join(path)!r} of the file"
  if path[-1] in AVERAGED:
    told += ", averaged ones (EMA)"
  told += f"; beside it stand: {some(others) or 'none'}."
  within = "/".join((*path[:-1], ""))
  weights = [name for name in others if _holds_weights(beside.get(name))]
  takes = [
    f"{field}={within}{name} takes the {'averaged' if name in AVERAGED else 'raw'} ones"
    for name in weights
    if (name in AVERAGED) != (path[-1] in AVERAGED) and name in (*AVERAGED, *RAW)
  ]
  takes = takes[:1] or [f"{field}={within}{name} takes that" for name in weights[:1]]
  return " ".join([told, *(f"{take}." for take in takes)])


def _tensors(place: Mapping[Any, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
  """The tensors of an entry, and what else it has, which nobody needs.

  Raises:
    RefusedError: something else may be part of the net, or it has no tensors.
  """
  arrays = {str(name): array_of(value) for name, value in place.items()}
  tensors = {name: array for name, array in arrays.items() if array is not None}
  odd = {str(name): value for name, value in place.items() if arrays[str(name)] is None}
  coded = [f"{name!r} ({_kind(value)})" for name, value in odd.items() if _needs_code(name, value)]
  if coded:
    raise RefusedError(f"{_CODE} {some(coded)}. {_PLAIN}")
  skipped = [f"{name!r} ({_kind(value)})" for name, value in odd.items()]
  if odd and not tensors:
    modules = [name for name, value in odd.items() if type(value) is StandIn and value.is_module]
    if modules:
      raise RefusedError(f"{_no_weights(odd[modules[0]])} It is the entry {modules[0]!r}.")
    raise RefusedError(
      f"holds no tensors, but {some(skipped)}; known places of tensors are "
      f"{listed((*RAW[:3], AVERAGED[0]))} and others (docs/weights.md)."
    )
  unclear = [f"{name!r} ({_kind(value)})" for name, value in odd.items() if _may_hold_more(value)]
  if unclear:
    raise RefusedError(f"holds more than tensors: {some(unclear)}. {_PLAIN}")
  return tensors, skipped


def _needs_code(name: str, value: Any) -> bool:
  """Whether something is a tensor that only code can make: by what it is, or by its name."""
  if type(value) is not StandIn or name.endswith("_extra_state"):
    return False
  return _is_weight(value) or "." in name


def _may_hold_more(value: Any) -> bool:
  """Whether there are tensors in a value, or more than can be looked through."""
  left = [value]
  for _ in range(_MOST_LOOKED_AT):
    if not left:
      return False
    value = left.pop()
    if _is_weight(value):
      return True
    if isinstance(value, Mapping):
      left.extend(value.values())
    elif isinstance(value, (tuple, list)):
      left.extend(value)
  return True


def _no_weights(tree: Any) -> str:
  if type(tree) is StandIn and tree.is_module:
    return f"holds a whole pickled module ({tree.name}), whose code is not run here. {_PLAIN}"
  if type(tree) is StandIn:
    return f"{_CODE} {tree.name}. {_PLAIN}"
  return f"holds no dictionary of tensors, but one value ({_kind(tree)}). {_PLAIN}"


def _kind(value: Any) -> str:
  return value.name if type(value) is StandIn else type(value).__name__
