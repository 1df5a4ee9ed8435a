"""One of several processes that train the tiny net, with the command line or with the library; the
last one can send itself a signal.
"""

import json
import os
import pathlib
import sys

import jax
import numpy as np
from flax import traverse_util

import main
import profit_jax as pj
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


# Of a global batch; and the examples of an evaluation, of which one process has two batches and the
# other has one.
ROWS, EXAMPLES = 8, 11


def own_data(processes=1, process=0, faults=()):
  """A process's part of float images of one channel.

  Args:
    processes: how many there are.
    process: the number of this one.
    faults: what is wrong with this process's batches: `eval`, `rows` or `end`.
  """
  rows = ROWS // processes - ("rows" in faults)

  def drawn(seed, count):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, count)
    image = rng.normal(size=(count, 8, 8, 1)) + label[:, None, None, None]
    return {"image": np.float32(image), "label": label}

  def train(epoch, first_step):
    for step in range(first_step, 4):
      if "end" in faults and (epoch, step) == (1, 2):
        return
      batch = {name: of[process * rows :][:rows] for name, of in drawn((epoch, step), ROWS).items()}
      yield batch

  def evaluation():
    first, last = (0, EXAMPLES) if processes == 1 else ((0, 8), (8, EXAMPLES))[process]
    for start in range(first, last, rows):
      batch = {name: of[start : min(start + rows, last)] for name, of in whole.items()}
      if "eval" in faults:
        batch["label"] = batch["label"] + 3
      yield batch

  whole = drawn(100, EXAMPLES)
  return pj.Data(train=train, eval=evaluation, steps_per_epoch=4)


def own_run(workdir, devices=None):
  """A `Trainer` of the tiny net as a user's: full precision, then 4 bits, and half of it frozen."""
  schedule = pj.profit_schedule(
    weight_bits=(4,), act_bits=(4,), full_precision_epochs=2, finetune_epochs=2, stabilize=False,
    sampling_epochs=1, freeze_fractions=(0.5,), learning_rate=0.02,
  )  # fmt: skip
  options = pj.Options(train=pj.TrainSettings(ema_rate=0.9), devices=devices)
  return pj.Trainer(TinyNet(num_classes=3), schedule, workdir, options=options)


def fit(workdir, coordinator, processes, process, faults=()):
  """Trains with the library, as a user's program; writes the result beside the directory.

  Args:
    workdir: as `train`'s, and what the process prints.
    coordinator: address of the first process.
    processes: how many there are.
    process: the number of this one.
    faults: of the last process's data.
  """
  redirect(*printed(workdir, process))
  jax.config.update("jax_num_cpu_devices", 2)
  jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=10)
  data = own_data(processes, process, faults if process == processes - 1 else ())
  try:
    result = own_run(workdir).fit(data)
    own_result(workdir, process).write_text(json.dumps(summary_of(result)))
    try:
      report = pj.export(result, workdir / "net.onnx", data.eval)
      print(report)
    except pj.ConfigError as error:
      print(f"{error.label}: {error}")
  finally:
    # As JAX does where Python ends, after an error too; forked processes end without it. If the
    # first process were gone sooner, JAX would abort the other one.
    jax.distributed.shutdown()


def own_result(workdir, process):
  """The file of what a process's `Trainer.fit` returned."""
  return pathlib.Path(f"{workdir}_{process}.json")


def summary_of(result):
  """What a run ended with, for JSON."""
  variables = traverse_util.flatten_dict(result.variables, sep="/")
  return {
    "epochs": [[epoch.top1, epoch.loss] for epoch in result.epochs],
    "frozen": result.phases[-1].frozen,
    "variables": {name: np.asarray(value).tolist() for name, value in variables.items()},
  }


def run_main(arguments, environment, out, err):
  """`main.py` with arguments."""
  redirect(out, err)
  os.environ.update(environment)
  ended = main.run(["main.py", *arguments])
  distributed.leave(*ended)


def printed(workdir, process):
  """The files of a process's output and errors."""
  return [workdir.with_name(f"{workdir.name}_{process}.{name}") for name in ("out", "err")]
