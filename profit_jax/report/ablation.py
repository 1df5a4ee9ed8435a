"""A grid of runs: its cells, their commands, and what their results say."""

import dataclasses
import itertools
import json
import math
import os
import re
import runpy
import statistics
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import scipy.stats
from absl import flags
from etils import epath
from ml_collections import config_flags

from profit_jax import paths
from profit_jax.config import ConfigError, Settings, parse
from profit_jax.fields import listed
from profit_jax.models import REGISTRY
from profit_jax.train import fork

Labels = tuple[str, ...]
Run = tuple[Labels, int]  # a cell and a seed
_NAMED = re.compile(r"\{([^}]*)\}")  # an axis in a grid's `config`


@dataclasses.dataclass(frozen=True)
class Grid:
  """What is varied.

  Attributes:
    config: of `profit train`, with `{axis}` for labels; relative to the current directory.
    fields: of every run.
    axes: by name, labels and the fields that they set.
    keep: whether a cell, labels by axis, is run.
    seeds: runs of a cell.

  Raises:
    ConfigError: a wrong number of seeds, an axis without labels, or a name in `config` that is not
      an axis.
  """

  config: str
  fields: Mapping[str, Any]
  axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
  keep: Callable[[dict[str, str]], bool]
  seeds: int

  def __post_init__(self):
    if not isinstance(self.seeds, int) or self.seeds < 1:
      raise ConfigError(f"seeds={self.seeds!r} is not allowed: a cell must have 1 seed or more.")
    if empty := [axis for axis, labels in self.axes.items() if not labels]:
      raise ConfigError(f"The grid's axis {empty[0]!r} is empty: it must have at least one label.")
    if unknown := set(_NAMED.findall(self.config)) - self.axes.keys():
      raise ConfigError(
        f"The grid's config {self.config!r} names {sorted(unknown)}, which must be an axis: one of "
        f"{', '.join(self.axes)}."
      )

  def cells(self) -> list[Labels]:
    """The labels of every cell, one of each axis, in the order of the axes."""
    found = itertools.product(*self.axes.values())
    return [labels for labels in found if self.keep(dict(zip(self.axes, labels, strict=True)))]

  def arguments(self, labels: Labels, seed: int) -> list[str]:
    """The arguments of a cell's run for `profit train`, without the directory."""
    named = dict(zip(self.axes, labels, strict=True))
    fields = dict(self.fields)
    for axis, label in named.items():
      fields |= self.axes[axis][label]
    config = _NAMED.sub(lambda match: named[match[1]], self.config)
    return [
      f"--config={config}",
      *(f"--config.{field}={value}" for field, value in {**fields, "seed": seed}.items()),
    ]


def read_grid(path: str) -> Grid:
  """The grid that a file's `get_grid` gives; see `configs/ablation_digits.py`.

  Raises:
    ConfigError: there is none, or it is not one.
  """
  names = listed([field.name for field in dataclasses.fields(Grid)])
  wanted = f"Give a file with a function get_grid that returns a dictionary of {names}."
  paths.require_file("--config=", path, wanted)
  try:
    content = runpy.run_path(path)
    if "get_grid" not in content and "get_config" in content:
      raise ConfigError(
        f"--config={path} is the configuration of one run, not a grid. Train it with: profit train "
        f"--config={path} --workdir=DIR"
      )
    if "get_grid" not in content:
      raise ConfigError(f"--config={path} has no function get_grid. {wanted}")
    return Grid(**content["get_grid"]())
  except ConfigError:
    raise
  except Exception as error:  # a configuration file is code: it can raise anything
    raise ConfigError(
      f"--config={path} cannot be used: {type(error).__name__}: {error}. {wanted}"
    ) from error


def narrowed(grid: Grid, only: Sequence[str], seeds: int | None) -> Grid:
  """A part of a grid.

  Args:
    grid: the whole.
    only: `AXIS=LABEL`; of an axis that is named, the other labels are left out.
    seeds: runs of a cell; None is the grid's.

  Raises:
    ConfigError: an axis or label that is not there, or a wrong number.
  """
  wanted: dict[str, set[str]] = {}
  for text in only:
    axis, _, label = text.partition("=")
    if axis not in grid.axes or label not in grid.axes[axis]:
      there = "; ".join(f"{name}={'|'.join(labels)}" for name, labels in grid.axes.items())
      raise ConfigError(f"--only {text} is not allowed: it must be AXIS=LABEL of {there}.")
    wanted.setdefault(axis, set()).add(label)
  axes = {
    name: {label: fields for label, fields in labels.items() if label in wanted.get(name, labels)}
    for name, labels in grid.axes.items()
  }
  return dataclasses.replace(grid, axes=axes, seeds=grid.seeds if seeds is None else seeds)


