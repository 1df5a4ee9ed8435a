"""The phases of a PROFIT run as data (SPEC section 4; the published 4-bit command is 22 phases and
200 epochs).

Pure: imports no jax, so that `--mode plan` answers at once on any machine.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from profit_jax.config import ConfigError, Settings

Kind = Literal["full_precision", "bn", "finetune", "sampling"]

WARMUP_START = 0.1  # multiple of the learning rate in the first warm-up epoch
FINAL = 0.001  # multiple that the cosine falls to


class Program(NamedTuple):
  """What makes one compiled training program; phases that agree here share it.

  Attributes:
    quantized_weights: kernels go through their quantizers.
    quantized_acts: activations do.
    train_kernels: False where every kernel is frozen by its label, so that its gradient need not be
      computed.
    sampling: AIWQ is measured.
    distill: a teacher runs beside the student.
  """

  quantized_weights: bool
  quantized_acts: bool
  train_kernels: bool
  sampling: bool
  distill: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """A stretch of epochs with one optimizer.

  Attributes:
    index: place in the plan, from 1.
    name: unique: `fp`, `a8 bn1`, `w4a4 ft2`, ...
    kind: full_precision; bn (kernels fixed; norms, biases, a and c train); finetune; sampling.
    weight_bits: None is full precision.
    act_bits: likewise.
    epochs: at least 1.
    warmup_epochs: linear warm-up before the cosine.
    learning_rate: its peak.
    constant_rate: no schedule (the sampling phase).
    frozen_fraction: share of the AIWQ ranking whose kernels are frozen.
    shares_program: of kind bn: it runs the program of finetune, with all kernels frozen by value.
    calibrate: quantizers that get their first a and c just before it: "act", "weight" (the first
      values), "fit" (kernels', fitted to the phase's bits) or None.
    distill: the loss has the teacher's part.
  """

  index: int
  name: str
  kind: Kind
  weight_bits: int | None
  act_bits: int | None
  epochs: int
  warmup_epochs: int
  learning_rate: float
  constant_rate: bool = False
  frozen_fraction: float = 0.0
  shares_program: bool = False
  calibrate: Literal["act", "weight", "fit"] | None = None
  distill: bool = False

  @property
  def program(self) -> Program:
    """The compiled program that runs it."""
    return Program(
      quantized_weights=self.weight_bits is not None,
      quantized_acts=self.act_bits is not None,
      train_kernels=self.trains_kernels or self.shares_program,
      sampling=self.kind == "sampling",
      distill=self.distill,
    )

  @property
  def trains_kernels(self) -> bool:
    """False in BN phases."""
    return self.kind != "bn"

  @property
  def trains_codes(self) -> bool:
    """Whether it trains kernels that are quantized, so that weight codes can change."""
    return self.weight_bits is not None and self.trains_kernels

  def learning_rate_at(self, epoch: int) -> float:
    """The learning rate of the weights in an epoch, from 0: warm-up from 0.1, then a cosine to
    0.001, as multiples.
    """
    if self.constant_rate:
      return self.learning_rate
    if epoch < self.warmup_epochs:
      multiple = WARMUP_START + (1 - WARMUP_START) * epoch / self.warmup_epochs
    else:
      progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
      multiple = FINAL + (1 - FINAL) * (1 + math.cos(math.pi * progress)) / 2
    return self.learning_rate * multiple


def plan(settings: Settings) -> tuple[Phase, ...]:
  """The phases of a run; a kind whose epochs are 0 has none.

  Raises:
    ConfigError: the settings leave nothing to do.
  """
  phases = _Builder(settings).build()
  if not phases:
    raise ConfigError(
      "The plan has no phase: config.plan.weight_bits and config.plan.act_bits are empty, and a "
      "full-precision phase runs "
      "only with a teacher, from random weights or with a new classifier. Give at least one bit "
      "width."
    )
  return phases


def target_phases(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
  """The phases that run at the plan's last bits: what the final result is chosen from."""
  last = phases[-1]
  return tuple(
    p for p in phases if (p.weight_bits, p.act_bits) == (last.weight_bits, last.act_bits)
  )


