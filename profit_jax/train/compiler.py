"""Compiles programs in the background, before they are needed."""

import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax

from profit_jax import memory
from profit_jax.train import interrupt


class Compiler:
  """Compiles programs by key on background threads, in the order of the requests.

  Attributes:
    waited_seconds: how long callers have waited for compilation, in all.
  """

  def __init__(
    self, trace: Callable[[Any], jax.stages.Traced], options: dict[str, Any] | None = None
  ):
    """Args:
    trace: traces the program of a key.
    options: of the compiler, for all programs.
    """
    self._trace, self._options = trace, options
    self.waited_seconds = 0.0
    # While XLA compiles a program, Python traces the next. XLA gets them one at a time, because it
    # takes 1.2 GB for a small MobileNet's step; and in the order of the requests, because the
    # processes of a run may tune kernels together.
    self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")
    self._turns = _Turns()
    self._closed = False
    self._made: dict[Hashable, concurrent.futures.Future] = {}

  def close(self) -> None:
    """Drops what is not being compiled yet."""
    self._closed = True
    self._pool.shutdown(wait=False, cancel_futures=True)

  def prefetch(self, keys: Iterable[Hashable]) -> None:
    """Starts compiling the programs of these keys, in order, and drops all others."""
    needed = dict.fromkeys(keys)
    for key in self._made.keys() - needed.keys():
      dropped = self._made.pop(key)
      # Of several processes another may be compiling it already, and wait for this one.
      if jax.process_count() == 1:
        dropped.cancel()
    for key in needed:
      self._request(key)

  def get(self, key: Hashable) -> Callable[..., Any]:
    """The compiled program of a key; waits for it, and requests it where `prefetch` has not.

    Raises:
      Stopped: by a signal.
    """
    start, request = time.perf_counter(), self._request(key)
    # Python runs signal handlers in this thread only, and compilation can take minutes.
    while not concurrent.futures.wait([request], timeout=0.5).done:
      interrupt.check()
    compiled = request.result()
    self.waited_seconds += time.perf_counter() - start
    return compiled

  def _request(self, key: Hashable) -> concurrent.futures.Future:
    if key not in self._made:
      turn = self._turns.take()
      future = self._pool.submit(self._make, key, turn)
      future.add_done_callback(lambda _: self._turns.end(turn))  # also where it is cancelled
      self._made[key] = future
    return self._made[key]

  def _make(self, key: Hashable, turn: int) -> Callable[..., Any]:
    """A compiled program; the memory that this took goes back to the system."""
    try:
      lowered = self._trace(key).lower()
      self._turns.wait(turn)
      if self._closed:
        raise concurrent.futures.CancelledError
      compiled = lowered.compile(self._options)
      memory.trim()  # before the next is compiled
      self._turns.end(turn)
      return compiled
    finally:
      memory.trim()


class _Turns:
  """One thread at a time, in the order in which the turns were taken."""

  def __init__(self):
    self._changed = threading.Condition()
    self._taken: list[int] = []
    self._numbers = itertools.count()

  def take(self) -> int:
    """A turn after all others."""
    with self._changed:
      self._taken.append(next(self._numbers))
      return self._taken[-1]

  def wait(self, turn: int) -> None:
    """Returns when all earlier turns have ended."""
    with self._changed:
      self._changed.wait_for(lambda: self._taken[0] == turn)

  def end(self, turn: int) -> None:
    """Ends a turn, whether it has come or not; once more does nothing."""
    with self._changed:
      if turn in self._taken:
        self._taken.remove(turn)
        self._changed.notify_all()
