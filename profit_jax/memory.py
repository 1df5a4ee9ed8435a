"""Memory that was freed goes back to the operating system."""

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
  try:
    return ctypes.CDLL(None).malloc_trim
  except (OSError, TypeError, AttributeError):  # not Linux, or another C library than glibc
    return None


def trim() -> None:
  """Gives freed memory back, where the C library is glibc; elsewhere does nothing.

  XLA compiles on many threads. glibc gives each thread an arena of its own, and keeps what is freed
  in it for that thread's next allocation.
  """
  function = _malloc_trim()
  if function is not None:
    function(0)
