"""Integer files: how their codes differ, and that they compute in integers."""

import numpy as np
import pytest

from tests.export import integers
from tests.export.integers import FORMATS, compared, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
  ("low", "high", "interval"),
  [(0.0, 6.0, 9.0), (0.0, 6.0, 1.7), (-1.1, 1.6, 3.0), (0.5, 2.0, 3.0), (-2.0, -0.5, 3.0)],
)
def test_bounds_hold_where_a_quantizer_is_not_the_only_reader(folder, low, high, interval, name):
  found = compared(integers.bounded(low, high, interval), name, folder)
  # A step that is rounded to one of 8 bits, where one that is not bounded had 5 to 50 %.
  for quantizer, differences in found.differences.items():
    assert differences.max() <= 1, quantizer
    assert np.mean(differences > 0) < 0.01, quantizer  # seen: 0.0049


@pytest.mark.parametrize("name", FORMATS)
def test_a_mean_of_signed_values_is_clipped(folder, name):
  net = integers.signed_mean()
  codes = written(net, name, folder).codes["second"]
  assert (codes.min(), np.mean(codes == 0) > 0.2) == (0, True)
  assert compared(net, name, folder).differences["second"].max() <= 1
