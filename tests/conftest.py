"""Strict dtype promotion everywhere, and four CPU devices so that sharding is real."""

import os
from importlib import metadata

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# With requirements-accelerators.txt installed, JAX would look for a TPU and a GPU and complain.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the tests' time is compilation: 28 s of CPU time for one training step of MobileNet-v2, 17
# s without LLVM's optimizations; 78 s for a whole run of the tiny net, 45 s without XLA's newer way
# to compile fused operations (0.10.2 of jaxlib). Also for the processes that tests start.
_FLAGS = [*os.environ.get("XLA_FLAGS", "").split(), "--xla_backend_optimization_level=0"]
# From 0.11.1 on, there is no other way, and an unknown flag ends the process.
if tuple(map(int, metadata.version("jaxlib").split(".")[:3])) < (0, 11, 1):
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)

import gc
import pathlib
import signal
import tempfile

import jax
import pytest

from tests import drawn, tiers
from tests.train.shared import compiled, finished_run, tiny

__all__ = ["compiled", "finished_run", "tiny"]

# `nohup` and shells that start a command in the background make it ignore these, which a run
# respects: tests that send them would wait, or train to the end.
for _number, _default in (
  (signal.SIGHUP, signal.SIG_DFL),
  (signal.SIGINT, signal.default_int_handler),
):
  if signal.getsignal(_number) == signal.SIG_IGN:
    signal.signal(_number, _default)

drawn.load_profile()
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same small programs are compiled by several runs, in several processes; kept in a directory of
# this session only.
if "PROFIT_JAX_TESTS_CACHE" not in os.environ:
  _CACHE = tempfile.TemporaryDirectory(prefix="profit_jax_tests_")
  os.environ["PROFIT_JAX_TESTS_CACHE"] = _CACHE.name
jax.config.update("jax_compilation_cache_dir", os.environ["PROFIT_JAX_TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

# Tracing makes millions of objects, and the collector looks at them again and again: a training
# step of MobileNet-v2 is traced in 8.9 s, not in 11.6 s.
gc.freeze()
gc.set_threshold(200_000, 20, 100)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items):
  """Marks the slow tests, and lets the longest files start first."""
  unused = tiers.unused([item.nodeid for item in items])
  everything = set(pathlib.Path(__file__).parent.rglob("test_*.py"))
  if unused and everything <= {item.path for item in items}:
    raise pytest.UsageError(f"tests/tiers.py names tests that do not exist: {unused}")
  for item in items:
    if tiers.is_slow(item.nodeid):
      item.add_marker("slow")
  items.sort(key=lambda item: tiers.place(item.nodeid))
