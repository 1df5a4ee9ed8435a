"""Signals are heard where a run waits."""

import os
import signal
import threading

import pytest

from profit_jax.train import interrupt
from profit_jax.train.compiler import Compiler


class Slow:
  """Stands for a traced program whose compilation lasts."""

  def __init__(self):
    self.may_end = threading.Event()

  def lower(self):
    self.may_end.wait()
    return self

  def compile(self, options):
    return lambda: None


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_during_compilation_stops_the_run(asked):
  program = Slow()
  compiler = Compiler(lambda key: program)
  timer = threading.Timer(0.1, os.kill, (os.getpid(), asked))
  timer.start()
  try:
    with interrupt.graceful(processes=1), pytest.raises(interrupt.Stopped) as stopped:
      compiler.get("program")
  finally:
    timer.join()
    program.may_end.set()
    compiler.close()
  assert (stopped.value.asked, stopped.value.code) == (asked, 128 + asked)


def test_a_signal_that_is_ignored_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
  try:
    with interrupt.graceful(processes=1):
      os.kill(os.getpid(), signal.SIGHUP)
      interrupt.check()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)
