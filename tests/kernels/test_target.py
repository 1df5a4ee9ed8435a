"""What a program is traced and compiled for."""

import jax
import pytest

from profit_jax.kernels import target


@pytest.mark.parametrize(
  ("name", "platform"), [("cpu", "cpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("tpu", "tpu")]
)
def test_devices_have_a_platform(name, platform):
  assert target.platform_of(name) == platform


def test_a_target_holds_for_what_is_traced_inside():
  outside = target.current()
  with target.tracing_for(target.Target("tpu", "xla")):
    assert target.current() == target.Target("tpu", "xla")
    assert not target.current().is_tuned_for("tpu")
    with target.tracing_for(target.Target("gpu")):
      assert target.current().is_tuned_for("gpu")
    assert target.current().platform == "tpu"
  assert target.current() == outside


def test_the_users_flags_win(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")
  assert target.compiler_options("cpu") == {}
  options = target.compiler_options("gpu")
  assert options
  name = next(iter(options))
  for flag in (f"--{name}=true", f"--{name}"):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_other=1 {flag} --{name}_2=true")
    assert target.compiler_options("gpu") == {k: v for k, v in options.items() if k != name}


def test_xla_knows_the_options(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")
  # Every compiler reads the options of all platforms, and refuses one that it does not know.
  assert jax.jit(lambda x: x + 1.0, compiler_options=target.compiler_options("gpu"))(1.0) == 2.0
