"""The compiled steps: train, sample, evaluate, calibrate. Every one is a pure function of its
arguments.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from profit_jax.config import ConfigError
from profit_jax.data.normalize import Normalization, normalize
from profit_jax.nn.layers import at_least_float32
from profit_jax.nn.spec import KERNEL, ModelSpec, split_path
from profit_jax.quant import duq
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import value_of
from profit_jax.train import aiwq
from profit_jax.train.oscillation import added_losses
from profit_jax.train.packing import unpack
from profit_jax.train.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# `(logits [N, classes], labels [N]) -> losses [N]`.
LossFunction = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross-entropy `[N]` of logits `[N, classes]` against int labels `[N]`, in at least float32."""
  return optax.losses.softmax_cross_entropy_with_integer_labels(at_least_float32(logits), labels)


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
  """Cross-entropy `[N]` of the student against the teacher's softmax, at temperature 1."""
  targets = jax.nn.softmax(at_least_float32(teacher_logits))
  return -jnp.sum(targets * jax.nn.log_softmax(at_least_float32(logits)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Distillation:
  """The teacher of a training step. It is not quantized, and runs in the student's `dtype`.

  Attributes:
    model: the teacher's module.
    batch_statistics: True normalizes with the batch's statistics, as in the reference; False with
      the running ones.
    normalization: of the images that the teacher sees; None is the student's.
    bits: in full precision, with the quantizer whose scalars the teacher's variables hold.
  """

  model: nn.Module
  batch_statistics: bool = True
  normalization: Normalization | None = None
  bits: Bits = Bits()


def make_train_step(  # noqa: PLR0913  one keyword for each setting
  model: nn.Module,
  tx: optax.GradientTransformationExtraArgs,
  *,
  normalization: Normalization,
  ema_rate: float,
  distillation: Distillation | None = None,
  accumulation_steps: int = 1,
  dtype: Any = None,
  loss: LossFunction | None = None,
  projections: Mapping[str, optax.GradientTransformationExtraArgs] | None = None,
) -> Callable[..., tuple[TrainState, Metrics, aiwq.AiwqState | None]]:
  """A training step, and a sampling step when it is given an `AiwqState`; not yet jitted.

  The step takes `(state, batch, bits, learning_rate, key, teacher, sampling, strengths=None)`:
    batch: `image` `[N, H, W, 3]` (uint8, or already normalized floats), `label` int32 `[N]`, and
      `mask` bool `[N]`, False in rows without an example, which the loss excludes. Without `mask`
      all rows count.
    bits: the student's.
    learning_rate: scalar, the epoch's.
    key: folded with `state.step` for dropout.
    teacher: the teacher's variables, or None.
    sampling: an `AiwqState`, or None outside the sampling phase.
    strengths: of the remedies by name, or None where none acts; see
      `profit_jax/train/oscillation/`.
  and returns the new state, the metrics `{loss, ce, kd, correct, examples, finite}` and the new
  `AiwqState` (or None). `loss`, `ce` and `kd` are means over the examples. `kd` exists only with a
  teacher. A remedy that adds a loss term adds its value, which `loss` does not include, under its
  name. `correct` and `examples` are counts. `finite` says whether the loss, the optimizer's changes
  and the new running statistics are finite. Where `finite` is False, the state is the old one: the
  state of a net that has become NaN explains nothing.

  Args:
    model: the student.
    tx: what `make_optimizer` gives; its labels decide what trains. Besides `learning_rate`, its
      `update` gets `tree`, the nested params, `bits` and `strengths`.
    normalization: of uint8 images.
    ema_rate: share of the old average that a step keeps (0.9997 in the reference).
    distillation: the teacher, where one is used.
    accumulation_steps: number of parts of the batch, computed one after the other. The gradient is
      that of the whole batch's loss. Batch statistics are those of each part; the running ones move
      once, by the parts' mean.
    dtype: of the activations and their gradients; None is that of the normalized images.
    loss: of the labels; None is `cross_entropy`.
    projections: of the params after the update, by the name of their state in
      `TrainState.oscillation`; see `oscillation.Remedy.of_params`.
  """

  def step(state, batch, bits, learning_rate, key, teacher, sampling, strengths=None):
    batch = {"mask": jnp.ones(batch["label"].shape, bool), **batch}
    # A batch without any example counts as one, so that its loss is 0 and not NaN.
    examples = jnp.maximum(jnp.sum(batch["mask"]), 1)
    params, batch_stats = unpack((state.params, state.batch_stats))

    def gradient(part, key):
      image, teacher_logits = _normalized(part["image"], normalization, dtype), None
      if teacher is not None:
        seen = _normalized(part["image"], distillation.normalization or normalization, dtype)
        teacher_logits = _teacher_logits(distillation, teacher, seen, key)

      def forward(params):
        variables = {"params": params, "batch_stats": batch_stats}
        return _forward(model, variables, state.step, image, bits, key, sampling)

      # With respect to the leaves: the transpose of a slice is a padded vector, one a leaf.
      return _share_of_gradient(
        forward, params, part, teacher_logits, examples, loss or cross_entropy
      )

    grads, metrics, updates = _accumulate(gradient, batch, key, accumulation_steps)
    metrics["examples"] = examples
    grads = state.params.filled(grads)
    statistics = state.batch_stats.filled(updates.get("batch_stats", {}))
    given = {"bits": bits, "strengths": strengths}
    changes, opt_state = tx.update(
      grads, state.opt_state, state.params, learning_rate=learning_rate, tree=params, **given
    )
    metrics |= added_losses(opt_state)
    new = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, changes),
      batch_stats=statistics,
      opt_state=opt_state,
    )
    new = _projected(new, projections or {}, given)
    sums = _sum(changes, statistics)
    new = _averaged(new, ema_rate)
    metrics["finite"] = jnp.isfinite(metrics["loss"]) & jnp.isfinite(sums)
    state = jax.tree.map(lambda n, o: jnp.where(metrics["finite"], n, o), new, state)
    if sampling is not None:
      sampling = aiwq.update(sampling, updates.get("moments", {}), updates.get("quantized", {}))
    return state, metrics, sampling

  return step


