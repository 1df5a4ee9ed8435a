"""Puts a run together: settings -> plan -> data, model, teacher -> loop -> reports. `main.py` reads
the flags.
"""

import contextlib
import dataclasses
import functools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from profit_jax import checkpoints, data, devices, distributed, optional, paths, schedule
from profit_jax.cli import export
from profit_jax.config import ConfigError, Settings, parse
from profit_jax.export import formats, verify
from profit_jax.export.integer.difference import IntegerLimits
from profit_jax.models import REGISTRY, check, student_spec
from profit_jax.nn.spec import ModelSpec
from profit_jax.report import console
from profit_jax.report import result as result_files
from profit_jax.train import fork, published, run_directory, run_state, start, trainer
from profit_jax.train.evaluate import evaluate
from profit_jax.train.mesh import default_dtype, make_mesh
from profit_jax.train.observer import Observer
from profit_jax.train.packing import pack_variables
from profit_jax.train.programs import Programs
from profit_jax.train.progress import Progress, initial_weights, summary
from profit_jax.train.run import Run

_NOT_KEPT = "Error (writing|reading) persistent compilation cache entry"  # as JAX warns
MODES = ("train", "eval", "plan", "export")


class Cluster(NamedTuple):
  """How several processes find each other, where nothing tells by itself; see
  `distributed.initialize`.
  """

  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  heartbeat_seconds: int = 100


class Hooks(NamedTuple):
  """What a caller from Python adds to a run in mode train.

  Attributes:
    callbacks: told of every event, in every process.
    clock: in seconds; decides when `checkpoint.minutes` are over.
    devices: that the run uses, or None for all.
    plots: whether pictures are drawn at the end, for the report and for TensorBoard. It takes some
      seconds, which many short runs may want to save.
  """

  callbacks: Sequence[Observer] = ()
  clock: Callable[[], float] = time.monotonic
  devices: Sequence[jax.Device] | None = None
  plots: bool = True


class Exports(NamedTuple):
  """What mode export writes.

  Attributes:
    formats: by name.
    limits: that integer files must reach.
  """

  formats: Sequence[str] = formats.DEFAULT
  limits: IntegerLimits = IntegerLimits()


def main(
  config: ml_collections.ConfigDict | None,
  workdir: str,
  mode: str,
  images_per_second: float | None = None,
  cluster: Cluster = Cluster(),
  exports: Exports = Exports(),
  fork_from: str = "",
  hooks: Hooks = Hooks(),
) -> None:
  """Runs one mode.

  Args:
    config: from `--config`; in modes eval and export None takes the run's own `config.json`.
    workdir: the run's directory; mode plan needs none, nor does mode eval with `init.weights`,
      which it evaluates where there is no run.
    mode: one of `MODES`.
    images_per_second: of training; mode plan then prints hours.
    cluster: where the processes meet.
    exports: what mode export writes.
    fork_from: the directory of a run whose first phases a new run in mode train begins with; see
      `fork`.
    hooks: callbacks and more for mode train.

  Raises:
    ConfigError: anything that the user can mend.
  """
  exports = exports._replace(formats=formats.named(list(exports.formats)))
  settings, directory, only_file = _read(config, workdir, mode, fork_from)
  phases = schedule.plan(settings)
  if mode == "plan":
    print_plan(settings, phases, images_per_second)
    return
  distributed.initialize(*cluster)
  require_devices()
  with kept_programs(settings):
    settings, _ = _with_published(settings, directory if workdir else None, fork_from)
    settings = _with_dtype(settings, directory if workdir else None, fork_from, hooks.devices)
    distributed.require_equal("settings", identity(settings, mode, workdir, fork_from))
    if only_file:
      if workdir:
        _say(f"{directory} holds no run: this evaluates {settings.init.weights}.")
      evaluate_file(settings, phases)
    elif mode == "eval":
      run_eval(settings, phases, directory)
    elif mode == "export":
      run_export(settings, phases, directory, exports)
    else:
      with distributed.peers_needed():
        train(settings, directory, fork_from, hooks)


