"""What it costs to watch a run's instability: epochs with `train/monitor.py` around their steps and
without, by turns.

    python benchmarks/watch_cost.py [--width 0.25] [--image_size 32] [--batch_size 64] [--steps 21]
    [--pairs 10]

MobileNet-v2 with weights and activations quantized, as its own teacher. The cost is an epoch's: its
last 8 steps are watched, however many there are. 21 steps are an epoch of the demo; of ImageNet at
batch 256 it has 5004.
"""

import argparse
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from configs import digits_w4
from profit_jax import data, schedule
from profit_jax.config import parse
from profit_jax.models import REGISTRY, student_spec
from profit_jax.train.mesh import make_mesh
from profit_jax.train.monitor import InstabilityMonitor
from profit_jax.train.programs import Programs
from profit_jax.train.progress import Progress
from profit_jax.train.run_state import RunState, host_copy
from profit_jax.train.state import create_state


def main() -> None:
  """Prints both times of an epoch and the share."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--width", type=float, default=0.25, help="of MobileNet-v2")
  parser.add_argument("--image_size", type=int, default=32, help="pixels")
  parser.add_argument("--batch_size", type=int, default=64, help="images")
  parser.add_argument("--steps", type=int, default=21, help="of an epoch")
  parser.add_argument("--pairs", type=int, default=10, help="of epochs")
  options = parser.parse_args()
  config = digits_w4.get_config()
  config.model.width, config.data.image_size = options.width, options.image_size
  config.train.batch_size = options.batch_size
  settings = parse(config, REGISTRY)
  source = data.load(settings, data.HostShard())
  spec = student_spec(settings, source.info.num_classes)
  programs = Programs(settings, source.info, spec, spec, make_mesh(settings))
  phase = next(phase for phase in schedule.plan(settings) if phase.name == "w4a4 ft1")
  variables = spec.init(jax.random.key(0))
  step = programs.train_step(phase.program)
  state = programs.placement.replicate(create_state(variables, spec, ema=True))
  state = programs.states.with_fresh_optimizer(state, phase.program)
  current = RunState(Progress(phase=phase.index), state)
  teacher, key = (
    programs.placement.replicate(host_copy(current.state.variables)),
    programs.placement.replicate(jax.random.key(0)),
  )
  batch, watch = (
    next(iter(source.train_batches(0, options.batch_size))),
    InstabilityMonitor(programs, options.steps),
  )

  def epoch(watched: bool) -> float:
    current.progress.step, start = 0, time.perf_counter()
    for _ in range(options.steps):
      if watched:
        watch.before_step(current)
      arguments = (
        programs.placement.split(batch),
        programs.student.bits.at(phase.weight_bits, phase.act_bits),
        np.float32(1e-3),
        key,
        teacher,
        None,
        None,
      )
      current.state, metrics, _ = step(current.state, *arguments)
      current.progress.step += 1
      if watched:
        watch.after_step(current, phase)
      jax.block_until_ready(metrics)
    jax.block_until_ready(current.state)
    return time.perf_counter() - start

  epoch(watched=True)
  plain, watching = [], []
  for _ in range(options.pairs):
    plain.append(epoch(watched=False))
    watching.append(epoch(watched=True))
  share = statistics.median(
    with_it / without - 1 for with_it, without in zip(watching, plain, strict=True)
  )
  print(
    f"MobileNet-v2, width {options.width:g}, {options.image_size}x{options.image_size}, batch "
    f"{options.batch_size}; "
    f"{jax.devices()[0].device_kind}; epochs of {options.steps} steps"
  )
  print(
    f"an epoch takes {statistics.median(plain):.3f} s without and "
    f"{statistics.median(watching):.3f} s with what is watched "
    f"(medians of {options.pairs}): {100 * share:+.2f} % (median of the pairs)"
  )
  programs.close()


if __name__ == "__main__":
  main()
