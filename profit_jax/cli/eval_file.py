"""Evaluates an exported file in its own runtime: profit eval FILE (top-1, top-5, images/s).

A file in RUN/export is evaluated on the data of that run. For others, --config or --workdir says
the data; --config.data.FIELD=value changes it.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from etils import epath
from rich.console import Console

from profit_jax import data, paths
from profit_jax.cli import app, command
from profit_jax.cli import main as command_line
from profit_jax.config import ConfigError, Settings, parse
from profit_jax.data import Source
from profit_jax.export import exported, formats
from profit_jax.export.evaluate import Evaluation, evaluate
from profit_jax.models import REGISTRY
from profit_jax.train import run_directory


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = command.parser("eval", __doc__)
  parser.add_argument("file", metavar="FILE", help="exported, its card (.json) beside it")
  parser.add_argument("--config", metavar="CONFIG.py", help="configuration file with the data")
  parser.add_argument("--workdir", metavar="RUN", help="a run with the data")
  parser.add_argument(
    "--split", default="eval", help="eval (if left out), train, or one that data.eval_split takes"
  )
  parser.add_argument("--batch_size", type=int, help="train.eval_batch_size if left out")
  parser.add_argument("--threads", type=int, help="of the runtime; for onnx and litert")
  parser.add_argument("--json", metavar="FILE.json", help="also write the result there")
  given = sys.argv[1:] if arguments is None else arguments
  # Fields of the configuration, which have a parser of their own.
  overrides = [argument for argument in given if argument.startswith("--config.")]
  others = [argument for argument in given if argument not in overrides]
  return command.run(parser, others, lambda options: run(options, overrides))


def run(options: argparse.Namespace, overrides: Sequence[str] = ()) -> None:
  """Evaluates, prints and writes; raises ConfigError where the user can mend something."""
  target = _target(options.json)
  file = exported.read(options.file)
  try:
    _card_line(file)
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f"The card of {file.path!r} lacks top1 or training, which every card has: {error!r}. Export "
      "the file again."
    ) from error
  settings, where = _settings(options, overrides, file)
  size = file.card["input"]["image_size"]
  if settings.data.image_size != size:
    raise ConfigError(
      f"config.data.image_size = {settings.data.image_size} ({where}) does not fit {file.path!r}, "
      f"which takes images of {size} pixels. Give --config.data.image_size={size}."
    )
  if formats.FORMATS[file.format].opened_by in (None, "jax"):
    app.require_devices()
  source = data.load_split(settings, options.split)
  _require_classes(file, source, settings, where)
  screen = Console(highlight=False, markup=False)
  for warning in _warnings(file, source, settings):
    screen.print(f"WARNING: {warning}", style="yellow", soft_wrap=True)
  with app.kept_programs(settings):
    found = evaluate(file, source, settings.train.eval_batch_size, options.threads)
  screen.print(f"{settings.data.name}, split {options.split} ({where})", soft_wrap=True)
  screen.print(str(found), soft_wrap=True)
  screen.print(_card_line(file), soft_wrap=True)
  if target is not None:
    _write(target, options.json, {**_content(file, found), "split": options.split, "data": where})


def _target(path: str | None) -> epath.Path | None:
  """Where the result is written; checked before it is computed."""
  if path is None:
    return None
  if not path:
    raise ConfigError("--json= is not allowed: give a file, as --json=result.json.")
  place = paths.opened("--json", path)
  if place.is_dir() or not place.parent.is_dir():
    raise ConfigError(f"--json={path} cannot be written. Give a file in a directory that is there.")
  return place


def _write(target: epath.Path, path: str, content: dict[str, Any]) -> None:
  try:
    target.write_text(json.dumps(content, indent=1) + "\n")
  except OSError as error:
    raise ConfigError(f"--json={path} cannot be written: {error}.") from error


def _card_line(file: exported.ExportedFile) -> str:
  top1 = file.card["top1"]
  return (
    f"Its card: top-1 {top1['file']:.2f} % of {top1['examples']} evaluation images of "
    f"{_dataset(file)}"
  )


def _content(file: exported.ExportedFile, found: Evaluation) -> dict[str, Any]:
  return {**dataclasses.asdict(found), "sha256": file.card["sha256"]}


def _settings(
  options: argparse.Namespace, overrides: Sequence[str], file: exported.ExportedFile
) -> tuple[Settings, str]:
  """The settings whose data is evaluated on, and what they are from."""
  if options.config and options.workdir:
    raise ConfigError("--config and --workdir are not allowed together. Give one.")
  if not file.of_pictures and not (options.config and file.card["input"]["type"] == "uint8"):
    raise ConfigError(
      f"{file.path!r} was exported by profit_jax.export, and its card does not say how its arrays "
      "are made of pictures: its data is in a program. There, call profit_jax.evaluate_file(FILE, "
      "eval_batches)."
    )
  if options.config:
    where, first = f"--config={options.config}", None
    argv = ["profit eval", where, *overrides]
  else:
    where, settings = _run_of(options.workdir, file)
    first, argv = ml_collections.ConfigDict(settings.to_dict()), ["profit eval", *overrides]
  settings = parse(command_line.read_config(argv, first), REGISTRY)
  if options.batch_size is not None:
    if options.batch_size < 1:
      raise ConfigError(f"--batch_size={options.batch_size} is not allowed: it must be 1 or more.")
    train = dataclasses.replace(settings.train, eval_batch_size=options.batch_size)
    settings = dataclasses.replace(settings, train=train)
  return settings, where


def _run_of(workdir: str | None, file: exported.ExportedFile) -> tuple[str, Settings]:
  """The run in a directory, or that of a file in its directory `export`."""
  if workdir:
    directory = paths.opened("--workdir", workdir)
    return f"--workdir={workdir}", run_directory.read_settings(directory)
  folder, trained_on = pathlib.Path(os.path.abspath(file.path)).parent, _dataset(file)
  give = "Give the data with --config=CONFIG.py or --workdir=RUN."
  if folder.name != "export" or not (folder.parent / "config.json").exists():
    raise ConfigError(
      f"{file.path!r} was trained on {trained_on}, and does not lie in the directory export of the "
      f"run, whose config.json says where that is. {give}"
    )
  settings = run_directory.read_settings(epath.Path(folder.parent), "The run")
  if settings.data.name != trained_on:
    raise ConfigError(
      f"{file.path!r} was trained on {trained_on}, but the run in {folder.parent} on "
      f"{settings.data.name}: the file is of another run. {give}"
    )
  return f"the run {folder.parent}", settings


def _dataset(file: exported.ExportedFile) -> str:
  return file.card["training"]["dataset"]


def _require_classes(
  file: exported.ExportedFile, source: Source, settings: Settings, where: str
) -> None:
  classes, found = file.card["num_classes"], source.info.num_classes
  if found != classes:
    raise ConfigError(
      f"{settings.data.name} ({where}) has {found} classes, but {file.path!r} has {classes}. Give "
      "data with the same classes."
    )


def _warnings(file: exported.ExportedFile, source: Source, settings: Settings) -> list[str]:
  """In what the data differs from what the card says, one line each."""
  found, pixels = [], file.card["input"]
  given = data.eval_preparation(settings)
  trained = pixels.get("crop_pct"), pixels.get("interpolation")
  if file.of_pictures and given != trained:
    found.append(
      f"the data's images are prepared with crop_pct {given[0]} and interpolation {given[1]}, "
      f"those of the training with {trained[0]} and {trained[1]}."
    )
  names, theirs = file.card["class_names"], list(source.info.class_names)
  if names and theirs and names != theirs:
    first = next(index for index, name in enumerate(names) if name != theirs[index])
    found.append(
      f"the data's classes have other names than the file's: class {first} is {theirs[first]!r} "
      f"there and {names[first]!r} in the card."
    )
  return found
