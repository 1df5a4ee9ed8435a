"""Signals that ask a run to stop: it finishes the step under way, saves, and ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from profit_jax.config import ProfitError

PREEMPTED = signal.SIGTERM  # what clusters send before they take a machine away
_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_requested: signal.Signals | None = None


class Stopped(ProfitError):
  """Raised after a graceful stop on SIGINT, SIGTERM or SIGHUP; the exit code is what shells give a
  program that a signal ended.
  """

  label, everywhere = "stopped", True

  def __init__(self, asked: signal.Signals, where: str = ""):
    """Args: asked: the signal; where: the run stands, and how it resumes."""
    super().__init__(f"by {asked.name} {where}.")
    self.asked, self.code = asked, 128 + asked

  def told(self, where: str) -> "Stopped":
    """The same, with words on where the run stands."""
    return Stopped(self.asked, where)


@contextlib.contextmanager
def graceful(processes: int | None = None) -> Iterator[None]:
  """Within, SIGTERM (a preemption, a batch system), SIGINT (Ctrl-C) and SIGHUP (a terminal that is
  closed) make `check` raise; those that are ignored, as SIGHUP under `nohup`, do not.

  A second Ctrl-C ends at once; batch systems may send SIGTERM twice and mean the same. Of several
  processes, JAX listens for SIGTERM itself and lets all of them agree on a step; see
  `multihost_utils.reached_preemption_sync_point`. Nothing changes outside the main thread, where
  Python allows no handlers.

  Args:
    processes: of the run; None asks JAX, which takes the devices.
  """
  global _requested
  processes = jax.process_count() if processes is None else processes
  if processes > 1 or threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {asked: signal.getsignal(asked) for asked in _HEARD}
  before = {asked: old for asked, old in before.items() if old != signal.SIG_IGN}

  def handle(number, _):
    global _requested
    _requested = signal.Signals(number)
    if signal.SIGINT in before:
      signal.signal(signal.SIGINT, before[signal.SIGINT])

  for asked in before:
    signal.signal(asked, handle)
  try:
    yield
  finally:
    for asked, handler in before.items():
      signal.signal(asked, handler)
    _requested = None


def check() -> None:
  """Raises Stopped if a signal has come. Whoever calls it must be where a run can be saved."""
  if _requested is not None:
    raise Stopped(_requested)


class StopPoints:
  """Counts the places where a run can stop, so that several processes stop at the same one."""

  def __init__(self):
    self._count = 0

  def check(self) -> None:
    """Raises Stopped if a signal has come, to any of the processes."""
    check()
    # All processes have come here as often, and JAX wants numbers that count up from 1.
    self._count += 1
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._count):
      raise Stopped(PREEMPTED)
