"""Bits for a budget: a greedy choice among the reductions that `measure` found."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from profit_jax.config import FLOAT, ConfigError
from profit_jax.export import packing
from profit_jax.export.build import build_net
from profit_jax.export.costs import LayerCost, costs
from profit_jax.export.net import FLOAT_BITS
from profit_jax.nn import feeds
from profit_jax.nn.rules import Rule
from profit_jax.quant.base import Quantizer
from profit_jax.quant.bits import largest_code
from profit_jax.quant.duq import inverse_softplus
from profit_jax.sensitivity.measure import LayerSensitivity, Sensitivity, Side

Budget = Literal["bytes", "bops"]
_COST_BITS = 4  # of the net that tells sizes: every quantizer's codes fit into a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
  """Bits of all layers within a budget.

  Attributes:
    rules: for `quant.rules`, or `Trainer(rules=...)`.
    weight_bits: the fewest of a kernel; the last of the plan to train with.
    act_bits: the fewest of a quantizer of activations, likewise. None without any.
    bits: by path, of kernels and of quantizers of activations.
    bytes: of all kernels, as files hold them: codes of 3 bits take 4.
    bops: bit operations for an image.
    full_bytes: of the model as it was measured.
    full_bops: likewise.
    loss: the sum of the single changes, which a training is going to reduce.
  """

  rules: tuple[Rule, ...]
  weight_bits: int | None
  act_bits: int | None
  bits: Mapping[str, int]
  bytes: int
  bops: int
  full_bytes: int
  full_bops: int
  loss: float

  def to_dict(self) -> dict[str, Any]:
    """Plain values, for JSON."""
    plain = dataclasses.asdict(self)
    return {**plain, "loss": self.loss if math.isfinite(self.loss) else None}


def assign_bits(found: Sensitivity, budget: Budget, most: int) -> Assignment:
  """The bits of all layers within a budget.

  Lowers one part after the other, each time the one whose loss rises least for what it saves. Then
  gives back what the last steps saved too much, to the part that lost most.

  Args:
    found: of `measure`.
    budget: `bytes` of kernels as files hold them, or `bops`, bit operations for an image.
    most: of them.

  Raises:
    ConfigError: an unknown budget, or one that cannot be met; a model whose cost is not known,
      because it cannot be exported.
  """
  if budget not in _UNITS:
    raise ConfigError(f"budget = {budget!r} is not allowed; allowed are {', '.join(_UNITS)}.")
  rows, parts = _rows_of_costs(found), found.parts
  costs_of = _Costs(found, rows, budget)
  losses = [_losses(part) for part in parts]
  choice = [part.bits for part in parts]
  least = costs_of.total([min(widths) for widths in losses])
  if least > most:
    raise ConfigError(
      f"A budget of {most:,} {_UNITS[budget]} cannot be met: all layers at their fewest bits take "
      f"{least:,}. Give more, or let them fall to fewer bits."
    )
  cost = costs_of.total(choice)
  while cost > most:
    *_, index, width = min(_moves(losses, choice, costs_of))
    cost -= costs_of.saved(choice, index, width)
    choice[index] = width
  for index in sorted(range(len(parts)), key=lambda index: -losses[index][choice[index]]):
    for width in sorted(losses[index], reverse=True):
      better = losses[index][width] < losses[index][choice[index]]
      rise = -costs_of.saved(choice, index, width)
      if better and cost + rise <= most:
        cost += rise
        choice[index] = width
  full = [part.bits for part in parts]
  fewest = _fewest(found, choice)
  in_bytes, in_bops = _Costs(found, rows, "bytes"), _Costs(found, rows, "bops")
  return Assignment(
    rules=_rules(found, choice, fewest),
    weight_bits=fewest["weights"],
    act_bits=fewest["inputs"],
    bits={path: w for part, w in zip(parts, choice, strict=True) for path in part.paths},
    bytes=in_bytes.total(choice),
    bops=in_bops.total(choice),
    full_bytes=in_bytes.total(full),
    full_bops=in_bops.total(full),
    loss=sum(widths[w] for widths, w in zip(losses, choice, strict=True)),
  )


_UNITS = {"bytes": "bytes", "bops": "bit operations an image"}


def _losses(part: LayerSensitivity) -> dict[int, float]:
  """The change of the loss by bits, never below that at more bits; 0 as trained."""
  found = {part.bits: 0.0}
  for reduction in sorted(part.reductions, key=lambda reduction: -reduction.bits):
    loss = reduction.loss if math.isfinite(reduction.loss) else math.inf
    found[reduction.bits] = max(loss, *found.values())
  return found


def _moves(
  losses: Sequence[Mapping[int, float]], choice: Sequence[int], costs_of: "_Costs"
) -> Iterator[tuple[float, int, int, int]]:
  """Reductions that save something: loss for what is saved, what is not saved, part, bits."""
  for index, now in enumerate(choice):
    for width, loss in losses[index].items():
      saved = costs_of.saved(choice, index, width)
      if saved > 0:
        rise = loss - losses[index][now] if math.isfinite(losses[index][now]) else 0.0
        yield rise / saved, -saved, index, width


class _Costs:
  """What bits cost, as in the card of an exported file. A choice has the bits of all parts."""

  def __init__(self, found: Sensitivity, rows: Mapping[str, LayerCost], budget: Budget):
    self._rows, self._parts = rows, found.parts
    self._of: dict[Side, dict[str, int]] = {"weights": {}, "inputs": {}}
    for index, part in enumerate(found.parts):
      self._of[part.side] |= dict.fromkeys(part.layers, index)
    widths = {width for part in found.parts for width in _losses(part)}
    by = found.model.spec.bits.quantizer
    self._fields = {width: _field_bits(by, width) for width in widths}
    self._cost = self._kernel_bytes if budget == "bytes" else self._bops

  def total(self, choice: Sequence[int]) -> int:
    """Of all layers."""
    return sum(self._cost(row, choice) for row in self._rows.values())

  def saved(self, choice: Sequence[int], index: int, width: int) -> int:
    """What a choice costs more than the same with another width of a part."""
    if width == choice[index]:
      return 0
    other = [*choice]
    other[index] = width
    rows = [self._rows[layer] for layer in self._parts[index].layers]
    return sum(self._cost(row, choice) - self._cost(row, other) for row in rows)

  def _kernel_bytes(self, row: LayerCost, choice: Sequence[int]) -> int:
    index = self._of["weights"].get(row.layer)
    field = FLOAT_BITS if index is None else self._fields[choice[index]]
    return -(-math.prod(row.kernel) * field // 8)

  def _bops(self, row: LayerCost, choice: Sequence[int]) -> int:
    weight, act = self._of["weights"].get(row.layer), self._of["inputs"].get(row.layer)
    weight_bits = FLOAT_BITS if weight is None else choice[weight]
    # The mean of codes is no code.
    of_codes = None if row.input == "float" else act
    return row.macs * weight_bits * (row.input_bits if of_codes is None else choice[of_codes])


def _rows_of_costs(found: Sensitivity) -> dict[str, LayerCost]:
  """The layers of an exported file."""
  model, spec = found.model, found.model.spec
  floats = tuple(each for each in spec.bits.own if each.least is None)
  net = build_net(
    dataclasses.replace(spec, bits=dataclasses.replace(spec.bits, own=floats)),
    model.variables,
    name=type(spec.model).__name__,
    normalization=model.normalization,
    weight_bits=_COST_BITS,
    act_bits=_COST_BITS,
  )
  return {row.layer: row for row in costs(net)}


def _field_bits(by: Quantizer, width: int) -> int:
  """The bits of a kernel's code in a file."""
  ends, qmax = jnp.float32([-1.0, 1.0]), jnp.float32(largest_code(width, signed=True))
  scalars = jax.tree.map(inverse_softplus, by.first_kernel(ends, qmax))
  largest = int(np.abs(by.quantize_kernel(ends, scalars, qmax).codes).max())
  return packing.field_bits(max(width, largest.bit_length() + 1))


