"""Operations in the form that each platform's compiler makes fast.

Programs traced for a CPU (`kernels.target`) get special forms, others the plain ones. What XLA
makes of it on a CPU was measured on 2 cores; the figures stand beside each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from profit_jax.kernels import target


def own_kernel(compute: Callable[..., jax.Array], witness: jax.Array, *operands: Any) -> jax.Array:
  """`compute(*operands)` as an array of its own, in programs for CPUs.

  XLA on CPU fuses an elementwise result into each of its uses, which compute it again and then are
  too long for LLVM to vectorize; it removes `optimization_barrier` before it fuses. The branch of a
  conditional is compiled by itself. Forward and backward pass of an expansion and a depthwise
  convolution, norms and quantizers, [16, 56, 56, 144]: 41 ms, not 125.

  Args:
    compute: gives one array.
    witness: not NaN, and the same on every device: a parameter. Where its first element is NaN, so
      is the result.
    operands: of `compute`.
  """
  if not target.current().is_tuned_for("cpu"):
    return compute(*operands)
  first = witness.reshape(-1)[0].astype(jnp.float32)
  shape = jax.eval_shape(compute, *operands)
  return lax.cond(
    first == first, compute, lambda *_: jnp.full(shape.shape, jnp.nan, shape.dtype), *operands
  )


def computed_again(x: jax.Array) -> jax.Array:
  """An array that a backward pass reads, whose functions it computes again.

  XLA on GPUs would find them in the forward pass, and write masks there to read them here:
  MobileNet-v2's step at [128, 224, 224, 3] accesses 26.0 GB with them.
  """
  return lax.optimization_barrier(x) if target.current().is_tuned_for("gpu") else x


# XLA on CPU writes the operand of a sum to memory first, and once for each sum; one reduction of
# several operands computes them as it goes. LLVM vectorizes it where it can unroll the loop over
# the reduced axis, which depends on what the loop computes: first a few rows are summed, then the
# sums of these. On 2 cores, a depthwise kernel's gradient (9 cheap sums) of [16, 56, 56, 144]: 32
# ms as 9 sums, 14 ms as one reduction, 6 ms as 3 of 3 with 16 rows; of [64, 28, 28, 192] with 4, 8,
# 16 and 32 rows: 17, 13, 7 and 30 ms. The sums of `fused.py` (3 long ones) of [16, 112, 112, 96]:
# 51 ms apart, 38 ms with 16 rows, 8 ms with 8.
_TOGETHER = 3
_TERMS = 64  # that are added one after the other


def channel_sums(operands: Sequence[jax.Array], rows: int = 8) -> list[jax.Array]:
  """Sums over all axes but the last: `[C]` each.

  Args:
    operands: `[M, ..., C]`, all of one shape.
    rows: how many along the first axis a CPU sums first: 8, or 16 where each is a single product.
  """
  to, axes = target.current(), tuple(range(operands[0].ndim - 1))
  if to.is_tuned_for("gpu") and len(operands) > 1:
    # As one sum of a stack, XLA on GPUs reads what they are computed from once. Three sums of
    # [128, 112, 112, 96] in bfloat16 access 0.6 GB so, 1.2 to 1.5 GB apart, and 4.6 GB as one
    # reduction of several operands (XLA of jaxlib 0.10.2 for an H100).
    return list(jnp.sum(jnp.stack(operands), axis=tuple(axis + 1 for axis in axes)))
  if not to.is_tuned_for("cpu"):
    return [jnp.sum(operand, axis=axes) for operand in operands]
  sums = []
  for start in range(0, len(operands), _TOGETHER):
    sums += _reduce_rows(operands[start : start + _TOGETHER], rows)
  return sums


def as_rows(x: jax.Array) -> jax.Array:
  """`[..., C]` as `[M, C]` in programs for CPUs, where `channel_sums` adds some rows first.

  On a TPU the reshape would be a copy.
  """
  return x.reshape(-1, x.shape[-1]) if target.current().is_tuned_for("cpu") else x


def total_sums(operands: Sequence[jax.Array]) -> list[jax.Array]:
  """Sums over all elements of arrays of one shape, of any rank: scalars."""
  shape = (-1, operands[0].shape[-1]) if operands[0].ndim else (1, 1)
  return [jnp.sum(each) for each in channel_sums([operand.reshape(shape) for operand in operands])]


def _reduce_rows(operands: Sequence[jax.Array], rows: int) -> Sequence[jax.Array]:
  length, *rest = operands[0].shape
  rows = max(size for size in range(1, rows + 1) if length % size == 0)
  groups = [operand.reshape(length // rows, rows, *rest) for operand in operands]
  sums = _reduce(groups, (1,))
  # One after the other, thousands of terms would lose a digit: 3 of 12 nets of
  # `benchmarks/float32_step.py` kept all their codes so, and 8 do.
  length = sums[0].shape[0]
  rows = max(size for size in range(1, _TERMS + 1) if length % size == 0)
  if 1 < rows < length:
    sums = _reduce([each.reshape(length // rows, rows, *rest) for each in sums], (1,))
  return _reduce(sums, tuple(range(len(rest))))


def _reduce(operands: Sequence[jax.Array], axes: tuple[int, ...]) -> Sequence[jax.Array]:
  zeros = [jnp.zeros((), operand.dtype) for operand in operands]
  return lax.reduce(
    list(operands),
    zeros,
    lambda left, right: [a + b for a, b in zip(left, right, strict=True)],
    axes,
  )
