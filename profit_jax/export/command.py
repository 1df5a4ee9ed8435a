"""`--mode export`: a run's best checkpoint -> model files, each proven before it gets its name."""

import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from profit_jax.data import Source, normalization
from profit_jax.export import card, formats, verify
from profit_jax.export.build import build_net
from profit_jax.plan import bits_name
from profit_jax.settings import ConfigError, Ending, Settings


class NotEqual(Ending):
  """An exported file is not what was trained."""

  label = "export failed"


def export(
  *,
  settings: Settings,
  source: Source,
  model: nn.Module,
  variables: Any,
  run: dict[str, Any],
  trained_top1: float,
  names: Sequence[str],
  directory: epath.Path,
  screen: Console,
) -> None:
  """Writes the files and cards of a run.

  Args:
    settings: of the run.
    source: its data.
    model: its model.
    variables: the best, on the host.
    run: `phases`, `aiwq`, `final` of its `result.json`.
    trained_top1: of these variables on the whole evaluation set, in percent.
    names: of the formats.
    directory: where to.
    screen: to tell.

  Raises:
    ConfigError: anything that the user can mend.
    NotEqual: a file that differs from the trained model; it is not kept, the others are.
  """
  modules = {name: formats.load(name) for name in names}
  facts, final = source.facts, run["final"]
  pixels = normalization(settings.data.normalization, facts)
  net = build_net(settings, variables, pixels, final["weight_bits"], final["act_bits"])
  batch = settings.train.eval_batch_size
  images = verify.eval_images(net, source, batch)
  count = sum(map(len, images))
  trained = verify.compare(net, images, verify.trained_codes(net, model, variables, pixels))
  bits = bits_name(net.weight_bits, net.act_bits)
  screen.print(
    f"{net.model} {bits} in the code domain, {count} images: {trained.differing} of "
    f"{trained.codes:,} codes differ from "
    "the trained model's",
    soft_wrap=True,
  )
  if not trained.at_ties:
    _print_layers(screen, trained)
    raise NotEqual(
      "the code-domain net does not compute what the trained model does; nothing was written."
    )
  failed = []
  for name in names:
    final_path = directory / f"{net.model}_{net.bits_name}{formats.FORMATS[name].suffix}"
    _clear(final_path)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / final_path.name
      modules[name].write(net, path)
      runner = modules[name].open_file(path)
      why, compared = None, None
      try:
        compared = verify.compare(net, images, verify.file_codes(runner))
      except verify.WatchedDiffers as error:
        why = (
          f"its logits change by {error.args[0]:.1e} of the largest when its codes are asked for"
        )
      correct, examples = verify.count_correct(
        lambda image, runner=runner: runner.run(image)[0], source, batch
      )
      trained_correct = round(trained_top1 * examples / 100.0)
      if why is None and not compared.exact:
        why = f"{compared.differing:,} of {compared.codes:,} codes differ"
      if why is None and not verify.top1_equal(correct, trained_correct, examples):
        why = "its top-1 is another"
      figures = f"top-1 {100.0 * correct / examples:.2f} % of {examples} images"
      if why is not None:
        screen.print(f"{name:12}NOT EQUAL: {why}; {figures}, trained {trained_top1:.2f} %")
        if compared is not None:
          _print_layers(screen, compared)
        failed.append(name)
        continue
      content = card.make(
        name=name,
        path=path,
        net=net,
        settings=settings,
        facts=facts,
        run=run,
        trained=trained,
        file=compared,
        images=count,
        correct=(trained_correct, correct),
        examples=examples,
      )
      _keep(path, final_path, content)
    size = content["size"]
    screen.print(
      f"{name:12}{final_path.name}  {size['bytes']:,} bytes ({size['ratio']:.1f}x smaller than "
      "float32)  "
      f"{compared.differing} of {compared.codes:,} codes differ  {figures}: top-1 equal",
      soft_wrap=True,
    )
  kept = len(names) - len(failed)
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