def _fewest(found: Sensitivity, choice: Sequence[int]) -> dict[Side, int | None]:
  """The smallest width of all weights, and of all inputs."""
  chosen = list(zip(found.parts, choice, strict=True))
  sides: tuple[Side, ...] = ("weights", "inputs")
  return {
    side: min((width for part, width in chosen if part.side == side), default=None)
    for side in sides
  }


def _rules(
  found: Sensitivity, choice: Sequence[int], fewest: Mapping[Side, int | None]
) -> tuple[Rule, ...]:
  """A rule for all layers of the same bits; none for those at the fewest bits.

  Layers to which the run has rules or a policy get one, because the policy comes after them.
  """
  spec = found.model.spec
  sources, floats = feeds.quantizers_of(spec), spec.float_layers
  widths: dict[str, list[Any]] = {
    layer: [
      FLOAT if layer in floats else None,
      FLOAT if sources[layer] and set(sources[layer]) <= floats else None,
    ]
    for layer in spec.all_kernels
  }
  for part, width in zip(found.parts, choice, strict=True):
    for layer in part.layers:
      if width != fewest[part.side]:
        widths[layer][part.side == "inputs"] = width
  own = {each.path for each in spec.bits.own}
  alike: dict[tuple[Any, Any], list[str]] = {}
  for layer, (weight, act) in widths.items():
    if (weight, act) != (None, None) or own & {layer, *sources[layer]}:
      alike.setdefault((weight, act), []).append(re.escape(layer))
  return tuple(("|".join(layers), weight, act) for (weight, act), layers in alike.items())
