"""What a run is: `ConfigDict` -> frozen, validated `Settings`. Every later module trusts these and
checks nothing again.

`configs/base.py` documents each field's meaning and unit; here stand the types and the allowed
values.
"""

import dataclasses
import itertools
from collections.abc import Collection
from typing import Any, Literal

import ml_collections

from profit_jax.fields import ConfigError as ConfigError  # every package takes both from here
from profit_jax.fields import Ending as Ending
from profit_jax.fields import as_lists, build, listed, require

MIN_BITS, MAX_BITS = 2, 8
Dtype = Literal["auto", "float32", "tfloat32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
  """Section `model`."""

  name: str
  width: float
  activation: Literal["relu", "relu6"]
  dropout: float
  strides: tuple[int, ...]
  bn_momentum: float
  bn_epsilon: float
  squeeze_excite: Literal["before", "after"]
  pad_value: float
  channel_rounding: Literal["nearest", "up"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitSettings:
  """Section `init`."""

  weights: str
  reset_head: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSettings:
  """Section `teacher`."""

  model: str
  weights: str
  batch_stats: Literal["batch", "running"]
  normalization: Literal["dataset", "imagenet", "inception", "none"]
  width: float
  activation: Literal["relu", "relu6"]
  strides: tuple[int, ...]
  bn_epsilon: float
  squeeze_excite: Literal["before", "after"]
  pad_value: float
  channel_rounding: Literal["nearest", "up"]

  def as_model(self) -> ModelSettings:
    """Another model's settings. Without dropout, which would only add noise to what it teaches."""
    own = dataclasses.asdict(self)
    shape = {
      field.name: own[field.name]
      for field in dataclasses.fields(ModelSettings)
      if field.name in own
    }
    # Its running statistics are its file's and never updated, so that the momentum does not matter.
    return ModelSettings(name=self.model, dropout=0.0, bn_momentum=0.9, **shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
  """Section `data`."""

  name: str
  data_dir: str
  train_split: str
  eval_split: str
  image_size: int
  normalization: Literal["dataset", "imagenet", "inception", "none"]
  augment: bool
  train_crop: Literal["resized", "padded"]
  eval_share: float
  interpolation: Literal["bicubic", "bilinear"]
  max_broken: float
  readers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
  """Section `plan`."""

  weight_bits: tuple[int, ...]
  act_bits: tuple[int, ...]
  fitted_bits: tuple[int, ...] = ()
  progressive: bool
  stabilize: bool
  profit: bool
  profit_bits: tuple[int, ...]
  freeze_fractions: tuple[float, ...]
  full_precision_epochs: int
  finetune_epochs: int
  bn_epochs: int
  sampling_epochs: int
  sampling_every: int
  warmup_epochs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSettings:
  """Section `quant`; the defaults are the paper's."""

  method: Literal["duq", "lsq", "pact", "qil"] = "duq"
  per_channel: bool = False
  first_bits: int = 0
  last_bits: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemedySettings:
  """Section `remedy`; the defaults are off."""

  dampening: float = 0.0
  freezing_thresholds: tuple[float, ...] = ()
  freezing_momentum: float = 0.001
  bn_batches: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
  """Section `train`."""

  batch_size: int
  accumulation_steps: int
  eval_batch_size: int
  learning_rate: float
  full_precision_learning_rate: float
  quantizer_lr_scale: float
  weight_decay: float
  momentum: float
  ema_rate: float
  dtype: Dtype
  kernels: Literal["tuned", "xla"] = "tuned"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
  """Section `checkpoint`."""

  keep: int
  minutes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoverySettings:
  """Section `recovery`."""

  retries: int
  learning_rate_factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """A validated configuration, one attribute per section."""

  seed: int
  compilation_cache: str
  model: ModelSettings
  init: InitSettings
  teacher: TeacherSettings
  data: DataSettings
  plan: PlanSettings
  quant: QuantSettings = QuantSettings()
  remedy: RemedySettings = RemedySettings()
  train: TrainSettings
  checkpoint: CheckpointSettings
  recovery: RecoverySettings

  def with_dtype(self, dtype: Dtype) -> "Settings":
    """The settings with `train.dtype` decided."""
    return dataclasses.replace(self, train=dataclasses.replace(self.train, dtype=dtype))

  @property
  def from_scratch(self) -> bool:
    """Whether the student starts from random weights."""
    return not self.init.weights

  @property
  def new_classifier(self) -> bool:
    """Whether the student's classifier starts at random: before its full-precision phase it can
    teach nobody.
    """
    return self.from_scratch or self.init.reset_head

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, tuples as lists: what `config.json` holds."""
    return as_lists(dataclasses.asdict(self))


def parse(config: ml_collections.ConfigDict, models: Collection[str]) -> Settings:
  """Checks a configuration and freezes it.

  Args:
    config: what a configuration file gives, overridden from the command line.
    models: the names that `model.name` and `teacher.model` may take.

  Raises:
    ConfigError: naming the field, its value, and what is allowed.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      f"the configuration is a {type(config).__name__}: its get_config() must return a ConfigDict."
    )
  settings = build(Settings, config.to_dict(), "config")
  _check_model(settings, models)
  _check_data(settings.data)
  _check_plan(settings.plan)
  for name in ("first_bits", "last_bits"):
    bits = getattr(settings.quant, name)
    allowed = f"0 (as all layers), or {MIN_BITS} to {MAX_BITS}"
    require(bits == 0 or MIN_BITS <= bits <= MAX_BITS, f"quant.{name}", bits, allowed)
  fitted, method = settings.plan.fitted_bits, settings.quant.method
  require(
    not fitted or method == "duq",
    "plan.fitted_bits",
    fitted,
    f"() with quant.method = {method}: it fits DuQ's a and c",
  )
  _check_remedy(settings.remedy, method)
  epochs = settings.plan.full_precision_epochs
  needed = "1 or above without init.weights, and with init.reset_head"
  require(epochs >= 1 or not settings.new_classifier, "plan.full_precision_epochs", epochs, needed)
  require(
    bool(settings.init.weights) or not settings.init.reset_head,
    "init.reset_head",
    settings.init.reset_head,
    "False without init.weights: from random weights the head is new anyway",
  )
  train = settings.train
  require(0 <= settings.seed < 2**32, "seed", settings.seed, "0 or above, below 2^32")
  for name in ("batch_size", "accumulation_steps", "eval_batch_size"):
    require(getattr(train, name) >= 1, f"train.{name}", getattr(train, name), "1 or above")
  parts, fitting = train.accumulation_steps, f"a divisor of train.batch_size = {train.batch_size}"
  require(train.batch_size % parts == 0, "train.accumulation_steps", parts, fitting)
  part, every = train.batch_size // parts, settings.plan.sampling_every
  fitting = f"a divisor of {part}, the images in a part of a batch"
  require(every >= 1 and part % every == 0, "plan.sampling_every", every, fitting)
  for name in ("learning_rate", "full_precision_learning_rate"):
    require(
      0 < getattr(train, name) <= 10, f"train.{name}", getattr(train, name), "above 0, at most 10"
    )
  require(
    0 <= train.quantizer_lr_scale <= 1,
    "train.quantizer_lr_scale",
    train.quantizer_lr_scale,
    "0 to 1",
  )
  for name in ("weight_decay", "momentum", "ema_rate"):
    require(
      0 <= getattr(train, name) < 1, f"train.{name}", getattr(train, name), "0 or above, below 1"
    )
  require(settings.checkpoint.keep >= 1, "checkpoint.keep", settings.checkpoint.keep, "1 or above")
  require(
    settings.checkpoint.minutes >= 0,
    "checkpoint.minutes",
    settings.checkpoint.minutes,
    "0 or above",
  )
  recovery, factor = settings.recovery, settings.recovery.learning_rate_factor
  require(recovery.retries >= 0, "recovery.retries", recovery.retries, "0 or above")
  require(0 < factor < 1, "recovery.learning_rate_factor", factor, "above 0, below 1")
  return settings


def _check_model(settings: Settings, models: Collection[str]) -> None:
  model, teacher = settings.model, settings.teacher
  require(model.name in models, "model.name", model.name, f"one of {listed(models)}")
  for name in ("dropout", "bn_momentum"):
    require(
      0 <= getattr(model, name) < 1, f"model.{name}", getattr(model, name), "0 or above, below 1"
    )
  for section, shape in (("model", model), ("teacher", teacher)):
    require(0 < shape.width <= 4, f"{section}.width", shape.width, "above 0, at most 4")
    require(
      all(stride in (1, 2) for stride in shape.strides),
      f"{section}.strides",
      shape.strides,
      "numbers that are each 1 or 2, the stem's and the stages'; or () for the published ones",
    )
    require(
      0 < shape.bn_epsilon <= 0.1, f"{section}.bn_epsilon", shape.bn_epsilon, "above 0, at most 0.1"
    )
    require(
      shape.pad_value in (0.0, -0.375),
      f"{section}.pad_value",
      shape.pad_value,
      "-0.375 (negative padding) or 0.0",
    )
  allowed = ["none", "self", *models]
  require(teacher.model in allowed, "teacher.model", teacher.model, f"one of {listed(allowed)}")
  if teacher.model in ("none", "self"):
    none = f'"" with teacher.model = {teacher.model}, which reads none'
    require(not teacher.weights, "teacher.weights", teacher.weights, none)
  else:
    needed = f"a weights file: teacher.model = {teacher.model} cannot teach without one; "
    needed += "or set teacher.model to self or none"
    require(bool(teacher.weights), "teacher.weights", teacher.weights, needed)


def _check_data(data: DataSettings) -> None:
  # Only the sources know which data sets there are.
  sets = "digits, digit_pairs, folder, or the name of a tensorflow-datasets set"
  require(bool(data.name.strip()), "data.name", data.name, sets)
  require(
    bool(data.train_split), "data.train_split", data.train_split, "the name of a split, as train"
  )
  require(8 <= data.image_size <= 1024, "data.image_size", data.image_size, "8 to 1024 pixels")
  require(0.1 <= data.eval_share <= 1, "data.eval_share", data.eval_share, "0.1 to 1")
  require(0 <= data.max_broken <= 1, "data.max_broken", data.max_broken, "a share from 0 to 1")
  require(1 <= data.readers <= 1024, "data.readers", data.readers, "1 to 1024")


def _check_plan(plan: PlanSettings) -> None:
  for name in ("weight_bits", "act_bits"):
    bits = getattr(plan, name)
    require(
      all(MIN_BITS <= b <= MAX_BITS for b in bits),
      f"plan.{name}",
      bits,
      f"bit widths from {MIN_BITS} to {MAX_BITS}",
    )
    require(
      all(before > after for before, after in itertools.pairwise(bits)),
      f"plan.{name}",
      bits,
      "bit widths that fall from one to the next, as (8, 5, 4)",
    )
  reached = plan.weight_bits if plan.progressive else plan.weight_bits[-1:]
  fitting = f"only bit widths that the plan reaches, {reached}"
  require(set(plan.fitted_bits) <= set(reached), "plan.fitted_bits", plan.fitted_bits, fitting)
  if plan.profit and plan.weight_bits:
    require(
      set(plan.profit_bits) <= set(reached),
      "plan.profit_bits",
      plan.profit_bits,
      f"{fitting}; or plan.profit = False for plain fine-tuning",
    )
  require(
    len(plan.freeze_fractions) >= 1
    and all(0 <= f <= 1 for f in plan.freeze_fractions)
    and list(plan.freeze_fractions) == sorted(plan.freeze_fractions),
    "plan.freeze_fractions",
    plan.freeze_fractions,
    "at least one share from 0 to 1, none below the one before it",
  )
  for name in ("full_precision_epochs", "bn_epochs", "warmup_epochs"):
    require(getattr(plan, name) >= 0, f"plan.{name}", getattr(plan, name), "0 or above")
  for name in ("finetune_epochs", "sampling_epochs"):
    require(getattr(plan, name) >= 1, f"plan.{name}", getattr(plan, name), "1 or above")
  for name in ("finetune_epochs", "full_precision_epochs"):
    epochs = getattr(plan, name)
    require(
      epochs == 0 or plan.warmup_epochs <= epochs,
      "plan.warmup_epochs",
      plan.warmup_epochs,
      f"at most plan.{name} = {epochs}",
    )


def _check_remedy(remedy: RemedySettings, method: str) -> None:
  require(0 <= remedy.dampening <= 1000, "remedy.dampening", remedy.dampening, "0 (off) to 1000")
  require(
    0 < remedy.freezing_momentum < 1,
    "remedy.freezing_momentum",
    remedy.freezing_momentum,
    "above 0, below 1",
  )
  thresholds = remedy.freezing_thresholds
  # A single oscillation makes a frequency of the momentum: at or below it every one would be
  # enough.
  require(
    not thresholds
    or (len(thresholds) == 2 and 1 >= thresholds[0] >= thresholds[1] > remedy.freezing_momentum),
    "remedy.freezing_thresholds",
    thresholds,
    "() (off), or two frequencies, first and last, at most 1, not rising, and above "
    "remedy.freezing_momentum = "
    f"{remedy.freezing_momentum:g}",
  )
  require(remedy.bn_batches >= 0, "remedy.bn_batches", remedy.bn_batches, "0 (off) or above")
  for name, off in (("dampening", 0.0), ("freezing_thresholds", ())):
    value = getattr(remedy, name)
    allowed = (
      f"{off} with quant.method = {method}: it needs duq or lsq, whose codes come from one interval"
    )
    require(not value or method in ("duq", "lsq"), f"remedy.{name}", value, allowed)