def directory_of(root: epath.Path, labels: Labels, seed: int) -> epath.Path:
  """The working directory of a run."""
  return root / re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join((*labels, f"seed{seed}")))


def settings_of(grid: Grid, run: Run) -> Settings:
  """The settings of a run, as `profit train` reads them; raises ConfigError where it does not get
  that far.
  """
  read, line = flags.FlagValues(), ["profit", *grid.arguments(*run)]
  paths.require_file(
    "The grid's config ",
    line[1].removeprefix("--config=").partition(":")[0],
    f"It is looked for in {os.getcwd()}. Run the command in the directory that has it.",
  )
  config = config_flags.DEFINE_config_file("config", flag_values=read, sys_argv=line)
  try:
    with warnings.catch_warnings():
      # Ml_collections loads files in an old way.
      warnings.simplefilter("ignore", DeprecationWarning)
      read(line)
      return parse(config.value, REGISTRY)
  except Exception as error:  # a configuration file is code: it can raise anything
    raise ConfigError(f"The grid's cell {', '.join(run[0])} is no run: {error}") from error


class Parent(NamedTuple):
  """What a run has in common with one before it.

  Attributes:
    run: that one.
    phases: how many phases of it.
  """

  run: Run
  phases: int


def parents(settings: Mapping[Run, Settings]) -> dict[Run, Parent]:
  """For every run that has phases in common with an earlier one: the one with most of them, the
  first of equals.
  """
  found: dict[Run, Parent] = {}
  for place, (run, mine) in enumerate(settings.items()):
    for earlier, other in itertools.islice(settings.items(), place):
      count = fork.shared_phases(mine, other) if earlier[1] == run[1] else 0
      if count > (found[run].phases if run in found else 0):
        found[run] = Parent(earlier, count)
  return found


@dataclasses.dataclass(frozen=True)
class Cell:
  """The runs of a cell.

  Attributes:
    labels: one of each axis.
    top1: by seed, in percent, of the runs that ended.
    full_precision: likewise.
    mean: of top-1; NaN without runs.
    deviation: the standard deviation of top-1 over seeds (n - 1); NaN below two runs.
    runs: their number.
  """

  labels: Labels
  top1: dict[int, float]
  full_precision: dict[int, float]
  mean: float
  deviation: float
  runs: int


def final_of(root: epath.Path, run: Run) -> dict[str, Any] | None:
  """What a run ended with; None if it has not ended."""
  path = directory_of(root, *run) / "result.json"
  return json.loads(path.read_text())["final"] if path.exists() else None


def read_cells(grid: Grid, root: epath.Path) -> list[Cell]:
  """The results that are there."""
  cells = []
  for labels in grid.cells():
    finals = {seed: final_of(root, (labels, seed)) for seed in range(grid.seeds)}
    ended = {seed: final for seed, final in finals.items() if final}
    top1 = {seed: final["top1"] for seed, final in ended.items()}
    full = {seed: final["full_precision_top1"] for seed, final in ended.items()}
    cells.append(Cell(labels, top1, full, *_mean_and_deviation(top1.values()), len(top1)))
  return cells


def _mean_and_deviation(values: Collection[float]) -> tuple[float, float]:
  """The mean and the standard deviation (n - 1); NaN where there are too few values."""
  mean = statistics.fmean(values) if values else math.nan
  return mean, statistics.stdev(values) if len(values) > 1 else math.nan


LEAST_SEEDS = 3  # below, no difference is said to exceed the spread


@dataclasses.dataclass(frozen=True)
class Difference:
  """A cell beside the one that differs in one axis only, where it has that axis's first label.

  Attributes:
    axis: the axis.
    base: the cell with the first label.
    other: the cell with another label.
    mean: the mean over seeds that both have of `other - base`, in points.
    error: its standard error.
    runs: the number of those seeds.
    exceeds: whether the difference exceeds the spread: `mean` is further from 0 than the 95 % point
      of Student's t times `error`, for pairs of the same seed; never with fewer than `LEAST_SEEDS`.
  """

  axis: str
  base: Labels
  other: Labels
  mean: float
  error: float
  runs: int
  exceeds: bool


def differences(grid: Grid, cells: Sequence[Cell]) -> list[Difference]:
  """Every pair of cells that differ in one axis, one of them with the axis's first label."""
  by_labels = {cell.labels: cell for cell in cells}
  found = []
  for position, (axis, labels) in enumerate(grid.axes.items()):
    first = next(iter(labels))
    for cell in cells:
      base = by_labels.get((*cell.labels[:position], first, *cell.labels[position + 1 :]))
      if base not in (None, cell):
        found.append(_difference(axis, base, cell))
  return found


