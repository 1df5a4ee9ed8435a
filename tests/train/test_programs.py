"""Programs are compiled one at a time, and held no longer than the run needs them."""

import gc
import weakref

import jax
import pytest

from profit_jax.data.digits import FACTS
from profit_jax.models import REGISTRY
from profit_jax.settings import parse
from profit_jax.train.programs import Programs, make_mesh
from tests.train.conftest import tiny_config
from tests.train.tiny import TinyNet

SIZE = 40  # of a batch of evaluation; no other test compiles these programs


@pytest.fixture
def programs(tiny):
  settings = parse(tiny_config(**{"train.eval_batch_size": SIZE}), REGISTRY)
  made = Programs(settings, FACTS, TinyNet(), TinyNet(), make_mesh(settings))
  yield made
  made.close()


def test_xla_has_one_program_at_a_time(programs):
  spans = []

  def note(event, start, end, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      spans.append((start, end))

  jax.monitoring.register_event_time_span_listener(note)
  try:
    programs.prefetch((), lambda phase: None, ["teacher", "student"])
    programs.eval_step(False, False, "student")
    programs.eval_step(False, False, "teacher")
  finally:
    jax.monitoring.unregister_event_time_span_listener(note)
  (_, first_end), (second_start, _) = sorted(spans)
  assert first_end <= second_start


def test_what_no_later_phase_needs_is_dropped(programs):
  programs.prefetch((), lambda phase: None, ["student", "teacher"])
  held = {who: weakref.ref(programs.eval_step(False, False, who)) for who in ("student", "teacher")}
  programs.prefetch((), lambda phase: None, ["student"])
  gc.collect()
  assert held["student"]() is not None
  assert held["teacher"]() is None
