"""Bits for a budget."""

import dataclasses
import math

import numpy as np
import pytest

from profit_jax.config import ConfigError, check_rules
from profit_jax.export.build import build_net
from profit_jax.export.costs import costs
from profit_jax.nn.rules import with_rules
from profit_jax.nn.spec import describe
from profit_jax.quant import PACT, Bits
from profit_jax.sensitivity import Reduction, Sensitivity, assign_bits
from profit_jax.sensitivity.measure import parts_of
from tests.export.tiny import MIXED, TinyV1
from tests.sensitivity.test_measure import measured_model


def found_of(losses, rules=(), policy="profit", **widths):
  """A measurement in which parts lose what `losses` says, by (side, first layer): at 4 bits this,
  at 2 bits four times this; others nothing.
  """
  model = measured_model(model=TinyV1(), **{"weight_bits": 8, "act_bits": 8, **widths})
  spec = with_rules(model.spec, rules, policy)
  model = dataclasses.replace(model, spec=spec)
  parts = []
  for part in parts_of(model):
    loss = losses.get((part.side, part.layers[0]), 0.0)
    reductions = (Reduction(2, 4 * loss, -1.0), Reduction(4, loss, -1.0))
    parts.append(
      dataclasses.replace(part, reductions=tuple(f for f in reductions if f.bits < part.bits))
    )
  return Sensitivity(model=model, bits=(2, 4), scores={}, parts=tuple(parts))


LAYERS = ("stem_conv", "block00/depthwise_conv", "block00/pointwise_conv", "classifier")
EQUAL = {(side, layer): 0.1 for side in ("weights", "inputs") for layer in LAYERS}


def cost_of_file(found, assigned):
  """Bytes and bit operations in the card of a file that is trained as assigned."""
  model = found.model
  spec = describe(model.spec.model, model.spec.input_shape, model.spec.bits)
  net = build_net(
    with_rules(spec, assigned.rules, "profit"),
    model.variables,
    name="net",
    normalization=None,
    weight_bits=assigned.weight_bits,
    act_bits=assigned.act_bits,
  )
  rows = costs(net)
  return sum(row.kernel_bytes for row in rows), sum(row.bops for row in rows)


@pytest.mark.parametrize("budget", ["bytes", "bops"])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_a_budget_is_met_and_a_file_costs_what_is_said(budget, share):
  found = found_of(EQUAL)
  full = assign_bits(found, budget, 10**12)
  assert full.loss == 0.0
  most = int(share * getattr(full, budget))
  assigned = assign_bits(found, budget, most)
  assert getattr(assigned, budget) <= most
  assert cost_of_file(found, assigned) == (assigned.bytes, assigned.bops)
  assert (assigned.full_bytes, assigned.full_bops) == (full.bytes, full.bops)
  if share == 1.0:
    assert assigned == full
    assert assigned.rules == ()
    assert (assigned.weight_bits, assigned.act_bits) == (8, 8)


def test_what_loses_least_for_its_bytes_falls_first():
  losses = EQUAL | {("weights", "block00/pointwise_conv"): 9.0}
  found = found_of(losses)
  full = assign_bits(found, "bytes", 10**12)
  # The pointwise kernel has 128 of 576 weights and costs most; all others go first.
  assigned = assign_bits(found, "bytes", full.bytes // 2)
  assert assigned.bits["block00/pointwise_conv"] == 8
  assert {width for path, width in assigned.bits.items() if "quant" in path} == {8}
  assert assigned.weight_bits < 8 == assigned.act_bits


def test_what_is_saved_too_much_is_given_back():
  found = found_of({("weights", "stem_conv"): 1.0})
  full = assign_bits(found, "bytes", 10**12)
  # All but the stem fall for nothing, so that it stays, whatever the first steps did.
  sizes = {"stem_conv": 216, "block00/depthwise_conv": 72, "block00/pointwise_conv": 128}
  assert full.bytes == sum(sizes.values()) + 160
  assigned = assign_bits(found, "bytes", 216 + (72 + 128 + 160) // 4)
  assert assigned.bits["stem_conv"] == 8
  assert assigned.loss == 0.0


def test_a_fall_without_a_finite_loss_is_the_last():
  found = found_of(EQUAL)
  parts = [
    dataclasses.replace(
      part,
      reductions=tuple(
        dataclasses.replace(reduction, loss=math.nan) for reduction in part.reductions
      ),
    )
    if part.layers == ("classifier",) and part.side == "weights"
    else part
    for part in found.parts
  ]
  found = dataclasses.replace(found, parts=tuple(parts))
  assigned = assign_bits(found, "bytes", 160 + (216 + 72 + 128) // 4)
  assert assigned.bits["classifier"] == 8
  assert math.isfinite(assigned.loss)
  everything = assign_bits(found, "bytes", (160 + 216 + 72 + 128) // 4)
  assert everything.to_dict()["loss"] is None


def test_a_budget_that_cannot_be_met_names_the_least():
  with pytest.raises(
    ConfigError, match=r"A budget of 100 bytes cannot be met: all layers .* take 144\."
  ):
    assign_bits(found_of(EQUAL), "bytes", 100)
  with pytest.raises(ConfigError, match=r"A budget of 1 bit operations an image"):
    assign_bits(found_of(EQUAL), "bops", 1)


def test_an_unknown_budget_is_named():
  with pytest.raises(ConfigError, match=r"'bitops' is not allowed; allowed are bytes, bops"):
    assign_bits(found_of(EQUAL), "bitops", 10**9)


@pytest.mark.parametrize(
  ("rules", "policy"),
  [((), "profit"), ((), "lsq_paper"), (MIXED, "profit"), ((("stem_conv", 6, None),), "lsq_paper")],
)
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_the_rules_give_the_bits_that_were_assigned(rules, policy, share):
  found = found_of(EQUAL, rules, policy, weight_bits=6, act_bits=5)
  most = int(share * assign_bits(found, "bops", 10**12).bops)
  try:
    assigned = assign_bits(found, "bops", most)
  except ConfigError:
    assert rules == MIXED  # most of it is in floats
    return
  check_rules(assigned.rules, "assigned")
  spec = describe(TinyV1(), found.model.spec.input_shape)
  spec = with_rules(spec, assigned.rules, policy)
  bits = spec.bits.at(assigned.weight_bits, assigned.act_bits)
  assert {path: int(spec.width_of(path, bits)) for path in assigned.bits} == assigned.bits
  assert spec.float_layers == found.model.spec.float_layers


def test_codes_that_take_more_bits_cost_more_bytes():
  found = found_of({})
  spec = dataclasses.replace(found.model.spec, bits=Bits(quantizer=PACT()))
  model = dataclasses.replace(found.model, spec=spec)
  pact = assign_bits(dataclasses.replace(found, model=model), "bytes", 10**12)
  least = {"duq": 144, "pact": 288}  # PACT's codes of 2 bits are odd numbers from -3 to 3
  assert pact.bytes == assign_bits(found, "bytes", 10**12).bytes
  for name, of in (("duq", found), ("pact", dataclasses.replace(found, model=model))):
    assert assign_bits(of, "bytes", least[name]).bytes == least[name]
    with pytest.raises(ConfigError, match=f"take {least[name]}\\."):
      assign_bits(of, "bytes", least[name] - 1)
  assert np.isfinite(pact.loss)
