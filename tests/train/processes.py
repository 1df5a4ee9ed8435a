"""One of several processes that train the tiny net; the last one can send itself a signal."""

import os
import sys

import jax

import main
from profit_jax import distributed
from profit_jax.cli import app
from profit_jax.config import ProfitError
from profit_jax.models import register
from tests.train.forked import redirect
from tests.train.runs import WITHOUT_PLOTS, SignalAt
from tests.train.shared import tiny_config
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


def train(workdir, coordinator, processes, process, signals):
  """Trains.

  Args:
    workdir: of the run; beside it lies what the process prints, see `printed`.
    coordinator: address of the first process.
    processes: how many there are.
    process: the number of this one.
    signals: that the last one sends itself, as `SignalAt` takes them.
  """
  redirect(*printed(workdir, process))
  jax.config.update("jax_num_cpu_devices", 2)
  # As `tests/conftest.py`: the starts of a run share even the smallest programs.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
  register("tiny")(TinyNet)
  hooks = SignalAt(signals).hooks if process == processes - 1 else WITHOUT_PLOTS
  # Ten seconds instead of a hundred: a test waits for it.
  cluster = app.Cluster(coordinator, processes, process, heartbeat_seconds=10)
  try:
    app.main(config(), str(workdir), "train", cluster=cluster, hooks=hooks)
  except ProfitError as error:
    print(f"{error.label}: {error}")
    distributed.leave(error.code, error.everywhere)
  sys.stdout.flush()
  jax.distributed.shutdown()  # as JAX does where Python ends by itself


def run_main(arguments, environment, out, err):
  """`main.py` with arguments."""
  redirect(out, err)
  os.environ.update(environment)
  ended = main.run(["main.py", *arguments])
  distributed.leave(*ended)


def printed(workdir, process):
  """The files of a process's output and errors."""
  return [workdir.with_name(f"{workdir.name}_{process}.{name}") for name in ("out", "err")]
