"""The tiny run in a separate process, which tests kill."""

import jax

from profit_jax.cli import app
from profit_jax.models import register
from tests.train.forked import redirect
from tests.train.runs import WITHOUT_PLOTS
from tests.train.shared import tiny_config
from tests.train.tiny import TinyNet


def train(workdir, cache, log, changes):
  """Trains; as `conftest.py` sets JAX up, because the programs must be the same."""
  redirect(log, log)
  jax.config.update("jax_num_cpu_devices", 4)
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
  register("tiny")(TinyNet)
  app.main(
    tiny_config(**{"compilation_cache": cache, **changes}), workdir, "train", hooks=WITHOUT_PLOTS
  )
