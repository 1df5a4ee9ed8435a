"""Names of tensors without what wrappers, profilers and pruning have put into them."""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from profit_jax.weights.containers import AVERAGED, RAW
from profit_jax.weights.formats import RefusedError, some

_DATA_PARALLEL = "module"
# Modules that torch.compile, FSDP and activation checkpointing put around others, anywhere in a
# net.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Numbers that profilers (thop) and averaging (AveragedModel) leave beside the tensors.
_PROFILED = ("total_ops", "total_params")
_AVERAGED_COUNT = "n_averaged"
# A copy of the net has at least this share of the tensors that the best one has.
_OF_A_COPY = 0.5
_NOT_READ = "num_batches_tracked"

Tensors = dict[str, np.ndarray]


def tidied(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
  """Tensors under the names that they had before anybody wrapped, profiled or pruned their net.

  Returns:
    The tensors, and notes for the user.

  Raises:
    RefusedError: parametrized tensors, which only their code can make.
  """
  notes = []
  counted = [name for name, tensor in tensors.items() if _ends(name, _PROFILED, tensor)]
  if counted:
    notes.append(f"Passed over: {len(counted)} counters of a profiler, as {counted[0]}.")
  tensors = {
    name: tensor
    for name, tensor in tensors.items()
    if not _ends(name, (*_PROFILED, _AVERAGED_COUNT), tensor)
  }
  tensors = _renamed(tensors, lambda name: _without(name, _WRAPPERS))
  # Within names it may be anything; see `fitted`.
  while tensors and all(name.startswith(f"{_DATA_PARALLEL}.") for name in tensors):
    tensors = {name.removeprefix(f"{_DATA_PARALLEL}."): each for name, each in tensors.items()}
  tensors, pruned = _with_masks(tensors)
  if pruned:
    notes.append(f"{pruned} pruned tensors are the products of their _orig and _mask.")
  parametrized = [name for name in tensors if ".parametrizations." in f".{name}"]
  if parametrized:
    raise RefusedError(
      f"holds {len(parametrized)} parametrized tensors, as {parametrized[0]}, which need code. In "
      "PyTorch, remove the parametrizations (torch.nn.utils.parametrize.remove_parametrizations), "
      "and save the weights again."
    )
  return tensors, tuple(notes)


def below(tensors: Tensors, prefix: str, field: str, entries: Collection[str] = ()) -> Tensors:
  """The tensors whose names begin with a prefix, without it.

  Args:
    tensors: of a file.
    prefix: that somebody asked for.
    field: that has it, for messages.
    entries: of the file that hold weights, for messages.

  Raises:
    RefusedError: there are none.
  """
  found = _starting(tensors, prefix)
  if not found:
    # As `fitted` names them, without wrappers.
    unwrapped = {*_WRAPPERS, _DATA_PARALLEL}
    plain = _renamed(tensors, lambda name: _without(name, unwrapped))
    found = _starting(plain, _without(prefix.rstrip("."), unwrapped))
  if not found:
    first = dict.fromkeys(name.partition(".")[0] for name in tensors)
    weights = f" Its entries with weights are {some(entries)}." if entries else ""
    raise RefusedError(
      f"has no entry {prefix!r} ({field}), and no names that begin so: they begin with "
      f"{some(first)}.{weights}"
    )
  return found


def _starting(tensors: Tensors, prefix: str) -> Tensors:
  start = f"{prefix.rstrip('.')}."
  return {
    name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)
  }


def fitted(
  tensors: Tensors, expected: Collection[Collection[str]], field: str
) -> tuple[Tensors, tuple[str, ...]]:
  """Tensors without the prefix, as `model.` or `backbone.`, that keeps them from being a net's.

  Of several copies of the net under several prefixes, one is taken: averaged weights before raw
  ones, as of entries. Names that do not begin so stay as they are.

  Args:
    tensors: of a file.
    expected: names that the net may have, one collection for each codebase.
    field: that chooses a copy, for messages.

  Returns:
    The tensors, and notes for the user. Where less than half of a net is there, or two tensors
    would have one name, the tensors are those that were given.

  Raises:
    RefusedError: several copies, of which none is the first.
  """
  wanted = set().union(*expected)
  plain = _renamed(tensors, lambda name: _without(name, {_DATA_PARALLEL}))
  found = max((tensors, plain), key=lambda some: _largest(_parts(some, wanted)))
  parts = _parts(found, wanted)
  largest = max(parts.values(), key=len, default=frozenset())
  if not any(len(largest & set(each)) >= _OF_A_COPY * len(each) for each in expected):
    return tensors, ()
  copies = [
    prefix for prefix, names in parts.items() if len(names & largest) >= _OF_A_COPY * len(largest)
  ]
  prefix = _first(copies, field)
  renamed = {name: found[f"{prefix}{name}"] for name in parts[prefix]}
  others = {f"{copy}{name}" for copy in copies for name in parts[copy]}
  left = {name: tensor for name, tensor in found.items() if name not in others}
  if renamed.keys() & left.keys():
    return tensors, ()
  if prefix:
    _refuse_the_rest(renamed.keys(), left.keys() - wanted, expected, prefix, field)
  return {**left, **renamed}, _notes(prefix, copies, field)


