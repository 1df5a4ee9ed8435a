"""First intervals."""

import jax
import numpy as np
import pytest

from profit_jax.quant import calibration

act_interval = jax.jit(calibration.act_interval, static_argnums=(1, 2))
fitted_interval = jax.jit(calibration.fitted_interval)


@pytest.mark.parametrize("kind", ["symmetric", "unsigned", "hswish"])
def test_act_interval_is_the_95th_percentile_of_the_positive_part(kind):
  offset = np.float32({"hswish": 3 / 8}.get(kind, 0.0))
  rng = np.random.default_rng(0)
  # 19/20 of 19, 20 and 21 lie on both sides of an integer.
  for count in (1, 19, 20, 21, 500, 997):
    positive = (0.01 + rng.gamma(2.0, 0.5, count)).astype(np.float32)
    lowest = 0.0 if kind == "symmetric" else -1.0
    others = rng.uniform(lowest, 0.0, 997 - count).astype(np.float32)
    x = np.concatenate([positive, others]) - offset
    if kind == "symmetric":
      x *= rng.choice(np.float32([-1, 1]), 997)
    x = rng.permutation(x)
    seen = np.abs(x) if kind == "symmetric" else x + offset
    expected = np.sort(seen[seen > 0])[int(count * 0.95)]
    assert np.sum(seen > 0) == count
    np.testing.assert_allclose(act_interval(x, kind), expected, rtol=1e-6, err_msg=f"{count}")


def test_act_interval_without_a_positive_element():
  assert act_interval(np.zeros(40, np.float32), "unsigned") == np.float32(1e-3)


def test_act_interval_is_bounded_for_relu6():
  x = np.full(40, 9.0, np.float32)
  assert act_interval(x, "unsigned", 6.0) == 6.0
  assert act_interval(x, "unsigned") == 9.0


def test_weight_interval():
  assert calibration.weight_interval(np.array([[-2.0, 1.0]], np.float32)) == np.float32(1.8)
  assert calibration.weight_interval(np.zeros((1, 2), np.float32)) == np.float32(1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_fitted_interval_is_the_nearest_of_its_grid(bits):
  kernel = np.float32(np.random.default_rng(bits).normal(size=(3, 3, 8, 16)))
  steps = np.float32(2 ** (bits - 1) - 1)

  def error(a, c):
    return np.sum((kernel - c * np.rint(np.clip(kernel / a, -1, 1) * steps) / steps) ** 2)

  a, c = map(float, fitted_interval(kernel, steps))
  largest = np.abs(kernel).max()
  for share in np.arange(1, 41) / 40:
    q = np.rint(np.clip(kernel / (share * largest), -1, 1) * steps) / steps
    best_c = np.sum(kernel * q) / np.sum(q * q)
    assert error(a, c) <= error(share * largest, best_c) * (1 + 1e-5)  # in float32
  assert error(a, c) < error(0.9 * largest, 0.9 * largest)


def test_a_kernel_that_is_on_the_grid_is_fitted_exactly():
  kernel = np.float32(0.3) * np.random.default_rng(0).choice(
    np.float32([-1, 0, 1]), size=(3, 3, 8, 16)
  )
  a, c = fitted_interval(kernel, np.float32(1))
  np.testing.assert_allclose(c, 0.3, rtol=1e-5)  # a sum in float32
  quantized = float(c) * np.rint(np.clip(kernel / float(a), -1, 1))
  np.testing.assert_allclose(quantized, kernel, rtol=1e-5)


def test_a_kernel_of_zeros_has_the_smallest_interval():
  found = fitted_interval(np.zeros((3, 3, 8, 16), np.float32), np.float32(1))
  assert [float(value) for value in found] == [np.float32(1e-3)] * 2