def _normalized(image, normalization, dtype):
  image = normalize(image, normalization)
  return image if dtype is None else image.astype(dtype)


def _teacher_logits(distillation, variables, image, key):
  """The teacher's logits of normalized images."""
  # The running statistics are its file's: what the batch would make of them is discarded.
  logits, _ = distillation.model.apply(
    variables,
    image,
    distillation.bits,
    distillation.batch_statistics,
    mutable=["batch_stats"],
    rngs={"dropout": key},
  )
  return value_of(logits)


def _share_of_gradient(forward, params, batch, teacher_logits, examples, loss):
  """The share that a part of the batch has in the gradient and the metrics, and the collections
  that `forward(params) -> (logits, collections)` updates.
  """

  def share(losses):
    return jnp.sum(jnp.where(batch["mask"], losses, 0.0)) / examples.astype(losses.dtype)

  def loss_fn(params):
    logits, updates = forward(params)
    logits = value_of(logits)
    parts = {"ce": share(_losses(loss, logits, batch["label"]))}
    if teacher_logits is not None:
      parts["kd"] = share(distillation_loss(logits, teacher_logits))
    return sum(parts.values()), (parts, logits, updates)

  grads, (parts, logits, updates) = jax.grad(loss_fn, has_aux=True)(params)
  right = jax.lax.argmax(logits, 1, jnp.int32) == batch["label"]
  metrics = {**parts, "loss": sum(parts.values()), "correct": jnp.sum(right & batch["mask"])}
  return grads, metrics, updates


