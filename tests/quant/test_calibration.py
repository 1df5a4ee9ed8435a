"""First intervals."""

import numpy as np
import pytest

from profit_jax.quant import calibration


@pytest.mark.parametrize("kind", ["symmetric", "unsigned", "hswish"])
@pytest.mark.parametrize("size", [1, 19, 20, 21, 997])
def test_act_interval_is_the_95th_percentile_of_the_positive_part(kind, size):
  x = np.random.default_rng(size).normal(0.5, 1, size).astype(np.float32)
  seen = {"symmetric": np.abs(x), "unsigned": x, "hswish": x + np.float32(3 / 8)}[kind]
  positive = np.sort(seen[seen > 0])
  expected = positive[int(len(positive) * 0.95)] if len(positive) else 1e-3
  np.testing.assert_allclose(calibration.act_interval(x, kind), expected, rtol=1e-6)


def test_act_interval_without_a_positive_element():
  assert calibration.act_interval(np.zeros(8, np.float32), "unsigned") == np.float32(1e-3)


def test_act_interval_is_bounded_for_relu6():
  x = np.full(40, 9.0, np.float32)
  assert calibration.act_interval(x, "unsigned", 6.0) == 6.0
  assert calibration.act_interval(x, "unsigned") == 9.0


def test_weight_interval():
  assert calibration.weight_interval(np.array([[-2.0, 1.0]], np.float32)) == np.float32(1.8)
  assert calibration.weight_interval(np.zeros((3, 3), np.float32)) == np.float32(1e-3)
