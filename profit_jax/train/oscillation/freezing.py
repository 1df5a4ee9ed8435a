"""Iterative freezing of weights: codes that oscillate too often are fixed (section 4, algorithm
1).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from profit_jax.nn.spec import KERNEL, ModelSpec, split_path
from profit_jax.quant.bits import Bits
from profit_jax.train.instability import changes
from profit_jax.train.oscillation.base import Remedy, kernels_and_steps, register
from profit_jax.train.packing import Packed, unpack

# The most bits at which codes are fixed, as in the paper's code: at more bits, codes change with
# every small move of a weight.
FREEZING_BITS = 4
_NEVER = 2.0  # a threshold that no frequency reaches


@register
class IterativeFreezing(Remedy):
  """Its strength is the frequency above which a code is fixed, which falls."""

  name = "freezing"

  @property
  def is_on(self) -> bool:
    """See `Remedy`."""
    return bool(self._settings.freeze_thresholds)

  def summary(self) -> str:
    """See `Remedy`."""
    first, last = self._settings.freeze_thresholds
    momentum = self._settings.freeze_momentum
    return f"codes fixed above a frequency of {first:g} to {last:g} (momentum {momentum:g})"

  def strength(self, weight_bits: int, left: float) -> float:
    """See `Remedy`."""
    first, last = self._settings.freeze_thresholds
    return last + (first - last) * left if weight_bits <= FREEZING_BITS else _NEVER

  def of_params(self, spec: ModelSpec) -> optax.GradientTransformationExtraArgs:
    """See `Remedy`."""
    return fix_oscillating_codes(spec, self._settings.freeze_momentum)

  def measured(self, state: "FreezingState") -> dict[str, dict[str, float]]:
    """`fixed`: the share of each kernel's codes that is fixed."""
    fixed = jax.device_get(state.fixed)
    return {"fixed": {layer: float(codes.mean()) for layer, codes in sorted(fixed.items())}}


class FreezingState(NamedTuple):
  """What iterative freezing carries from step to step; dictionaries by layer, arrays of the
  kernels' shapes.

  Attributes:
    codes: int8, the latest, fixed ones included.
    direction: int8, -1 or 1, where each went when it changed last; 0 before it has.
    frequency: float32, running mean of whether a step changed the code against its last change.
    mean: float32, running mean of the code. A fixed code is this, rounded.
    fixed: bool.
    started: bool scalar; False before the first step, which has nothing to compare with.
  """

  codes: dict[str, jax.Array]
  direction: dict[str, jax.Array]
  frequency: dict[str, jax.Array]
  mean: dict[str, jax.Array]
  fixed: dict[str, jax.Array]
  started: jax.Array


def fix_oscillating_codes(
  spec: ModelSpec, momentum: float
) -> optax.GradientTransformationExtraArgs:
  """`fix_codes` as a projection of the packed params after a step.

  It is no transformation of gradients: a fixed weight is the step size times its code, with the
  step size that the same step has trained in another optimizer group. As an update `p + (w - p)`,
  rounding would also miss that value.

  Args:
    spec: of the model.
    momentum: share of the present step in the running means.
  """

  def init(params: Packed) -> FreezingState:
    del params
    return start(spec.kernels)

  def update(params: Packed, state: FreezingState, before=None, *, bits, strengths, **_):
    del before
    threshold = strengths[IterativeFreezing.name]
    fixed, state = fix_codes(state, unpack(params), bits, threshold, momentum, spec)
    return params.with_kernels(fixed), state

  return optax.GradientTransformationExtraArgs(init, update)


def start(kernels: Mapping[str, tuple[int, ...]]) -> FreezingState:
  """The state before any step, on the host; `kernels` is `ModelSpec.kernels`."""
  dtypes = (np.int8, np.int8, np.float32, np.float32, bool)
  return FreezingState(
    *({layer: np.zeros(s, dtype) for layer, s in kernels.items()} for dtype in dtypes),
    np.zeros((), bool),
  )


def fix_codes(
  state: FreezingState,
  params: Mapping[str, Any],
  bits: Bits,
  threshold: jax.Array,
  momentum: float,
  spec: ModelSpec,
) -> tuple[Mapping[str, Any], FreezingState]:
  """Fixes the codes that oscillate too often, after a step.

  A fixed weight has the value of its code in the latent kernel too. It follows its interval, which
  keeps training, also where PROFIT has frozen the kernel: the code is what stays. In BN phases,
  which train no kernel, it does not follow. The average of the weights (EMA) averages the latent
  kernels as they are.

  Args:
    state: before the step.
    params: after it, nested.
    bits: with the bit width of the weights.
    threshold: of the frequency.
    momentum: share of the present step in the running means.
    spec: of the model.

  Returns:
    The params and the state after it.
  """
  flat, kernels = traverse_util.flatten_dict(params), kernels_and_steps(params, bits, spec)
  new = FreezingState({}, {}, {}, {}, {}, jnp.ones((), bool))
  for layer, code in spec.kernel_codes(params, bits).items():
    kernel, step = kernels[layer]
    fixed, mean = state.fixed[layer], state.mean[layer]
    code = jnp.where(fixed, jnp.round(mean).astype(jnp.int8), code)
    _, turned, new.direction[layer] = changes(
      state.codes[layer], state.direction[layer], code, state.started
    )
    frequency = momentum * turned.astype(jnp.float32) + (1 - momentum) * state.frequency[layer]
    fixed = fixed | (frequency > _threshold(threshold, layer, bits))
    value = code.astype(jnp.float32)
    present = jnp.where(state.started, momentum * value + (1 - momentum) * mean, value)
    new.frequency[layer] = frequency
    new.mean[layer] = mean = jnp.where(fixed, mean, present)
    new.fixed[layer] = fixed
    new.codes[layer] = jnp.where(fixed, jnp.round(mean).astype(jnp.int8), code)
    flat[*split_path(layer), KERNEL] = jnp.where(
      fixed, (step * jnp.round(mean)).astype(kernel.dtype), kernel
    )
  return traverse_util.unflatten_dict(flat), new


def _threshold(threshold, layer, bits):
  """That of a layer: of one with other bits than the phase's, they decide."""
  if layer not in bits.layers:
    return threshold
  return jnp.where(bits.layers[layer] <= FREEZING_BITS, threshold, _NEVER)