def _read(config, workdir: str, mode: str, fork_from: str) -> tuple[Settings, epath.Path, bool]:
  """The settings, the run's directory, and whether only the file in `init.weights` is evaluated."""
  if mode not in MODES:
    raise ConfigError(f"--mode={mode} is not allowed: it must be one of {', '.join(MODES)}.")
  if fork_from and mode != "train":
    raise ConfigError(
      f"--fork_from={fork_from} is not allowed with --mode={mode}: only training begins with "
      "another run."
    )
  directory = paths.opened("--workdir", workdir) if workdir else epath.Path()
  if config is None and mode not in ("eval", "export"):
    raise ConfigError(
      "--config is missing: give a configuration file, as --config configs/digits_w4.py."
    )
  if config is None:
    _require_workdir(workdir, mode)
    settings, only_file = run_directory.read_settings(directory), False
  else:
    settings = parse(config, REGISTRY)
    has_run = workdir and run_directory.is_begun(directory)
    only_file = mode == "eval" and bool(settings.init.weights) and not has_run
  if mode != "plan" and not only_file:
    _require_workdir(workdir, mode)
  check(settings)
  return settings, directory, only_file


def _with_dtype(
  settings: Settings,
  workdir: epath.Path | None,
  fork_from: str,
  devices: Sequence[jax.Device] | None,
) -> Settings:
  """The settings with a `train.dtype` that is not auto: the run's, where it has begun; that of the
  run that it begins with; or the platform's.
  """
  if settings.train.dtype != "auto":
    return settings
  if workdir is not None and run_directory.is_begun(workdir):
    return settings.with_dtype(run_directory.read_settings(workdir).train.dtype)
  if fork_from:
    origin = paths.opened("--fork_from", fork_from)
    if run_directory.is_begun(origin):
      return settings.with_dtype(run_directory.read_settings(origin, "--fork_from").train.dtype)
  return settings.with_dtype(default_dtype((devices or jax.devices())[0].platform))


def _begun(flag: str, path: str) -> tuple[Settings, tuple[str, ...] | None] | None:
  """The settings of a run that the first process sees, and the fields that it took from what is
  published of its weights; None where there is no run yet.
  """
  origin = paths.opened(flag, path)
  if not distributed.on_first_host(lambda: run_directory.is_begun(origin)):
    return None
  return distributed.on_all_hosts(
    lambda: (
      run_directory.read_settings(origin, flag),
      run_directory.read_published(origin, flag),
    )
  )


def _with_published(
  settings: Settings, workdir: epath.Path | None, fork_from: str
) -> tuple[Settings, tuple[str, ...] | None]:
  """The settings with what is published of their weights, and the fields that were taken; a run
  keeps what it began with.
  """
  named = settings.init.weights or settings.teacher.weights
  if not named or settings.init.published_settings == "compare":
    return settings, None
  for flag, path in (("--workdir", workdir), ("--fork_from", fork_from)):
    begun = path and _begun(flag, os.fspath(path))
    if begun:
      return published.as_begun(settings, *begun), begun[1]
  applied = distributed.on_all_hosts(lambda: published.apply(settings))
  for line in applied.lines:
    _say(line)
  return applied.settings, applied.fields


def identity(settings: Settings, mode: str, workdir: str, fork_from: str) -> str:
  """The text in which all processes of a run must agree; where data and programs lie may differ."""
  numbers = json.dumps(run_directory.of_all_processes(settings.to_dict()), sort_keys=True)
  return f"{mode} {workdir} {fork_from} {numbers}"


def print_plan(
  settings: Settings, phases: tuple[schedule.Phase, ...], images_per_second: float | None
) -> None:
  """Prints the phases; reads the data only where its size is not known otherwise."""
  if images_per_second is not None and not 0 < images_per_second < float("inf"):
    raise ConfigError(
      f"--images_per_second={images_per_second} is not allowed: it must be above 0 and finite."
    )
  batch, info = settings.train.batch_size, data.info(settings)
  print(
    schedule.format_table(
      phases, info.train_examples // batch, images_per_second and images_per_second / batch
    )
  )


def require_devices() -> None:
  """Raises ConfigError where JAX has no devices; warns where it leaves an accelerator idle."""
  devices.require()
  if told := devices.warning():
    _say(f"WARNING: {told}")


def _say(line: str) -> None:
  if distributed.is_first():
    print(line)


