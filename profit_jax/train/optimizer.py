"""SGD with Nesterov momentum in four groups, as `optax.multi_transform` labels."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from profit_jax.fields import ConfigError
from profit_jax.nn.spec import NORM, QUANT, WEIGHT, ModelSpec
from profit_jax.train.packing import Packed, group_of, pack, split, unpack
from profit_jax.typing import Array, Params

FROZEN = "frozen"
Frozen = frozenset[str]


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


# `learning_rate -> transformation`, as `optax.adamw`.
OptimizerFactory = Callable[[jax.Array], optax.GradientTransformation]


class NotSaved(flax.struct.PyTreeNode):
  """A part of an optimizer's state that no checkpoint holds.

  It follows from the phase, or the next step makes it anew.
  """


class FrozenKernels(NotSaved):
  """Which weights are frozen, as values: another set needs no other program.

  Attributes:
    frozen: bool `[len(kernels)]`.
    kernels: their arrays' names in `Packed`, `block01/expand_conv/kernel`.
  """

  frozen: Array
  kernels: tuple[str, ...] = flax.struct.field(pytree_node=False)

  def names(self) -> frozenset[str]:
    """The frozen kernels, of flags on the host."""
    return frozenset(name for name, flag in zip(self.kernels, self.frozen, strict=True) if flag)


def label_params(params: Packed, *, train_kernels: bool) -> Packed:
  """Names every array's group.

  | array                                        | group                               |
  |----------------------------------------------|-------------------------------------|
  | the quantizers' scalars                      | quant                               |
  | scales and biases                            | norm                                |
  | a kernel, or another parameter of two axes   | weight; frozen if kernels are fixed |

  Args:
    params: of a model.
    train_kernels: False in BN phases, where every kernel is fixed.
  """
  weight = WEIGHT if train_kernels else FROZEN
  return params.replace(arrays={name: group_of(name) or weight for name in params.arrays})


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


def add_decayed_weights_unless_frozen(
  weight_decay: float, frozen: frozenset[str]
) -> optax.GradientTransformation:
  """As `optax.add_decayed_weights`, but the update of a frozen kernel is 0, and so is its momentum.

  Its gradient is computed all the same, because its a and c need most of it. The frozen set is a
  value in the state, which `init` makes; `update` never reads the argument.

  Args:
    weight_decay: of the kernels that train.
    frozen: arrays, as `block01/expand_conv/kernel`, matched exactly.

  Raises:
    ValueError: in `init`, for a frozen array that there is not.
  """

  def init(params: Packed) -> FrozenKernels:
    kernels = tuple(sorted(n for n, a in params.arrays.items() if not _is_masked(a)))
    # A phase that trains no kernel freezes all of them by their labels.
    if kernels and (unused := frozen - set(kernels)):
      raise ValueError(f"no weights to freeze have the names {', '.join(sorted(unused))}")
    return FrozenKernels(np.array([name in frozen for name in kernels], bool), kernels)

  def update(updates: Packed, state: FrozenKernels, params: Packed):
    if not state.kernels:
      return updates, state
    flags = split(state.frozen, [1] * len(state.kernels))
    arrays = dict(updates.arrays)
    for name, flag in zip(state.kernels, flags, strict=True):
      decayed = arrays[name] + weight_decay * params.arrays[name]
      arrays[name] = jnp.where(flag[0], jnp.zeros_like(decayed), decayed)
    return updates.replace(arrays=arrays), state

  return optax.GradientTransformation(init, update)


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def own_transformation(factory: OptimizerFactory) -> optax.GradientTransformationExtraArgs:
  """A user's transformation, on the leaves of packed parameters as their model has them.

  Its learning rate is an argument of `update`, as ours. Leaves, because the state may have other
  shapes than its parameter (`optax.adafactor`), or a norm of it (`optax.lamb`).
  """

  # Only the rate is part of the state, whatever the factory calls it.
  def transformation(learning_rate):
    return factory(learning_rate)

  inner = optax.inject_hyperparams(transformation)(learning_rate=0.0)

  def init(params: Packed):
    leaves = unpack(params)
    return inner.init(leaves) if leaves else optax.EmptyState()

  def update(updates: Packed, state, params: Packed, *, learning_rate, **_):
    leaves = unpack(updates)
    if not leaves:
      return updates, state
    rate = jnp.asarray(learning_rate, jnp.asarray(state.hyperparams["learning_rate"]).dtype)
    state = state._replace(hyperparams={**state.hyperparams, "learning_rate": rate})
    changes, state = inner.update(leaves, state, unpack(params))
    if traverse_util.flatten_dict(changes).keys() != traverse_util.flatten_dict(leaves).keys():
      raise ValueError("its updates have another structure than the gradients")
    return updates.filled(changes), state

  return optax.GradientTransformationExtraArgs(init, update)


def check_factory(factory: OptimizerFactory, spec: ModelSpec) -> None:
  """Traces a user's optimizer once on a model's parameters, without computing anything.

  Raises:
    ConfigError: it is no such function; it needs more than gradients, parameters and a traced
      rate; its state or its updates change their shapes or dtypes from step to step.
  """
  allowed = (
    "optimizer must be a function learning_rate -> optax.GradientTransformation, as optax.adamw or "
    "lambda rate: optax.sgd(rate, 0.9)"
  )
  if not callable(factory):
    raise ConfigError(f"optimizer is a {type(factory).__name__}: {allowed}.")

  flat = traverse_util.flatten_dict(spec.shapes["params"])
  for group in (WEIGHT, NORM):
    leaves = {path: leaf for path, leaf in flat.items() if spec.groups[path] == group}
    if not leaves:
      continue
    try:
      state, updated = _traced_step(factory, traverse_util.unflatten_dict(leaves), spec)
    except jax.errors.ConcretizationTypeError as error:
      raise ConfigError(
        "optimizer cannot be traced: it needs the learning rate as a Python number, but the rate "
        "is an array, which the schedule sets in each epoch. Write it without `if` and float() on "
        "the rate."
      ) from error
    except Exception as error:  # it is a user's
      text = " ".join(str(error).split())
      raise ConfigError(
        f"optimizer cannot be used: {type(error).__name__}: {text}. {allowed}."
      ) from error
    if _signature(state) != _signature(updated):
      raise ConfigError(
        "optimizer changes the structure, shapes or dtypes of its state in an update, which a "
        "compiled step cannot do. Give it a state that stays alike."
      )
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    if any(jax.dtypes.issubdtype(dtype, jax.dtypes.extended) for dtype in dtypes):
      raise ConfigError(
        "optimizer has a typed random key in its state, which checkpoints cannot hold. Use "
        "jax.random.key_data of it."
      )


def _traced_step(factory: OptimizerFactory, leaves: Params, spec: ModelSpec) -> tuple[Any, Any]:
  """Shapes of an optimizer's state before and after an update."""

  def step(params):
    params = pack(params, spec.groups)
    tx = own_transformation(factory)
    state = tx.init(params)
    changes, updated = tx.update(params, state, params, learning_rate=jnp.zeros((), jnp.float32))
    optax.apply_updates(params, changes)  # of the parameters' shapes
    return state, updated

  return jax.eval_shape(step, leaves)


