"""`--mode export`: a run's best checkpoint -> model files, each proven before it gets its name."""

from collections.abc import Callable, Sequence

from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from profit_jax.export import formats, verify
from profit_jax.export.integer.difference import Difference, IntegerLimits
from profit_jax.export.write import Exporter, NotEqual


def export(
  trained: verify.TrainedModel,
  names: Sequence[str],
  directory: epath.Path,
  screen: Console,
  limits: IntegerLimits = IntegerLimits(),
  load: Callable[[str], formats.Module] = formats.load,
) -> None:
  """Writes the files and cards of a run.

  Args:
    trained: the run's best checkpoint.
    names: of the formats.
    directory: where the files go.
    screen: what is printed goes here.
    limits: that integer files must reach.
    load: returns the module of a format, given its name.

  Raises:
    ConfigError: anything that the user can mend.
    NotEqual: a file that differs from the trained model, or misses a limit; it is not kept, the
      others are.
  """
  modules = {name: load(name) for name in names}
  exporter = Exporter(trained, limits)
  net, reference = exporter.net, exporter.reference
  screen.print(
    f"{net.model} {net.bits_name} in the code domain, {reference.images} images: "
    f"{reference.differing} of {reference.codes:,} codes differ from the trained model's",
    soft_wrap=True,
  )
  if not reference.at_ties:
    _print_layers(screen, reference)
  exporter.require_equal()
  failed, missed, width = [], [], max(12, *(len(name) + 1 for name in modules))
  for name, module in modules.items():
    file = f"{net.model}_{net.bits_name}{formats.FORMATS[name].suffix}"
    check, report = exporter.write(name, module, directory / file)
    if report is not None:
      screen.print(f"{name:{width}}{report}", soft_wrap=True)
      continue
    if isinstance(check, Difference) and check.rows:
      missed.append(name)
      screen.print(f"{name:{width}}LIMIT MISSED: {check.problem}.", soft_wrap=True)
      _print_difference(screen, check)
      continue
    failed.append(name)
    top1 = f"top-1 {100.0 * check.correct / check.examples:.2f} % of {check.examples} images"
    screen.print(
      f"{name:{width}}NOT EQUAL: {check.problem}; {top1}, trained {trained.top1:.2f} %",
      soft_wrap=True,
    )
    if isinstance(check, verify.FileCheck) and check.comparison is not None:
      _print_layers(screen, check.comparison)
  kept = len(modules) - len(failed) - len(missed)
  if kept:
    screen.print(
      f"{kept} verified {'file' if kept == 1 else 'files'} with cards (.md, .json): {directory}",
      soft_wrap=True,
    )
  _require_none(failed, missed)


def _require_none(failed: Sequence[str], missed: Sequence[str]) -> None:
  """Raises NotEqual where files of some formats failed the verification, or missed a limit."""
  told = []
  if failed:
    told.append(
      f"{', '.join(failed)}: not what was trained (see above), and not kept. Please report it "
      "with the table."
    )
  if missed:
    told.append(
      f"{', '.join(missed)}: not within the limits (see above), and not kept. Export onnx or "
      "litert, whose files are equal, or allow more: --min_agreement=, --max_top1_loss=."
    )
  if told:
    raise NotEqual(" ".join(told))


def _print_difference(screen: Console, found: Difference) -> None:
  table = Table(box=box.SIMPLE)
  table.add_column("quantizer", no_wrap=True)
  for title in ("codes", "differ", "by at most", "free-running", "by at most"):
    table.add_column(title, justify="right")
  for row in found.rows:
    table.add_row(
      row.quantizer,
      f"{row.codes:,}",
      f"{100.0 * row.differing / row.codes:.2f} %",
      f"{row.largest}",
      f"{100.0 * row.free_differing / row.codes:.2f} %",
      f"{row.free_largest}",
    )
  screen.print(table)


def _print_layers(screen: Console, comparison: verify.Comparison) -> None:
  table = Table(box=box.SIMPLE)
  for title, justify in (
    ("quantizer", "left"),
    ("codes", "right"),
    ("differ", "right"),
    ("reads", "left"),
  ):
    table.add_column(title, justify=justify)
  for row in comparison.rows:
    style = "red" if row.differing else None
    reads = "floats" if row.float_fed else "codes"
    table.add_row(row.quantizer, f"{row.codes:,}", f"{row.differing:,}", reads, style=style)
  screen.print(table)
