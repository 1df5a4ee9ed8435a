"""First intervals."""

import jax.numpy as jnp
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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_fitted_interval_is_the_nearest_of_its_grid(bits):
  kernel = np.float32(np.random.default_rng(bits).normal(size=(3, 3, 8, 16)))
  steps = np.float32(2 ** (bits - 1) - 1)

  def error(a, c):
    return np.sum((kernel - c * np.rint(np.clip(kernel / a, -1, 1) * steps) / steps) ** 2)

  a, c = map(float, calibration.fitted_interval(jnp.asarray(kernel), jnp.asarray(steps)))
  largest = np.abs(kernel).max()
  for share in np.arange(1, 41) / 40:
    q = np.rint(np.clip(kernel / (share * largest), -1, 1) * steps) / steps
    best_c = np.sum(kernel * q) / np.sum(q * q)
    assert error(a, c) <= error(share * largest, best_c) * (1 + 1e-5)  # in float32
  assert error(a, c) < error(0.9 * largest, 0.9 * largest)


def test_a_kernel_that_is_on_the_grid_is_fitted_exactly():
  kernel = np.float32(0.3) * np.random.default_rng(0).choice(
    np.float32([-1, 0, 1]), size=(3, 3, 4, 8)
  )
  a, c = calibration.fitted_interval(jnp.asarray(kernel), jnp.float32(1))
  np.testing.assert_allclose(c, 0.3, rtol=1e-5)  # a sum in float32
  quantized = float(c) * np.rint(np.clip(kernel / float(a), -1, 1))
  np.testing.assert_allclose(quantized, kernel, rtol=1e-5)


def test_a_kernel_of_zeros_has_the_smallest_interval():
  assert [float(v) for v in calibration.fitted_interval(jnp.zeros((3, 3)), jnp.float32(1))] == [
    np.float32(1e-3)
  ] * 2
