"""One of several processes that train the tiny net; the last one can be made to end on the way.

python -m tests.train.processes WORKDIR COORDINATOR PROCESSES ID [SIGNAL STEP]
"""

import functools
import signal
import sys

import jax
import pytest

from profit_jax import app, distributed
from profit_jax.models import REGISTRY
from profit_jax.settings import Ending
from tests.train.conftest import tiny_config
from tests.train.runs import signal_at
from tests.train.tiny import TinyNet


def config():
  """Two phases of two epochs: full precision, and activations quantized, taught by what the first
  one made.
  """
  return tiny_config(
    **{
      "plan.weight_bits": (),
      "plan.act_bits": (4,),
      "plan.stabilize": False,
      "plan.warmup_epochs": 0,
    }
  )


def main(workdir, coordinator, processes, process, asked="", at=""):
  REGISTRY["tiny"] = TinyNet
  with pytest.MonkeyPatch.context() as patch:
    # Ten seconds instead of a hundred: the tests wait for it.
    patch.setattr(
      jax.distributed,
      "initialize",
      functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10),
    )
    if asked and int(process) == int(processes) - 1:
      signal_at(patch, {int(at): signal.Signals[asked]})
    try:
      app.main(
        config(), workdir, "train", None, app.Cluster(coordinator, int(processes), int(process))
      )
    except Ending as ending:
      print(f"{ending.label}: {ending}")
      distributed.leave(ending.code, ending.everywhere)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 2)
  main(*sys.argv[1:])
