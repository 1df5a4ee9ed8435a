"""The tiny run in a process of its own, which tests kill."""

import os

import jax
from tensorflow import summary  # noqa: F401  imported once, before the processes are forked

from profit_jax import app
from profit_jax.models import REGISTRY
from tests.train.conftest import tiny_config
from tests.train.tiny import TinyNet


def train(workdir, cache, log, changes):
  """Trains; as `conftest.py` sets JAX up, because the programs must be the same."""
  for number in (1, 2):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
  jax.config.update("jax_num_cpu_devices", 4)
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
  REGISTRY["tiny"] = TinyNet
  app.main(tiny_config(**{"compilation_cache": cache, **changes}), workdir, "train")
