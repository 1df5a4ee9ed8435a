"""The terminal: one progress bar per phase, and the final table."""

from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from profit_jax.schedule import Phase, bits_name
from profit_jax.train.observer import EpochReport, Observer
from profit_jax.train.phases import place
from profit_jax.train.progress import PhaseRecord, Start
from profit_jax.train.progress import Progress as RunProgress


class ConsoleObserver(Observer):
  """Writes to the terminal."""

  def __init__(self, console: Console, num_classes: int):
    """Args: console: rich's; num_classes: of the data."""
    self._console, self._num_classes = console, num_classes
    self._bar: Progress | None = None
    self._task = None
    self._count = self._steps_per_epoch = 0
    self._speed = 0.0

  def run_started(
    self, phases: tuple[Phase, ...], steps_per_epoch: int, progress: RunProgress
  ) -> None:
    """See `Observer`."""
    self._count, self._steps_per_epoch = len(phases), steps_per_epoch
    if progress.phase:
      self._console.print(
        f"Going on from the checkpoint: {place(phases, progress, steps_per_epoch)}."
      )

  def start_evaluated(self, start: Start) -> None:
    """See `Observer`."""
    print_start(self._console, start, self._num_classes)

  def warned(self, text: str) -> None:
    """See `Observer`."""
    self._console.print(f"WARNING: {text}", style="yellow", soft_wrap=True)

  def phase_started(self, phase: Phase, steps_done: int) -> None:
    """See `Observer`."""
    self._stop_bar()  # where the run went back, the last phase's is still there
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(bar_width=12),
      TextColumn("{task.percentage:>3.0f}%"),
      TextColumn("{task.elapsed:>3.0f}s"),
      TextColumn("{task.fields[numbers]}"),
      console=self._console,
      # A log file gets one line per phase, not one per refresh.
      auto_refresh=self._console.is_terminal,
    )
    self._bar.start()
    self._task = self._bar.add_task(
      f"{phase.index:>2}/{self._count} {phase.name:13}",
      total=phase.epochs * self._steps_per_epoch,
      completed=steps_done,
      numbers="waiting for compilation",
    )

  def step_done(self, phase: Phase, metrics: dict[str, float], images_per_second: float) -> None:
    """See `Observer`."""
    self._speed = images_per_second
    numbers = (
      f"loss {metrics['loss']:.3f} train {metrics['top1']:.0f}% {images_per_second:,.0f} img/s"
    )
    self._bar.update(self._task, advance=1, numbers=numbers)

  def epoch_done(self, report: EpochReport) -> None:
    """See `Observer`."""
    average = report.evaluation_ema
    numbers = f"loss {report.train['loss']:.3f} top-1 {report.evaluation['top1']:.2f}"
    if average:
      numbers += f" EMA {average['top1']:.2f}"
    numbers += f" {self._speed:,.0f} img/s"
    self._bar.update(self._task, numbers=numbers)

  def phase_done(self, record: PhaseRecord) -> None:
    """See `Observer`."""
    self._stop_bar()

  def close(self) -> None:
    """See `Observer`."""
    self._stop_bar()

  def _stop_bar(self) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None


def near_chance(top1: float, num_classes: int) -> bool:
  """Whether a top-1 in percent is less than a tenth of the way from guessing to 100 %."""
  chance = 100.0 / num_classes
  return top1 < chance + (100.0 - chance) / 10


def start_lines(start: Start) -> list[str]:
  """What weights files are worth before training, in sentences."""
  lines = []
  if start.top1 is not None:
    line = f"Before training, in full precision: top-1 {start.top1:.2f} %, top-5 {start.top5:.2f} %"
    if start.file_top1 is not None:
      line += f" with the padding of this run, top-1 {start.file_top1:.2f} %"
      line += " with that of the code behind the file"
    lines.append(f"{line} ({start.examples} images; {start.source} names).")
  if start.teacher_top1 is not None:
    lines.append(
      f"The teacher, in full precision: top-1 {start.teacher_top1:.2f} % ({start.examples} images)."
    )
  return lines


