"""Dampening: a loss term that pulls each weight to the middle of its bin (section 4)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from profit_jax.nn.spec import KERNEL, ModelSpec, split_path
from profit_jax.quant.bits import Bits
from profit_jax.train.oscillation.base import AddedLoss, Remedy, kernels_and_steps, register
from profit_jax.train.packing import Packed


@register
class Dampening(Remedy):
  """Its strength is lambda, the weight of the loss term, which rises from 0."""

  name = "dampening"

  @property
  def is_on(self) -> bool:
    """See `Remedy`."""
    return self._settings.dampening > 0

  def summary(self) -> str:
    """See `Remedy`."""
    return f"dampening up to {self._settings.dampening:g}"

  def strength(self, weight_bits: int, left: float) -> float:
    """See `Remedy`."""
    del weight_bits
    return self._settings.dampening * (1 - left)

  def of_gradient(self, spec: ModelSpec) -> optax.GradientTransformationExtraArgs:
    """See `Remedy`."""
    return add_dampening(spec)


def add_dampening(spec: ModelSpec) -> optax.GradientTransformationExtraArgs:
  """Adds the gradient of the weighted dampening loss to that of the kernels.

  Args:
    spec: of the model.
  """

  def init(params: Packed) -> AddedLoss:
    del params
    return AddedLoss(np.zeros((), np.float32), Dampening.name)

  def update(updates: Packed, state: AddedLoss, params=None, *, tree, bits, strengths, **_):
    del params  # of the weight group only; the intervals are in `tree`

    def weighted(tree):
      return strengths[Dampening.name] * dampening_loss(tree, bits, spec)

    loss, gradient = jax.value_and_grad(weighted)(tree)
    flat, arrays = traverse_util.flatten_dict(gradient), dict(updates.arrays)
    for layer in spec.kernels:
      path = (*split_path(layer), KERNEL)
      arrays["/".join(path)] = arrays["/".join(path)] + flat[path]
    return updates.replace(arrays=arrays), state.replace(value=loss)

  return optax.GradientTransformationExtraArgs(init, update)


def dampening_loss(params: Mapping[str, Any], bits: Bits, spec: ModelSpec) -> jax.Array:
  """The sum over all kernels of `(w - w_hat)^2` within the interval, where w_hat is the value of
  w's code.

  Neither the interval nor clipped weights get a gradient.

  Args:
    params: of a model, nested.
    bits: with the bit width of the weights.
    spec: of the model.
  """
  total = jnp.zeros((), jnp.float32)
  for layer, (kernel, step) in kernels_and_steps(params, bits, spec).items():
    distance = kernel - jax.lax.stop_gradient(step * jnp.round(kernel / step))
    inside = jnp.abs(kernel) < step * bits.kernel_qmax(layer)
    total += jnp.sum(jnp.where(inside, jnp.square(distance), 0.0))
  return total
