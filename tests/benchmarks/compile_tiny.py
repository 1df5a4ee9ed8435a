"""Compiles steps of tests' nets for a target, in a separate process, and prints their figures.

python -m tests.benchmarks.compile_tiny v5e:2x2
"""

import json
import os
import sys

from benchmarks import aot_targets

os.environ.update(aot_targets.ENVIRONMENT)  # before JAX is imported

from benchmarks import aot_programs
from configs import mbv2_w4
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY
from profit_jax.nn.spec import describe
from tests.traced import TwoBlocks
from tests.train.tiny import TinyNet

# TwoBlocks has the operations of all models.
PROGRAMS = (
  (TinyNet, "wa", "bfloat16"),
  (TwoBlocks, "ft2", "bfloat16"),
  (TwoBlocks, "sampling", "float32"),
  (TwoBlocks, "forward", "float32"),
)


def settings_of(dtype, devices):
  config = mbv2_w4.get_config()
  config.teacher.model = "none"
  config.data.image_size = 32
  config.train.batch_size = config.train.eval_batch_size = 8 * devices
  config.train.dtype = dtype
  return parse(config, REGISTRY)


def figures(target, make_net, stage, dtype):
  settings = settings_of(dtype, len(target.devices))
  spec = describe(make_net(num_classes=aot_programs.INFO.num_classes), (32, 32, 3))
  mesh = aot_programs.mesh_of(target)
  found, _ = aot_programs.measured(
    lambda: aot_programs.compile_ours(settings, spec, stage, mesh), target.platform
  )
  return {"net": make_net.__name__, "stage": stage, "dtype": dtype, **found}


if __name__ == "__main__":
  try:
    found = aot_targets.find(sys.argv[1])
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(json.dumps([figures(found, *program) for program in PROGRAMS]))
