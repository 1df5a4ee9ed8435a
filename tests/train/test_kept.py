"""Programs kept between runs: found again, made anew where anything differs, and no more than a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.train import kept
from profit_jax.train.kept import Kept


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
  def get(config=None, name="a", **more):
    return Kept(tmp_path, {"seed": 0, "width": 1} | (config or {}), jax.devices()[:1], **more).get(
      name, made(len(made.calls))
    )

  first = get()
  np.testing.assert_array_equal(get()(jnp.ones(3))["sum"], first(jnp.ones(3))["sum"])
  get({"seed": 1})  # an argument of programs, no part of them
  assert made.calls == [0]
  get({"width": 2})
  get(name="b")
  get(model="wide")
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
  get()
  monkeypatch.setattr(kept, "__file__", str(tmp_path / "other" / "train" / "kept.py"))  # other source
  get()
  assert made.calls == [0, 1, 2, 3, 4, 5]


def test_damage_and_a_directory_that_cannot_be_written_cost_no_more_than_a_compilation(tmp_path, made):
  Kept(tmp_path / "here", {}, jax.devices()[:1]).get("a", made(1))
  (file,) = (tmp_path / "here").iterdir()
  for content in (file.read_bytes()[:-9], b""):
    file.write_bytes(content)
    assert Kept(tmp_path / "here", {}, jax.devices()[:1]).get("a", made(1))(jnp.ones(3))["sum"][0] == 2
  assert made.calls == [1, 1, 1]
  (tmp_path / "file").write_text("")
  assert Kept(tmp_path / "file" / "below", {}, jax.devices()[:1]).get("a", made(1))(jnp.ones(3))["sum"][0] == 2