def _load_data(settings: Settings, trains: bool = True) -> data.Source:
  shard = data.HostShard(jax.process_index(), jax.process_count())
  source = distributed.on_all_hosts(lambda: data.load(settings, shard, trains=trains))
  distributed.require_equal("data", source.fingerprint())
  return source


def _require_workdir(workdir: str, mode: str) -> None:
  if not workdir:
    either = (
      " (or --config and --config.init.weights=FILE, to evaluate that)" if mode == "eval" else ""
    )
    raise ConfigError(
      f"--workdir is missing: --mode={mode} needs the directory of a run, local or gs://{either}."
    )


def train(
  settings: Settings, workdir: epath.Path, fork_from: str = "", hooks: Hooks = Hooks()
) -> dict[str, Any] | None:
  """Trains the run in `workdir`, or resumes it.

  Args:
    settings: validated.
    workdir: the run's directory.
    fork_from: the run whose first phases a new run begins with, or "".
    hooks: callbacks and more.

  Returns:
    What `result.json` holds, in the first process; None in the others.
  """
  settings, taken = _with_published(settings, workdir, fork_from)
  settings = _with_dtype(settings, workdir, fork_from, hooks.devices)
  phases = schedule.plan(settings)
  mesh = make_mesh(settings, hooks.devices)
  source = _load_data(settings)
  info = source.info
  screen = Console(highlight=False, markup=False, quiet=not distributed.is_first())
  # Closes in reverse order: the last checkpoints are written whatever else fails.
  with contextlib.ExitStack() as closing:
    # A fresh directory is claimed only when what the run starts from has been read: files of
    # weights, or another run.
    begun = distributed.on_first_host(lambda: run_directory.is_begun(workdir))
    identity = run_directory.identity_of(settings, source, taken)
    writer = _claim(workdir, settings, identity, closing) if begun else None
    saved = run_state.opened(writer and writer.read_newest(lambda text: _warn(screen, text)))
    if saved is None and fork_from:
      origin = distributed.on_all_hosts(lambda: paths.opened("--fork_from", fork_from))
      saved = fork.checkpoint(settings, source, origin, lambda text: _warn(screen, text))
      writer = writer or _claim_fresh(workdir, settings, identity, closing)
      run_state.copy(writer, saved)
      screen.print(
        f"Up to the end of phase {saved.progress.forked_phases}, this is the run in {fork_from}."
      )
    progress = saved and saved.progress
    student = distributed.on_all_hosts(
      lambda: start.load_student(settings, info.num_classes, progress)
    )
    teacher = distributed.on_all_hosts(
      lambda: start.load_teacher(settings, student, info.num_classes, progress)
    )
    writer = writer or _claim_fresh(workdir, settings, identity, closing)
    screen.print(f"{schedule.summary_line(phases)}; {workdir}")
    if settings.from_scratch:
      screen.print("The student starts from random weights (config.init.weights is empty).")
    for warning in start.weight_warnings(settings, student, teacher):
      _warn(screen, warning)
    watchers = _watchers(screen, info, workdir, hooks.plots) if distributed.is_first() else []
    end = trainer.train(
      Run(settings, phases, source, student, teacher),
      writer,
      saved,
      mesh,
      [*hooks.callbacks, *watchers],
      hooks.clock,
    )
    if not distributed.is_first():
      return None
    result = result_files.write_report(
      workdir, settings, phases, end.progress, end.best["params"], plots=hooks.plots
    )
  console.print_table(screen, result)
  events = f"   TensorBoard: tensorboard --logdir {workdir}"
  without_events = optional.missing("tensorboard", "Writing TensorBoard events")
  screen.print(f"Report: {workdir / 'report.md'}{'' if without_events else events}")
  return result


def _claim_fresh(
  workdir: epath.Path,
  settings: Settings,
  identity: run_directory.Identity,
  closing: contextlib.ExitStack,
) -> checkpoints.Writer:
  """`_claim`, of a directory in which no run was a moment ago."""
  writer = _claim(workdir, settings, identity, closing)
  if checkpoints.saved_numbers(workdir / "checkpoints"):
    raise ConfigError(
      f"--workdir {workdir}: another run began there meanwhile. The same command goes on from its "
      "end."
    )
  return writer


