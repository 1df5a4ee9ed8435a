"""Remedies for oscillating weights (Nagel et al., "Overcoming Oscillations in Quantization-Aware
Training", ICML 2022, arXiv 2203.11086): dampening, iterative freezing, and batch statistics
estimated anew. All of them can go with PROFIT.

Dampening and freezing work on quantizers whose codes come from one interval, DuQ and LSQ, in the
phases that train kernels quantized. Their strength is annealed over all such phases of one bit
width, sampling and ft1 to ft3 together. Codes are fixed at up to 4 bits only, as in the code of
that paper: at more, codes change with every little move of a weight.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from profit_jax.config import OscillationSettings
from profit_jax.nn.spec import KERNEL, ModelSpec, split_path
from profit_jax.quant.bits import Bits
from profit_jax.schedule import Phase
from profit_jax.train.instability import changes

FREEZING_BITS = 4  # the most at which codes are fixed
_NEVER = 2.0  # a threshold that no frequency reaches


class Strengths(NamedTuple):
  """What a step applies, float32 scalars; None where the remedy is off.

  Attributes:
    dampening: lambda, the weight of the dampening loss.
    threshold: the oscillation frequency above which a code is fixed.
  """

  dampening: jax.Array | None = None
  threshold: jax.Array | None = None


class Oscillation(NamedTuple):
  """What iterative freezing carries from step to step; dictionaries by layer, arrays of the
  kernels' shapes.

  Attributes:
    codes: int8, the latest, those that are fixed included.
    direction: int8, -1 or 1, where each went when it changed last; 0 before it has.
    frequency: float32, running mean of whether a step changed the code against its last change.
    mean: float32, running mean of the code; of a fixed one, the code is this, rounded.
    fixed: bool.
    started: bool scalar; False before the first step, which has nothing to compare with.
  """

  codes: dict[str, jax.Array]
  direction: dict[str, jax.Array]
  frequency: dict[str, jax.Array]
  mean: dict[str, jax.Array]
  fixed: dict[str, jax.Array]
  started: jax.Array


def start(kernels: Mapping[str, tuple[int, ...]]) -> Oscillation:
  """The state before any step, on the host; `kernels` is `ModelSpec.kernels`."""
  dtypes = (np.int8, np.int8, np.float32, np.float32, bool)
  return Oscillation(
    *({layer: np.zeros(s, dtype) for layer, s in kernels.items()} for dtype in dtypes),
    np.zeros((), bool),
  )


def active(
  settings: OscillationSettings, quantized_weights: bool, train_kernels: bool
) -> tuple[bool, bool]:
  """Whether a program dampens, and whether it freezes codes."""
  trains = quantized_weights and train_kernels
  return trains and settings.dampening > 0, trains and bool(settings.freeze_thresholds)


def strengths(
  settings: OscillationSettings,
  phases: tuple[Phase, ...],
  phase: Phase,
  step: int,
  steps_per_epoch: int,
) -> Strengths | None:
  """Those of a step (from 0) of a phase: lambda rises from 0 and the threshold falls, both as a
  half cosine.

  None where the phase has neither.
  """
  dampens, freezes = active(settings, phase.program.quantized_weights, phase.program.train_kernels)
  if not (dampens or freezes):
    return None
  same = [p for p in phases if p.trains_codes and p.weight_bits == phase.weight_bits]
  before = sum(p.epochs for p in same if p.index < phase.index) * steps_per_epoch + step
  left = (1 + math.cos(math.pi * before / (sum(p.epochs for p in same) * steps_per_epoch))) / 2
  first, last = settings.freeze_thresholds or (0.0, 0.0)
  threshold = last + (first - last) * left if phase.weight_bits <= FREEZING_BITS else _NEVER
  return Strengths(
    np.float32(settings.dampening * (1 - left)) if dampens else None,
    np.float32(threshold) if freezes else None,
  )


def dampening_loss(params: Mapping[str, Any], bits: Bits, spec: ModelSpec) -> jax.Array:
  """The sum over all kernels of `(w - w_hat)^2` within the interval, w_hat being the value of w's
  code (section 4).

  It pulls each weight to the middle of its bin. Neither the interval nor what is clipped gets a
  gradient.

  Args:
    params: of a model.
    bits: with the bit width of the weights.
    spec: of the model.
  """
  total = jnp.zeros((), jnp.float32)
  for layer, (kernel, step) in _kernels(params, bits, spec).items():
    distance = kernel - jax.lax.stop_gradient(step * jnp.round(kernel / step))
    inside = jnp.abs(kernel) < step * bits.kernel_qmax(layer)
    total += jnp.sum(jnp.where(inside, jnp.square(distance), 0.0))
  return total


def fix_codes(
  state: Oscillation,
  params: Mapping[str, Any],
  bits: Bits,
  threshold: jax.Array,
  momentum: float,
  spec: ModelSpec,
) -> tuple[Mapping[str, Any], Oscillation]:
  """Fixes the codes that oscillate too often (section 4, algorithm 1), after a step.

  A fixed weight has the value of its code in the latent kernel too, and follows the interval that
  goes on training, also where PROFIT has frozen the kernel: there the code is what rests. In BN
  phases, which train no kernel, it does not follow. The average of the weights (EMA) averages the
  latent kernels as they are.

  Args:
    state: before the step.
    params: after it.
    bits: with the bit width of the weights.
    threshold: of the frequency.
    momentum: share of the present step in the running means.
    spec: of the model.

  Returns:
    The params and the state after it.
  """
  flat, kernels = traverse_util.flatten_dict(params), _kernels(params, bits, spec)
  new = Oscillation({}, {}, {}, {}, {}, jnp.ones((), bool))
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


def _kernels(params, bits, spec):
  """Each kernel and the width of a step of its quantizer, without a gradient; by layer."""
  flat, found = traverse_util.flatten_dict(params), {}
  for layer in spec.kernels:
    path = split_path(layer)
    interval = jax.nn.softplus(jax.lax.stop_gradient(flat[*path, "quant_a"]))
    found[layer] = flat[*path, KERNEL], interval / bits.kernel_qmax(layer)
  return found
