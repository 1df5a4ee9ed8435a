r"""The training step of every stage: time, images a second, operations, bytes, compilation, memory;
the authors', and another commit's.

    python benchmarks/train_step.py [--model mobilenet_v2] [--image_size 224] [--batch_size 16] \
      [--dtype float32] [--stages fp,a,wa,bn,sampling,ft2,ft3,forward] [--turns 7] [--steps 4] \
      [--json FILE] [--torch-reference DIR [--torch-variants eager,channels_last,compiled]] \
      [--against DIRECTORY]

What runs is what a run would run: the programs of `profit_jax.train.programs`, at published widths
and strides. The frozen layers of ft2 and ft3 are drawn at random, AIWQ's ranking being that of no
layer in particular; --seed draws others.

DIR is a checkout of the authors' repository (github.com/EunhyeokPark/PROFIT), whose model and
`train_ts` run by turns with ours in the same process; it needs PyTorch (`pip install torch`).
Nothing here imports TensorFlow. `--against` names a checkout of another commit of this project,
whose steps run by turns with these in a process of their own; both compile at the same time.

On a CPU, set GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as the Makefile does; both sides then have it.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from benchmarks import other_commit, reference
from configs import base
from profit_jax import data
from profit_jax.config import parse
from profit_jax.models import REGISTRY, student_spec
from profit_jax.schedule import ProgramKey
from profit_jax.train import aiwq
from profit_jax.train.mesh import default_dtype, make_mesh
from profit_jax.train.packing import pack_variables, unpack
from profit_jax.train.programs import Programs
from profit_jax.train.state import create_state

_FOUR = np.int32(4)  # bits
_TRAIN = ProgramKey(True, True, train_kernels=True, sampling=False, distill=False)
# wa is a fine-tuning phase, ft1 included. Its program runs BN phases and other frozen sets too.
PROGRAMS: dict[str, ProgramKey | None] = {
  "fp": _TRAIN._replace(quantized_weights=False, quantized_acts=False),
  "a": _TRAIN._replace(quantized_weights=False),
  "wa": _TRAIN,
  "bn": _TRAIN,
  "sampling": _TRAIN._replace(sampling=True),
  "ft2": _TRAIN,
  "ft3": _TRAIN,
  "forward": None,  # an evaluation, clip rates included
}
FROZEN = {"ft2": 1 / 3, "ft3": 2 / 3, "bn": 1.0}  # the share of the layers
RATIOS = (("wa", "fp"), ("a", "fp"), ("bn", "wa"), ("sampling", "wa"), ("ft2", "wa"), ("ft3", "wa"))


@dataclasses.dataclass
class Contender:
  """One thing that is timed.

  Attributes:
    stage: a key of `PROGRAMS`.
    code: whose, and how it is run.
    run: takes a number of steps, and returns when their results are there.
    facts: what its compiler says.
    seconds: measured times of one step, a number a turn.
  """

  stage: str
  code: str
  run: Callable[[int], None]
  facts: dict[str, float] = dataclasses.field(default_factory=dict)
  seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def median(self) -> float:
    """Seconds."""
    return statistics.median(self.seconds)


def ours(options: argparse.Namespace, stages: Iterable[str]) -> Iterable[Contender]:
  """This project's steps, compiled one after the other."""
  config = base.get_config()
  config.model.name, config.model.width = options.model, options.width
  config.model.activation = "relu"  # the authors' code has no bound at 6
  config.data.image_size = options.image_size
  config.train.batch_size = config.train.eval_batch_size = options.batch_size
  config.train.dtype, config.train.kernels = options.dtype, options.kernels
  # weights stay what they are
  config.train.learning_rate = config.train.full_precision_learning_rate = 1e-6
  config.plan.sampling_every = options.sampling_every
  settings = parse(config, REGISTRY)
  info = data.KNOWN["imagenet2012"]
  spec = student_spec(settings, info.num_classes)
  batch = host_batch(options.batch_size, options.image_size)
  variables = spec.init(jax.random.key(options.seed))
  layers = sorted(spec.kernels)
  random.Random(options.seed).shuffle(layers)

  teacher_spec, teacher = (spec, variables) if options.teacher == "self" else (None, None)
  programs = Programs(settings, info, spec, teacher_spec, make_mesh(settings))
  variables = programs.placement.replicate(pack_variables(jax.device_get(variables), spec))
  teacher, key = programs.placement.replicate((teacher, jax.random.key(0)))
  arrays = programs.placement.split(batch)
  bits = spec.bits.at(None, _FOUR)
  variables["params"] = programs.calibration("act")(variables, arrays["image"], key, bits)
  bits = spec.bits.at(_FOUR, None)
  variables["params"] = programs.calibration("weight")(variables["params"], bits)
  start = jax.device_get(variables)
  for stage in stages:
    program = PROGRAMS[stage]
    # Not what it waits for in `Programs`: the background thread has nothing else to do here.
    before = time.perf_counter()
    if program is None:
      yield _forward(programs, programs.placement.replicate(start), arrays, before)
      continue
    program = program._replace(distill=teacher is not None)
    layers_now = aiwq.frozen_layers(layers, FROZEN.get(stage, 0.0))
    frozen = frozenset(f"{layer}/kernel" for layer in layers_now)
    step = programs.train_step(program)
    facts_of = compiler_facts(step, time.perf_counter() - before)
    state = programs.placement.replicate(create_state(unpack(start), spec, ema=True))
    state = programs.states.with_fresh_optimizer(state, program, frozen)
    yield Contender(
      stage, "profit_jax", _train(programs, program, step, state, arrays, key, teacher), facts_of
    )
  programs.close()