def _claim(
  workdir: epath.Path,
  settings: Settings,
  identity: run_directory.Identity,
  closing: contextlib.ExitStack,
) -> checkpoints.Writer:
  """Makes the directory this run's, until `closing`; gives the writer of its checkpoints."""
  return trainer.claim(workdir, identity, settings.checkpoint.keep, closing)


def _warn(screen: Console, text: str) -> None:
  # Whole in a log file, where a path is not cut in two.
  screen.print(f"WARNING: {text}", style="yellow", soft_wrap=True)


@contextlib.contextmanager
def kept_programs(settings: Settings) -> Iterator[None]:
  """Inside, JAX keeps compiled programs in `compilation_cache`; afterwards where it did before.

  Where that cannot be written, it says so and keeps none; those that are there are used.
  """
  before = jax.config.jax_compilation_cache_dir
  directory, told = before, False
  if settings.compilation_cache:
    given = os.path.expanduser(settings.compilation_cache)
    place = paths.opened("config.compilation_cache =", given)
    directory = os.fspath(place)
    try:
      place.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # remote file systems have their own
      _say(
        f"WARNING: config.compilation_cache = {settings.compilation_cache!r} cannot be written "
        f"({error}): compiled programs are not kept."
      )
      directory = before
    else:
      told = "://" not in directory and not os.access(directory, os.W_OK)
      if told:
        _say(
          f"WARNING: config.compilation_cache = {settings.compilation_cache!r} is read-only: "
          "compiled programs in it are used, and new ones are not kept."
        )
  _set_cache_directory(directory)
  try:
    with warnings.catch_warnings():
      # A full disk: JAX tells it, and goes on. It is no error under `python -W error` either.
      warnings.filterwarnings("default", _NOT_KEPT, UserWarning)
      if told:
        warnings.filterwarnings("ignore", _NOT_KEPT, UserWarning)
      yield
  finally:
    _set_cache_directory(before)


def _set_cache_directory(directory: str | None) -> None:
  if directory != jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()  # JAX reads the setting at its first compilation only


def _watchers(screen, info, workdir, pictures):
  # Here, because TensorFlow takes seconds to import, and a wrong setting should not wait for it.
  from profit_jax.report.tensorboard import TensorBoardObserver

  warn = functools.partial(_warn, screen)
  watchers = [console.ConsoleObserver(screen, info.num_classes)]
  without_plots = optional.missing("plots", "Drawing plots") if pictures else ""
  without_events = optional.missing("tensorboard", "Writing TensorBoard events")
  for text in filter(None, (without_plots, without_events)):
    warn(f"{text}. Training continues without.")
  if not without_events:
    watchers.append(TensorBoardObserver(os.fspath(workdir), warn, pictures=pictures))
  return watchers


class Trained(NamedTuple):
  """A run's best checkpoint at the plan's last bits, its model and data, and the compiled steps."""

  source: data.Source
  spec: ModelSpec
  programs: Programs
  progress: Progress
  variables: Any


@contextlib.contextmanager
def best_checkpoint(settings: Settings, workdir: epath.Path) -> Iterator[Trained]:
  """Opens a run whose best checkpoint is at the plan's last bits; raises as `run_eval`."""
  run_directory.read_config(workdir)  # before the data, which takes longer
  mesh, source = make_mesh(settings), _load_data(settings)
  distributed.on_first_host(
    lambda: run_directory.require_same_run(workdir, run_directory.identity_of(settings, source))
  )
  spec = student_spec(settings, source.info.num_classes)
  programs = Programs(settings, source.info, spec, None, mesh)
  try:
    screen = Console(highlight=False, markup=False, quiet=not distributed.is_first(), stderr=True)
    found = run_state.best_variables(
      workdir / "checkpoints", spec.shapes, lambda text: _warn(screen, text)
    )
    if found is None:
      raise run_directory.no_checkpoint(workdir)
    yield Trained(source, spec, programs, *found)
  finally:
    programs.close()


def run_eval(
  settings: Settings, phases: tuple[schedule.Phase, ...], workdir: epath.Path
) -> dict[str, float]:
  """Evaluates a run's best checkpoint at the plan's last bits and prints top-1 and top-5."""
  with best_checkpoint(settings, workdir) as best:
    return _evaluate_quantized(settings, phases, best.programs, best.source, best.variables)


