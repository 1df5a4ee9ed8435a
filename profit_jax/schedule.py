"""The phases of a PROFIT run as data; the published 4-bit command is 22 phases and 200 epochs.

Pure: imports no jax, so that `--mode plan` answers at once on any machine.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from profit_jax.config import ConfigError, PlanSettings, Settings, TrainSettings, check_plan

Kind = Literal["full_precision", "bn", "finetune", "sampling"]

WARMUP_START = 0.1  # multiple of the learning rate in the first warm-up epoch
FINAL = 0.001  # multiple that the cosine falls to


class ProgramKey(NamedTuple):
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
  def program(self) -> ProgramKey:
    """The compiled program that runs it."""
    return ProgramKey(
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


def profit_schedule(  # noqa: PLR0913  one keyword for each setting
  *,
  weight_bits: Sequence[int] = PlanSettings.weight_bits,
  act_bits: Sequence[int] = PlanSettings.act_bits,
  full_precision_epochs: int = PlanSettings.full_precision_epochs,
  finetune_epochs: int = PlanSettings.finetune_epochs,
  bn_epochs: int = PlanSettings.bn_epochs,
  sampling_epochs: int = PlanSettings.sampling_epochs,
  warmup_epochs: int | None = None,
  freeze_fractions: Sequence[float] = PlanSettings.freeze_fractions,
  profit_bits: Sequence[int] | None = None,
  refit_bits: Sequence[int] = PlanSettings.refit_bits,
  progressive: bool = PlanSettings.progressive,
  stabilize: bool = PlanSettings.stabilize,
  learning_rate: float = TrainSettings.learning_rate,
  full_precision_learning_rate: float | None = None,
  teacher: bool = False,
) -> tuple[Phase, ...]:
  """The phases of PROFIT: full precision, activations at falling bits, then weights.

  At each bit width BN phases surround a fine-tuning; at `profit_bits`, AIWQ is sampled first and
  fine-tuning has a part for each of `freeze_fractions`.

  Args:
    weight_bits: bit widths of the weights, 2 to 8, falling; () leaves them in full precision.
    act_bits: bit widths of the activations, likewise.
    full_precision_epochs: of the first phase; 0 for weights that are trained already.
    finetune_epochs: of each fine-tuning phase.
    bn_epochs: of each BN phase, which trains norms, biases and quantizers; 0 leaves them out.
    sampling_epochs: in which AIWQ is measured.
    warmup_epochs: first epochs of full-precision and fine-tuning phases, whose learning rate rises;
      None is 3, or fewer where a phase is shorter.
    freeze_fractions: shares of the convolutions that are frozen, one phase each; not falling.
    profit_bits: weight bit widths with sampling and freezing; None is the last, () none.
    refit_bits: weight bit widths at whose beginning the kernels' intervals are fitted again.
    progressive: False goes straight to the last bits of each list.
    stabilize: False leaves the BN phases out.
    learning_rate: peak of the weights' learning rate.
    full_precision_learning_rate: likewise, of the first phase; None is `learning_rate`.
    teacher: whether the losses have a teacher's part.

  Raises:
    ConfigError: values that are not allowed, or nothing to do.

  References:
    Park and Yoo, PROFIT, ECCV 2020, arXiv 2008.04693, section 3.
  """
  for name, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
    if isinstance(bits, int):
      raise ConfigError(f"{name} = {bits} is not allowed: give a tuple, as ({bits},).")
  for name, rate in (
    ("learning_rate", learning_rate),
    ("full_precision_learning_rate", full_precision_learning_rate or learning_rate),
  ):
    if not 0 < rate <= 10:
      raise ConfigError(f"{name} = {rate!r} is not allowed: it must be above 0, at most 10.")
  reached = tuple(weight_bits if progressive else weight_bits[-1:])
  longest = min((e for e in (finetune_epochs, full_precision_epochs) if e > 0), default=0)
  options = PlanSettings(
    weight_bits=tuple(weight_bits),
    act_bits=tuple(act_bits),
    full_precision_epochs=full_precision_epochs,
    finetune_epochs=finetune_epochs,
    bn_epochs=bn_epochs,
    sampling_epochs=sampling_epochs,
    warmup_epochs=min(PlanSettings.warmup_epochs, longest)
    if warmup_epochs is None
    else warmup_epochs,
    freeze_fractions=tuple(freeze_fractions),
    profit=bool(reached) and (profit_bits is None or bool(profit_bits)),
    profit_bits=reached[-1:] if profit_bits is None else tuple(profit_bits),
    refit_bits=tuple(refit_bits),
    progressive=progressive,
    stabilize=stabilize,
  )
  try:
    check_plan(options)
  except ConfigError as error:
    told = str(error).replace("config.plan.", "").replace("plan.", "")
    told = told.replace("profit = False for plain fine-tuning", "() for plain fine-tuning")
    raise ConfigError(told) from None
  rates = Rates(learning_rate, full_precision_learning_rate or learning_rate)
  phases = _Builder(options, rates, distill=teacher, first_distills=teacher).build(
    full_precision=full_precision_epochs > 0
  )
  if not phases:
    raise ConfigError(
      "The schedule has no phase: give bit widths, or full_precision_epochs above 0."
    )
  return phases


def plan(settings: Settings) -> tuple[Phase, ...]:
  """The phases of a run; a kind whose epochs are 0 has none.

  Raises:
    ConfigError: the settings leave nothing to do.
  """
  taught, train = settings.teacher.model != "none", settings.train
  # A student with a random classifier has nothing to learn from itself yet: its teacher is what the
  # full-precision phase makes.
  own_teacher = settings.teacher.model == "self" and settings.new_classifier
  builder = _Builder(
    settings.plan,
    Rates(train.learning_rate, train.full_precision_learning_rate),
    distill=taught,
    first_distills=taught and not own_teacher,
  )
  phases = builder.build(full_precision=taught or settings.new_classifier)
  if not phases:
    raise ConfigError(
      "The plan has no phase: config.plan.weight_bits and config.plan.act_bits are empty, and a "
      "full-precision phase runs "
      "only with a teacher, from random weights or with a new classifier. Give at least one bit "
      "width."
    )
  if settings.oscillation.in_training:
    return with_separate_bn_programs(phases)
  return phases


def with_separate_bn_programs(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
  """The same phases where a remedy for oscillation is on in all but BN phases."""
  return tuple(dataclasses.replace(phase, shares_program=False) for phase in phases)


def target_phases(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
  """The phases that run at the plan's last bits: what the final result is chosen from."""
  last = phases[-1]
  return tuple(
    p for p in phases if (p.weight_bits, p.act_bits) == (last.weight_bits, last.act_bits)
  )


