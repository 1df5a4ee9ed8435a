"""Programs are compiled one at a time in the order of the requests, and held no longer than the
run needs them.
"""

import concurrent.futures
import gc
import itertools
import threading
import time
import weakref

import jax
import pytest

from profit_jax.config import parse
from profit_jax.data.digits import INFO
from profit_jax.models import REGISTRY
from profit_jax.train.mesh import make_mesh
from profit_jax.train.programs import Programs
from tests.specs import spec_of
from tests.train.shared import tiny_config
from tests.train.tiny import TinyNet

SIZE = 40  # of a batch of evaluation; no other test compiles these programs


@pytest.fixture
def programs(tiny):
  settings = parse(tiny_config(**{"train.eval_batch_size": SIZE}), REGISTRY)
  made = Programs(
    settings, INFO, spec_of(TinyNet(), 16), spec_of(TinyNet(), 16), make_mesh(settings)
  )
  yield made
  made.close()


def test_xla_has_one_program_at_a_time(programs):
  spans, begin = [], time.time()

  def note(event, start, end, **_):
    # Programs of tests before this one may still be compiled.
    if event == "/jax/core/compile/backend_compile_duration" and start >= begin:
      spans.append((start, end))

  jax.monitoring.register_event_time_span_listener(note)
  try:
    programs.prefetch((), ["teacher", "student"])
    programs.eval_step(False, False, "student")
    programs.eval_step(False, False, "teacher")
  finally:
    jax.monitoring.unregister_event_time_span_listener(note)
  spans.sort()
  assert len(spans) >= 2
  assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


class Evaluation:
  """In place of an evaluation that is traced; notes when it is compiled."""

  def __init__(self, who, compiled, may_end):
    self._who, self._compiled, self._may_end = who, compiled, may_end

  def lower(self):
    return self

  def compile(self, options):
    self._compiled.append(self._who)
    assert self._may_end.wait(60)
    return self._who


def test_programs_are_compiled_in_the_order_of_the_requests(programs, monkeypatch):
  order, may_end = [], threading.Event()
  may_end.set()

  def trace(quantized_weights, quantized_acts, who):
    time.sleep(0.2 if who == "teacher" else 0)
    return Evaluation(who, order, may_end)

  monkeypatch.setattr(programs.tracer, "eval_step", trace)
  programs.prefetch((), ["teacher", "student"])
  assert programs.eval_step(False, False, "student") == "student"
  assert order == ["teacher", "student"]


def test_what_waits_is_not_compiled_once_all_is_closed(programs, monkeypatch):
  compiled, may_end = [], threading.Event()
  monkeypatch.setattr(
    programs.tracer, "eval_step", lambda *arguments: Evaluation(arguments[2], compiled, may_end)
  )
  programs.prefetch((), ["teacher", "student"])
  end = time.monotonic() + 60
  while not compiled:
    assert time.monotonic() < end
    time.sleep(0.01)
  programs.close()
  may_end.set()
  with pytest.raises(concurrent.futures.CancelledError):
    programs.eval_step(False, False, "student")
  assert compiled == ["teacher"]


def test_what_no_later_phase_needs_is_dropped(programs):
  programs.prefetch((), ["student", "teacher"])
  held = {who: weakref.ref(programs.eval_step(False, False, who)) for who in ("student", "teacher")}
  programs.prefetch((), ["student"])
  gc.collect()
  assert held["student"]() is not None
  assert held["teacher"]() is None
