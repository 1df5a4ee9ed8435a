"""Prints runs side by side: profit compare RUN RUN...; what they ended with, and the
settings that differ.

With --plot FILE.png also draws their accuracy and their instability over the epochs; runs that
differ in their seed alone are one group, with its mean.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from profit_jax import devices, paths
from profit_jax.cli import command
from profit_jax.config import ConfigError
from profit_jax.schedule import Phase, bits_name, plan, summary_line
from profit_jax.train import run_directory, run_state
from profit_jax.train.progress import Progress, summary


def read(run: str) -> tuple[dict[str, Any], dict[str, str]]:
  """A run's settings, flat, by field; and what it ended with, as text by row of the table.

  Raises:
    ConfigError: no run, or one that has not ended.
  """
  directory = paths.opened("The run", run)
  config = run_directory.read_config(directory, "The run")
  if "library" in config:
    return _read_library(directory, config)
  settings = run_directory.read_settings(directory, "The run")
  result = _result(directory)
  environment = result["environment"]
  rows = {
    "model": f"{result['model']}, width {settings.model.width:g}",
    "data": f"{result['dataset']}, {settings.data.image_size} pixels",
    "seed": str(result["seed"]),
    "plan": summary_line(plan(settings)),
    "teacher": settings.teacher.model,
    **_ended_with(result),
    "device": f"{environment['devices']} x {environment['device']}",
    "jax": environment["packages"]["jax"],
    "commit": (environment.get("commit") or "-")[:12],
  }
  return _flat(settings.to_dict()), rows


def _ended_with(result: dict[str, Any]) -> dict[str, str]:
  """Rows of what `progress.summary` knows."""
  final, phases = result["final"], result["phases"]
  full = final["full_precision_top1"]
  return {
    "bits": bits_name(final["weight_bits"], final["act_bits"]),
    "other bits": _other_bits(result),
    "top-1": f"{final['top1']:.2f} %",
    "top-5": f"{final['top5']:.2f} %",
    "full precision": "-" if full is None else f"{full:.2f} %",
    "difference": "-" if full is None else f"{final['top1'] - full:+.2f}",
    "weights": f"{final['weights']}, of {final['examples']} images",
    "minutes": f"{sum(phase['seconds'] for phase in phases) / 60:.1f}",
    "most unstable": result["aiwq"][0]["layer"] if result["aiwq"] else "-",
  }


def _read_library(
  directory: epath.Path, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
  """As `read`, of a run of `profit_jax.Trainer`, which writes no `result.json`."""
  fields = _comparable(config)
  try:
    phases = tuple(Phase(**phase) for phase in config["schedule"])
    dtype, *shape = config["images"]
    model, seed, teacher = config["model"], config["seed"], config["teacher"]
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f"{directory / 'config.json'} is damaged, or of another version: {error!r}."
    ) from error
  progress = _progress(directory, lambda text: None)
  if len(progress.records) < len(phases):
    raise ConfigError(
      f"{directory} has not ended: {len(progress.records)} of {len(phases)} phases are done. Train "
      "it to its end first."
    )
  return fields, {
    "model": model,
    "data": f"own batches, {'x'.join(map(str, shape))} {dtype}",
    "seed": str(seed),
    "plan": summary_line(phases),
    "teacher": "own" if teacher else "none",
    **_ended_with(summary(progress, phases)),
    # Not recorded: the model may have rules.
    "other bits": "?" if _has_rules(config) else "-",
    "device": "-",
    "jax": "-",
    "commit": "-",
  }


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
  """The settings of a run, or those of them that are compared, flat, by field."""
  if "library" not in config:
    return _flat(config)
  # By phase, and without the shapes of all parameters.
  phases = {str(phase["index"]): phase for phase in config.get("schedule", ())}
  return _flat({**config, "schedule": phases, "params": len(config.get("params", ()))})


def _progress(directory: epath.Path, warn: Callable[[str], None]) -> Progress:
  """What the last checkpoint of a run says."""
  devices.require()
  found = run_state.read(directory / "checkpoints", warn)
  if found is None:
    raise run_directory.no_checkpoint(directory, "The run")
  return found.progress


def _has_rules(config: dict[str, Any]) -> bool:
  """Whether a run of the library gives single layers other bits."""
  quantizer = config.get("quantizer", {})
  return bool(quantizer.get("rules")) or quantizer.get("policy", "profit") != "profit"


def _other_bits(result: dict[str, Any]) -> str:
  """The layers whose bits are not those of the run's last phase, counted by width."""
  found: dict[str, int] = {}
  for what, letter in (("weights", "w"), ("activations", "a")):
    usual = result["final"]["weight_bits" if letter == "w" else "act_bits"]
    for width in result.get("layer_bits", {}).get(what, {}).values():
      if width != usual:
        name = f"{letter}{width or ' float'}"
        found[name] = found.get(name, 0) + 1
  return ", ".join(f"{count} x {name}" for name, count in sorted(found.items())) or "-"


