"""The format `litert_packed`: as `litert_file.py`, but kernels of 3 and 4 bits are INT4, of 2 bits
INT2.

A file is half as large at 4 bits and a third at 2, and slower: the XNNPACK delegate dequantizes no
kernels of fewer than 8 bits.
"""

import os

from profit_jax.export import litert_file
from profit_jax.export.net import Net

open_file = litert_file.open_file


def write(net: Net, path: str | os.PathLike) -> None:
  """Writes the model."""
  litert_file.write(net, path, packed=True)
