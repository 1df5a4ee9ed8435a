"""What a run has done so far, without its arrays: plain data that a checkpoint holds as JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from profit_jax.config import Settings
from profit_jax.schedule import Phase


@dataclasses.dataclass(kw_only=True)
class PhaseRecord:
  """A finished phase, as `result.json` lists it.

  `top1`, `top1_ema` in percent at its last epoch (`top1_ema` None without EMA); `loss` the mean
  training loss of its last epoch; `seconds` all of its wall time, `compile_seconds` the part of
  them spent waiting for compilation.
  """

  index: int
  name: str
  kind: str
  weight_bits: int | None
  act_bits: int | None
  epochs: int
  steps: int
  top1: float
  top1_ema: float | None
  loss: float
  seconds: float
  compile_seconds: float
  frozen: list[str]


@dataclasses.dataclass(kw_only=True)
class Best:
  """The best evaluation so far: of the target bits, or in full precision."""

  epoch: int  # over the whole run, from 1; 0 is before training
  phase: int
  top1: float
  top5: float
  weights: str  # raw or ema
  examples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """What the weights files of a run are worth before training, in full precision; top-1 and top-5
  in percent.

  Attributes:
    source: whose names the student's file has; None from random weights, and then so are its
      scores.
    new_head: its classifier starts at random.
    quantized: it has the scalars of quantizers, so that it was trained quantized.
    top1: of the student as configured.
    top5: likewise.
    file_top1: of the student with the padding of its file's own code, where that is another.
    file_pad_value: that padding.
    teacher_top1: of a teacher with a file of its own.
    examples: evaluated.
    sha256: of the student's file.
    teacher_sha256: of the teacher's.
    variant: which net of another codebase the student's file is; None where it is none, or nothing
      gives it a name.
    variant_by: what says so, or gives the settings of the file.
    teacher_variant: as `variant`, of the teacher's.
    teacher_variant_by: likewise.
  """

  source: str | None = None
  new_head: bool = False
  quantized: bool = False
  top1: float | None = None
  top5: float | None = None
  file_top1: float | None = None
  file_pad_value: float | None = None
  teacher_top1: float | None = None
  examples: int = 0
  sha256: str | None = None
  teacher_sha256: str | None = None
  variant: str | None = None
  variant_by: str | None = None
  teacher_variant: str | None = None
  teacher_variant_by: str | None = None


@dataclasses.dataclass
class EpochRecord:
  """An epoch's evaluation, and for the plots, by name and layer: what its last steps changed (see
  `train/instability.py`), `clip_rate`, `aiwq` in a sampling phase, and the quantizers' scalars.
  """

  phase: int
  top1: float
  top1_ema: float | None
  loss: float
  instability: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class Progress:
  """Where a run stands.

  Attributes:
    phase: index of the phase under way, from 1; 0 before the first.
    epoch: epochs finished in it.
    total_epochs: epochs finished in all.
    step: steps done in the epoch under way.
    totals: sums over them of what the steps measured, in the order of the steps.
    instability: what the last steps of the epoch changed, once they are done; see
      `train/instability.py`.
    ranking: the convolutions by AIWQ, largest first; empty before a sampling phase ends.
    metric: their AIWQ at the end of the last sampling epoch.
    phase_seconds: wall time that the phase under way has taken.
    phase_compile_seconds: the part of it spent waiting for compilation.
    epochs: every epoch so far.
    records: the finished phases.
    best: at the plan's last bits, or None before them.
    full_precision: the best of the first weights, where they came from a file, and of the
      full-precision phase; None without either.
    start: what the weights files were worth before training; None without any.
    retries: how often the run went back to a checkpoint because its numbers were not finite.
    learning_rate_scale: what all learning rates are multiplied by since.
    forked_from: the directory of the run that trained the first phases, where it was another; else
      empty.
    forked_phases: how many.
  """

  phase: int = 0
  epoch: int = 0
  total_epochs: int = 0
  step: int = 0
  totals: dict[str, float] = dataclasses.field(default_factory=dict)
  instability: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  ranking: list[str] = dataclasses.field(default_factory=list)
  metric: dict[str, float] = dataclasses.field(default_factory=dict)
  phase_seconds: float = 0.0
  phase_compile_seconds: float = 0.0
  epochs: list[EpochRecord] = dataclasses.field(default_factory=list)
  records: list[PhaseRecord] = dataclasses.field(default_factory=list)
  best: Best | None = None
  full_precision: Best | None = None
  start: Start | None = None
  retries: int = 0
  learning_rate_scale: float = 1.0
  forked_from: str = ""
  forked_phases: int = 0

  @property
  def begun(self) -> bool:
    """Whether a step has been made."""
    return bool(self.total_epochs or self.step)

  def begin_phase(self, phase: Phase) -> None:
    """A phase begins; a sampling phase makes a new ranking."""
    self.phase, self.epoch, self.step, self.totals = phase.index, 0, 0, {}
    self.phase_seconds = self.phase_compile_seconds = 0.0
    if phase.kind == "sampling":
      self.ranking, self.metric = [], {}

  def add(self, metrics: dict[str, float]) -> None:
    """Adds the metrics of the next step to the totals."""
    for name, value in metrics.items():
      self.totals[name] = self.totals.get(name, 0.0) + value

  def means(self) -> dict[str, float]:
    """The means of the metrics over the steps of the epoch so far."""
    return {name: total / self.step for name, total in self.totals.items()}

  def count_epoch(self, record: EpochRecord) -> None:
    """The epoch under way is over."""
    self.epochs.append(record)
    self.epoch, self.total_epochs = self.epoch + 1, self.total_epochs + 1
    self.step, self.totals, self.instability = 0, {}, {}

  def count_retry(self, bad: "Progress", factor: float) -> None:
    """The run has gone back here from `bad`, and resumes with `factor` times its learning rates."""
    self.retries = bad.retries + 1
    self.learning_rate_scale = bad.learning_rate_scale * factor

  def to_dict(self) -> dict[str, Any]:
    """Plain values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "Progress":
    """The inverse of `to_dict`."""
    values = dict(values)
    values["epochs"] = [EpochRecord(**record) for record in values["epochs"]]
    values["records"] = [PhaseRecord(**record) for record in values["records"]]
    for name, kind in (("best", Best), ("full_precision", Best), ("start", Start)):
      values[name] = kind(**values[name]) if values[name] else None
    return cls(**values)


