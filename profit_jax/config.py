"""What a run is: each setting once, with its meaning, unit, type, allowed values and default.

The defaults are the published values of PROFIT (arXiv 2008.04693 and the authors' code): the 4-bit
recipe of MobileNet-v2 on ImageNet, without weights files. A configuration file changes what
`default_config` gives, the command line overrides single fields, and `parse` turns the result into
frozen `Settings`. Every later module trusts these.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args, get_type_hints

import ml_collections

from profit_jax.fields import ConfigError as ConfigError  # every package takes both from here
from profit_jax.fields import ProfitError as ProfitError
from profit_jax.fields import as_lists, build, listed, require

MIN_BITS, MAX_BITS = 2, 8
FLOAT = "float"  # in a rule: never quantized
Dtype = Literal["auto", "float32", "tfloat32", "bfloat16"]

# Runs of earlier versions do not have these.
_LATER_FIELDS = frozenset(
  {
    "config.data.image_key",
    "config.data.label_key",
    "config.init.entry",
    "config.init.published_settings",
    "config.init.variant",
    "config.model.padding",
    "config.oscillation",
    "config.plan.refit_bits",
    "config.quant",
    "config.quant.policy",
    "config.quant.rules",
    "config.teacher.entry",
    "config.teacher.padding",
    "config.teacher.variant",
    "config.train.kernels",
  }
)
# What fields, sections and values were called before version 0.2.
RENAMED_FIELDS = {
  "data.eval_share": "data.crop_pct",
  "data.readers": "data.num_readers",
  "plan.fitted_bits": "plan.refit_bits",
  "remedy.dampening": "oscillation.dampening",
  "remedy.freezing_thresholds": "oscillation.freeze_thresholds",
  "remedy.freezing_momentum": "oscillation.freeze_momentum",
  "remedy.bn_batches": "oscillation.bn_reestimation_batches",
}
# Fields that are rules since version 0.2: the rule to write.
FIELDS_NOW_RULES = {
  "quant.first_bits": '("stem_conv", 8, None)',
  "quant.last_bits": '("classifier", 8, 8)',
}
RENAMED_VALUES = {
  ("data.train_crop", "resized"): "random_resized_crop",
  ("data.train_crop", "padded"): "pad_crop",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
  """Section `model`."""

  # A key of profit_jax.models.REGISTRY.
  name: str = "mobilenet_v2"
  # Multiplies every layer's channels; above 0, at most 4.
  width: float = 1.0
  # MobileNet-v1 and v2. relu6: what torchvision's and timm's weights were trained with; relu: what
  # the authors' code computes (there 6 only bounds intervals).
  activation: Literal["relu", "relu6"] = "relu6"
  # Rate before the classifier.
  dropout: float = 0.2
  # Of the stem and of each stage (MobileNet-v1 6 numbers, v2 8, v3 large 7, v3 small 6, v4 6;
  # EfficientNet-Lite 8, MnasNet 8; ResNet 6, the second its max-pooling's), each 1 or 2. () is the
  # published ones. Small images need fewer 2s.
  strides: tuple[int, ...] = ()
  # Share of the old running statistics that a step keeps; the authors' v3: 0.9997.
  bn_momentum: float = 0.9
  # Added to variances; torchvision's v3: 1e-3.
  bn_epsilon: float = 1e-5
  # MobileNet-v3 only. Squeeze-excite after the depthwise convolution's non-linearity (torchvision,
  # timm), or before it (the authors' code).
  squeeze_excite: Literal["before", "after"] = "after"
  # What depthwise convolutions after h-swish pad with: -0.375 (negative padding), or 0.0
  # (torchvision, timm).
  pad_value: float = -0.375
  # Rounding to multiples of 8, at other widths: nearest (torchvision), up (the authors), or timm:
  # nearest, with expansions of rounded channels and a last layer that keeps its width.
  channel_rounding: Literal["nearest", "up", "timm"] = "nearest"
  # EfficientNet-Lite and MobileNet-v3 only. torch: the same border on every side; same:
  # TensorFlow's SAME, which timm's tf_* weights were trained with.
  padding: Literal["torch", "same"] = "torch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitSettings:
  """Section `init`."""

  # A file of weights under torchvision's, timm's, the authors' or our names, which are recognised:
  # .safetensors, .npz or a PyTorch file, whatever its suffix; or a directory with one; or the
  # workdir of another run; or a name, as hf:timm/mobilenetv2_100.ra_in1k or
  # torchvision:mobilenet_v2.IMAGENET1K_V2. "" starts from random weights.
  weights: str = ""
  # Which of the weights in the file: an entry, as "state_dict_ema" or "checkpoint/model", or what
  # names begin with, as "student". "" takes averaged weights (EMA) where there are some, else the
  # first entry that docs/weights.md lists.
  entry: str = ""
  # Which net these weights are, by timm's or torchvision's name, as tf_mobilenetv3_large_100: nets
  # of the same tensors may compute different things. "" is what the file, its config.json or its
  # name says.
  variant: str = ""
  # What is published of these weights (crop, interpolation, normalization, epsilon, ...): "apply"
  # takes it for every field that has its default; "compare" only names what differs.
  published_settings: Literal["apply", "compare"] = "apply"
  # The classifier starts at random, whatever the file has (another number of classes).
  reset_head: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSettings:
  """Section `teacher`."""

  # "none"; "self", the student before quantization (its init.weights, or, from random weights, what
  # the full-precision phase ends with); or a model's name, which needs teacher.weights.
  model: str = "self"
  # As init.weights.
  weights: str = ""
  # As init.entry and init.variant.
  entry: str = ""
  variant: str = ""
  # "batch" normalizes with the batch's statistics, as the authors' code; "running" with the file's.
  batch_stats: Literal["batch", "running"] = "batch"
  # The rest describes another model; for the meaning see ModelSettings and DataSettings.
  normalization: Literal["dataset", "imagenet", "inception", "none"] = "dataset"
  width: float = 1.0
  activation: Literal["relu", "relu6"] = "relu6"
  strides: tuple[int, ...] = ()
  bn_epsilon: float = 1e-5
  squeeze_excite: Literal["before", "after"] = "after"
  pad_value: float = 0.0
  channel_rounding: Literal["nearest", "up", "timm"] = "nearest"
  padding: Literal["torch", "same"] = "torch"

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

  # "digits" (scikit-learn's); "digit_pairs" (two of them side by side, 100 classes); "folder"
  # (images in data_dir/train/CLASS/ and data_dir/val/CLASS/, or in data_dir/CLASS/); or any
  # classification set of tensorflow-datasets, with its configuration and version where needed
  # (imagenette/320px-v2). See docs/data.md.
  name: str = "imagenet2012"
  # Of the folder, or of TFDS, local or gs://; "" is TFDS's own ($TFDS_DATA_DIR,
  # ~/tensorflow_datasets).
  data_dir: str = ""
  # Or a part of one, as train[:90%]; of a folder, in percent of each class. In a folder, "train" is
  # also Train or Training, or data_dir itself where it holds the classes.
  train_split: str = "train"
  # Likewise. "" is the first of validation, val, test that exists (folders: docs/data.md). Folders
  # take a share too: "10%" of each class's training images, chosen by seed; the rest trains.
  eval_split: str = ""
  # TFDS only: the features with an example's image and class; "" is the set's supervised keys.
  image_key: str = ""
  label_key: str = ""
  # Height and width in pixels, 8 to 1024.
  image_size: int = 224
  # Mean and standard deviation of pixels: "dataset" (its own), "imagenet" (torchvision's),
  # "inception" (0.5 and 0.5, some of timm's files), "none" (0 and 1: pixels in 0..1).
  normalization: Literal["dataset", "imagenet", "inception", "none"] = "dataset"
  # Random changes of the training images; False trains on the pixels that it evaluates.
  augment: bool = True
  # Which changes: "random_resized_crop" (a random part of 8 to 100 % of the area, scaled), or
  # "pad_crop" (moved by up to an eighth: small images); both mirror half of the images. The digits
  # only move.
  train_crop: Literal["random_resized_crop", "pad_crop"] = "random_resized_crop"
  # Evaluation cuts the centre, this share of the shorter side, as timm's crop_pct: 0.875 is 224 of
  # 256.
  crop_pct: float = 0.875
  # Antialiased; "bilinear" for torchvision's older files.
  interpolation: Literal["bicubic", "bilinear"] = "bicubic"
  # Share of images that may be broken, which are skipped and named. More stop the run.
  max_broken: float = 0.001
  # Readers of a TFDS set of more than 512 MB, over all processes: a multiple of their number, 1 to
  # 1024. Batch sizes should be multiples of it; otherwise the greatest common divisor counts. The
  # order of the images depends on it.
  num_readers: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
  """Section `plan`."""

  # Bit widths of the weights, 2 to 8, falling; () leaves them in full precision.
  weight_bits: tuple[int, ...] = (8, 5, 4)
  # Bit widths of the activations, likewise.
  act_bits: tuple[int, ...] = (8, 5, 4)
  # Weight bit widths at whose beginning each kernel's a and c are fitted again, by least squares.
  # () is as published: once, to 0.9 max|w|. Needed at 2 bits: a is learned slowly, and half of 0.9
  # max|w| leaves one weight in ten.
  refit_bits: tuple[int, ...] = ()
  # False goes straight to the last bits of each list.
  progressive: bool = True
  # BN phases (kernels fixed) before and after each fine-tuning.
  stabilize: bool = True
  # False fine-tunes at each bit width, without PROFIT.
  profit: bool = True
  # Weight bit widths at which PROFIT samples AIWQ and freezes.
  profit_bits: tuple[int, ...] = (4,)
  # Share of the convolutions that is frozen in ft1, ft2, ...; not falling.
  freeze_fractions: tuple[float, ...] = (0.0, 1 / 3, 2 / 3)
  # Epochs of phase 1, which runs with a teacher, from random weights, or with a new classifier.
  full_precision_epochs: int = 15
  # Epochs of each fine-tuning phase, ft1 to ft3 included.
  finetune_epochs: int = 15
  # Epochs of each BN phase.
  bn_epochs: int = 5
  # Epochs in which AIWQ is measured, at a constant learning rate.
  sampling_epochs: int = 5
  # AIWQ is measured on every n-th image of a batch; 1 is all, as published. For what 4 saves and
  # changes, see benchmarks/RESULTS.md.
  sampling_every: int = 1
  # First epochs of full-precision and fine-tuning phases, whose learning rate rises.
  warmup_epochs: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSettings:
  """Section `quant`; the defaults are the paper's."""

  # "duq" (the paper's), or under the same plan "lsq", "pact", "qil"; see profit_jax/quant.
  method: str = "duq"
  # Kernels have scalars for each output channel, not one set each.
  per_channel: bool = False
  # Bits of single layers, as ((r"classifier", 8, 8), (r".*depthwise.*", 8, None)). A rule is a
  # regular expression that matches a layer's whole path, the bits of its kernel, and those of the
  # quantizer that feeds it: 2 to 8, the least (a phase may have more); None, as the phase says; or
  # "float", never quantized. The first rule that matches decides.
  rules: tuple[Any, ...] = ()
  # Rules by name, after those in `rules`. "profit": none; "lsq_paper": the first and the last layer
  # at 8 bits; "brevitas": the first layer at 8 bits, kernels with scalars for each channel.
  policy: Literal["profit", "lsq_paper", "brevitas"] = "profit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OscillationSettings:
  """Section `oscillation`: remedies for weights that oscillate (Nagel et al., ICML 2022), beside
  PROFIT or instead of it; docs/ablation.md. The defaults are off. `dampening` and
  `freeze_thresholds` need a quantizer with one interval: "duq" or "lsq".
  """

  # The last weight of the dampening loss, to which it rises from 0; 0.1 in the paper, on ImageNet.
  dampening: float = 0.0
  # Oscillation frequency per step above which a weight's code is frozen, (first, last), falling
  # from one to the other; (0.1, 0.01) in the paper, at 4 bits. () freezes none.
  freeze_thresholds: tuple[float, ...] = ()
  # Share of a step in that frequency's running mean; well below the thresholds.
  freeze_momentum: float = 0.001
  # Training batches from which batch statistics are re-estimated before each evaluation of a
  # quantized network; 0 evaluates with the running ones.
  bn_reestimation_batches: int = 0

  @property
  def in_training(self) -> bool:
    """Whether a remedy is on that changes training steps."""
    return self.dampening > 0 or bool(self.freeze_thresholds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
  """Section `train`."""

  # Global, over all devices.
  batch_size: int = 256
  # Parts of a batch that are computed one after the other, where it is larger than memory. Batch
  # statistics are then those of a part.
  accumulation_steps: int = 1
  eval_batch_size: int = 256
  # Of weights, norms and biases, by SGD with Nesterov momentum.
  learning_rate: float = 0.005
  # The same in the full-precision phase.
  full_precision_learning_rate: float = 0.005
  # Learning rate of a and c over that of the weights.
  quantizer_lr_scale: float = 0.01
  # Of kernels only, added to the gradient.
  weight_decay: float = 4e-5
  momentum: float = 0.9
  # Share of the average of the weights (EMA) that a step keeps; 0 keeps no average.
  ema_rate: float = 0.9997
  # Arithmetic of training. float32: products of codes take one pass of the matrix unit, which is
  # exact for them; all others have full precision. tfloat32: stored in float32, all products take
  # one pass (TF32 on GPUs, bfloat16 on TPUs). bfloat16: activations and their gradients are stored
  # in bfloat16. auto: bfloat16 on TPUs, tfloat32 on GPUs, float32 on CPUs; a run keeps what it
  # began with. Parameters and batch statistics are float32 in all of them, and so is evaluation.
  dtype: Dtype = "auto"
  # Form of operations: tuned for the platform, or plain XLA.
  kernels: Literal["tuned", "xla"] = "tuned"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
  """Section `checkpoint`."""

  # How many stay; each has everything that the run needs, the best weights so far included.
  keep: int = 3
  # Minutes between two, also within an epoch. The end of each phase has one too.
  minutes: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoverySettings:
  """Section `recovery`."""

  # How often, in all, a run whose loss or gradient is not finite returns to its last checkpoint and
  # continues with all learning rates multiplied by the factor. After that it stops.
  retries: int = 0
  learning_rate_factor: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """A validated configuration, one attribute per section."""

  # Of initial weights, data order, augmentation and dropout.
  seed: int = 0
  # Directory of JAX's compilation cache, local or gs://. "" leaves JAX's own setting: no cache,
  # unless JAX_COMPILATION_CACHE_DIR names one.
  compilation_cache: str = "~/.cache/profit_jax"
  model: ModelSettings = ModelSettings()
  init: InitSettings = InitSettings()
  teacher: TeacherSettings = TeacherSettings()
  data: DataSettings = DataSettings()
  plan: PlanSettings = PlanSettings()
  quant: QuantSettings = QuantSettings()
  oscillation: OscillationSettings = OscillationSettings()
  train: TrainSettings = TrainSettings()
  checkpoint: CheckpointSettings = CheckpointSettings()
  recovery: RecoverySettings = RecoverySettings()

  def with_dtype(self, dtype: Dtype) -> "Settings":
    """The settings with `train.dtype` decided."""
    return dataclasses.replace(self, train=dataclasses.replace(self.train, dtype=dtype))

  def with_batch_size(self, size: int) -> "Settings":
    """The settings with another batch size, of evaluation too."""
    train = dataclasses.replace(self.train, batch_size=size, eval_batch_size=size)
    return dataclasses.replace(self, train=train)

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


def default_config() -> ml_collections.ConfigDict:
  """The defaults, locked, for a configuration file to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Settings())).lock()


def with_new_names(config: Mapping[str, Any]) -> dict[str, Any]:
  """A saved configuration of an earlier version under the present names."""
  found: dict[str, Any] = {}
  for section, content in config.items():
    if not isinstance(content, Mapping):
      found[section] = content
      continue
    for name, value in content.items():
      field = RENAMED_FIELDS.get(f"{section}.{name}", f"{section}.{name}")
      if isinstance(value, str):
        value = RENAMED_VALUES.get((field, value), value)
      new_section, _, new_name = field.partition(".")
      found.setdefault(new_section, {})[new_name] = value
  return _with_rules(found)


# Whether `quant.last_bits` gave its bits to the classifier's input too.
_LAST_BITS_OF_INPUT = {
  "mobilenet_v1": False,
  "mobilenet_v2": True,
  "mobilenet_v3_large": True,
  "mobilenet_v3_small": True,
}


def _with_rules(config: dict[str, Any]) -> dict[str, Any]:
  """With the rules that `quant.first_bits` and `quant.last_bits` of an earlier version stood for.

  Raises:
    ConfigError: they are those of a model whose layers are not known here.
  """
  quant, model = config.get("quant"), config.get("model")
  if not isinstance(quant, Mapping) or not {"first_bits", "last_bits"} & quant.keys():
    return config
  quant = dict(quant)
  first, last = quant.pop("first_bits", 0), quant.pop("last_bits", 0)
  name = str(model.get("name")) if isinstance(model, Mapping) else ""
  if (first or last) and name not in _LAST_BITS_OF_INPUT:
    raise ConfigError(
      f"quant.first_bits = {first!r} and quant.last_bits = {last!r} of the model {name!r} are of "
      "an earlier version. Now they are rules (quant.rules): begin another run with them."
    )
  rules = [["stem_conv", first, None]] if first else []
  if last:
    rules.append(["classifier", last, last if _LAST_BITS_OF_INPUT[name] else None])
  return {**config, "quant": {"rules": rules, **quant}}


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
  plain = config.to_dict()
  _refuse_wrong_names(plain)
  settings = build(Settings, plain, "config", _LATER_FIELDS)
  _check_model(settings, models)
  _check_data(settings.data)
  check_plan(settings.plan)
  check_rules(settings.quant.rules, "config.quant.rules")
  epochs = settings.plan.full_precision_epochs
  needed = "1 or above without init.weights, and with init.reset_head"
  require(epochs >= 1 or not settings.new_classifier, "plan.full_precision_epochs", epochs, needed)
  require(
    bool(settings.init.weights) or not settings.init.reset_head,
    "init.reset_head",
    settings.init.reset_head,
    "False without init.weights: from random weights the head is new anyway",
  )
  for section, weights in (("init", settings.init), ("teacher", settings.teacher)):
    require(
      bool(weights.weights) or not weights.entry,
      f"{section}.entry",
      weights.entry,
      f'"" without {section}.weights, whose entry it is',
    )
  require(0 <= settings.seed < 2**32, "seed", settings.seed, "0 or above, below 2^32")
  check_training(
    settings.train,
    settings.oscillation,
    settings.checkpoint,
    settings.recovery,
    settings.plan.sampling_every,
  )
  return settings


def renamed_field(field: str) -> str | None:
  """A sentence about a field that has another name since version 0.2; None for all others."""
  new = RENAMED_FIELDS.get(field)
  if field == "remedy":
    new = "oscillation"
  if field in FIELDS_NOW_RULES:
    return (
      f"`{field}` is now a rule: config.quant.rules = ({FIELDS_NOW_RULES[field]},), with the path "
      'of the layer; or config.quant.policy = "lsq_paper".'
    )
  return f"`{field}` is now `{new}`." if new else None


def unknown_field(field: str) -> str | None:
  """A sentence about a field that no configuration has, as `train.lr`: where a field of that name
  is, or which names are like it. None for fields and sections that there are.
  """
  known = _fields()
  if field in known or any(name.startswith(f"{field}.") for name in known):
    return None
  section, _, name = field.rpartition(".")
  lasts = {full: full.rpartition(".")[2] for full in known}
  closest = difflib.get_close_matches(name, set(lasts.values()), n=1, cutoff=0.75)
  for likely in (
    [full for full, last in lasts.items() if last == name],
    [full for full, last in lasts.items() if name in (_initials(last), *last.split("_"))],
    [full for full, last in lasts.items() if last in closest],
  ):
    if likely:
      return f"there is no such field. Did you mean {' or '.join(likely)}?"
  inside = [full for full in known if full.startswith(f"{section}.")] if section else []
  sections = dict.fromkeys(full.partition(".")[0] for full in known)
  return f"there is no such field; there are {listed(inside or sections)}."


def _initials(name: str) -> str:
  """As lr for learning_rate; of one word, the word."""
  words = name.split("_")
  return "".join(word[0] for word in words) if len(words) > 1 else name


def _fields() -> list[str]:
  """All fields with their sections, as `train.batch_size`."""
  return [
    f"{section}.{name}" if name else section
    for section, content in dataclasses.asdict(Settings()).items()
    for name in (content if isinstance(content, dict) else ("",))
  ]


def _refuse_wrong_names(config: Mapping[str, Any]) -> None:
  for section, content in config.items():
    for name, value in content.items() if isinstance(content, Mapping) else (("", content),):
      field = f"{section}.{name}" if name else section
      told = renamed_field(field)
      if told is None and isinstance(value, str) and (field, value) in RENAMED_VALUES:
        told = f"The value {value!r} of `{field}` is now {RENAMED_VALUES[field, value]!r}."
      if told:
        raise ConfigError(f"{told} Change it in the configuration.")
      if told := unknown_field(field):
        raise ConfigError(f"config.{field} is not allowed: {told}")


def check_rules(rules: Any, field: str) -> None:
  """Checks the form of rules; whether they fit a model, `nn.rules.with_rules` says.

  Args:
    rules: as `QuantSettings.rules`.
    field: what has them, for messages.

  Raises:
    ConfigError: something else than rules, a bad expression, bits that are not allowed.
  """
  example = 'a tuple of (expression, weight bits, activation bits), as (("classifier", 8, 8),)'
  if not isinstance(rules, (tuple, list)):
    raise ConfigError(f"{field} = {rules!r} is not allowed: it must be {example}.")
  for rule in rules:
    if not (isinstance(rule, (tuple, list)) and len(rule) == 3 and isinstance(rule[0], str)):
      raise ConfigError(f"{field} has the entry {rule!r}: it must be {example}.")
    rule = tuple(rule)
    try:
      re.compile(rule[0])
    except re.error as error:
      raise ConfigError(
        f"{field} has the rule {rule!r}, whose regular expression is not valid: {error}."
      ) from None
    for bits in rule[1:]:
      whole = isinstance(bits, int) and not isinstance(bits, bool)
      if not (bits is None or bits == FLOAT or (whole and MIN_BITS <= bits <= MAX_BITS)):
        raise ConfigError(
          f"{field} has the rule {rule!r} with the bits {bits!r}: they must be {MIN_BITS} to "
          f'{MAX_BITS}, None (as the phase says) or "{FLOAT}" (never quantized).'
        )


def check_training(
  train: TrainSettings,
  oscillation: OscillationSettings,
  checkpoint: CheckpointSettings,
  recovery: RecoverySettings,
  sampling_every: int,
) -> None:
  """Checks the sections of training, and `plan.sampling_every`; raises as `parse`."""
  _check_oscillation(oscillation)
  dtypes = get_args(get_type_hints(TrainSettings)["dtype"])
  require(train.dtype in dtypes, "train.dtype", train.dtype, f"one of {listed(dtypes)}")
  for name in ("batch_size", "accumulation_steps", "eval_batch_size"):
    require(getattr(train, name) >= 1, f"train.{name}", getattr(train, name), "1 or above")
  parts, fitting = train.accumulation_steps, f"a divisor of train.batch_size = {train.batch_size}"
  require(train.batch_size % parts == 0, "train.accumulation_steps", parts, fitting)
  part, every = train.batch_size // parts, sampling_every
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
  require(checkpoint.keep >= 1, "checkpoint.keep", checkpoint.keep, "1 or above")
  require(
    checkpoint.minutes >= 0,
    "checkpoint.minutes",
    checkpoint.minutes,
    "0 or above",
  )
  factor = recovery.learning_rate_factor
  require(recovery.retries >= 0, "recovery.retries", recovery.retries, "0 or above")
  require(0 < factor < 1, "recovery.learning_rate_factor", factor, "above 0, below 1")


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
  require(0.1 <= data.crop_pct <= 1, "data.crop_pct", data.crop_pct, "0.1 to 1")
  require(0 <= data.max_broken <= 1, "data.max_broken", data.max_broken, "a share from 0 to 1")
  require(1 <= data.num_readers <= 1024, "data.num_readers", data.num_readers, "1 to 1024")


def check_plan(plan: PlanSettings) -> None:
  """Checks section `plan`; raises as `parse`."""
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
  require(set(plan.refit_bits) <= set(reached), "plan.refit_bits", plan.refit_bits, fitting)
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


def _check_oscillation(oscillation: OscillationSettings) -> None:
  require(
    0 <= oscillation.dampening <= 1000,
    "oscillation.dampening",
    oscillation.dampening,
    "0 (off) to 1000",
  )
  require(
    0 < oscillation.freeze_momentum < 1,
    "oscillation.freeze_momentum",
    oscillation.freeze_momentum,
    "above 0, below 1",
  )
  thresholds = oscillation.freeze_thresholds
  # A single oscillation makes a frequency of the momentum: at or below it every one would be
  # enough.
  require(
    not thresholds
    or (len(thresholds) == 2 and 1 >= thresholds[0] >= thresholds[1] > oscillation.freeze_momentum),
    "oscillation.freeze_thresholds",
    thresholds,
    "() (off), or two frequencies, first and last, at most 1, not rising, and above "
    "oscillation.freeze_momentum = "
    f"{oscillation.freeze_momentum:g}",
  )
  require(
    oscillation.bn_reestimation_batches >= 0,
    "oscillation.bn_reestimation_batches",
    oscillation.bn_reestimation_batches,
    "0 (off) or above",
  )