class _Builder:
  """Appends phases one by one; `weight_bits` and `act_bits` are those that the next one runs at."""

  def __init__(self, settings: Settings):
    self.settings, self.options = settings, settings.plan
    self.phases: list[Phase] = []
    self.weight_bits: int | None = None
    self.act_bits: int | None = None
    self.calibrate: Literal["act", "weight", "fit"] | None = None

  def build(self) -> tuple[Phase, ...]:
    options, settings = self.options, self.settings
    taught = settings.teacher.model != "none"
    if taught or settings.new_classifier:
      # A student with a random classifier has nothing to learn from itself yet: its teacher is what
      # this phase makes.
      own_teacher = settings.teacher.model == "self" and settings.new_classifier
      self._add(
        "full_precision", "", options.full_precision_epochs, distill=taught and not own_teacher
      )

    for bits in self._ladder(options.act_bits):
      self.calibrate = "act" if self.act_bits is None else None
      self.act_bits = bits
      self._stable("finetune")
    for bits in self._ladder(options.weight_bits):
      self.calibrate = (
        "fit" if bits in options.fitted_bits else "weight" if self.weight_bits is None else None
      )
      self.weight_bits = bits
      self._stable("profit" if options.profit and bits in options.profit_bits else "finetune")
    return tuple(self.phases)

  def _ladder(self, bits: tuple[int, ...]) -> tuple[int, ...]:
    return bits if self.options.progressive else bits[-1:]

  def _stable(self, middle: str) -> None:
    options = self.options
    if options.stabilize:
      self._add("bn", "bn1", options.bn_epochs)
    if middle == "profit":
      self._add("sampling", "sampling", options.sampling_epochs)
      for number, fraction in enumerate(options.freeze_fractions, 1):
        self._add("finetune", f"ft{number}", options.finetune_epochs, frozen_fraction=fraction)
    else:
      self._add("finetune", "ft", options.finetune_epochs)
    if options.stabilize:
      self._add("bn", "bn2", options.bn_epochs)

  def _add(
    self,
    kind: Kind,
    part: str,
    epochs: int,
    *,
    frozen_fraction: float = 0.0,
    distill: bool | None = None,
  ) -> None:
    if epochs == 0:
      return
    train = self.settings.train
    full_precision = kind == "full_precision"
    remedy = self.settings.remedy
    self.phases.append(
      Phase(
        index=len(self.phases) + 1,
        name=f"{bits_name(self.weight_bits, self.act_bits)} {part}".strip(),
        kind=kind,
        weight_bits=self.weight_bits,
        act_bits=self.act_bits,
        epochs=epochs,
        warmup_epochs=self.options.warmup_epochs if kind in ("full_precision", "finetune") else 0,
        learning_rate=train.full_precision_learning_rate if full_precision else train.learning_rate,
        constant_rate=kind == "sampling",
        frozen_fraction=frozen_fraction,
        # The a and c of a quantized kernel need its gradient anyway, so that a program without the
        # kernels' update would save nothing. A remedy has programs with and without it.
        shares_program=kind == "bn"
        and self.weight_bits is not None
        and not (remedy.dampening or remedy.freezing_thresholds),
        calibrate=self.calibrate,
        distill=self.settings.teacher.model != "none" if distill is None else distill,
      )
    )
    self.calibrate = None


def bits_name(weight_bits: int | None, act_bits: int | None) -> str:
  """`w4a4`, `a8`, `w8`, or `fp`."""
  named = (f"w{weight_bits}" if weight_bits else "") + (f"a{act_bits}" if act_bits else "")
  return named or "fp"


def summary_line(phases: tuple[Phase, ...]) -> str:
  """The plan in half a sentence: `22 phases, 200 epochs, to w4a4`."""
  last = phases[-1]
  epochs = sum(p.epochs for p in phases)
  counted = "1 phase" if len(phases) == 1 else f"{len(phases)} phases"
  return f"{counted}, {epochs} epochs, to {bits_name(last.weight_bits, last.act_bits)}"


def format_table(
  phases: tuple[Phase, ...], steps_per_epoch: int, steps_per_second: float | None = None
) -> str:
  """The plan as text: a line per phase, phases that share a compiled program under one number.

  Args:
    phases: `plan(settings)`.
    steps_per_epoch: of the training data.
    steps_per_second: of training; gives the hours of each phase, evaluation and compilation apart.
  """
  numbers = {program: i for i, program in enumerate(dict.fromkeys(p.program for p in phases), 1)}
  kinds = {(p.weight_bits is not None, p.act_bits is not None) for p in phases}
  lines = [
    f"{'#':>3}  {'phase':14} {'kind':14} {'bits':5} {'frozen':>6} {'epochs':>6} {'steps':>8} "
    f"{'program':>7}"
  ]
  if steps_per_second:
    lines[0] += f" {'hours':>7}"
  for p in phases:
    lines.append(
      f"{p.index:>3}  {p.name:14} {p.kind.replace('_', ' '):14} "
      f"{bits_name(p.weight_bits, p.act_bits):5} "
      f"{p.frozen_fraction:>6.0%} {p.epochs:>6} {p.epochs * steps_per_epoch:>8} "
      f"{numbers[p.program]:>7}"
    )
    if steps_per_second:
      lines[-1] += f" {p.epochs * steps_per_epoch / steps_per_second / 3600:>7.2f}"
  epochs = sum(p.epochs for p in phases)
  lines.append(
    f"{len(phases)} phases, {epochs} epochs, {epochs * steps_per_epoch} steps; "
    f"compiled programs: {len(numbers)} for training, {len(kinds)} for evaluation"
  )
  if steps_per_second:
    hours = epochs * steps_per_epoch / steps_per_second / 3600
    lines.append(
      f"{hours:.1f} hours of training at {steps_per_second:g} steps a second, evaluation and "
      "compilation apart"
    )
  return "\n".join(lines)