def _train(programs, program, step, state, arrays, key, teacher) -> Callable[[int], None]:
  sampling = None
  if program.sampling:
    sampling = programs.placement.replicate(aiwq.start(programs.student.convs))
  bits = programs.student.bits.at(
    _FOUR if program.quantized_weights else None, _FOUR if program.quantized_acts else None
  )
  held = [state, sampling]

  def run(count: int) -> None:
    for _ in range(count):
      held[0], metrics, held[1] = step(
        held[0], arrays, bits, np.float32(1e-6), key, teacher, held[1], None
      )
    jax.block_until_ready((held, metrics))
    if not bool(metrics["finite"]):
      sys.exit("the benchmark's loss is not finite: what it measures is no training")

  return run


def _forward(programs, variables, arrays, before) -> Contender:
  step = programs.eval_step(True, True)
  facts = compiler_facts(step, time.perf_counter() - before)

  def run(count: int) -> None:
    for _ in range(count):
      sums = step(variables, arrays, programs.student.bits.at(_FOUR, _FOUR))
    jax.block_until_ready(sums)

  return Contender("forward", "profit_jax", run, facts)


def compiler_facts(compiled: Any, seconds: float) -> dict[str, float]:
  """What the compiled program says of itself; XLA counts each kernel's operands and results as
  bytes.
  """
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  peak = (
    memory.temp_size_in_bytes
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  kernels = sum(
    " fusion(" in line or " convolution(" in line or " dot(" in line
    for line in compiled.as_text().splitlines()
  )
  return {
    "compile_seconds": seconds,
    "gflop": cost.get("flops", float("nan")) / 1e9,
    "gbyte": cost.get("bytes accessed", float("nan")) / 1e9,
    "peak_mbyte": peak / 1e6,
    "kernels": kernels,
  }


def host_batch(size: int, pixels: int) -> dict[str, np.ndarray]:
  """Noise, and labels: speed does not depend on the values."""
  draw = np.random.default_rng(0)
  return {
    "image": draw.integers(0, 256, (size, pixels, pixels, 3), np.uint8),
    "label": draw.integers(0, 1000, size).astype(np.int32),
    "mask": np.ones(size, bool),
  }


def measure(contenders: list[Contender], turns: int, steps: int) -> None:
  """Times all by turns, so that what slows the machine for a while slows each; the first step of a
  turn is not counted.
  """
  for contender in contenders:
    contender.run(2)
  for turn in range(turns):
    print(f"turn {turn + 1} of {turns}", end="\r", file=sys.stderr, flush=True)
    for contender in contenders:
      contender.run(1)
      start = time.perf_counter()
      contender.run(steps)
      contender.seconds.append((time.perf_counter() - start) / steps)


def print_table(contenders: list[Contender], batch_size: int) -> None:
  """One line for each; ms is the median of the turns, with the smallest and the largest."""
  head = f"{'stage':9} {'code':26} {'ms':>8} {'smallest':>8} {'largest':>8} {'images/s':>8}"
  head += f" {'ops G':>7} {'bytes GB':>8}"
  print(f"{head} {'kernels':>7} {'peak MB':>8} {'compile s':>9}")
  for one in contenders:
    line = f"{one.stage:9} {one.code:26} {one.median * 1e3:8.1f}"
    line += f" {min(one.seconds) * 1e3:8.1f} {max(one.seconds) * 1e3:8.1f}"
    line += f" {batch_size / one.median:8.1f}"
    if one.facts:
      facts = one.facts
      line += f" {facts['gflop']:7.2f} {facts['gbyte']:8.3f} {facts['kernels']:7}"
      line += f" {facts['peak_mbyte']:8.0f} {facts['compile_seconds']:9.1f}"
    print(line)


def print_ratios(contenders: list[Contender]) -> None:
  """Stage over stage of our code, then every other code's time over ours; each the median over the
  turns of the turns' ratio.
  """
  own = {one.stage: one for one in contenders if one.code == "profit_jax"}

  def ratio(left: Contender, right: Contender) -> str:
    each = [a / b for a, b in zip(left.seconds, right.seconds, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"

  print("\nratio of times, median (smallest to largest) over the turns")
  for upper, lower in RATIOS:
    if upper in own and lower in own:
      print(f"  {upper} / {lower}: {ratio(own[upper], own[lower])}")
  for one in contenders:
    if one.code != "profit_jax" and one.stage in own:
      print(f"  {one.stage}: {one.code} / profit_jax: {ratio(one, own[one.stage])}")


def machine() -> str:
  """Where this runs, in a line."""
  name = platform.processor()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    found = [
      line.split(":")[1].strip()
      for line in cpuinfo.read_text().splitlines()
      if line.startswith("model name")
    ]
    name = f"{len(found)} x {found[0]}" if found else name
  device = jax.devices()[0]
  return f"{name}; jax {jax.__version__} on {len(jax.devices())} x {device.device_kind}"


def main() -> None:
  """Compiles, measures, prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  quantized = [name for name in sorted(REGISTRY) if name.startswith("mobilenet")]
  parser.add_argument("--model", default="mobilenet_v2", choices=quantized)
  parser.add_argument("--width", type=float, default=1.0)
  parser.add_argument("--image_size", type=int, default=224, help="pixels")
  parser.add_argument("--batch_size", type=int, default=16, help="images")
  parser.add_argument(
    "--dtype",
    default="auto",
    choices=("auto", "float32", "tfloat32", "bfloat16"),
    help="config.train.dtype",
  )
  parser.add_argument("--kernels", default="tuned", choices=("tuned", "xla"))
  parser.add_argument(
    "--teacher", default="none", choices=("none", "self"), help="self: a forward pass more"
  )
  parser.add_argument("--stages", default=",".join(PROGRAMS), help="separated by commas")
  parser.add_argument("--turns", type=int, default=7)
  parser.add_argument("--steps", type=int, default=4, help="of each stage in a turn")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--sampling_every", type=int, default=1, help="as config.plan.sampling_every")
  parser.add_argument(
    "--torch-reference", metavar="DIR", help="a checkout of the authors' repository"
  )
  parser.add_argument(
    "--torch-variants",
    default="eager",
    help=f"of {', '.join(reference.VARIANTS)}, separated by commas",
  )
  parser.add_argument("--against", metavar="DIRECTORY", help="a checkout of another commit")
  parser.add_argument("--json", metavar="FILE", help="where all figures go as well")
  options = parser.parse_args()
  if options.dtype == "auto":
    options.dtype = default_dtype(jax.devices()[0].platform)
  stages, variants = options.stages.split(","), options.torch_variants.split(",")
  if wrong := [name for name in stages if name not in PROGRAMS]:
    parser.error(f"--stages: {', '.join(wrong)}: choose from {', '.join(PROGRAMS)}")
  if wrong := [name for name in variants if name not in reference.VARIANTS]:
    parser.error(
      f"--torch-variants: {', '.join(wrong)}: choose from {', '.join(reference.VARIANTS)}"
    )
  if options.against and not (pathlib.Path(options.against) / "benchmarks/train_step.py").exists():
    parser.error(f"--against: {options.against} is not a checkout of this project")

  print(machine())
  print(
    f"{options.model} {options.width}, {options.image_size} px, batch {options.batch_size}, "
    f"{options.dtype}"
  )
  other = other_commit.Stages(options.against, options) if options.against else None
  contenders = list(ours(options, stages))
  if other:
    contenders += [
      Contender(stage, "the other commit", *rest) for stage, *rest in other.contenders()
    ]
  if options.torch_reference:
    job = reference.Job(
      options.torch_reference,
      options.model,
      options.width,
      "bfloat16" if options.dtype == "bfloat16" else "float32",
      options.teacher == "self",
      options.seed,
    )
    batch = host_batch(options.batch_size, options.image_size)
    for variant in variants:
      for stage, run in reference.contenders(job, variant, batch, stages):
        contenders.append(Contender(stage, f"authors', {variant}", run))
    print(reference.describe())
  measure(contenders, options.turns, options.steps)
  print_table(contenders, options.batch_size)
  print_ratios(contenders)
  if options.json:
    figures = [
      {"stage": c.stage, "code": c.code, "seconds": c.seconds, **c.facts} for c in contenders
    ]
    document = {"machine": machine(), "options": vars(options), "figures": figures}
    pathlib.Path(options.json).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
  main()
