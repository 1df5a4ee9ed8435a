"""How long the programs of a whole plan take to compile, from nothing and from JAX's cache.

    python benchmarks/compile_time.py [--config configs/digits_w4.py] [--against DIRECTORY]

A separate process compiles the programs of a run for each line, in the order of the phases and in
the background, as a run does. A phase's time is the time that it waits. AIWQ's ranking, which
decides what ft2 and ft3 freeze, is drawn at random; `--other_ranking` adds a run with another one.
`--against` is a checkout of another commit: both are measured by turns, with a cache each, and the
ratio is printed. Only JAX's cache is used, even if the other commit has another one.
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


def compile_all(options: argparse.Namespace) -> None:
  """Prints a line per program, and the sum."""
  sys.path.insert(0, options.code)
  import importlib.util

  import jax

  from profit_jax import data, plan
  from profit_jax.models import REGISTRY, build, variable_shapes
  from profit_jax.settings import parse
  from profit_jax.train import aiwq
  from profit_jax.train.programs import Programs, make_mesh

  path, _, argument = options.config.partition(":")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  settings = parse(module.get_config(argument) if argument else module.get_config(), REGISTRY)
  jax.config.update("jax_compilation_cache_dir", options.cache)
  facts = data.load(settings).facts
  model = build(settings.model, facts.num_classes)
  programs = Programs(settings, facts, model, model, make_mesh(settings))
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
  total = time.perf_counter() - start
  print(f"  {len(phases)} phases, {seen} wait for a program: {total:.1f} s in all")
  pathlib.Path(options.result).write_text(str(total))


def measure(options: argparse.Namespace, code: pathlib.Path, cache: str, seed: int) -> float:
  """The seconds of a process that compiles everything."""
  with tempfile.NamedTemporaryFile() as result:
    command = [
      sys.executable,
      __file__,
      f"--config={options.config}",
      f"--code={code}",
      f"--cache={cache}",
      f"--result={result.name}",
      f"--seed={seed}",
    ]
    subprocess.run(command, check=True, cwd=code, env={"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ})
    return float(pathlib.Path(result.name).read_text())


def main() -> None:
  """Runs itself, a process for each line of the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default="configs/digits_w4.py")
  parser.add_argument("--against", type=pathlib.Path, help="a checkout of another commit")
  parser.add_argument("--other_ranking", action="store_true")
  for name in ("code", "cache", "result"):
    parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
  parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.code:
    return compile_all(options)
  codes = {"here": ROOT}
  if options.against:
    codes = {"there": options.against.resolve(), **codes}
  runs = {"from nothing": 0, "from the cache": 0}
  if options.other_ranking:
    runs["from the cache, another ranking"] = 1
  with tempfile.TemporaryDirectory(prefix="compile_time_") as caches:
    for what, seed in runs.items():
      seconds = {}
      for name, code in codes.items():
        print(f"{what}, {code}", flush=True)
        seconds[name] = measure(options, code, f"{caches}/{name}", seed)
      if options.against:
        print(f"{what}: here / there {seconds['here'] / seconds['there']:.2f}", flush=True)


if __name__ == "__main__":
  main()
