"""Integer biases and scales: where they are called exact, every sum gets its exact code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profit_jax.export.integer import thresholds

LARGEST = 2_000  # of the sums that are tried
# What kernels of 4, 3, 2 and 8 bits are multiplied by.
FACTORS = (18, 42, 127, 1)


def staircase(ends, values):
  """The code of each value, counted from 0, and whether the value is so near to an end that either
  of two codes is right.
  """
  places = values[..., None] - ends
  return np.count_nonzero(places > 0, axis=-1), np.abs(places).min(-1) < 1e-9


def computed(found, ends, sums, factor):
  """The codes that a runtime computes: float32, rounded half to even, `[F, N]`."""
  sums = np.float32(factor * sums + found.bias[:, None].astype(np.int64))
  rounded = np.round(sums * np.float32(found.scale)[:, None])
  return np.clip(rounded - (ends[0] - 0.5), 0, len(ends))


def fitted(scale, start, factor, codes, largest, zero=0):
  """Channels in which a sum of 1 is scale `scale` codes and the sum 0 has the value `start`."""
  ends = np.arange(codes) + 0.5 + zero
  scale, start = np.float64(scale), np.float64(start)
  largest = np.full(len(scale), float(largest))
  return ends, thresholds.fitted(ends, scale / factor, start / scale * factor, factor, largest)


@given(
  scale=st.floats(1e-4, 4.0),
  start=st.floats(-60.0, 60.0),
  factor=st.sampled_from(FACTORS),
  codes=st.sampled_from([3, 7, 15]),
  zero=st.sampled_from([0, -7, 112]),
  largest=st.integers(1, LARGEST),
)
def test_an_exact_channel_gives_every_sum_its_exact_code(
  scale, start, factor, codes, zero, largest
):
  ends, found = fitted([scale], [start], factor, codes, largest, zero)
  assert np.array_equal(found.bias, np.round(found.bias))
  assert np.abs(found.bias) + factor * largest < 2**31
  sums = np.arange(-largest, largest + 1)
  expected, near = staircase(ends, scale * sums + start)
  differ = np.abs(computed(found, ends, sums, factor)[0] - expected)[~near]
  if found.exact[0]:
    assert not differ.any()
  else:  # a neighbouring sum has that code
    assert (differ <= np.ceil(scale)).all()


@pytest.mark.parametrize(("factor", "codes"), [(18, 15), (42, 7), (127, 3)])
def test_channels_of_few_bits_are_exact(factor, codes):
  rng = np.random.default_rng(0)
  scale = 1.0 / rng.uniform(2.0, 200.0, 40)
  start = rng.uniform(-codes, codes, 40)
  ends, found = fitted(scale, start, factor, codes, LARGEST)
  assert found.exact.all()  # seen: every one of 2,700
  # Without the choice of a bias, a third of them would have codes that differ.
  sums = np.arange(-LARGEST, LARGEST + 1)
  expected, _ = staircase(ends, scale[:, None] * sums + start[:, None])
  plain = found._replace(scale=scale, bias=np.round(start / scale))
  differ = (computed(plain, ends, sums, 1) != expected).any(1)
  assert differ.mean() > 0.3


def test_codes_that_no_sum_reaches_do_not_matter():
  # Of 15 codes two are reached; a bias is found that serves them, not all.
  rng = np.random.default_rng(0)
  scale, start = 1.0 / rng.uniform(30.0, 60.0, 300), rng.uniform(1.2, 1.8, 300)
  near, far = (fitted(scale, start, 1, 15, largest)[1] for largest in (25, LARGEST))
  assert near.exact.mean() > 0.95 > 0.5 > far.exact.mean()
  # None at all: the rounded bias, and the scale as it was.
  _, idle = fitted([0.01], [40.0], 18, 15, 100)
  assert (idle.scale, idle.bias) == (0.01 / 18, np.round(40.0 / 0.01 * 18))


def test_a_bias_beyond_float32_is_not_called_exact():
  _, found = fitted([1e-6], [7.3], 18, 15, 1e6)
  assert abs(found.bias[0] - 7.3e6 * 18) < 18
  assert not found.exact[0]
