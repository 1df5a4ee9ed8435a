"""`--mode export`: a run's best checkpoint -> model files, each proven before it gets its name."""

import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from profit_jax.config import ConfigError, ProfitError
from profit_jax.data import normalization
from profit_jax.export import card, formats, verify
from profit_jax.export.build import build_net


class NotEqual(ProfitError):
  """An exported file is not what was trained."""

  label = "export failed"


def export(
  trained: verify.TrainedModel,
  names: Sequence[str],
  directory: epath.Path,
  screen: Console,
  load: Callable[[str], formats.Module] = formats.load,
) -> None:
  """Writes the files and cards of a run.

  Args:
    trained: the run's best checkpoint.
    names: of the formats.
    directory: where the files go.
    screen: what is printed goes here.
    load: returns the module of a format, given its name.

  Raises:
    ConfigError: anything that the user can mend.
    NotEqual: a file that differs from the trained model; it is not kept, the others are.
  """
  modules = {name: load(name) for name in names}
  exporter = _Exporter(trained, directory, screen)
  exporter.compare_reference()
  failed = [name for name, module in modules.items() if not exporter.write(name, module)]
  kept = len(modules) - len(failed)
  if kept:
    screen.print(
      f"{kept} verified {'file' if kept == 1 else 'files'} with cards (.md, .json): {directory}",
      soft_wrap=True,
    )
  if failed:
    raise NotEqual(
      f"{', '.join(failed)}: not what was trained (see above), and not kept. Please report it "
      "with the table."
    )


class _Exporter:
  """Writes and verifies the files of one run, one after the other."""

  def __init__(self, trained: verify.TrainedModel, directory: epath.Path, screen: Console):
    settings, final = trained.settings, trained.result["final"]
    self._trained, self._directory, self._screen = trained, directory, screen
    self._pixels = normalization(settings.data.normalization, trained.source.facts)
    self._net = build_net(
      trained.spec,
      trained.variables,
      name=settings.model.name,
      normalization=self._pixels,
      weight_bits=final["weight_bits"],
      act_bits=final["act_bits"],
    )
    self._images = verify.eval_images(self._net, trained.source, settings.train.eval_batch_size)

  def compare_reference(self) -> None:
    """Compares the code-domain net with the trained model.

    Raises:
      NotEqual: they differ other than by rounding.
    """
    net, trained = self._net, self._trained
    codes = verify.trained_codes(net, trained.spec, trained.variables, self._pixels)
    self._reference = verify.compare(net, self._images, codes)
    self._screen.print(
      f"{net.model} {net.bits_name} in the code domain, {self._reference.images} images: "
      f"{self._reference.differing} of {self._reference.codes:,} codes differ from the trained "
      "model's",
      soft_wrap=True,
    )
    if not self._reference.at_ties:
      _print_layers(self._screen, self._reference)
      raise NotEqual(
        "the code-domain net does not compute what the trained model does; nothing was written."
      )

  def write(self, name: str, module: formats.Module) -> bool:
    """Writes a file and verifies it; returns whether it is the trained model, and was kept."""
    net, suffix = self._net, formats.FORMATS[name].suffix
    final_path = self._directory / f"{net.model}_{net.bits_name}{suffix}"
    _clear(final_path)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / final_path.name
      module.write(net, path)
      check = verify.check_file(net, self._images, module.open_file(path), self._trained)
      if check.problem is not None:
        self._print_problem(name, check)
        return False
      content = card.make(
        name=name,
        path=path,
        net=net,
        trained=self._trained,
        reference=self._reference,
        check=check,
      )
      _keep(path, final_path, content)
    size, comparison = content["size"], check.comparison
    self._screen.print(
      f"{name:12}{final_path.name}  {size['bytes']:,} bytes ({size['ratio']:.1f}x smaller than "
      f"float32)  {comparison.differing} of {comparison.codes:,} codes differ  {_top1(check)}: "
      "top-1 equal",
      soft_wrap=True,
    )
    return True

  def _print_problem(self, name: str, check: verify.FileCheck) -> None:
    self._screen.print(
      f"{name:12}NOT EQUAL: {check.problem}; {_top1(check)}, trained {self._trained.top1:.2f} %"
    )
    if check.comparison is not None:
      _print_layers(self._screen, check.comparison)


def _top1(check: verify.FileCheck) -> str:
  return f"top-1 {100.0 * check.correct / check.examples:.2f} % of {check.examples} images"


def _clear(path: epath.Path) -> None:
  """What an earlier export left must not stand for this one, should it fail."""
  try:
    for suffix in ("", ".json", ".md"):
      (path.parent / f"{path.name}{suffix}").unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(
      f"{path.parent} cannot be written: {error}. Give a --workdir that can."
    ) from error


def _keep(path: pathlib.Path, to: epath.Path, content: dict[str, Any]) -> None:
  """Puts a verified file and its card where they belong; the file last, by renaming it."""
  unfinished = to.parent / f"{to.name}.unfinished"
  try:
    (to.parent / f"{to.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (to.parent / f"{to.name}.md").write_text(card.markdown(content))
    unfinished.write_bytes(path.read_bytes())
    unfinished.replace(to)
  except OSError as error:
    raise ConfigError(
      f"{to} cannot be written: {error}. Make room, and give the same command again."
    ) from error


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