def _difference(axis, base, other):
  seeds = base.top1.keys() & other.top1.keys()
  runs = len(seeds)
  mean, deviation = _mean_and_deviation([other.top1[seed] - base.top1[seed] for seed in seeds])
  error = deviation / math.sqrt(max(runs, 1))
  # Top-1 is counted in whole images: two differences can be equal by chance, and their error 0.
  exceeds = runs >= LEAST_SEEDS and abs(mean) > scipy.stats.t.ppf(0.975, runs - 1) * error
  return Difference(axis, base.labels, other.labels, mean, error, runs, bool(exceeds))


def markdown(grid: Grid, cells: Sequence[Cell], compared: Sequence[Difference]) -> str:
  """The table, and what exceeds the spread; where runs failed, or were not trained yet, it counts
  them.
  """
  axes = list(grid.axes)
  lines = [
    f"| {' | '.join(axes)} | top-1, mean | std | runs | full precision |",
    f"|{':--|' * len(axes)}--:|--:|--:|--:|",
  ]
  for cell in cells:
    full = [value for value in cell.full_precision.values() if value is not None]
    numbers = [
      _number(cell.mean),
      _number(cell.deviation),
      f"{cell.runs}" if cell.runs == grid.seeds else f"{cell.runs} of {grid.seeds}",
      _number(_mean_and_deviation(full)[0]),
    ]
    lines.append(f"| {' | '.join(cell.labels)} | {' | '.join(numbers)} |")
  lines += ["", *sentences(axes, compared)]
  return "\n".join(lines) + "\n"


def sentences(axes: Sequence[str], compared: Sequence[Difference]) -> list[str]:
  """A line for every difference, those that exceed the spread first."""
  lines = []
  for title, exceeds in (
    ("Differences that exceed the spread:", True),
    ("Differences that do not:", False),
  ):
    rows = [_sentence(axes, row) for row in compared if row.exceeds == exceeds and row.runs > 1]
    lines += [title, "", *(rows or ["- none"]), ""]
  few = sum(row.runs < 2 for row in compared)
  if few:
    lines += [
      f"{few} pairs of cells have fewer than two seeds in common: nothing is said of them.",
      "",
    ]
  lines.append(
    "A difference is the mean over seeds of one run's top-1 minus the other's of the same seed, "
    "in points, with its "
    "standard error; it exceeds the spread where it is beyond the 95 % point of Student's t, of "
    f"at least {LEAST_SEEDS} seeds. One in twenty does by chance."
  )
  return lines


def _sentence(axes, row):
  position = list(axes).index(row.axis)
  place = ", ".join(label for index, label in enumerate(row.base) if index != position)
  change = f"{row.axis} {row.other[position]} instead of {row.base[position]}"
  return f"- {change} ({place}): {row.mean:+.2f} ± {row.error:.2f} ({row.runs} seeds)"


def _number(value):
  return "-" if math.isnan(value) else f"{value:.2f}"


def to_json(grid: Grid, cells: Sequence[Cell], compared: Sequence[Difference]) -> dict[str, Any]:
  """The same for programs; what has no value is null."""

  def plain(item):
    return {
      name: None if isinstance(value, float) and math.isnan(value) else value
      for name, value in dataclasses.asdict(item).items()
    }

  return {
    "axes": {axis: list(labels) for axis, labels in grid.axes.items()},
    "cells": [plain(cell) for cell in cells],
    "differences": [plain(row) for row in compared],
  }


def plot(grid: Grid, cells: Sequence[Cell], path: epath.Path) -> None:
  """Every run a point, every cell its mean and deviation."""
  from profit_jax.report import plots  # here, because it needs matplotlib

  cells = [cell for cell in cells if cell.runs]
  figure = plots.Figure(figsize=(9, 0.42 * len(cells) + 1.4), layout="constrained")
  axis = figure.subplots()
  for row, cell in enumerate(reversed(cells)):
    values = list(cell.top1.values())
    axis.plot(values, [row] * len(values), "o", color="#1f5fa8", alpha=0.45, markersize=5)
    spread = None if math.isnan(cell.deviation) else cell.deviation
    axis.errorbar(cell.mean, row, xerr=spread, fmt="|", color="black", capsize=4, markersize=14)
  axis.set_yticks(
    range(len(cells)), [", ".join(cell.labels) for cell in reversed(cells)], fontsize=8
  )
  axis.set_xlabel("top-1 (%), every run a point; mean and standard deviation over seeds")
  axis.set_title(", ".join(grid.axes), fontsize=9)
  axis.grid(axis="x", color="0.9")
  plots.save(figure, path)