def _losses(loss, logits, labels):
  """The losses of a user's function, of logits in at least float32."""
  losses = loss(at_least_float32(logits), labels)
  if losses.shape != labels.shape:
    raise ConfigError(
      f"loss gives an array of the shape {losses.shape} for {labels.shape[0]} examples: it must "
      f"give one number for each, of the shape {labels.shape}."
    )
  return losses


def _accumulate(gradient, batch, key, count):
  """`gradient(part, key)` over `count` parts of the batch, and its results joined."""
  if count == 1:
    return gradient(batch, key)
  # Every count-th row makes a part, so that each device's rows make its own share of every part.
  parts = jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(len(x) // count, count, *x.shape[1:]), 0, 1), batch
  )
  shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts), key)

  def body(total, numbered):
    number, part = numbered
    grads, metrics, updates = gradient(part, jax.random.fold_in(key, number))
    quantized = updates.pop("quantized", {})  # the same in every part
    return (jax.tree.map(jnp.add, total[0], grads), quantized), (metrics, updates)

  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[2].get("quantized", {}))
  )
  (grads, quantized), (metrics, updates) = jax.lax.scan(body, zeros, (jnp.arange(count), parts))
  updates = {
    "batch_stats": jax.tree.map(lambda leaf: jnp.mean(leaf, 0), updates.get("batch_stats", {})),
    "moments": aiwq.pooled(updates.get("moments", {})),
    "quantized": quantized,
  }
  return grads, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), metrics), updates


def _projected(state, projections, given):
  """The state after projections of its params."""
  params, states = state.params, {}
  for name, projection in projections.items():
    params, states[name] = projection.update(params, state.oscillation[name], **given)
  return state.replace(params=params, oscillation=states)


def _forward(model, variables, step, image, bits, key, sampling):
  """The student in train mode; beside the previous kernels where AIWQ is sampled."""
  extra = {} if sampling is None else {"previous": aiwq.previous_collection(sampling)}
  return model.apply(
    {**variables, **extra},
    image,
    bits,
    True,
    mutable=["batch_stats", "moments", "quantized"],
    rngs={"dropout": jax.random.fold_in(key, step)},
  )


def _sum(changes, batch_stats) -> jax.Array:
  """A number that is finite if all changes and statistics are."""
  # Of the changes, not the gradients: those of fixed kernels are not computed, and those of frozen
  # ones are not used.
  # Where a variance overflows, its inverse is 0: loss and gradient stay finite, the running
  # variance does not.
  # Joined first: the sum of an array is two kernels on a CPU.
  leaves = [
    jnp.sum(leaf, axis=tuple(range(leaf.ndim - 1)))
    for leaf in jax.tree.leaves((changes, batch_stats))
  ]
  return jnp.sum(jnp.concatenate([at_least_float32(jnp.atleast_1d(leaf)) for leaf in leaves]))


def _averaged(state: TrainState, rate: float) -> TrainState:
  """The state with its average moved on, where it has one."""
  if state.ema_params is None:
    return state
  return state.replace(
    ema_params=_ema(state.ema_params, state.params, rate),
    ema_batch_stats=_ema(state.ema_batch_stats, state.batch_stats, rate),
  )


def _ema(average: Any, value: Any, rate: float) -> Any:
  return jax.tree.map(lambda e, v: e + (1 - rate) * (v - e), average, value)