def _result(directory: epath.Path) -> dict[str, Any]:
  path = directory / "result.json"
  if not path.exists():
    raise ConfigError(f"{directory} has not ended: there is no {path}. Train it to its end first.")
  try:
    result = json.loads(path.read_text())
    result["final"]["top1"], result["environment"]["packages"]["jax"]
    return result
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f"{path} cannot be read: {error!r}. Restore the file; the run's command writes it anew."
    ) from error


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix: tree}
  found = {}
  for name, part in tree.items():
    found |= _flat(part, f"{prefix}.{name}" if prefix else name)
  return found


def print_runs(runs: Sequence[str], screen: Console) -> None:
  """Prints the table; raises as `read`."""
  found = [read(run) for run in runs]
  table = Table(box=box.SIMPLE)
  table.add_column("")
  for run in runs:
    table.add_column(run, overflow="fold")
  for row in found[0][1]:
    table.add_row(row, *(rows[row] for _, rows in found))
  table.add_section()
  fields = list(dict.fromkeys(field for settings, _ in found for field in settings))
  differing = [
    field for field in fields if len({json.dumps(settings.get(field)) for settings, _ in found}) > 1
  ]
  for field in differing:
    table.add_row(
      field, *(json.dumps(settings[field]) if field in settings else "-" for settings, _ in found)
    )
  screen.print(table)
  if not differing and len(runs) > 1:
    screen.print("All settings are the same.")


def groups(runs: Sequence[str]) -> dict[str, list[str]]:
  """Runs that differ in their seed alone, by the fields that groups differ in; raises as `read`."""
  settings = {}
  for run in runs:
    directory = paths.opened("The run", run)
    config = run_directory.read_config(directory, "The run")
    if "library" not in config:
      config = run_directory.read_settings(directory, "The run").to_dict()
    flat = _comparable(run_directory.comparable(config))
    settings[run] = {field: value for field, value in flat.items() if field != "seed"}
  fields = list(dict.fromkeys(field for flat in settings.values() for field in flat))
  differing = [
    field
    for field in fields
    if len({json.dumps(flat.get(field)) for flat in settings.values()}) > 1
  ]
  values = {run: {field: flat.get(field) for field in differing} for run, flat in settings.items()}
  # Shortened, two groups could have one name.
  write = (
    _short
    if len({_short(of) for of in values.values()})
    == len({json.dumps(of) for of in values.values()})
    else json.dumps
  )
  found: dict[str, list[str]] = {}
  for run, of in values.items():
    found.setdefault(write(of), []).append(run)
  return found


def _short(value: Any) -> str:
  """For a legend."""
  if isinstance(value, dict):
    return ", ".join(f"{field}={_short(item)}" for field, item in value.items())
  if isinstance(value, (list, tuple)):
    return f"({', '.join(map(_short, value))})"
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(runs: Sequence[str], file: str, screen: Console) -> None:
  """Draws the runs, of whose checkpoints the last is read; raises as `read`, and where that or the
  file cannot be.
  """
  from profit_jax.report import plots  # here, because it needs matplotlib

  def progress(run):
    warn = functools.partial(screen.print, style="yellow")
    return _progress(paths.opened("The run", run), lambda text: warn(f"WARNING: {text}"))

  target = paths.opened("--plot", file)
  drawn = {name or "all": [progress(run) for run in group] for name, group in groups(runs).items()}
  try:
    plots.plot_runs(drawn, target)
  except OSError as error:
    raise ConfigError(
      f"--plot={file} cannot be written: {error}. Give a file in a directory that is there."
    ) from error
  screen.print(f"Plot: {file}")


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = command.parser("compare", __doc__)
  parser.add_argument(
    "runs", nargs="+", metavar="RUN", help="the --workdir of a run that has ended"
  )
  parser.add_argument("--plot", metavar="FILE.png", help="draw them over the epochs")

  def execute(options):
    screen = Console(highlight=False, markup=False)
    print_runs(options.runs, screen)
    if options.plot:
      plot(options.runs, options.plot, screen)

  return command.run(parser, arguments, execute)