def run_export(
  settings: Settings,
  phases: tuple[schedule.Phase, ...],
  workdir: epath.Path,
  exports: Exports,
) -> None:
  """Writes a run's best checkpoint at the plan's last bits as integer model files.

  Args:
    settings: of the run.
    phases: of its plan.
    workdir: its directory.
    exports: what is written.

  Raises:
    ConfigError: anything that the user can mend.
    NotEqual: as `export.export`.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      f"--mode=export runs in one process, not in {jax.process_count()}. Start it on one machine "
      "alone."
    )
  if None in (phases[-1].weight_bits, phases[-1].act_bits):
    bits = schedule.bits_name(phases[-1].weight_bits, phases[-1].act_bits)
    raise ConfigError(
      f"--workdir {workdir}: the plan ends with {bits}, and only a run whose weights and "
      "activations are both quantized "
      f"can be exported. Train with config.plan.weight_bits and config.plan.act_bits."
    )
  for name in exports.formats:
    formats.load(name)  # now, not after the evaluation: a package may be missing
  with trained_model(settings, phases, workdir) as trained:
    screen = Console(highlight=False, markup=False)
    export.export(trained, exports.formats, workdir / "export", screen, exports.limits)


@contextlib.contextmanager
def trained_model(
  settings: Settings, phases: tuple[schedule.Phase, ...], workdir: epath.Path
) -> Iterator[verify.TrainedModel]:
  """Evaluates a run's best checkpoint at the plan's last bits, which files must equal; raises as
  `run_eval`.
  """
  with best_checkpoint(settings, workdir) as best:
    evaluated = _evaluate_quantized(settings, phases, best.programs, best.source, best.variables)
    result = summary(best.progress, phases)
    yield verify.TrainedModel(
      settings=settings,
      width=settings.model.width,
      train_examples=best.source.info.train_examples,
      source=best.source,
      spec=best.spec,
      variables=best.variables,
      normalization=data.normalization(settings.data.normalization, best.source.info),
      weight_bits=phases[-1].weight_bits,
      act_bits=phases[-1].act_bits,
      preparation=data.eval_preparation(settings),
      phases=result["phases"],
      weights=result["final"]["weights"],
      full_precision_top1=result["final"]["full_precision_top1"],
      top1=evaluated["top1"],
      initial_weights=initial_weights(settings, best.progress),
    )


def evaluate_file(settings: Settings, phases: tuple[schedule.Phase, ...]) -> None:
  """Evaluates `init.weights`: in full precision, and at the plan's last bits if it has the
  quantizers' scalars.
  """
  # The training's batch and data do not matter.
  train = dataclasses.replace(
    settings.train, batch_size=settings.train.eval_batch_size, accumulation_steps=1
  )
  settings = dataclasses.replace(settings, train=train)
  mesh, source = make_mesh(settings), _load_data(settings, trains=False)
  classes = source.info.num_classes
  student, teacher = start.load_student(settings, classes), start.Teacher(None, None, None)
  screen = Console(highlight=False, markup=False, quiet=not distributed.is_first())
  for warning in start.weight_warnings(settings, student, teacher):
    _warn(screen, warning)
  programs = Programs(
    settings,
    source.info,
    student.spec,
    None,
    mesh,
    student.file_spec,
  )
  try:
    variables = programs.placement.replicate(pack_variables(student.make(), student.spec))
    scores = start.evaluate_start(programs, source, settings, student, teacher, variables)
    console.print_start(screen, scores, classes)
    if student.loaded.quantizers:
      _evaluate_quantized(settings, phases, programs, source, student.make())
  finally:
    programs.close()


def _evaluate_quantized(settings, phases, programs, source, variables) -> dict[str, float]:
  """Evaluates variables at the plan's last bits and prints a line."""
  bits = {"weight_bits": phases[-1].weight_bits, "act_bits": phases[-1].act_bits}
  scores, _ = evaluate(
    programs,
    source,
    settings,
    programs.placement.replicate(pack_variables(variables, programs.student)),
    **bits,
  )
  name = schedule.bits_name(**bits)
  _say(
    f"{name}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % on "
    f"{scores['examples']:.0f} images"
  )
  return scores
