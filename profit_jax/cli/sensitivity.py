"""Measures where bits matter: profit sensitivity --workdir RUN --bits=2,3,4.

For the weights and the inputs of each layer alone: the change of the loss and top-1 where they fall
to fewer bits, with their intervals refitted. With a budget, also the bits of all layers that a
greedy choice assigns, as options to train with.
"""

import argparse
import json
import math
import os
import shlex
from collections.abc import Sequence
from typing import Any

from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from profit_jax import data, distributed, optional, paths, schedule
from profit_jax.cli import app, command
from profit_jax.config import ConfigError, PlanSettings
from profit_jax.models import check
from profit_jax.sensitivity import (
  Assignment,
  Budget,
  LayerSensitivity,
  MeasuredModel,
  Reduction,
  Sensitivity,
  assign_bits,
  measure,
)
from profit_jax.sensitivity.measure import IMAGES
from profit_jax.train import run_directory


def table(found: Sensitivity) -> Table:
  """What was measured, the most sensitive parts first."""
  made = Table(box=box.SIMPLE)
  made.add_column("layer", no_wrap=True)
  made.add_column("reduced")
  made.add_column("bits", justify="right")
  for what in ("loss", "top-1"):
    for width in found.bits:
      made.add_column(f"{what} at {width}", justify="right", no_wrap=True)
  for part in sorted(found.parts, key=_largest, reverse=True):
    reductions = [
      next((f for f in part.reductions if f.bits == width), None) for width in found.bits
    ]
    cells = [_shown(reduction, what) for what in ("loss", "top1") for reduction in reductions]
    made.add_row(_named(part), part.side, str(part.bits), *cells)
  return made


def _print_whole(screen: Console, made: Table) -> None:
  """Prints a table that may be wider than the screen."""
  needed = screen.measure(made, options=screen.options.update(width=1000)).maximum
  screen.width = max(screen.width, needed)
  screen.print(made)


def _largest(part: LayerSensitivity) -> float:
  """The loss at the fewest bits; of parts that did not fall, none."""
  return part.reductions[0].loss if part.reductions else -math.inf


def _named(part: LayerSensitivity) -> str:
  others = len(part.layers) - 1
  return part.layers[0] + (f" and {others} more" if others else "")


def _shown(reduction: Reduction | None, what: str) -> str:
  if reduction is None:
    return "-"
  return f"{reduction.loss:+.4f}" if what == "loss" else f"{reduction.top1:+.2f}"


def options_of(assigned: Assignment, plan: PlanSettings) -> list[str]:
  """The command line's options of a training with these bits.

  Args:
    assigned: the bits.
    plan: of the run.
  """
  weight_bits = _ladder(plan.weight_bits, assigned.weight_bits)
  fields: dict[str, Any] = {
    "plan.weight_bits": weight_bits,
    "plan.act_bits": _ladder(plan.act_bits, assigned.act_bits),
  }
  # Both must be bits that the plan reaches.
  reached = weight_bits if plan.progressive else weight_bits[-1:]
  if plan.profit and weight_bits and not set(plan.profit_bits) <= {weight_bits[-1]}:
    fields["plan.profit_bits"] = weight_bits[-1:]
  if not set(plan.refit_bits) <= set(reached):
    fields["plan.refit_bits"] = tuple(b for b in plan.refit_bits if b in reached)
  fields["quant.rules"] = assigned.rules
  return [f"--config.{name}={_quoted(value)}" for name, value in fields.items()]


def _ladder(bits: Sequence[int], last: int | None) -> tuple[int, ...]:
  """The plan's bits down to the last."""
  return () if last is None else (*(width for width in bits if width > last), last)


def _quoted(value: Any) -> str:
  return shlex.quote(_literal(value))


def _literal(value: Any) -> str:
  """As Python reads it, without the single quotes that a shell reads."""
  if isinstance(value, tuple):
    return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
  return json.dumps(value) if isinstance(value, str) else repr(value)


def _print_assignment(
  screen: Console, assigned: Assignment, budget: str, options: Sequence[str]
) -> None:
  screen.print(
    f"Budget {budget}: kernels of {assigned.bytes:,} bytes (as measured {assigned.full_bytes:,}), "
    f"{assigned.bops:,} bit operations an image (as measured {assigned.full_bops:,}); the single "
    f"changes of the loss add up to {assigned.loss:+.4f} before training.",
    soft_wrap=True,
  )
  screen.print("Train with:", soft_wrap=True)
  for option in options:
    screen.print(f"  {option}", soft_wrap=True)


