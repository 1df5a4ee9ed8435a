"""Strict dtype promotion everywhere, and four CPU devices so that sharding is real."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same small programs are compiled by several runs; kept in a directory of this session only.
_CACHE = tempfile.TemporaryDirectory(prefix="profit_jax_tests_")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
  """What shares expensive fixtures runs in one of the two processes: a file, or all that looks at the finished run."""
  for item in items:
    group = "finished_run" if "finished_run" in item.fixturenames else item.path.name
    item.add_marker(pytest.mark.xdist_group(group))