def _refuse_the_rest(
  names: Collection[str],
  left: Collection[str],
  expected: Collection[Collection[str]],
  prefix: str,
  field: str,
) -> None:
  """Names what is beside a net that is complete without it, as the weights of a loss."""
  beside = sorted(name for name in left if not name.endswith(_NOT_READ))
  if any(name.startswith(prefix) for name in beside):
    return  # choosing the prefix would not leave it out
  if beside and any(set(each) <= set(names) for each in expected):
    raise RefusedError(
      f"holds {len(beside)} tensors beside the net, whose names begin with {prefix!r}: "
      f"{some(beside)}. If the net does not need them, {field}={prefix.rstrip('.')} leaves them "
      "out."
    )


def _parts(names: Collection[str], wanted: Collection[str]) -> dict[str, set[str]]:
  """Which wanted names there are behind which prefix. A name has the shortest that it can."""
  found: dict[str, set[str]] = {}
  most = max((name.count(".") + 1 for name in wanted), default=0)
  for name in names:
    steps = name.split(".")
    for first in range(max(0, len(steps) - most), len(steps)):
      rest = ".".join(steps[first:])
      if rest in wanted:
        found.setdefault(name.removesuffix(rest), set()).add(rest)
        break
  return found


def _largest(parts: Mapping[str, Collection[str]]) -> int:
  return max(map(len, parts.values()), default=0)


def _first(copies: Collection[str], field: str) -> str:
  """The prefix that comes first in the order of entries."""
  ranks = sorted((_rank(prefix), prefix) for prefix in copies)
  if len(ranks) > 1 and ranks[0][0] == ranks[1][0]:
    shown = [repr(prefix) for _, prefix in ranks]
    raise RefusedError(
      f"holds the net several times, under names that begin with {some(shown)}. Choose "
      f"one by {field}={ranks[0][1].rstrip('.')}."
    )
  return ranks[0][1]


def _rank(prefix: str) -> int:
  parts = prefix.split(".")
  if any(part in AVERAGED for part in parts):
    return 0
  places = [1 + RAW.index(part) for part in parts if part in RAW]
  return 1 if not prefix else min(places, default=len(RAW) + 1)


def _notes(prefix: str, copies: Collection[str], field: str) -> tuple[str, ...]:
  """Which of several copies was taken."""
  others = [other for other in copies if other != prefix]
  if not others:
    return ()
  told = f"The weights are those whose names begin with {prefix!r}" if prefix else "The weights are"
  told += "" if prefix else " those whose names have no prefix"
  told += ", averaged ones (EMA)" if _rank(prefix) == 0 else ""
  takes = [f"{field}={other.rstrip('.')} takes those under {other!r}" for other in others if other]
  return (f"{'; '.join([told, *takes[:1]])}.",)


def _ends(name: str, words: Collection[str], tensor: np.ndarray) -> bool:
  """Whether a tensor is a single number under one of these names."""
  return tensor.size == 1 and name.rpartition(".")[2] in words


def _without(name: str, parts: Collection[str]) -> str:
  return ".".join(part for part in name.split(".") if part not in parts)


def _renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
  """With other names; as they are where two would have the same."""
  renamed = {rename(name): tensor for name, tensor in tensors.items()}
  return renamed if len(renamed) == len(tensors) else tensors


def _with_masks(tensors: Tensors) -> tuple[Tensors, int]:
  """What torch.nn.utils.prune has split, `weight_orig` and `weight_mask`, as one; and how many."""
  found, count = dict(tensors), 0
  for name, tensor in tensors.items():
    mask = tensors.get(f"{name.removesuffix('_orig')}_mask")
    plain = name.removesuffix("_orig")
    if plain == name or plain in tensors or mask is None or mask.shape != tensor.shape:
      continue
    del found[name], found[f"{plain}_mask"]
    found[plain] = tensor * mask.astype(tensor.dtype)
    count += 1
  return found, count