def print_start(console: Console, start: Start, num_classes: int) -> None:
  """Prints what weights files are worth, and loudly where that is next to nothing."""
  for line in start_lines(start):
    console.print(line)
  guessing = f"guessing gives {100.0 / num_classes:.2f} %"
  if start.top1 is not None and near_chance(start.top1, num_classes):
    if start.quantized:
      text = f"The weights reach top-1 {start.top1:.2f} % in full precision; {guessing}. "
      text += "They have the a and c of quantizers: trained quantized, they need not work without. "
      text += "A run starts in full precision; start it from other weights."
      console.print(
        Panel(
          text, title="NEAR CHANCE IN FULL PRECISION", border_style="bold yellow", style="yellow"
        )
      )
    elif start.new_head:
      console.print(
        f"Near chance ({guessing}), as it has to be: the classifier is new (init.reset_head)."
      )
    elif start.file_top1 is not None and not near_chance(start.file_top1, num_classes):
      console.print(
        f"Near chance ({guessing}) with the padding of this run, to which training has to adapt "
        "the weights."
      )
    else:
      end = "Training from here spends its time on learning anew."
      _warn(
        console,
        "NEAR CHANCE",
        f"The first weights reach top-1 {start.top1:.2f} %; {guessing}.",
        "model",
        end,
      )
  if start.teacher_top1 is not None and near_chance(start.teacher_top1, num_classes):
    text = f"The teacher reaches top-1 {start.teacher_top1:.2f} %; {guessing}."
    _warn(
      console,
      "TEACHER NEAR CHANCE",
      text,
      "teacher",
      "What it teaches is noise; set teacher.model to self or none.",
    )


def _warn(console: Console, title: str, text: str, section: str, end: str) -> None:
  advice = (
    "Every tensor fitted, so the file is of this model, but it does not know this data, or "
    "computes otherwise than "
    f"configured. Compare config.{section} (activation, bn_epsilon, squeeze_excite), the "
    "normalization and the order of "
    f"the classes with those that it was trained with. {end}"
  )
  console.print(
    Panel(f"{text} {advice}", title=f"WARNING: {title}", border_style="bold red", style="red")
  )


def print_table(console: Console, result: dict[str, Any]) -> None:
  """Prints a `result.json` as a table and its last lines."""
  table = Table(
    title=f"{result['model']} on {result['dataset']}, seed {result['seed']}",
    title_justify="left",
    box=box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
  )
  left, right = "left", "right"
  columns = {
    "#": right,
    "phase": left,
    "bits": left,
    "frozen": right,
    "top-1": right,
    "EMA": right,
    "loss": right,
  }
  columns |= {"time/s": right, "compile/s": right}
  for name, justify in columns.items():
    table.add_column(name, justify=justify, no_wrap=True)
  for phase in result["phases"]:
    average = phase["top1_ema"]
    table.add_row(
      str(phase["index"]),
      phase["name"],
      bits_name(phase["weight_bits"], phase["act_bits"]),
      str(len(phase["frozen"])),
      f"{phase['top1']:.2f}",
      "-" if average is None else f"{average:.2f}",
      f"{phase['loss']:.3f}",
      f"{phase['seconds']:.1f}",
      f"{phase['compile_seconds']:.1f}",
    )
  console.print(table)
  console.print(final_line(result))


def final_line(result: dict[str, Any]) -> str:
  """The outcome in one sentence."""
  final = result["final"]
  bits = bits_name(final["weight_bits"], final["act_bits"]).upper()
  line = f"{bits}: top-1 {final['top1']:.2f} %, top-5 {final['top5']:.2f} % "
  line += f"({final['weights']} weights, {final['examples']} images)"
  quantized = final["weight_bits"] is not None or final["act_bits"] is not None
  if quantized and final["full_precision_top1"] is not None:
    difference = final["top1"] - final["full_precision_top1"]
    line += (
      f"; full precision {final['full_precision_top1']:.2f} %, difference {difference:+.2f} points"
    )
  return line + "."
