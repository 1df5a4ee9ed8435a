"""The grids of 8-bit tensors."""

import math

import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

from profit_jax.export.integer import lower
from profit_jax.export.integer.net import HIGH, LOW

ENDS = st.floats(-1e4, 1e4)
PLACES = np.linspace(-0.02, 1.02, 2001)


def ordered(low, high):
  assume(high - low > 1e-3)
  return low, high


def on(grid, values):
  """Values rounded to a grid, without its ends."""
  return grid.scale * np.round(values / grid.scale)


@given(low=ENDS, high=ENDS)
def test_a_grid_holds_its_range_and_zero(low, high):
  low, high = ordered(low, high)
  grid = lower._grid(low, high)
  assert isinstance(grid.zero, int)
  assert LOW <= grid.zero <= HIGH
  ends = grid.scale * (np.array([LOW, HIGH]) - grid.zero)
  # Half a step at each end is within its rounding.
  assert ends[0] - 0.501 * grid.scale <= min(low, 0.0)
  assert ends[1] + 0.501 * grid.scale >= max(high, 0.0)
  assert grid.scale <= (max(high, 0.0) - min(low, 0.0)) / 254 * (1 + 1e-9)


@given(low=ENDS, high=ENDS, step=st.floats(1e-3, 1e3))
@example(low=0.0, high=6.0, step=0.1)
@example(low=-1.0, high=1.0, step=2.0 / 15)
def test_rounding_twice_is_rounding_once(low, high, step):
  low, high = ordered(low, high)
  grid = lower._grid(low, high, step=step)
  fractions = step / grid.scale
  plain = (max(high, 0.0) - min(low, 0.0)) / 255
  if step / plain < 5.0:  # so coarse a grid would take more of the range than it is worth
    return
  assert math.isclose(fractions, round(fractions), rel_tol=1e-9)
  assert round(fractions) % 2 == 1
  assert plain <= grid.scale * (1 + 1e-9) <= plain / 0.5
  values = low + PLACES * (high - low)
  near = np.abs(values / step - np.floor(values / step) - 0.5) < 1e-9
  once, twice = np.round(values / step), np.round(on(grid, values) / step)
  assert np.array_equal(once[~near], twice[~near])


@given(low=ENDS, high=ENDS, step=st.none() | st.floats(1e-3, 1e3))
@example(low=-3.0, high=4.0, step=None)
@example(low=0.0, high=6.0, step=0.4)
@example(low=-0.003, high=1.0, step=None)
def test_the_end_of_a_bound_is_int8s(low, high, step):
  low, high = ordered(low, high)
  for bounds in ((low, np.inf), (-np.inf, high), (low, high)):
    grid = lower._grid(low, high, bounds, step)
    # One bound is at an end, to half a step; the other one is an operator's where it is not.
    places = [bound / grid.scale + grid.zero for bound in bounds]
    if low <= 0.0 and bounds[0] == low:
      assert abs(places[0] - LOW) <= 0.5 + 1e-6
    elif high >= 0.0 and bounds[1] == high and low <= 0.0:
      assert abs(places[1] - HIGH) <= 0.5 + 1e-6


@given(most=st.floats(0.0, 300.0), margin=st.floats(-2.0, 2.0))
def test_a_fraction_puts_ends_between_steps(most, margin):
  number = lower._fraction(most, margin)
  assert number <= most
  if number:
    assert number >= max(3, 0.6 * most)
    ends = (np.arange(-8, 9) + 0.5 - margin) * number - 0.5
    # Ends are the same distance from the middle between two steps.
    away = np.abs(ends - np.round(ends))
    if margin == round(margin):
      assert away.max() < 1e-6
    assert away.min() <= 0.21


def test_a_range_of_nothing_has_a_grid():
  assert lower._grid(0.0, 0.0).scale > 0.0
  assert lower._grid(0.0, 0.0, (0.0, 6.0), 0.4).scale > 0.0
