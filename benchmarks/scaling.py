"""What devices send each other in a training step, and what that costs on 8, 64 and 256 chips: on
paper, no step runs.

    python benchmarks/scaling.py [--model mobilenet_v2] [--image_size 224] [--per_chip_batch 256]
    [--step_ms MS]

The programs of a fine-tuning and of a sampling phase are compiled for --devices simulated devices
of this CPU, and their collectives counted in what the compiler made of them. What a data-parallel
step sends does not depend on the batch: two images per device do. The time of a step is never
guessed: without --step_ms only communication is predicted.
"""

import argparse
import math
import pathlib
import re
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax

from benchmarks.train_step import PROGRAMS
from configs import base
from profit_jax import data
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, student_spec
from profit_jax.train.mesh import make_mesh
from profit_jax.train.programs import Programs

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


class Level(NamedTuple):
  """Chips that reduce among themselves: `hops` in turn one way and as many back, `rate` bytes/s out
  of each chip.
  """

  chips: int
  hops: int
  rate: float
  between_nodes: bool = False


def _slice(*sides: int, wrap: bool) -> tuple[Level, ...]:
  # 50 GB/s a link and way. All axes carry a part of the data at once; a ring sends both ways round,
  # a line half of that.
  hops = sum(side // 2 if wrap else side - 1 for side in sides)
  return (Level(math.prod(sides), hops, 50e9 * len(sides) * (2 if wrap else 1)),)


def _gpus(nodes: int) -> tuple[Level, ...]:
  # Between nodes NCCL takes trees for what is small: hops are logarithmic, where a ring's would be
  # nodes - 1.
  return Level(8, 7, 900e9 / 2), Level(
    nodes, math.ceil(math.log2(nodes)), 400e9 / 8, between_nodes=True
  )


# TPU v4: 6 links of 50 GB/s each way (Jouppi et al., ISCA 2023, arXiv 2304.01433, table 4); rings
#   close where sides are multiples of 4 (docs.cloud.google.com/tpu/docs/v4).
# TPU v5e: 400 GB/s a chip over 4 ports, both ways together (docs.cloud.google.com/tpu/docs/v5e);
#   rings close where a side is 16 (jax-ml.github.io/scaling-book/tpus).
# H100: NVLink 900 GB/s a GPU, both ways together; 400 Gb/s InfiniBand, an adapter for each of the 8
#   GPUs of a node:
#   https://docs.nvidia.com/dgx-superpod/reference-architecture-scalable-infrastructure-h100/latest/dgx-superpod-components.html,
#   https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest/core-components.html.
INTERCONNECTS: dict[str, tuple[Level, ...]] = {
  **{
    f"TPU v4 {'x'.join(map(str, s))}": _slice(*s, wrap=min(s) >= 4)
    for s in ((2, 2, 2), (4, 4, 4), (4, 8, 8))
  },
  **{
    f"TPU v5e {'x'.join(map(str, s))}": _slice(*s, wrap=min(s) >= 16)
    for s in ((2, 4), (8, 8), (16, 16))
  },
  **{f"H100 {nodes}x8": _gpus(nodes) for nodes in (1, 8, 32)},
}


class Part(NamedTuple):
  """One array of a collective. Those with the same `name` were joined by the compiler."""

  name: str
  kind: str  # of `KINDS`
  shape: str
  size: int  # bytes of the result on each device
  turn: int  # so many collectives have to come one after the other up to here
  awaited: bool  # by another collective, as a batch's statistics by the next layer's


def read_collectives(text: str) -> list[Part]:
  """The collectives of a program that XLA compiled for a CPU, array by array."""
  before, _, entry = text.partition("\nENTRY ")
  entry, _, after = entry.partition("\n}")
  if re.search(rf" ({'|'.join(KINDS)})\(", before + after) or re.search(
    rf" ({'|'.join(KINDS)})-start\(", text
  ):
    sys.exit(
      "a collective in a loop, in a branch or in two halves: the program's text does not say when "
      "it runs"
    )
  turns: dict[str, list[int]] = {}  # of each instruction; of a collective, of each of its arrays
  arrays, needs, awaited = [], [], set()
  for name, shape, kind, rest in re.findall(
    r"^ +(?:ROOT )?%(\S+) = (.+?) ([a-z][\w-]*)\((.*)", entry, re.MULTILINE
  ):
    # Without what the scheduler orders although no data need it.
    names = re.findall(r"%([\w.-]+)", re.sub(r"control-predecessors={.*?}", "", rest))
    operands = [
      [(operand, i) for i in range(len(turns[operand]))] for operand in names if operand in turns
    ]
    if kind == "get-tuple-element" and len(operands[0]) > 1:
      operands = [[operands[0][int(re.search(r"index=(\d+)", rest).group(1))]]]
    if kind not in KINDS:
      operands = [[key for keys in operands for key in keys]]
    turns[name] = [
      max((turns[operand][i] for operand, i in keys), default=0) + (kind in KINDS)
      for keys in operands
    ]
    needs += [((name, i), kind in KINDS, keys) for i, keys in enumerate(operands)]
    if kind in KINDS:
      arrays += [
        (name, kind, i, array) for i, array in enumerate(re.findall(r"[a-z]+\d*\[[\d,]*\]", shape))
      ]
  for key, collective, keys in reversed(needs):
    if collective or key in awaited:
      awaited.update(keys)
  return [
    Part(name, kind, array, _bytes(array), turns[name][i], (name, i) in awaited)
    for name, kind, i, array in arrays
  ]


def _bytes(shape: str) -> int:
  # Pred has no number, and a byte.
  bits, sizes = re.fullmatch(r"[a-z]+(\d*)\[(.*)\]", shape).groups()
  return int(bits or 8) // 8 * math.prod(int(size) for size in sizes.split(",") if size)


def compiled_texts(options: argparse.Namespace) -> dict[str, str]:
  """The compiled programs by stage, of `benchmarks/train_step.py`'s configuration."""
  config = base.get_config()
  config.model.name, config.model.activation = options.model, "relu"
  config.data.image_size, config.train.dtype = options.image_size, options.dtype
  config.train.batch_size = config.train.eval_batch_size = 2 * options.devices
  settings, info, distill = (
    parse(config, REGISTRY),
    data.KNOWN["imagenet2012"],
    options.teacher == "self",
  )
  spec = student_spec(settings, info.num_classes)
  programs = Programs(settings, info, spec, spec if distill else None, make_mesh(settings))
  stages = {stage: PROGRAMS[stage]._replace(distill=distill) for stage in ("wa", "sampling")}
  texts = {stage: programs.train_step(program).as_text() for stage, program in stages.items()}
  programs.close()
  return texts


def print_collectives(stage: str, parts: list[Part]) -> None:
  """Number and bytes: of all, by kind with the largest arrays, and by what waits for them."""
  groups = {
    stage: parts,
    **{f"  {kind}": [part for part in parts if part.kind == kind] for kind in KINDS},
  }
  groups["  others wait for"] = [part for part in parts if part.awaited]
  groups["  only the update waits for"] = [part for part in parts if not part.awaited]
  print(f"\n{'':28} collectives  arrays        MB  in turn  largest")
  for name, those in groups.items():
    if not those:
      continue
    number, size = len({part.name for part in those}), sum(part.size for part in those) / 1e6
    largest = [part.shape for part in sorted(those, key=lambda part: -part.size)[:3]]
    turns = max(part.turn for part in those)
    print(f"{name:28} {number:11} {len(those):7} {size:9.3f} {turns:8}  {' '.join(largest)}")


def print_prediction(parts: list[Part], options: argparse.Namespace) -> None:
  """Communication in ms; with the measured step also both in ms, and the efficiency: the step over
  both.
  """
  if any(part.kind != "all-reduce" for part in parts):
    return print("no prediction: it knows all-reduces only")
  awaited = [part for part in parts if part.awaited]
  loads = (len({part.name for part in parts}), parts), (max(part.turn for part in awaited), awaited)
  columns = "comm ms" if options.step_ms is None else "comm ms step ms     eff"
  print(f"chips {'':14} all in turn: {columns}   fused, overlapped: {columns}")
  for name, levels in INTERCONNECTS.items():
    line = f"{math.prod(level.chips for level in levels):5} {name:14}"
    for (count, those), width in zip(loads, (20, 29), strict=True):
      total, share, step = 0.0, float(sum(part.size for part in those)), options.step_ms
      for level in levels:  # reduce-scatter, the next level, all-gather
        hop = (options.node_hop_us if level.between_nodes else options.hop_us) * 1e-3
        total += (
          2 * (level.chips - 1) / level.chips * share / level.rate * 1e3
          + 2 * level.hops * hop * count
        )
        share /= level.chips
      line += f" {total:{width}.2f}" + (
        "" if step is None else f" {step + total:7.1f} {step / (step + total):7.1%}"
      )
    print(line)


# The joining was compared once: compiled ahead of time for a TPU v5e slice of 2x4 (libtpu
# 0.0.42.1), mobilenet_v2 at 32 pixels has 158 all-reduces in wa, as for this CPU, and 161 in
# sampling, where this CPU's compiler leaves 262.
ASSUMPTIONS = """assumptions:
  Every chip keeps its {per_chip_batch} images, so that the batch grows with the chips. \
Input keeps up.
  All in turn: each collective of the program by itself, nothing beside it (pessimistic). \
Fused, overlapped: what need not
    be in turn goes together, and what only the update waits for hides \
behind the backward pass (optimistic).
  {hop_us} us a hop in a slice or node, {node_hop_us} us between nodes: no vendor's figures. \
Hops, each way: the sides of
    a mesh, half of a torus's, 7 in a node, log2 of the nodes. \
Rates are the published ones, which nobody quite reaches.
  The compiler for this CPU did the joining. \
Other platforms join by rules and thresholds of their own (GPUs up to 30 MiB
    unless told otherwise), and may have more collectives or fewer; what is in turn stays in turn.
  Sums and convolutions are in the {form}'s form."""


def main() -> None:
  """Counts, predictions, assumptions."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="mobilenet_v2", choices=sorted(REGISTRY))
  parser.add_argument("--image_size", type=int, default=224, help="pixels")
  parser.add_argument(
    "--per_chip_batch", type=int, default=256, help="images, of the measured step"
  )
  parser.add_argument("--devices", type=int, default=8, help="to compile for, at least 2")
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument(
    "--step_ms", type=float, help="milliseconds that a step was measured to take on one chip"
  )
  parser.add_argument("--teacher", default="none", choices=("none", "self"))
  parser.add_argument(
    "--form", default="accelerator", choices=("accelerator", "cpu"), help="of sums and convolutions"
  )
  parser.add_argument("--hop_us", type=float, default=1.0, help="microseconds from chip to chip")
  parser.add_argument(
    "--node_hop_us", type=float, default=5.0, help="microseconds from node to node"
  )
  options = parser.parse_args()
  for name, value in vars(options).items():
    if isinstance(value, int | float) and not (1 if name == "devices" else 0) < value < math.inf:
      parser.error(
        f"--{name} {value} is not allowed: it must be above {1 if name == 'devices' else 0}"
      )
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", options.devices)
  if options.form == "accelerator":
    # The layers ask which platform they are for. A CPU's have joined sums, for which XLA gathers
    # whole arrays.
    jax.lax.platform_dependent = lambda *operands, default, **_: default(*operands)
  try:
    texts = compiled_texts(options)
  except ConfigError as error:
    parser.error(str(error))
  print(
    f"{options.model}, {options.image_size} px, {options.dtype}, teacher {options.teacher}, "
    f"{options.devices} devices"
  )
  for stage, text in texts.items():
    parts = read_collectives(text)
    print_collectives(stage, parts)
    print_prediction(parts, options)
  measured = (
    "not measured; give --step_ms"
    if options.step_ms is None
    else f"{options.step_ms} ms on one chip, as given"
  )
  print(f"\nstep time: {measured}\n{ASSUMPTIONS.format(**vars(options))}")


if __name__ == "__main__":
  main()
