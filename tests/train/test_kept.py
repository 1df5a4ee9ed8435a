"""Programs kept between runs: found again with the same results to the last bit, compiled where
anything differs, and only a cache.
"""

import dataclasses
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from profit_jax.data import load
from profit_jax.models import REGISTRY, build, init_variables
from profit_jax.plan import Program
from profit_jax.quant.levels import levels
from profit_jax.settings import parse
from profit_jax.train import aiwq, kept
from profit_jax.train.kept import Kept
from profit_jax.train.programs import Programs, make_mesh
from profit_jax.train.state import create_state
from tests.train.conftest import tiny_config


@pytest.fixture(autouse=True)
def jax_cache(tmp_path_factory):
  """JAX's own cache, empty; other tests have theirs again."""
  before, own = jax.config.jax_compilation_cache_dir, tmp_path_factory.mktemp("jax")
  jax.config.update("jax_compilation_cache_dir", str(own))
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()
  yield own
  jax.config.update("jax_compilation_cache_dir", before)
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()


@pytest.fixture
def made():
  """Counts compilations of a program that adds `number`."""
  calls = []

  def make(number):
    def compile_it():
      calls.append(number)
      # Donated, as a training step's state is.
      return jax.jit(lambda x: {"sum": x + number}, donate_argnums=0).lower(jnp.zeros(3)).compile()

    return compile_it

  make.calls = calls
  return make


def test_the_same_is_found_and_whatever_differs_is_not(tmp_path, made, monkeypatch):
  plan = {"sampling_every": 1, "bn_epochs": 5}

  def get(config=None, name="a", **more):
    config = {"seed": 0, "plan": plan} | (config or {})
    return Kept(tmp_path, config, jax.devices()[:1], **more).get(name, made(len(made.calls)))

  first = get()
  np.testing.assert_array_equal(get()(jnp.ones(3))["sum"], first(jnp.ones(3))["sum"])
  # No part of programs.
  get({"seed": 1, "plan": {**plan, "bn_epochs": 6}, "recovery": {"retries": 3}})
  assert made.calls == [0]
  get({"plan": {**plan, "sampling_every": 2}})
  get({"width": 2})
  get(name="b")
  get(num_classes=3)
  with monkeypatch.context() as patch:
    patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    get()
  jax.config.update("jax_default_matmul_precision", "highest")
  try:
    get()
  finally:
    jax.config.update("jax_default_matmul_precision", None)
  get()
  # Another source.
  get(source=pathlib.Path(__file__).parent)
  assert made.calls == list(range(8))


def test_damage_and_a_directory_that_cannot_be_written_cost_no_more_than_a_compilation(
  tmp_path, made
):
  Kept(tmp_path / "here", {}, jax.devices()[:1]).get("a", made(1))
  (file,) = (tmp_path / "here").iterdir()
  for content in (file.read_bytes()[:-9], b""):
    file.write_bytes(content)
    assert (
      Kept(tmp_path / "here", {}, jax.devices()[:1]).get("a", made(1))(jnp.ones(3))["sum"][0] == 2
    )
  assert made.calls == [1, 1, 1]
  (tmp_path / "file").write_text("")
  assert (
    Kept(tmp_path / "file" / "below", {}, jax.devices()[:1]).get("a", made(1))(jnp.ones(3))["sum"][
      0
    ]
    == 2
  )


def test_what_nobody_has_used_for_a_month_is_removed(tmp_path, made):
  programs = Kept(tmp_path, {}, jax.devices()[:1])
  for name in "ab":
    programs.get(name, made(1))
  files = set(tmp_path.iterdir())
  for file in files:
    os.utime(file, (time.time() - 31 * 24 * 3600,) * 2)
  programs.get("a", made(1))  # is used
  programs.get("c", made(1))
  assert len(files & set(tmp_path.iterdir())) == 1
  programs.get("a", made(1))
  assert made.calls == [1, 1, 1]


class Noting:
  """Settings, or a section of them, that note which of their fields are read."""

  def __init__(self, settings, read, section=""):
    self._settings, self._read, self._section = settings, read, section

  def __getattr__(self, name):
    value = getattr(self._settings, name)
    if dataclasses.is_dataclass(value):
      return Noting(value, self._read, f"{name}.")
    self._read.add(f"{self._section}{name}")
    return value


PROGRAM = Program(
  quantized_weights=True,
  quantized_acts=True,
  train_kernels=True,
  sampling=True,
  frozen_fraction=0.0,
  distill=False,
)
FROZEN = frozenset({"conv1"})


def outputs(programs, variables):
  """What programs of every kind compute from the same arguments, on the host."""
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (128, 16, 16, 3), dtype=np.uint8),
    "label": rng.integers(0, 10, 128, dtype=np.int32),
    "mask": np.ones(128, bool),
  }
  batch, key, given = (
    programs.split(batch),
    programs.replicate(jax.random.key(0)),
    programs.replicate(variables),
  )
  weights = programs.calibrate_weights()(given["params"], levels(4, 4).weight)
  acts = programs.calibrate_acts()(given, batch["image"], key, levels(4, 4).act)
  scores = programs.eval_step(True, True)(given, batch, levels(4, 4))
  state = programs.fresh_optimizer(
    programs.replicate(create_state(variables, ema=True)), True, FROZEN
  )
  sampling = programs.replicate(aiwq.start(variables["params"]))
  step, shown = programs.train_step(PROGRAM, FROZEN), []
  for _ in range(2):  # each takes what the one before has given, in memory that was donated
    state, metrics, sampling = step(
      state, batch, levels(4, 4), np.float32(0.01), key, None, sampling, None
    )
    shown.append(jax.device_get(metrics))
  return jax.device_get((weights, acts, scores, state, sampling, shown))


def test_kept_programs_compute_the_same_also_where_jax_had_cached_them(
  tiny, tmp_path, jax_cache, monkeypatch
):
  settings = parse(tiny_config(**{"model.dropout": 0.1}), REGISTRY)
  facts, mesh, read = load(settings).facts, make_mesh(settings), set()
  model = build(settings.model, facts.num_classes)
  variables = init_variables(model, jax.random.key(1), settings.data.image_size)

  def run(keep_in):
    programs = Programs(Noting(settings, read), facts, model, None, mesh, keep_in=keep_in)
    try:
      return outputs(programs, variables)
    finally:
      programs.close()

  compiled = run(None)
  # Given from there and serialized again, they would load and not run.
  assert [
    len(list(jax_cache.glob(f"{name}-*-cache"))) for name in ("jit_step", "jit_calibrate")
  ] == [2, 1]
  again = run(tmp_path / "kept")
  assert len(list((tmp_path / "kept").iterdir())) == 4
  with monkeypatch.context() as patch:
    patch.setattr(jax, "jit", None)  # nothing is traced
    loaded = run(tmp_path / "kept")
  for other in (again, loaded):
    jax.tree.map(np.testing.assert_array_equal, compiled, other)
  # No program is made of a setting that its name leaves out, and what is left out exists.
  config = settings.to_dict()
  assert read - {"to_dict"} <= set(kept.deciding(config))
  fields = {f"{s}.{name}" for s, part in config.items() if isinstance(part, dict) for name in part}
  assert fields | set(config) >= kept.ELSEWHERE
