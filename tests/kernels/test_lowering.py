"""What a CPU computes in a form of its own has the values of the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.kernels.lowering import channel_sums, own_kernel, total_sums
from profit_jax.kernels.target import Target, tracing_for


# 13 has no divisor that a CPU could sum first, 24 has 8 and 12.
@pytest.mark.parametrize("shape", [(13, 3), (24, 3), (1, 5, 5, 2)], ids=str)
def test_sums_are_sums(shape):
  draw = np.random.default_rng(0)
  operands = [draw.normal(size=shape).astype(np.float32) for _ in range(4)]
  axes = tuple(range(len(shape) - 1))
  counts, rows = (1, 3, 4), (8, 16)

  def all_sums(*operands):
    channels = {(n, r): channel_sums(list(operands[:n]), r) for n in counts for r in rows}
    return channels, {n: total_sums(list(operands[:n])) for n in counts}

  channels, totals = jax.jit(all_sums)(*operands)
  assert all(len(sums) == count for (count, _), sums in channels.items())
  assert all(len(sums) == count for count, sums in totals.items())
  for sums in channels.values():
    for operand, ours in zip(operands, sums, strict=False):
      np.testing.assert_allclose(ours, operand.sum(axis=axes), rtol=1e-5, atol=1e-5)
  for sums in totals.values():
    for operand, ours in zip(operands, sums, strict=False):
      np.testing.assert_allclose(ours, operand.sum(), rtol=1e-5, atol=1e-5)


def test_total_of_a_scalar():
  assert total_sums([jnp.asarray(3.0)])[0] == 3.0


@pytest.mark.parametrize(
  ("to", "branches"),
  [
    (Target("cpu"), True),
    (Target("cpu", "xla"), False),
    (Target("gpu"), False),
    (Target("tpu"), False),
  ],
)
def test_a_kernel_of_its_own_is_a_branch_in_programs_for_cpus_only(to, branches):
  witness, x = jnp.ones((2, 2)), jnp.arange(3.0)
  with tracing_for(to):
    step = jax.jit(lambda witness, x: own_kernel(lambda x: 2 * x, witness, x)).trace(witness, x)
  np.testing.assert_array_equal(step.lower().compile()(witness, x), 2 * x)
  assert ("stablehlo.compare" in step.lower().as_text()) == branches


def test_a_witness_that_is_not_a_number_is_not_hidden():
  assert np.isnan(own_kernel(lambda x: 2 * x, jnp.full(1, jnp.nan), jnp.arange(3.0))).all()
