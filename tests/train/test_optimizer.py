"""Groups: every leaf in exactly one, and the update formula of each."""

import functools

import jax
import numpy as np
import optax
import pytest

from profit_jax.train import optimizer
from profit_jax.train.packing import pack

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
