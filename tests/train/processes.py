"""One of several processes: trains the tiny net, stops in the middle as if interrupted, and goes on.

python -m tests.train.processes WORKDIR COORDINATOR PROCESSES ID
"""

import sys

import jax

from profit_jax import app
from profit_jax.models import REGISTRY
from profit_jax.train.checkpoint import Checkpoints
from tests.train.conftest import tiny_config
from tests.train.tiny import TinyNet

EPOCHS_BEFORE_THE_STOP = 2  # of four


def config():
  """Two phases of two epochs: full precision, and activations quantized, taught by what the first one made."""
  return tiny_config(
    **{
      "plan.weight_bits": (),
      "plan.act_bits": (4,),
      "plan.stabilize": False,
      "plan.warmup_epochs": 0,
    }
  )


def main(workdir, coordinator, processes, process):
  REGISTRY["tiny"] = TinyNet
  cluster = app.Cluster(coordinator, int(processes), int(process))
  save = Checkpoints.save

  def save_and_stop(self, state, progress):
    save(self, state, progress)
    if progress.total_epochs == EPOCHS_BEFORE_THE_STOP:
      raise KeyboardInterrupt

  Checkpoints.save = save_and_stop
  try:
    app.main(config(), workdir, "train", None, cluster)
  except KeyboardInterrupt:
    Checkpoints.save = save
    app.main(config(), workdir, "train", None, cluster)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 2)
  main(*sys.argv[1:])
