"""Small integers in bytes: the first code in the lowest bits, each as its two's complement."""

import jax.numpy as jnp
import numpy as np


def field_bits(bits: int) -> int:
  """The bits that a code of so many takes in a file: 2, 4 or 8, so that no code stands in two
  bytes.
  """
  return 2 if bits <= 2 else 4 if bits <= 4 else 8


def pack(codes: np.ndarray, width: int) -> np.ndarray:
  """Codes of any shape, in row-major order, as uint8 `[ceil(size * width / 8)]`; zeros fill the
  last byte.

  Args:
    codes: int8.
    width: 2, 4 or 8 bits each.
  """
  count = 8 // width
  flat = codes.reshape(-1).astype(np.uint8) & np.uint8(2**width - 1)
  rows = np.pad(flat, (0, -flat.size % count)).reshape(-1, count)
  shifts = (width * np.arange(count)).astype(np.uint8)
  return np.bitwise_or.reduce(rows << shifts, axis=1, dtype=np.uint8)


def unpack(packed: np.ndarray, width: int, shape: tuple[int, ...]) -> np.ndarray:
  """The inverse of `pack`: int8 of that shape. Works on numpy and, inside a program, on JAX arrays.

  Raises:
    ValueError: another number of bytes than the shape has.
  """
  size, count = int(np.prod(shape)), 8 // width
  if packed.shape != (-(-size // count),):
    raise ValueError(f"{packed.shape} bytes do not hold codes of shape {shape} at {width} bits")
  codes = packed.astype(np.int8)
  # Up, so that the code's sign stands in the byte's, then down again: the shift to the right
  # repeats it.
  columns = [
    (codes << np.int8(8 - width * (place + 1))) >> np.int8(8 - width) for place in range(count)
  ]
  stack = np.stack if isinstance(packed, np.ndarray) else jnp.stack
  return stack(columns, axis=-1).reshape(-1)[:size].reshape(shape)
