"""How long the programs of a whole plan take to compile, from nothing and from the cache of an
earlier run.

    python benchmarks/compile_time.py [--config configs/digits_w4.py]

Each is a process of its own that makes what a run makes, in the order of the phases and in the
background, as a run does; a phase's time is what it waits. The layers that ft2 and ft3 freeze are
drawn at random: a run with another ranking than the one before finds all programs in the cache but
these two (`--other_ranking`).
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def compile_all(options: argparse.Namespace) -> None:
  """Prints a line per program, and the sum."""
  import importlib.util

  import jax

  from profit_jax import data, plan
  from profit_jax.models import REGISTRY, build, variable_shapes
  from profit_jax.settings import parse
  from profit_jax.train import aiwq
  from profit_jax.train.programs import Programs, make_mesh

  jax.config.update("jax_default_matmul_precision", "highest")  # as main.py does
  path, _, argument = options.config.partition(":")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  settings = parse(module.get_config(argument) if argument else module.get_config(), REGISTRY)
  jax.config.update("jax_compilation_cache_dir", options.cache)
  facts = data.load(settings).facts
  model = build(settings.model, facts.num_classes)
  programs = Programs(
    settings, facts, model, model, make_mesh(settings), keep_in=f"{options.cache}/programs"
  )
  layers = sorted(aiwq.conv_kernels(variable_shapes(model, settings.data.image_size)["params"]))
  random.Random(options.seed).shuffle(layers)
  phases, seen, start = plan.plan(settings), 0, time.perf_counter()
  programs.prefetch(phases, lambda phase: aiwq.frozen_layers(layers, phase.program.frozen_fraction))
  for phase in phases:
    before = time.perf_counter()
    if phase.calibrate:
      {
        "act": programs.calibrate_acts,
        "weight": programs.calibrate_weights,
        "fit": programs.fit_weights,
      }[phase.calibrate]()
    programs.train_step(phase.program, aiwq.frozen_layers(layers, phase.program.frozen_fraction))
    programs.eval_step(phase.program.quantized_weights, phase.program.quantized_acts)
    seconds = time.perf_counter() - before
    if seconds > 0.1:
      seen += 1
      print(f"  phase {phase.index:2} {phase.name:14} {seconds:6.1f} s", flush=True)
  programs.close()
  print(
    f"  {len(phases)} phases, {seen} wait for a program: {time.perf_counter() - start:.1f} s in all"
  )


def main() -> None:
  """Runs itself, a process for each line of the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default="configs/digits_w4.py")
  parser.add_argument("--cache", help=argparse.SUPPRESS)
  parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
  parser.add_argument("--other_ranking", action="store_true")
  options = parser.parse_args()
  if options.cache:
    return compile_all(options)
  with tempfile.TemporaryDirectory(prefix="compile_time_") as cache:
    runs = [("from nothing", 0), ("from the cache", 0)] + [
      ("from the cache, another ranking", 1)
    ] * options.other_ranking
    for what, seed in runs:
      print(what, flush=True)
      command = [
        sys.executable,
        __file__,
        f"--config={options.config}",
        f"--cache={cache}",
        f"--seed={seed}",
      ]
      subprocess.run(command, check=True, cwd=ROOT, env={"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ})


if __name__ == "__main__":
  main()