def initial_weights(settings: Settings, progress: Progress) -> dict[str, dict[str, str | None]]:
  """The weights files that a run started from: `student` and `teacher`, each with its `name` as
  configured, the `sha256` of the file (None where a run's directory was given), the `variant` that
  it is, and what told it, `variant_by`.
  """
  start = progress.start or Start()
  files = {
    "student": (settings.init.weights, start.sha256, start.variant, start.variant_by),
    "teacher": (
      settings.teacher.weights,
      start.teacher_sha256,
      start.teacher_variant,
      start.teacher_variant_by,
    ),
  }
  keys = ("name", "sha256", "variant", "variant_by")
  return {who: dict(zip(keys, facts, strict=True)) for who, facts in files.items() if facts[0]}


def weights_text(file: Mapping[str, str | None]) -> str:
  """What to say of a file of `initial_weights`, in a report or a card."""
  text = f"{file['name']}, SHA-256 `{file['sha256']}`" if file["sha256"] else str(file["name"])
  if file.get("variant"):  # not in runs of earlier versions
    text += f", {file['variant']} by {file['variant_by']}"
  return text


def summary(progress: Progress, phases: tuple[Phase, ...]) -> dict[str, Any]:
  """The parts of `result.json` that a run's progress knows: phases, aiwq, final."""
  best = progress.best
  return {
    "phases": [dataclasses.asdict(record) for record in progress.records],
    "aiwq": [
      {"layer": layer, "metric": progress.metric[layer], "rank": rank}
      for rank, layer in enumerate(progress.ranking, 1)
    ],
    "final": {
      "weight_bits": phases[-1].weight_bits,
      "act_bits": phases[-1].act_bits,
      "top1": best.top1,
      "top5": best.top5,
      "weights": best.weights,
      "full_precision_top1": progress.full_precision and progress.full_precision.top1,
      "examples": best.examples,
    },
  }
