"""Puts a run together: settings -> plan -> data, model, teacher -> loop -> reports. `main.py` reads the flags."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from etils import epath
from rich.console import Console

from profit_jax import data, plan
from profit_jax.models import REGISTRY, build, init_variables, variable_shapes
from profit_jax.report import console, files
from profit_jax.settings import ConfigError, Settings, parse
from profit_jax.train.checkpoint import Checkpoints
from profit_jax.train.evaluate import evaluate
from profit_jax.train.loop import Loop
from profit_jax.train.observer import Observers
from profit_jax.train.programs import Programs, make_mesh
from profit_jax.weights.load import load_variables

MODES = ("train", "eval", "plan")


def main(config: ml_collections.ConfigDict | None, workdir: str, mode: str) -> None:
  """Runs one mode.

  Args:
    config: from `--config`; in mode eval None takes the run's own `config.json`.
    workdir: the run's directory; mode plan needs none.
    mode: one of `MODES`.

  Raises:
    ConfigError: anything that the user can mend.
  """
  if mode not in MODES:
    later = " (export is not part of this release)" if mode == "export" else ""
    raise ConfigError(f"--mode={mode} is not allowed{later}: it must be one of {', '.join(MODES)}.")
  if mode != "plan" and not workdir:
    raise ConfigError(f"--workdir is missing: --mode={mode} needs the directory of a run, local or gs://.")
  directory = epath.Path(os.path.abspath(workdir) if workdir and "://" not in workdir else workdir)
  if config is None:
    if mode != "eval":
      raise ConfigError("--config is missing: give a configuration file, as --config configs/digits_w4.py.")
    config = ml_collections.ConfigDict(files.read_config(directory))
  settings = parse(config, REGISTRY, data.SOURCES)
  facts = data.check_sizes(settings)
  phases = plan.plan(settings)
  if mode == "plan":
    print(plan.format_table(phases, facts.train_examples // settings.train.batch_size))
    return
  if settings.compilation_cache:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(settings.compilation_cache))
  if mode == "eval":
    run_eval(settings, phases, directory)
  else:
    train(settings, phases, directory)


def train(settings: Settings, phases: tuple[plan.Phase, ...], workdir: epath.Path) -> dict[str, Any]:
  """Trains, or goes on with, the run in `workdir`; returns what `result.json` holds."""
  mesh = make_mesh(settings)
  source = data.load(settings)
  facts = source.facts
  model = build(settings.model.name, settings.model, facts.num_classes)
  first_variables = _first_variables(settings, model)
  teacher_model, teacher = _teacher(settings, model, facts.num_classes, first_variables)
  files.claim_workdir(workdir, settings)

  # Here, because TensorFlow takes seconds to import, and a wrong setting should not wait for it.
  from profit_jax.report.tensorboard import TensorBoardObserver

  screen = Console(highlight=False)
  screen.print(f"{plan.summary_line(phases)}; {workdir}")
  with contextlib.ExitStack() as closing:  # in reverse: the last checkpoints are written whatever else fails
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
    closing.callback(checkpoints.close)
    programs = Programs(settings, facts, model, teacher_model, mesh)
    closing.callback(programs.close)
    observer = Observers([console.ConsoleObserver(screen), TensorBoardObserver(os.fspath(workdir))])
    closing.callback(observer.close)
    loop = Loop(
      settings=settings,
      phases=phases,
      source=source,
      programs=programs,
      checkpoints=checkpoints,
      observer=observer,
      model=model,
      first_variables=first_variables,
      teacher=teacher,
    )
    progress = loop.run()
    best = checkpoints.restore_best(variable_shapes(model, settings.data.image_size))
  result = files.write_report(workdir, settings, phases, progress, best["params"])
  console.print_table(screen, result)
  screen.print(f"Report: {workdir / 'report.md'}   TensorBoard: tensorboard --logdir {workdir}")
  return result


def run_eval(settings: Settings, phases: tuple[plan.Phase, ...], workdir: epath.Path) -> dict[str, float]:
  """Evaluates a run's best checkpoint at the plan's last bits and prints top-1 and top-5."""
  files.read_config(workdir)  # before the next line, which would make a run of an empty directory
  files.claim_workdir(workdir, settings)
  mesh, source = make_mesh(settings), data.load(settings)
  model = build(settings.model.name, settings.model, source.facts.num_classes)
  programs = Programs(settings, source.facts, model, None, mesh)
  checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
  try:
    best = checkpoints.restore_best(variable_shapes(model, settings.data.image_size))
    if best is None:
      raise ConfigError(f"--workdir {workdir} has no checkpoint at the plan's last bits yet. Go on training first.")
    scores, _ = evaluate(programs, source, settings, phases[-1], programs.replicate(best))
  finally:
    programs.close()
    checkpoints.close()
  bits = plan.bits_name(phases[-1].weight_bits, phases[-1].act_bits)
  print(f"{bits}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % on {scores['examples']:.0f} images")
  return scores


def _first_variables(settings: Settings, model: Any) -> Callable[[], Any]:
  """Makes the student's first variables: random ones when called, those of a file read (and checked) now."""
  size = settings.data.image_size
  if settings.from_scratch:
    return lambda: init_variables(model, jax.random.key(settings.seed), size)
  loaded = load_variables(settings.init.weights, settings.model.name, variable_shapes(model, size))
  return lambda: loaded


def _teacher(settings: Settings, model: Any, num_classes: int, first_variables: Callable[[], Any]) -> tuple[Any, Any]:
  """The teacher's module and variables; None where there is none, or none yet."""
  teacher = settings.teacher
  if teacher.model == "none":
    return None, None
  if teacher.model == "self":
    # Its dropout would only add noise to what it teaches.
    return model.clone(dropout=0.0), None if settings.from_scratch else first_variables()
  other = build(teacher.model, settings.model, num_classes, width=teacher.width, activation=teacher.activation, dropout=0.0)
  return other, load_variables(teacher.weights, teacher.model, variable_shapes(other, settings.data.image_size))
