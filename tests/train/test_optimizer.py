"""Groups: every leaf in exactly one, and the update formula of each."""

import numpy as np
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


def test_every_leaf_has_its_group():
  labels = optimizer.label_params(pack(PARAMS), train_kernels=True, frozen=frozenset({"conv1"}))
  assert labels.arrays == {
    "conv1/kernel": "frozen",
    "conv10/kernel": "weight",  # not by a common beginning of the name
    "norm": "norm",
    "quant": "quant",
  }
  fixed = optimizer.label_params(pack(PARAMS), train_kernels=False, frozen=frozenset())
  assert sorted(fixed.arrays.values()) == ["frozen", "frozen", "norm", "quant"]


def test_unknown_leaves_and_unknown_layers_are_errors_with_their_path():
  with pytest.raises(ValueError, match="conv1/mystery"):
    optimizer.label_params(
      pack({"conv1": {"mystery": np.ones(1)}}), train_kernels=True, frozen=frozenset()
    )
  with pytest.raises(ValueError, match="conv2"):
    optimizer.label_params(pack(PARAMS), train_kernels=True, frozen=frozenset({"conv2"}))


def test_two_updates_follow_nesterov_sgd_with_coupled_decay():
  packed = pack(PARAMS)
  labels = optimizer.label_params(packed, train_kernels=True, frozen=frozenset({"conv1"}))
  tx = optimizer.make_optimizer(labels, SGD)
  params = packed.arrays
  grads = {name: np.full_like(value, 0.5) for name, value in params.items()}
  state, momentum = tx.init(packed), dict.fromkeys(params, 0.0)
  rates = {"weight": 1.0, "norm": 1.0, "quant": 0.01, "frozen": 0.0}
  groups = labels.arrays
  for learning_rate in (0.2, 0.05):
    updates, state = tx.update(
      packed.replace(arrays=grads),
      state,
      packed,
      learning_rate=np.float32(learning_rate),
    )
    for name, update in updates.arrays.items():
      gradient = grads[name] + (0.1 * params[name] if groups[name] == "weight" else 0.0)
      momentum[name] = 0.9 * momentum[name] + gradient
      expected = -learning_rate * rates[groups[name]] * (gradient + 0.9 * momentum[name])
      np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)