def _signature(tree: Any) -> Any:
  return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def make_optimizer(
  labels: Packed,
  sgd: SgdSettings,
  frozen: frozenset[str] = frozenset(),
  factory: OptimizerFactory | None = None,
  of_gradient: Sequence[optax.GradientTransformation] = (),
) -> optax.GradientTransformationExtraArgs:
  """The transformation of one phase; `update` takes `learning_rate`, the epoch's rate of the
  weights.

  weight: decay, momentum, rate. norm: momentum, rate. quant: momentum, rate * `quantizer_lr_scale`.
  frozen: nothing, and no state. Of the weight group, the arrays in `frozen` are too, with
  a momentum of 0; these are a value in the state, so that all such sets share a program.

  Args:
    labels: of `label_params`.
    sgd: the constants.
    frozen: arrays that are frozen by value, as `block01/expand_conv/kernel`.
    factory: replaces decay, momentum and rate of the groups weight and norm.
    of_gradient: transformations of the weights' gradient, before all others. A frozen kernel stays
      fixed whatever they add. Their states are `NotSaved`.
  """

  def momentum():
    return optax.trace(sgd.momentum, nesterov=True)

  def first(decay):
    # One entry of the outer chain, so that the paths of saved states stay.
    return optax.chain(*of_gradient, decay) if of_gradient else decay

  if factory is None:
    weight = optax.chain(
      first(add_decayed_weights_unless_frozen(sgd.weight_decay, frozen)),
      momentum(),
      scale_by_epoch_learning_rate(1.0),
    )
    norm = optax.chain(momentum(), scale_by_epoch_learning_rate(1.0))
  else:
    # Its own decay moves kernels whose gradient is 0: they are held at both ends.
    hold = add_decayed_weights_unless_frozen(0.0, frozen)
    weight = optax.chain(first(hold), own_transformation(factory), hold)
    norm = own_transformation(factory)
  groups = {
    WEIGHT: weight,
    NORM: norm,
    QUANT: optax.chain(momentum(), scale_by_epoch_learning_rate(sgd.quantizer_lr_scale)),
    FROZEN: optax.set_to_zero(),
  }
  return optax.multi_transform(groups, labels)