def _write(path: epath.Path, content: dict[str, Any]) -> None:
  try:
    path.write_text(json.dumps(content, indent=1) + "\n")
  except OSError as error:
    raise ConfigError(f"{path} cannot be written: {error}.") from error


def run(options: argparse.Namespace) -> None:
  """Measures, prints and writes; raises ConfigError where the user can mend something."""
  if distributed.started_tasks(os.environ) > 1:
    raise ConfigError("profit sensitivity runs in one process. Start it on one machine alone.")
  widths, budget = _widths(options.bits), _budget(options)
  workdir = paths.opened("--workdir", options.workdir)
  settings = run_directory.read_settings(workdir)
  check(settings)
  app.require_devices()
  screen = Console(highlight=False, markup=False)
  last = schedule.plan(settings)[-1]
  with app.kept_programs(settings), app.best_checkpoint(settings, workdir) as best:
    model = MeasuredModel(
      settings=settings,
      source=best.source,
      spec=best.spec,
      variables=best.variables,
      weight_bits=last.weight_bits,
      act_bits=last.act_bits,
      normalization=data.normalization(settings.data.normalization, best.source.info),
    )
    found = measure(
      model, widths, options.images, tell=lambda text: screen.print(text, soft_wrap=True)
    )
  scores = found.scores
  screen.print(
    f"{schedule.bits_name(last.weight_bits, last.act_bits)}: loss {scores['loss']:.4f}, top-1 "
    f"{scores['top1']:.2f} % of {scores['examples']:.0f} images. What changes where one part "
    "alone falls:",
    soft_wrap=True,
  )
  _print_whole(screen, table(found))
  content = {"workdir": str(workdir), **found.to_dict(), "assignment": None}
  try:
    if budget is not None:
      assigned = assign_bits(found, *budget)
      plan = options_of(assigned, settings.plan)
      content["assignment"] = {**assigned.to_dict(), "budget": dict([budget]), "options": plan}
      _print_assignment(screen, assigned, f"{budget[1]:,} {budget[0]}", plan)
  finally:
    _write(workdir / "sensitivity.json", content)
    _draw(found, workdir / "plots" / "sensitivity.png", screen)


def _draw(found: Sensitivity, path: epath.Path, screen: Console) -> None:
  written = f"Written: {path.parent.parent / 'sensitivity.json'}"
  if without := optional.missing("plots", "Drawing plots"):
    screen.print(f"{written}. {without}", soft_wrap=True)
    return
  from profit_jax.report import plots  # here, because it needs matplotlib

  plots.plot_sensitivity(found, path)
  screen.print(f"{written}, {path}", soft_wrap=True)


def _widths(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(part) for part in text.split(","))
  except ValueError:
    raise ConfigError(
      f"--bits={text} is not allowed: it must be widths from 2 to 8, as --bits=2,3,4."
    ) from None


def _budget(options: argparse.Namespace) -> tuple[Budget, int] | None:
  names: tuple[Budget, ...] = ("bytes", "bops")
  given = [(name, getattr(options, f"budget_{name}")) for name in names]
  given = [(name, value) for name, value in given if value is not None]
  if len(given) > 1:
    raise ConfigError("--budget_bytes and --budget_bops are not allowed together. Give one.")
  for name, value in given:
    if value < 1:
      raise ConfigError(f"--budget_{name}={value} is not allowed: it must be 1 or more.")
  return given[0] if given else None


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = command.parser("sensitivity", __doc__)
  parser.add_argument("--workdir", required=True, metavar="RUN", help="a run that has ended")
  parser.add_argument(
    "--bits", default="2,3,4", help="widths to fall to, 2 to 8; 2,3,4 if left out"
  )
  parser.add_argument(
    "--images",
    type=int,
    default=IMAGES,
    help="evaluation images at most, spread over the set (%(default)s)",
  )
  parser.add_argument(
    "--budget_bytes", type=int, help="of all kernels, as exported files hold them"
  )
  parser.add_argument("--budget_bops", type=int, help="bit operations for an image")
  return command.run(parser, arguments, run)
