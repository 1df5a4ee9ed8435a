"""One of several processes that train the tiny net; the last one can send itself a signal.

python -m tests.train.processes WORKDIR COORDINATOR PROCESSES ID [SIGNAL NUMBER]
"""

import signal
import sys

import jax

from profit_jax import app, distributed
from profit_jax.models import REGISTRY
from profit_jax.settings import Ending
from tests.train.conftest import tiny_config
from tests.train.runs import SignalAt
from tests.train.tiny import TinyNet


def config():
  """Two phases of two epochs: full precision, and activations quantized, taught by the first."""
  return tiny_config(
    **{
      "plan.weight_bits": (),
      "plan.stabilize": False,
      "plan.full_precision_epochs": 2,
      "plan.finetune_epochs": 2,
      # Low: at high rates the codes that rounding decides make the runs diverge.
      "train.full_precision_learning_rate": 0.03,
      "train.learning_rate": 0.02,
      "train.ema_rate": 0.98,
    }
  )


def main(workdir, coordinator, processes, process, asked="", at=""):
  REGISTRY["tiny"] = TinyNet
  hooks = app.Hooks()
  if asked and int(process) == int(processes) - 1:
    hooks = SignalAt({int(at): signal.Signals[asked]}).hooks
  # Ten seconds instead of a hundred: a test waits for it.
  cluster = app.Cluster(coordinator, int(processes), int(process), heartbeat_seconds=10)
  try:
    app.main(config(), workdir, "train", cluster=cluster, hooks=hooks)
  except Ending as ending:
    print(f"{ending.label}: {ending}")
    distributed.leave(ending.code, ending.everywhere)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 2)
  # As `tests/conftest.py`: the starts of a run share even the smallest programs.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
  main(*sys.argv[1:])
