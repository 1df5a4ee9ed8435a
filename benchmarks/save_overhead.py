"""What a checkpoint costs a run that saves every minute: the same steps with a save among them and
without, by turns.

    python benchmarks/save_overhead.py [--width 1.0] [--image_size 32] [--batch_size 64] [--steps
    40] [--pairs 8]

MobileNet-v2 with weights and activations quantized, as its own teacher: what is saved is the
student, its average, the optimizer, the best variables and the teacher.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from configs import digits_w4
from profit_jax import checkpoints, data, schedule
from profit_jax.config import parse
from profit_jax.models import REGISTRY, student_spec
from profit_jax.train import run_state
from profit_jax.train.mesh import make_mesh
from profit_jax.train.programs import Programs
from profit_jax.train.progress import Progress
from profit_jax.train.run_state import RunState
from profit_jax.train.state import create_state


def main() -> None:
  """Prints both times, the difference, and its share of a minute."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--width", type=float, default=1.0, help="of MobileNet-v2")
  parser.add_argument("--image_size", type=int, default=32, help="pixels")
  parser.add_argument("--batch_size", type=int, default=64, help="images")
  parser.add_argument("--steps", type=int, default=40, help="of each turn")
  parser.add_argument("--pairs", type=int, default=8, help="of turns")
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
  current.best = current.teacher = run_state.host_copy(current.state.variables)
  teacher, key = programs.placement.replicate((current.teacher, jax.random.key(0)))
  batch = next(iter(source.train_batches(0, options.batch_size)))

  def turn() -> float:
    start = time.perf_counter()
    for _ in range(options.steps):
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
      jax.block_until_ready(metrics)
    return time.perf_counter() - start

  with tempfile.TemporaryDirectory() as directory:
    writer = checkpoints.Writer(f"{directory}/checkpoints", keep=3)
    turn()
    run_state.save(writer, current, 1)
    writer.wait()
    plain, saving, blocked = [], [], []
    for pair in range(options.pairs):
      plain.append(turn())
      start = time.perf_counter()
      run_state.save(writer, current, pair + 2)
      blocked.append(time.perf_counter() - start)
      saving.append(blocked[-1] + turn())
      writer.wait()
    newest = pathlib.Path(directory) / "checkpoints" / str(options.pairs + 1)
    megabytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6
    writer.close()
  difference = statistics.median(
    with_save - without for with_save, without in zip(saving, plain, strict=True)
  )
  print(
    f"MobileNet-v2, width {options.width:g}, {options.image_size}x{options.image_size}, batch "
    f"{options.batch_size}; "
    f"{jax.devices()[0].device_kind}; a checkpoint has {megabytes:.1f} MB"
  )
  print(
    f"{options.steps} steps: {statistics.median(plain):.3f} s without a save, "
    f"{statistics.median(saving):.3f} s with one "
    f"(medians of {options.pairs})"
  )
  print(
    f"a save takes the loop {statistics.median(blocked):.3f} s by itself, {difference:+.3f} s "
    "with what it does in the "
    f"background: {100 * difference / 60:.2f} % of a minute"
  )


if __name__ == "__main__":
  main()
