"""One of several processes: trains the tiny net, stops in the middle as if interrupted, and goes on.

python -m tests.train.processes WORKDIR COORDINATOR PROCESSES ID
"""

import sys

import jax
import pytest

from profit_jax import app
from profit_jax.models import REGISTRY
from tests.train.conftest import tiny_config
from tests.train.runs import number, stop_at
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
  with pytest.MonkeyPatch.context() as patch:
    stop_at(patch, [number(EPOCHS_BEFORE_THE_STOP)])
    try:
      app.main(config(), workdir, "train", None, cluster)
    except KeyboardInterrupt:
      app.main(config(), workdir, "train", None, cluster)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 2)
  main(*sys.argv[1:])
