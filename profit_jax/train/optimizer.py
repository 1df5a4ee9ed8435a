"""SGD with Nesterov momentum in four groups, as `optax.multi_transform` labels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import traverse_util

from profit_jax.quant.methods import PREFIX

WEIGHT, NORM, QUANT, FROZEN = "weight", "norm", "quant", "frozen"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SgdSettings:
  """The optimizer's constants.

  Attributes:
    weight_decay: added to the gradient of the weights, before momentum ("coupled").
    momentum: Nesterov's.
    quantizer_lr_scale: learning rate of a and c, as a multiple of the others'.
  """

  weight_decay: float
  momentum: float
  quantizer_lr_scale: float


def label_params(
  params: Mapping[str, Any], *, train_kernels: bool, frozen: frozenset[str]
) -> dict[str, Any]:
  """Names every parameter's group.

  | leaf            | group                                                           |
  |-----------------|-----------------------------------------------------------------|
  | `quant_...`     | quant                                                           |
  | `scale`, `bias` | norm                                                            |
  | `kernel`        | weight; frozen if its layer is in `frozen` or kernels are fixed |

  Args:
    params: nested dictionaries.
    train_kernels: False in BN phases, where every kernel is fixed.
    frozen: layers, as `block01/expand_conv`, matched exactly.

  Raises:
    ValueError: a leaf that no rule covers, or a frozen layer that has no kernel.
  """
  labels, unused = {}, set(frozen)
  for path in traverse_util.flatten_dict(params):
    layer, leaf = "/".join(path[:-1]), path[-1]
    if leaf.startswith(PREFIX):
      labels[path] = QUANT
    elif leaf in ("scale", "bias"):
      labels[path] = NORM
    elif leaf == "kernel":
      unused.discard(layer)
      labels[path] = WEIGHT if train_kernels and layer not in frozen else FROZEN
    else:
      raise ValueError(f"no optimizer group for the parameter {'/'.join(path)}")
  if unused:
    raise ValueError(f"layers to freeze that have no kernel: {', '.join(sorted(unused))}")
  return traverse_util.unflatten_dict(labels)


def scale_by_epoch_learning_rate(multiple: float) -> optax.GradientTransformationExtraArgs:
  """Multiplies updates by `-multiple * learning_rate`, where `learning_rate` is an argument of
  `update`.

  The rate changes from epoch to epoch and the schedule from phase to phase; as an argument it needs
  neither a new program nor a place in the optimizer's state.
  """

  def update(updates, state, params=None, *, learning_rate, **_):
    del params
    return jax.tree.map(lambda u: u * (-multiple * learning_rate).astype(u.dtype), updates), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def make_optimizer(
  labels: Mapping[str, Any], sgd: SgdSettings
) -> optax.GradientTransformationExtraArgs:
  """The transformation of one phase; `update` takes `learning_rate`, the epoch's rate of the
  weights.

  weight: decay, momentum, rate. norm: momentum, rate. quant: momentum, rate * `quantizer_lr_scale`.
  frozen: nothing, and no state. XLA drops gradients that nobody reads; of a frozen quantized kernel
  that is little, since its a and c still train and need the gradient of the quantized kernel.
  """

  def momentum():
    return optax.trace(sgd.momentum, nesterov=True)

  groups = {
    WEIGHT: optax.chain(
      optax.add_decayed_weights(sgd.weight_decay), momentum(), scale_by_epoch_learning_rate(1.0)
    ),
    NORM: optax.chain(momentum(), scale_by_epoch_learning_rate(1.0)),
    QUANT: optax.chain(momentum(), scale_by_epoch_learning_rate(sgd.quantizer_lr_scale)),
    FROZEN: optax.set_to_zero(),
  }
  return optax.multi_transform(groups, labels)