def make_eval_step(
  model: nn.Module, *, normalization: Normalization, num_classes: int
) -> Callable[..., Metrics]:
  """An evaluation step over a padded batch; not yet jitted.

  The step takes `(variables, batch, bits)`, the batch with a bool `mask` `[N]` that is False for
  padding, and returns sums over the real examples: `examples`, `top1`, `top5` (counts; top5 is the
  top `min(5, classes)`), `loss`, and `clip_rate`, a dictionary by quantizer (`block01/input_quant`,
  or a kernel's layer) of sums of per-example shares.
  """

  def step(variables, batch, bits):
    image, mask, label = normalize(batch["image"], normalization), batch["mask"], batch["label"]
    logits, updates = model.apply(variables, image, bits, False, mutable=["clip_rate"])
    logits = at_least_float32(value_of(logits))
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    # The rank of the true class: how many classes score higher. Ties count for the lower index, as
    # in a stable sort.
    true = jnp.take_along_axis(logits, label[:, None], axis=1)
    earlier = jnp.arange(num_classes, dtype=label.dtype)[None, :] < label[:, None]
    # A NaN counts as higher: a net that diverged must not come out with 100 %.
    rank = jnp.sum(~(logits <= true) | ((logits == true) & earlier), axis=1)
    rates = {
      "/".join(path[:-1]): jnp.sum(jnp.where(mask, rate, 0.0))
      for path, rate in traverse_util.flatten_dict(updates.get("clip_rate", {})).items()
    }
    return {
      "examples": jnp.sum(mask),
      "top1": jnp.sum(mask & (rank < 1)),
      "top5": jnp.sum(mask & (rank < 5)),
      "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
      "clip_rate": rates,
    }

  return step


def batch_statistics(
  model: nn.Module,
  variables: Any,
  image: jax.Array,
  normalization: Normalization,
  bits: Bits,
  key: Any,
  spec: ModelSpec,
) -> Any:
  """The batch statistics of images, in the tree of the running ones; `spec` is the model's."""
  zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
  inputs = {"params": variables["params"], "batch_stats": zeros}
  _, updates = model.apply(
    inputs,
    normalize(image, normalization),
    bits,
    True,
    mutable=["batch_stats"],
    rngs={"dropout": key},
  )
  # From zeros, the update leaves this share of the batch's.
  flat = traverse_util.flatten_dict(variables["batch_stats"])
  seen = traverse_util.flatten_dict(updates["batch_stats"])
  for layer, momentum in spec.momenta.items():
    for name in ("mean", "var"):
      path = (*split_path(layer), name)
      flat[path] = seen[path] / (1 - momentum)
  return traverse_util.unflatten_dict(flat)


def calibrate_acts(
  model: nn.Module,
  variables: Any,
  image: jax.Array,
  normalization: Normalization,
  key: Any,
  bits: Bits,
) -> Any:
  """Params with the activation quantizers' scalars set from one batch, in train mode with
  quantizers off.

  Jit with `model` and `normalization` static. The running statistics stay as they are. `bits` has
  the width of the activations.
  """
  _, updates = model.apply(
    variables,
    normalize(image, normalization),
    bits,
    True,
    mutable=["calibration", "batch_stats"],
    rngs={"dropout": key},
  )
  flat = traverse_util.flatten_dict(variables["params"])
  for path, first in traverse_util.flatten_dict(updates.get("calibration", {})).items():
    _set(flat, path, first)
  return traverse_util.unflatten_dict(flat)


def calibrate_weights(params: Any, bits: Bits, spec: ModelSpec) -> Any:
  """Params with the first values of each kernel's scalars, at `bits.weight`; DuQ's are
  `0.9 * max|w|`.
  """
  return _with_kernel_scalars(params, bits, spec, spec.bits.quantizer.first_kernel)


def fit_weights(params: Any, bits: Bits, spec: ModelSpec) -> Any:
  """Params with each kernel's scalars fitted to it, at `bits.weight`."""
  return _with_kernel_scalars(params, bits, spec, spec.bits.quantizer.fit_kernel)


def _with_kernel_scalars(params, bits, spec, values_of):
  flat, quantizer = traverse_util.flatten_dict(params), spec.bits.quantizer
  for layer in spec.kernels:
    path = split_path(layer)
    values = quantizer.of_kernel(values_of, flat[*path, KERNEL], bits.kernel_qmax(layer))
    for name, value in values.items():
      _set(flat, (*path, name), value)
  return traverse_util.unflatten_dict(flat)


def _set(flat: dict[tuple[str, ...], jax.Array], path: tuple[str, ...], value: jax.Array) -> None:
  flat[path] = duq.inverse_softplus(value).astype(flat[path].dtype)
