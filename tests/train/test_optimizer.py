"""Groups: every leaf in exactly one, and the update formula of each."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from profit_jax.config import ConfigError
from profit_jax.nn.spec import describe
from profit_jax.quant.bits import Bits
from profit_jax.train import optimizer
from profit_jax.train.packing import pack, unpack
from profit_jax.train.state import TrainState, from_saved, saved_form

PARAMS = {
  "conv1": {
    "kernel": np.full((1, 1, 2, 2), 2.0),
    "quant_a": np.array(1.0),
    "quant_c": np.array(1.0),
  },
  "conv10": {
    "kernel": np.full((1, 1, 2, 2), 2.0),
    "quant_a": np.array(1.0),
    "quant_c": np.array(1.0),
  },
  "norm": {"scale": np.ones(2), "bias": np.zeros(2)},
}
SGD = optimizer.SgdSettings(weight_decay=0.1, momentum=0.9, quantizer_lr_scale=0.01)


GROUPS = {
  ("conv1", "kernel"): "weight",
  ("conv1", "quant_a"): "quant",
  ("conv1", "quant_c"): "quant",
  ("conv10", "kernel"): "weight",
  ("conv10", "quant_a"): "quant",
  ("conv10", "quant_c"): "quant",
  ("norm", "scale"): "norm",
  ("norm", "bias"): "norm",
}


def packed():
  return pack(PARAMS, GROUPS)


def label():
  return optimizer.label_params(packed(), train_kernels=True)


def test_every_leaf_has_its_group():
  assert label().arrays == {
    "conv1/kernel": "weight",
    "conv10/kernel": "weight",
    "/norm/float64": "norm",
    "/quant/float64": "quant",
  }
  fixed = optimizer.label_params(packed(), train_kernels=False)
  assert sorted(fixed.arrays.values()) == ["frozen", "frozen", "norm", "quant"]


def test_unknown_weights_are_an_error_with_their_path():
  with pytest.raises(ValueError, match="conv2/kernel"):
    optimizer.make_optimizer(label(), SGD, frozenset({"conv2/kernel"})).init(packed())


def test_two_updates_follow_nesterov_sgd_with_coupled_decay():
  whole = packed()
  # Not conv10 by the common beginning of the name.
  tx = optimizer.make_optimizer(label(), SGD, frozenset({"conv1/kernel"}))
  params = whole.arrays
  grads = {name: np.full_like(value, 0.5) for name, value in params.items()}
  state, momentum = tx.init(whole), dict.fromkeys(params, 0.0)
  rates = {"weight": 1.0, "norm": 1.0, "quant": 0.01, "frozen": 0.0}
  groups = {**label().arrays, "conv1/kernel": "frozen"}
  for learning_rate in (0.2, 0.05):
    updates, state = tx.update(
      whole.replace(arrays=grads),
      state,
      whole,
      learning_rate=np.float32(learning_rate),
    )
    for name, update in updates.arrays.items():
      gradient = grads[name] + (0.1 * params[name] if groups[name] == "weight" else 0.0)
      if groups[name] == "frozen":
        assert not np.any(update)
        continue
      momentum[name] = 0.9 * momentum[name] + gradient
      expected = -learning_rate * rates[groups[name]] * (gradient + 0.9 * momentum[name])
      np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  "factory",
  [
    functools.partial(optax.adafactor, min_dim_size_to_factor=2),
    optax.lion,
    optax.adamw,
    lambda rate: optax.sgd(optax.exponential_decay(rate, 1, 0.5), 0.9),
  ],
  ids=["adafactor", "lion", "adamw", "sgd"],
)
def test_an_own_optimizer_computes_as_alone_and_is_saved_by_leaf(factory):
  params = jax.tree.map(np.float32, PARAMS)
  whole, direct = pack(params, GROUPS), factory(0.1)
  labels = optimizer.label_params(whole, train_kernels=True)
  tx = optimizer.make_optimizer(labels, SGD, frozenset({"conv1/kernel"}), factory)
  state = TrainState(0, whole, pack({}), None, None, tx.init(whole))
  # Optax mixes dtypes.
  with jax.numpy_dtype_promotion("standard"):
    grads = jax.tree.map(lambda leaf: np.float32(0.3) + leaf, whole)
    updates, opt_state = tx.update(grads, state.opt_state, whole, learning_rate=np.float32(0.1))
    kernel = {"kernel": params["conv10"]["kernel"]}
    alone, _ = direct.update(
      {"kernel": unpack(grads)["conv10"]["kernel"]}, direct.init(kernel), kernel
    )
  np.testing.assert_allclose(unpack(updates)["conv10"]["kernel"], alone["kernel"], rtol=1e-6)
  assert not np.any(unpack(updates)["conv1"]["kernel"])
  after = jax.device_get(state.replace(opt_state=opt_state))
  back = from_saved(saved_form(after), state)
  assert jax.tree.structure(back) == jax.tree.structure(after)
  jax.tree.map(np.testing.assert_array_equal, back, after)


class Plain(nn.Module):
  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    return nn.Dense(3, name="dense")(x.reshape(len(x), -1))


@pytest.mark.parametrize(
  ("factory", "message"),
  [
    (optax.sgd(0.1), "function learning_rate -> optax.GradientTransformation"),
    (lambda rate: None, "'NoneType'.*function learning_rate"),
    (optax.lbfgs, "missing 3 required keyword-only arguments.*function learning_rate"),
    (lambda rate: optax.sgd(float(rate)), "needs the learning rate as a Python number"),
    (
      lambda rate: optax.stateless(lambda updates, _: {"dense": {}}),
      "cannot be used: ValueError: its updates have another structure than the gradients",
    ),
    (
      lambda rate: optax.GradientTransformation(
        lambda params: {"steps": np.zeros(())},
        lambda updates, state, params: (updates, {"steps": np.zeros(2)}),
      ),
      "changes the structure, shapes or dtypes of its state",
    ),
  ],
)
def test_what_is_no_optimizer(factory, message):
  with pytest.raises(ConfigError, match=message):
    optimizer.check_factory(factory, describe(Plain(), (2, 2, 1)))


def test_another_frozen_set_needs_no_other_program():
  params = jax.tree.map(np.float32, packed())
  first, second = (
    optimizer.make_optimizer(label(), SGD, frozenset({f"{layer}/kernel"}))
    for layer in ("conv1", "conv10")
  )
  step = jax.jit(functools.partial(first.update, learning_rate=np.float32(0.1)))
  ones = jax.tree.map(np.ones_like, params)
  for tx, frozen, moves in ((first, "conv1", "conv10"), (second, "conv10", "conv1")):
    kernel = params.arrays[f"{frozen}/kernel"]
    # Whatever its gradient is.
    grads = ones.replace(arrays={**ones.arrays, f"{frozen}/kernel": np.full_like(kernel, np.nan)})
    updates, _ = step(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(after.arrays[f"{frozen}/kernel"], kernel)
    assert np.all(after.arrays[f"{moves}/kernel"] != params.arrays[f"{moves}/kernel"])
  assert step._cache_size() == 1
