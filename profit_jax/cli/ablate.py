"""Trains a grid of runs and compares them: profit ablate --config
configs/ablation_digits.py --workdir DIR.

Every cell is an ordinary run of `profit train`, in a separate directory, with as many seeds as the
grid says; the same command goes on where it was stopped. Phases that two runs have in common are
trained once, and the second run forks from there. Writes DIR/ablation.md, ablation.json and
ablation.png.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from etils import epath

from profit_jax import checkpoints, optional, paths
from profit_jax.cli import command
from profit_jax.config import ConfigError, Settings
from profit_jax.report import ablation
from profit_jax.train import fork, interrupt, run_directory

# Checkpoints that a run keeps which others begin with: one of every end of a phase, and those
# between.
_ALL = 1000
# Prints a warning, or an empty line, and the number of GPUs.
_GPUS = """
import jax
from profit_jax import devices
devices.require()
print(devices.warning())
print(jax.local_device_count() if jax.default_backend() == "gpu" else 0)
"""


def one_per_gpu(jobs: int | None) -> list[dict[str, str]]:
  """The variables that select the GPU of each run that is trained at once.

  Args:
    jobs: number of runs at once; None is one for each GPU, or one in all without GPUs.

  Raises:
    ConfigError: JAX has no devices.
  """
  # In a process of its own: this one must not take the devices' memory.
  found = subprocess.run([sys.executable, "-c", _GPUS], capture_output=True, text=True, check=False)
  if found.returncode:
    raise ConfigError(found.stderr.strip().splitlines()[-1].partition(": ")[2])
  told, count = found.stdout.splitlines()[-2:]
  if told:
    print(f"WARNING: {told}", flush=True)
  gpus = int(count)
  if gpus:
    return [{"CUDA_VISIBLE_DEVICES": str(index % gpus)} for index in range(jobs or gpus)]
  return [{}] * (jobs or 1)


class Launcher(NamedTuple):
  """How the runs of a grid are started.

  Attributes:
    command: starts one run; the arguments of `profit train` follow it.
    environments: takes `--jobs`, or None. Gives the variables that each of the runs that are
      trained at once adds to the environment.
    poll: seconds between two looks for the checkpoints that waiting runs begin with.
  """

  command: Sequence[str] = (sys.executable, "-m", "profit_jax", "train")
  environments: Callable[[int | None], Sequence[Mapping[str, str]]] = one_per_gpu
  poll: float = 2.0


def main(arguments: Sequence[str] | None = None, launcher: Launcher = Launcher()) -> int:
  """The command line.

  Args:
    arguments: without the program's name; None is those of this process.
    launcher: starts the runs.

  Returns:
    The exit code: 1 where a run failed, 2 for wrong input.
  """
  parser = command.parser("ablate", __doc__)
  parser.add_argument(
    "--config", required=True, help="a file with a function get_grid, as configs/ablation_digits.py"
  )
  parser.add_argument(
    "--workdir", required=True, help="where the runs and the table go, local or remote"
  )
  parser.add_argument(
    "--only",
    action="append",
    default=[],
    metavar="AXIS=LABEL",
    help="a part of the grid; repeatable",
  )
  parser.add_argument("--seeds", type=int, help="runs of every cell, instead of the grid's number")
  parser.add_argument("--jobs", type=int, help="runs at once; by default one on every GPU, or one")
  parser.add_argument(
    "--alone",
    action="store_true",
    help="every run trains all its phases, those in common with others too",
  )
  parser.add_argument("--plan", action="store_true", help="print the commands and train nothing")
  return command.run(parser, arguments, lambda options: _execute(options, launcher))


def _execute(options: argparse.Namespace, launcher: Launcher) -> int:
  grid = ablation.narrowed(ablation.read_grid(options.config), options.only, options.seeds)
  if options.jobs is not None and options.jobs < 1:
    raise ConfigError(f"--jobs={options.jobs} is not allowed: it must be 1 or more.")
  root = paths.opened("--workdir", options.workdir)
  runs = [(labels, seed) for seed in range(grid.seeds) for labels in grid.cells()]
  if not runs:
    raise ConfigError("The grid has no cell: --only, or the grid's keep, leaves nothing.")
  settings = {run: ablation.settings_of(grid, run) for run in runs}
  parents = {} if options.alone else ablation.parents(settings)
  if options.plan:
    for run in runs:
      print(shlex.join(_command(launcher, grid, root, run, parents, fork=run in parents)))
    return 0
  optional.require("plots", "profit ablate")  # now, not when days of training are over
  try:
    failed = train(grid, root, settings, parents, options.jobs, launcher)
  except interrupt.Stopped as stopped:
    raise stopped.told(
      "with runs under way, which have saved and ended; the same command resumes them"
    ) from None
  report(grid, root)
  for (labels, seed), log in failed.items():
    print(f"FAILED: {', '.join(labels)}, seed {seed}: see {log}", file=sys.stderr)
  return 1 if failed else 0


def _command(launcher, grid, root, run, parents, *, fork):
  command = [
    *launcher.command,
    *grid.arguments(*run),
    f"--workdir={ablation.directory_of(root, *run)}",
  ]
  if fork:
    command.append(f"--fork_from={ablation.directory_of(root, *parents[run].run)}")
  if any(parent.run == run for parent in parents.values()):
    command.append(f"--config.checkpoint.keep={_ALL}")
  return command


def train(
  grid: ablation.Grid,
  root: epath.Path,
  settings: Mapping[ablation.Run, Settings],
  parents: Mapping[ablation.Run, ablation.Parent],
  jobs: int | None,
  launcher: Launcher = Launcher(),
) -> dict[ablation.Run, pathlib.Path]:
  """Trains the runs that have no result yet; returns those that failed, and their logs.

  A run with a parent begins when that has trained what both have in common. What can begin does so
  in the order given, seed by seed: a grid that is stopped has whole ones. `jobs` is the number of
  runs at once, as `--jobs`.
  """
  waiting = [run for run in settings if ablation.final_of(root, run) is None]
  count = len(waiting)
  print(f"{len(settings)} runs, {count} of them to be trained.", flush=True)
  if not waiting:
    return {}
  logs = pathlib.Path(root if "://" not in os.fspath(root) else ".") / "logs"
  try:
    logs.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"{logs} cannot be written: {error}. Give another --workdir.") from error
  log_of = {run: logs / f"{ablation.directory_of(root, *run).name}.log" for run in settings}
  slots = list(launcher.environments(jobs))
  failed: dict[ablation.Run, pathlib.Path] = {}
  running: dict[concurrent.futures.Future, ablation.Run] = {}
  with _starter(len(slots)) as start:
    while waiting or running:
      interrupt.check()
      for run in waiting[:]:
        if not slots:
          break
        parent = parents.get(run)
        forks = parent is not None and _is_saved(root, settings, parent)
        # A parent that has ended, well or not, will save no more.
        if forks or parent is None or parent.run not in (*waiting, *running.values()):
          waiting.remove(run)
          line = _command(launcher, grid, root, run, parents, fork=forks)
          running[start(line, slots.pop(0), log_of[run])] = run
      ended, _ = concurrent.futures.wait(
        running, timeout=launcher.poll, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in ended:
        run = running.pop(future)
        code, seconds, environment = future.result()
        slots.append(environment)
        if code:
          failed[run] = log_of[run]
        told = "failed" if code else f"{ablation.final_of(root, run)['top1']:.2f} %"
        done = count - len(waiting) - len(running)
        print(
          f"{done:>4}/{count}  {', '.join(run[0])}, seed {run[1]}: {told}, {seconds:.0f} s",
          flush=True,
        )
  return failed


@contextlib.contextmanager
def _starter(count: int) -> Iterator[Callable[..., concurrent.futures.Future]]:
  """Gives a function that starts a run, `count` of them at once at most.

  Whatever ends the `with`, a signal too, no run outlives it: each is told to save and to end.
  """
  started: list[subprocess.Popen] = []
  with interrupt.graceful(processes=1), concurrent.futures.ThreadPoolExecutor(count) as pool:

    def start(command, environment, log):
      """Gives the exit code, the seconds, and the environment, which is free again."""
      began = time.perf_counter()
      with log.open("a") as opened:
        process = subprocess.Popen(
          command, env={**os.environ, **environment}, stdout=opened, stderr=subprocess.STDOUT
        )
      started.append(process)
      return pool.submit(lambda: (process.wait(), time.perf_counter() - began, environment))

    try:
      yield start
    finally:
      for process in started:
        process.send_signal(interrupt.PREEMPTED)  # does nothing to those that have ended


def _is_saved(root, settings, parent):
  """Whether the parent has a checkpoint at the end of the phases in common."""
  directory = ablation.directory_of(root, *parent.run)
  try:
    examples = run_directory.read_data(directory)["train_examples"]
    end = fork.ends(settings[parent.run], parent.phases, examples)[-1]
    return end in checkpoints.saved_numbers(directory / "checkpoints")
  # It has not begun, or what is there cannot be read: then nobody begins with it.
  except ConfigError:
    return False


def report(grid: ablation.Grid, root: epath.Path) -> None:
  """Writes and prints the table of what has ended."""
  cells = ablation.read_cells(grid, root)
  compared = ablation.differences(grid, cells)
  text = ablation.markdown(grid, cells, compared)
  try:
    (root / "ablation.md").write_text(text)
    (root / "ablation.json").write_text(
      json.dumps(ablation.to_json(grid, cells, compared), indent=1) + "\n"
    )
    ablation.plot(grid, cells, root / "ablation.png")
  except OSError as error:
    raise ConfigError(
      f"--workdir {root} cannot be written: {error}. The runs are kept; make room and repeat."
    ) from error
  print(text, end="")
  print(f"Table and plot: {root}/ablation.md, ablation.json, ablation.png")
