"""Groups: every leaf in exactly one, and the update formula of each."""

import collections

import numpy as np
import pytest
from flax import traverse_util

from profit_jax.train import optimizer

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


def test_every_leaf_has_its_group():
  labels = optimizer.label_params(PARAMS, train_kernels=True, frozen=frozenset({"conv1"}))
  assert traverse_util.flatten_dict(labels, sep="/") == {
    "conv1/kernel": "frozen",
    "conv1/quant_a": "quant",
    "conv1/quant_c": "quant",
    "conv10/kernel": "weight",  # not by a common beginning of the name
    "conv10/quant_a": "quant",
    "conv10/quant_c": "quant",
    "norm/scale": "norm",
    "norm/bias": "norm",
  }
  fixed = optimizer.label_params(PARAMS, train_kernels=False, frozen=frozenset())
  groups = collections.Counter(traverse_util.flatten_dict(fixed).values())
  assert groups == {"norm": 2, "quant": 4, "frozen": 2}


def test_unknown_leaves_and_unknown_layers_are_errors_with_their_path():
  with pytest.raises(ValueError, match="conv1/mystery"):
    optimizer.label_params(
      {"conv1": {"mystery": np.ones(1)}}, train_kernels=True, frozen=frozenset()
    )
  with pytest.raises(ValueError, match="conv2"):
    optimizer.label_params(PARAMS, train_kernels=True, frozen=frozenset({"conv2"}))


def test_two_updates_follow_nesterov_sgd_with_coupled_decay():
  labels = optimizer.label_params(PARAMS, train_kernels=True, frozen=frozenset({"conv1"}))
  tx = optimizer.make_optimizer(labels, SGD)
  params = traverse_util.flatten_dict(PARAMS, sep="/")
  grads = {name: np.full_like(value, 0.5) for name, value in params.items()}
  state, momentum = tx.init(PARAMS), dict.fromkeys(params, 0.0)
  rates = {"weight": 1.0, "norm": 1.0, "quant": 0.01, "frozen": 0.0}
  groups = traverse_util.flatten_dict(labels, sep="/")
  for learning_rate in (0.2, 0.05):
    updates, state = tx.update(
      traverse_util.unflatten_dict(grads, sep="/"),
      state,
      traverse_util.unflatten_dict(params, sep="/"),
      learning_rate=np.float32(learning_rate),
    )
    for name, update in traverse_util.flatten_dict(updates, sep="/").items():
      gradient = grads[name] + (0.1 * params[name] if groups[name] == "weight" else 0.0)
      momentum[name] = 0.9 * momentum[name] + gradient
      expected = -learning_rate * rates[groups[name]] * (gradient + 0.9 * momentum[name])
      np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)