class Rates(NamedTuple):
  """Peaks of the weights' learning rate.

  Attributes:
    quantized: of all phases but the first.
    full_precision: of the first.
  """

  quantized: float
  full_precision: float


class _Builder:
  """Appends phases one by one; `weight_bits` and `act_bits` are those that the next one runs at."""

  def __init__(self, options: PlanSettings, rates: Rates, *, distill: bool, first_distills: bool):
    self.options, self.rates = options, rates
    self.distill, self.first_distills = distill, first_distills
    self.phases: list[Phase] = []
    self.weight_bits: int | None = None
    self.act_bits: int | None = None
    self.calibrate: Literal["act", "weight", "fit"] | None = None

  def build(self, *, full_precision: bool) -> tuple[Phase, ...]:
    options = self.options
    if full_precision:
      self._add("full_precision", "", options.full_precision_epochs, distill=self.first_distills)

    for bits in self._ladder(options.act_bits):
      self.calibrate = "act" if self.act_bits is None else None
      self.act_bits = bits
      self._stable("finetune")
    for bits in self._ladder(options.weight_bits):
      self.calibrate = (
        "fit" if bits in options.refit_bits else "weight" if self.weight_bits is None else None
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
    full_precision = kind == "full_precision"
    self.phases.append(
      Phase(
        index=len(self.phases) + 1,
        name=f"{bits_name(self.weight_bits, self.act_bits)} {part}".strip(),
        kind=kind,
        weight_bits=self.weight_bits,
        act_bits=self.act_bits,
        epochs=epochs,
        warmup_epochs=self.options.warmup_epochs if kind in ("full_precision", "finetune") else 0,
        learning_rate=self.rates.full_precision if full_precision else self.rates.quantized,
        constant_rate=kind == "sampling",
        frozen_fraction=frozen_fraction,
        # The a and c of a quantized kernel need its gradient anyway, so that a program without the
        # kernels' update would save nothing.
        shares_program=kind == "bn" and self.weight_bits is not None,
        calibrate=self.calibrate,
        distill=self.distill if distill is None else distill,
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
