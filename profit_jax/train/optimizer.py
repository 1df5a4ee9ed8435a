"""SGD with Nesterov momentum in four groups, as `optax.multi_transform` labels."""

import dataclasses

import jax
import optax

from profit_jax.train.packing import NORM, QUANT, Packed

WEIGHT, FROZEN = "weight", "frozen"
_KERNEL = "/kernel"


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


def label_params(params: Packed, *, train_kernels: bool, frozen: frozenset[str]) -> Packed:
  """Names every array's group.

  | array                     | group                                                           |
  |---------------------------|-----------------------------------------------------------------|
  | all `quant_...`           | quant                                                           |
  | all `scale` and `bias`    | norm                                                            |
  | a `kernel`                | weight; frozen if its layer is in `frozen` or kernels are fixed |

  Args:
    params: of a model.
    train_kernels: False in BN phases, where every kernel is fixed.
    frozen: layers, as `block01/expand_conv`, matched exactly.

  Raises:
    ValueError: an array that no rule covers, or a frozen layer that has no kernel.
  """
  labels, unused = {}, set(frozen)
  for name in params.arrays:
    layer = name.removesuffix(_KERNEL)
    if name in (NORM, QUANT):
      labels[name] = name
    elif name.endswith(_KERNEL):
      unused.discard(layer)
      labels[name] = WEIGHT if train_kernels and layer not in frozen else FROZEN
    else:
      raise ValueError(f"no optimizer group for the parameter {name}")
  if unused:
    raise ValueError(f"layers to freeze that have no kernel: {', '.join(sorted(unused))}")
  return params.replace(arrays=labels)


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


def make_optimizer(labels: Packed, sgd: SgdSettings) -> optax.GradientTransformationExtraArgs:
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
