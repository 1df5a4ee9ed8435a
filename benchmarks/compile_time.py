"""How long the programs of a whole plan take to compile, from nothing and from JAX's cache.

    python benchmarks/compile_time.py [--config configs/digits_w4.py] [--against DIRECTORY]

A separate process compiles the programs of a run for each line, in the order of the phases and in
the background, as a run does. A phase's time is the time that it waits. `--against` is a checkout
of another commit: both are measured by turns, with a cache each, and the ratio is printed. Only
JAX's cache is used, even if the other commit has another one.
"""

import argparse
import os
import pathlib
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

  from profit_jax import data, schedule
  from profit_jax.config import parse
  from profit_jax.models import REGISTRY, student_spec
  from profit_jax.train.mesh import make_mesh
  from profit_jax.train.programs import Programs

  path, _, argument = options.config.partition(":")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  settings = parse(module.get_config(argument) if argument else module.get_config(), REGISTRY)
  jax.config.update("jax_compilation_cache_dir", options.cache)
  info = data.load(settings).info
  spec = student_spec(settings, info.num_classes)
  programs = Programs(settings, info, spec, spec, make_mesh(settings))
  phases, seen, start = schedule.plan(settings), 0, time.perf_counter()
  programs.prefetch(phases)
  for phase in phases:
    before = time.perf_counter()
    if phase.calibrate:
      programs.calibration(phase.calibrate)
    programs.train_step(phase.program)
    programs.eval_step(phase.program.quantized_weights, phase.program.quantized_acts)
    seconds = time.perf_counter() - before
    if seconds > 0.1:
      seen += 1
      print(f"  phase {phase.index:2} {phase.name:14} {seconds:6.1f} s", flush=True)
  programs.close()
  total = time.perf_counter() - start
  print(f"  {len(phases)} phases, {seen} wait for a program: {total:.1f} s in all")
  pathlib.Path(options.result).write_text(str(total))


def measure(options: argparse.Namespace, code: pathlib.Path, cache: str) -> float:
  """The seconds of a process that compiles everything."""
  with tempfile.NamedTemporaryFile() as result:
    command = [
      sys.executable,
      str(code / "benchmarks" / "compile_time.py"),  # it knows its own commit's modules
      f"--config={options.config}",
      f"--code={code}",
      f"--cache={cache}",
      f"--result={result.name}",
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
  for name in ("code", "cache", "result"):
    parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.code:
    return compile_all(options)
  codes = {"here": ROOT}
  if options.against:
    codes = {"there": options.against.resolve(), **codes}
  with tempfile.TemporaryDirectory(prefix="compile_time_") as caches:
    for what in ("from nothing", "from the cache"):
      seconds = {}
      for name, code in codes.items():
        print(f"{what}, {code}", flush=True)
        seconds[name] = measure(options, code, f"{caches}/{name}")
      if options.against:
        print(f"{what}: here / there {seconds['here'] / seconds['there']:.2f}", flush=True)


if __name__ == "__main__":
  main()
