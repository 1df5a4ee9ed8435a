"""Bit widths of phases and of single layers."""

import jax
import numpy as np
import pytest

from profit_jax.quant import Bits
from profit_jax.quant.bits import LayerBits

OWN = (
  LayerBits("deep", "weight", 6),
  LayerBits("deep_quant", "act", 8),
  LayerBits("stem", "weight", None),
)


def test_a_layer_has_the_larger_of_its_own_bits_and_the_phases():
  given = Bits(own=OWN)
  assert dict(given.at(8, 8).layers) == {"deep": 8, "deep_quant": 8, "stem": None}
  assert dict(given.at(4, 5).layers) == {"deep": 6, "deep_quant": 8, "stem": None}
  assert given.at(4, 5).kernel_qmax("deep") == 31
  assert given.at(4, 5).act_qmax("unsigned", "deep_quant") == 255
  assert given.at(4, 5).act_qmax("symmetric", "deep_quant") == 127
  assert given.at(4, 5).kernel_qmax("other") == 7
  assert given.at(4, 5).kernel_qmax("stem") is None


def test_full_precision_has_no_bits_of_single_layers():
  given = Bits(own=OWN)
  assert not given.at(None, None).layers
  assert dict(given.at(None, 4).layers) == {"deep_quant": 8}
  assert given.at(None, 4).kernel_qmax("deep") is None
  assert not given.at(None, 4).never("stem")
  assert given.at(4, 4).never("stem")


def test_falling_bits_are_one_program():
  @jax.jit
  def widths(bits):
    return bits.kernel_qmax("deep"), bits.kernel_qmax("other"), bits.act_qmax("unsigned", "x")

  given = Bits(own=OWN)
  found = {width: np.array(widths(given.at(width, width))) for width in (8, 5, 4)}
  assert widths._cache_size() == 1
  np.testing.assert_array_equal(found[8], [127, 127, 255])
  np.testing.assert_array_equal(found[5], [31, 15, 31])
  np.testing.assert_array_equal(found[4], [31, 7, 15])


def test_traced_bits_combine_too():
  deep = jax.jit(lambda width: Bits(own=OWN).at(width, None).kernel_qmax("deep"))
  assert [float(deep(np.int32(width))) for width in (8, 4)] == [127, 31]


@pytest.mark.parametrize("width", [1, 9])
def test_a_width_of_a_layer_is_2_to_8(width):
  with pytest.raises(ValueError, match=f"got conv={width}"):
    Bits(4, 4, layers={"conv": width})
