"""Bits per layer: rules, matched with the layers of a model.

    rules = ((r"classifier", 8, 8), (r".*depthwise.*", 8, None), (r"stem_conv", "float", None))
    spec = with_rules(describe(model, input_shape, bits), rules, "profit")

A rule is a regular expression that matches a layer's whole path, the bits of the layer's kernel,
and the bits of the quantizer that feeds the layer (`feeds.py`). Bits are 2 to 8, the least that a
phase may use; None leaves them to the phase; "float" never quantizes. The first rule that matches a
layer decides about it.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from profit_jax.config import FLOAT, ConfigError
from profit_jax.nn import feeds
from profit_jax.nn.spec import ModelSpec
from profit_jax.quant.base import Quantizer
from profit_jax.quant.bits import LayerBits

Rule = tuple[str, Any, Any]  # expression, weight bits, activation bits
END_BITS = 8  # of policies' first and last layers
_SHOWN = 5


def policy_rules(policy: str, layers: Sequence[str]) -> list[Rule]:
  """The rules that a policy stands for.

  Args:
    policy: "profit" (none), "lsq_paper" (Esser et al., arXiv 1902.08153, section 3: first and last
      layer at 8 bits) or "brevitas" (its MobileNet example: first layer at 8 bits).
    layers: those with kernels, in the order of their calls.
  """
  if policy == "profit" or not layers:
    return []
  first, last = re.escape(layers[0]), re.escape(layers[-1])
  if policy == "brevitas":
    return [(first, END_BITS, None)]
  return [(last, END_BITS, END_BITS)] + ([(first, END_BITS, None)] if first != last else [])


def policy_quantizer(policy: str, quantizer: Quantizer) -> Quantizer:
  """The quantizer under a policy: "brevitas" has scalars for each channel of a kernel."""
  if policy != "brevitas":
    return quantizer
  return dataclasses.replace(quantizer, per_channel=True)


def with_rules(
  spec: ModelSpec, rules: Sequence[Rule], policy: str, field: str = "config.quant.rules"
) -> ModelSpec:
  """The same model, with the bits that rules give single layers.

  Args:
    spec: of the model.
    rules: of a form that `config.check_rules` accepts.
    policy: rules by name, which come last.
    field: what has the rules, for messages.

  Raises:
    ConfigError: a rule that decides about no layer, or that gives activation bits where no
      quantizer feeds the layer; two rules that want different bits of one quantizer.
  """
  layers = list(spec.all_kernels)
  own_rules = [tuple(rule) for rule in rules]
  every = [*own_rules, *policy_rules(policy, layers)]
  chosen = {layer: _first(every, layer) for layer in layers}
  for index in range(len(own_rules)):
    if index not in chosen.values():
      raise ConfigError(_unused(own_rules, index, spec, field))
  weights = {
    layer: every[index][1]
    for layer, index in chosen.items()
    if index is not None and every[index][1] is not None
  }
  acts = _activations(spec, every, len(own_rules), chosen, field)
  own = [LayerBits(path, "weight", _least(bits)) for path, bits in weights.items()]
  own += [LayerBits(path, "act", _least(bits)) for path, bits in acts.items()]
  bits = dataclasses.replace(spec.bits, own=tuple(sorted(own, key=lambda each: each.path)))
  return dataclasses.replace(spec, bits=bits)


def _first(rules: Sequence[Rule], layer: str) -> int | None:
  return next((i for i, rule in enumerate(rules) if re.fullmatch(rule[0], layer)), None)


def _least(bits: Any) -> int | None:
  return None if bits == FLOAT else bits


def _activations(
  spec: ModelSpec,
  rules: Sequence[Rule],
  count: int,
  chosen: Mapping[str, int | None],
  field: str,
) -> dict[str, Any]:
  """The bits of quantizers, by path; `count` of the rules are the user's own."""
  if all(index is None or rules[index][2] is None for index in chosen.values()):
    return {}
  sources = feeds.quantizers_of(spec)
  for own, rule in enumerate(rules[:count]):
    matched = [layer for layer in chosen if chosen[layer] == own]
    if rule[2] is not None and not any(sources[layer] for layer in matched):
      raise ConfigError(
        f"{field}: the rule {rule!r} has bits for the inputs of {_listed(matched)}, which no "
        "quantizer feeds: they read images or floats. Give None as its activation bits."
      )
  wanted: dict[str, tuple[str, int]] = {}  # by quantizer: the first layer that wants, and its rule
  for layer, index in chosen.items():
    if index is None or rules[index][2] is None:
      continue
    for quantizer in sources[layer]:
      other, first = wanted.setdefault(quantizer, (layer, index))
      if rules[first][2] != rules[index][2]:
        raise ConfigError(
          f"{field} gives the quantizer {quantizer!r} two widths: it feeds {other!r} "
          f"({rules[first][2]!r}, by {rules[first]!r}) and {layer!r} ({rules[index][2]!r}, by "
          f"{rules[index]!r}). Give both layers the same activation bits, or one of them None."
        )
  return {path: rules[index][2] for path, (_, index) in wanted.items()}


def _unused(rules: Sequence[Rule], index: int, spec: ModelSpec, field: str) -> str:
  """Why a rule decides about no layer."""
  rule, layers = rules[index], list(spec.all_kernels)
  expression = rule[0]
  if not layers:
    return f"{field}: the rule {rule!r} matches no layer: the model has none that is quantized."
  matched = [layer for layer in layers if re.fullmatch(expression, layer)]
  if matched:
    first = next(other for other in rules if re.fullmatch(other[0], matched[0]))
    return (
      f"{field}: the rule {rule!r} decides nothing: rules before it match all of its layers, as "
      f"{first!r} matches {matched[0]!r}. Remove it, or put it first."
    )
  begin = f"{field}: the rule {rule!r} matches no layer."
  quantizers = [path for path in spec.quantizers if re.fullmatch(expression, path)]
  if quantizers:
    readers = [layer for layer, read in feeds.quantizers_of(spec).items() if quantizers[0] in read]
    told = f"the layer that it feeds, {_listed(readers)}" if readers else "the layer that it feeds"
    return f"{begin} {quantizers[0]!r} is a quantizer: name {told}."
  parts = [layer for layer in layers if re.search(expression, layer)]
  if parts:
    told = f"{begin} An expression matches whole paths, and this one is in a part of"
    wider = _in_any_path(expression, parts[0])
    return f"{told} {_listed(parts)}" + (f": write {wider!r}." if wider else ".")
  near = difflib.get_close_matches(expression, layers, _SHOWN, 0.5)
  if near:
    return f"{begin} Near names: {', '.join(near)}."
  return f"{begin} The layers are {_listed(layers)}."


def _in_any_path(expression: str, layer: str) -> str | None:
  """An expression that matches whole paths with a part that this one matches; None where it
  cannot be part of another, as with flags.
  """
  part = f"(?:{expression})" if "|" in expression else expression
  wider = f".*{part}.*"
  try:
    return wider if re.fullmatch(wider, layer) else None
  except re.error:
    return None


def _listed(layers: Sequence[str]) -> str:
  more = len(layers) - _SHOWN
  return ", ".join(map(repr, layers[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
