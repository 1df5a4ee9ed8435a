"""Codes in bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profit_jax.export.packing import field_bits, pack, unpack


def test_the_first_code_stands_in_the_lowest_bits():
  assert pack(np.int8([1, -1, 7, -7]), 4).tolist() == [0xF1, 0x97]
  assert pack(np.int8([1, -1, 0, 1, -1]), 2).tolist() == [0b01001101, 0b00000011]
  assert pack(np.int8([-127, 127]), 8).tolist() == [0x81, 0x7F]


def test_bits_of_a_field():
  assert [field_bits(bits) for bits in range(2, 9)] == [2, 4, 4, 8, 8, 8, 8]


@given(
  st.sampled_from([2, 4, 8]),
  st.lists(st.integers(1, 5), min_size=1, max_size=4),
  st.integers(0, 2**32 - 1),
)
def test_unpack_is_the_inverse(width, shape, seed):
  codes = (
    np.random.default_rng(seed)
    .integers(-(2 ** (width - 1)), 2 ** (width - 1), shape)
    .astype(np.int8)
  )
  packed = pack(codes, width)
  assert packed.nbytes == -(-codes.size * width // 8)
  np.testing.assert_array_equal(unpack(packed, width, tuple(shape)), codes)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_unpacking_inside_a_program_gives_the_same(width):
  codes = (
    np.random.default_rng(0)
    .integers(-(2 ** (width - 1)), 2 ** (width - 1), (3, 3, 5, 7))
    .astype(np.int8)
  )
  inside = jax.jit(lambda packed: unpack(packed, width, codes.shape))(
    jnp.asarray(pack(codes, width))
  )
  np.testing.assert_array_equal(inside, codes)
  assert inside.dtype == jnp.int8


def test_a_wrong_number_of_bytes_is_refused():
  with pytest.raises(ValueError, match=r"\(3,\) bytes"):
    unpack(np.zeros(3, np.uint8), 4, (4,))
