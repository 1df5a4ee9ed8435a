"""The proof that an exported file is the trained network, on real images of the run's data.

Codes are compared teacher-forced: the reference computes each quantizer's codes from those that the
other side had before it, so that a code that differs is counted where it arises, and nowhere else.
Three comparisons make the chain:

    trained model  --codes-->  reference      that the code-domain net is the trained one,
                                              its topology and its numbers
    file           --codes-->  reference      that the file, read back and run in its own
                                              runtime, is that net
    file           --top-1-->  trained model  on the whole evaluation set, without forcing anything

A code at a tie that falls to the other side can put an image at the border of two classes into the
other class. Where top-1 differs by that little, every image of another class is compared by itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from profit_jax.config import Settings
from profit_jax.data import Source
from profit_jax.data.normalize import Normalization, normalize
from profit_jax.export import reference
from profit_jax.export.formats import Runner
from profit_jax.export.net import Net, Quantizer
from profit_jax.kernels import target
from profit_jax.nn.layers import QuantAct
from profit_jax.nn.spec import ModelSpec
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import Quantized, Unquantized, value_of

Codes = dict[str, np.ndarray]

# What may differ between a file and the reference: one code in a million, and only behind sums of
# floats.
SHARE = 1e-6
# Enough for `SHARE` to be seen.
CODES = 20_000_000
# Compared at once, as float32.
_AT_ONCE = 4_000_000
# How near to a tie a value is that float32 may round either way, over the range of the codes. Seen:
# at most 2e-7.
_TIE = 4e-6
# Of the evaluation set, half a hundredth of a percent: what two decimals show. Below 20,000 images
# it is none.
_TOP1_SHARE = 5e-5
# Of the evaluation set, by how much top-1 may differ where ties explain every image of another
# class. Seen: 3e-4, EfficientNet-Lite0 at 4 bits on 10,000 images with 327,000 codes each.
_TOP1_AT_TIES = 1e-3
# How far logits may be apart that follow from the same codes, over the largest.
_LOGITS = 1e-5


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A run's best checkpoint, which exported files must equal.

  Attributes:
    settings: of the run; the model's name, the data set's, the seed and the batch size count.
    width: of the model, or None.
    train_examples: of an epoch of the run.
    source: the run's data.
    spec: of the model that was trained.
    variables: the checkpoint's `params` and `batch_stats`, on the host.
    normalization: of uint8 images; None where images are floats.
    weight_bits: that it was trained for.
    act_bits: likewise.
    preparation: of images, the share of their shorter side that is kept and the interpolation; None
      where nobody says.
    phases: as in the run's `result.json`.
    weights: which they are, `raw` or `ema`.
    full_precision_top1: of the run; None without.
    top1: of these variables on the whole evaluation set, in percent.
    initial_weights: the files that it started from, as in its `result.json`.
  """

  settings: Settings
  width: float | None
  train_examples: int
  source: Source
  spec: ModelSpec
  variables: Any
  normalization: Normalization | None
  weight_bits: int
  act_bits: int
  preparation: tuple[float, str] | None
  phases: list[dict[str, Any]]
  weights: str
  full_precision_top1: float | None
  top1: float
  initial_weights: dict[str, dict[str, str | None]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
  """How the codes of a quantizer compare.

  Attributes:
    quantizer: its name.
    codes: compared.
    differing: of them.
    apart: of those, where the reference's value is not at a tie between the two codes.
    float_fed: whether it reads the float stream, where a code at a tie may differ (see
      `Net.float_fed`).
  """

  quantizer: str
  codes: int
  differing: int
  apart: int
  float_fed: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Codes of a net in two executions.

  Attributes:
    rows: by quantizer, in the net's order.
    logits: the largest difference between their logits, over the largest logit.
    images: how many images were compared.
  """

  rows: tuple[Row, ...]
  logits: float
  images: int

  @property
  def codes(self) -> int:
    """Compared in all."""
    return sum(row.codes for row in self.rows)

  @property
  def differing(self) -> int:
    """Of them."""
    return sum(row.differing for row in self.rows)

  @property
  def at_ties(self) -> bool:
    """Whether all that differ are at ties, as is allowed between the trained model and the
    reference.

    The trained model rounds after every float operation where the net's sums are exact, so that any
    value may fall to the other side of a tie that it is at. Finer steps have more ties: of a
    million codes, none to 0.1 at 4 bits, 20 at 8.
    """
    return not any(row.apart for row in self.rows)

  @property
  def exact(self) -> bool:
    """Whether no more differ than may between a file and the reference."""
    return self.differing <= SHARE * self.codes and not any(
      row.differing for row in self.rows if not row.float_fed
    )


@dataclasses.dataclass(frozen=True)
class FileCheck:
  """The result of verifying one file.

  Attributes:
    problem: why the file is not the trained network; None if it is.
    comparison: of the file's codes with the reference's; None if asking for codes changes the
      file's logits.
    correct: evaluation images that the file classifies correctly.
    trained_correct: evaluation images that the trained model classifies correctly.
    examples: size of the evaluation set.
    at_ties: evaluation images that the file puts into another class than the trained model, all
      because of values at ties; None where top-1 is equal, and they are not looked for.
  """

  problem: str | None
  comparison: Comparison | None
  correct: int
  trained_correct: int
  examples: int
  at_ties: int | None = None


def eval_images(
  net: Net, source: Source, batch_size: int, max_codes: int = CODES
) -> list[np.ndarray]:
  """The first evaluation images in equal parts, to be compared at once.

  Args:
    net: whose codes will be compared.
    source: the data.
    batch_size: of the batches that are read.
    max_codes: the images end at this number of codes, or of pixel values where the net has no
      codes; a smaller set is used nearly whole.
  """
  shapes = jax.eval_shape(
    functools.partial(reference.run_with_codes, net),
    np.zeros((1, *net.image_shape), net.image_dtype),
  )
  codes = sum(math.prod(shape.shape) for shape in shapes[1].values())
  codes = codes or math.prod(net.image_shape)
  wanted, found = -(-max_codes // codes), []
  for batch in source.eval_batches(batch_size):
    found.append(batch["image"][batch["mask"]])
    if sum(map(len, found)) >= wanted:
      break
  images = np.concatenate(found)[:wanted]
  parts = -(-len(images) // max(1, _AT_ONCE // codes))
  size = len(images) // parts
  return [images[part * size : (part + 1) * size] for part in range(parts)]


def trained_codes(
  net: Net, spec: ModelSpec, variables: Any, normalization: Normalization | None
) -> Callable[[np.ndarray], Any]:
  """What the trained model itself computes: images -> logits, and the codes of its quantizers."""
  names = {quantizer.name for quantizer in net.quantizers}

  def run(image):
    bits = spec.bits.at(np.int32(net.weight_bits), np.int32(net.act_bits))
    logits, captured = jax.device_get(
      _trained_values(spec.model, normalization, variables, image, bits)
    )
    leaves = jax.tree_util.tree_leaves_with_path(
      captured, is_leaf=lambda node: isinstance(node, Quantized | Unquantized)
    )
    # A model may sow other values.
    codes = {
      "/".join(part.key for part in path[:-2]): leaf.codes
      for path, leaf in leaves
      if path[-2].key == "__call__" and isinstance(leaf, Quantized)
    }
    if codes.keys() != names:
      raise KeyError(f"the net and the model have other quantizers: {sorted(codes.keys() ^ names)}")
    return logits, codes

  return run


def trained_logits(
  spec: ModelSpec, variables: Any, normalization: Normalization | None, bits: Bits
) -> Callable[[np.ndarray], Any]:
  """What the trained model itself computes: images -> logits."""
  return lambda image: _trained_values(spec.model, normalization, variables, image, bits)[0]


# One program per model, not per call: two exports in one process share it.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _trained_values(
  model: nn.Module,
  normalization: Normalization | None,
  variables: Any,
  image: jax.Array,
  bits: Bits,
) -> tuple[jax.Array, Any]:
  """Logits, and what the trained model's quantizers return."""
  platform = target.platform_of(jax.default_backend())
  # Plain operations where the tuned ones might not run; a reduced precision moves codes.
  with (
    target.tracing_for(target.Target(platform, "tuned" if platform == "cpu" else "xla")),
    jax.default_matmul_precision("highest"),
  ):
    logits, state = model.apply(
      variables,
      normalize(image, normalization),
      bits,
      capture_intermediates=lambda module, _: isinstance(module, QuantAct),
      mutable=["intermediates"],
    )
  return value_of(logits), state["intermediates"]


def file_codes(runner: Runner) -> Callable[[np.ndarray], Any]:
  """What an exported file computes: images -> logits and codes.

  The logits are those of the file as its users run it. Where it computes others while it is being
  watched, the codes prove nothing: a runtime that fuses operations may do so only where nobody asks
  for what stands between them.
  """

  def run(image):
    logits, codes = runner.run(image, with_codes=True)
    alone, _ = runner.run(image)
    largest = np.abs(logits).max()
    if not np.abs(alone - logits).max() <= _LOGITS * largest:
      part = np.abs(alone - logits).max() / largest
      raise WatchedDiffers(
        f"its logits change by {part:.1e} of the largest when its codes are asked for"
      )
    return alone, codes

  return run


class WatchedDiffers(Exception):
  """A file whose logits change when its codes are asked for; the argument says by how much."""


def compare(net: Net, images: list[np.ndarray], run: Callable[[np.ndarray], Any]) -> Comparison:
  """Compares codes with the reference's, which is given them: see the module's beginning.

  Args:
    net: the reference.
    images: parts `[N, H, W, C]`.
    run: images -> logits and codes by quantizer.

  Raises:
    KeyError: codes of other quantizers.
  """
  quantizers = {quantizer.name: quantizer for quantizer in net.quantizers}
  counts, logits = {name: np.zeros(3, np.int64) for name in quantizers}, 0.0
  for image in images:
    theirs, codes = run(image)
    if codes.keys() != counts.keys():
      raise KeyError(f"codes of other quantizers: {sorted(codes.keys() ^ counts.keys())}")
    codes = {name: np.float32(array) for name, array in codes.items()}
    expected, read = jax.device_get(forced(net, image, codes))
    logits = max(logits, float(np.abs(theirs - expected).max() / np.abs(expected).max()))
    for name, count in counts.items():
      count += _count(quantizers[name], read[name], codes[name])
  fed = net.float_fed()
  return Comparison(
    tuple(Row(name, *map(int, count), name in fed) for name, count in counts.items()),
    logits,
    sum(map(len, images)),
  )


# The net's arrays are constants of the program. All files of a net share one program.
@functools.partial(jax.jit, static_argnums=0)
def forced(
  net: Net, image: jax.Array, theirs: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The logits that follow from another execution's codes, and the floats that each quantizer
  reads.

  Args:
    net: the reference.
    image: `[N, H, W, C]`.
    theirs: codes of every quantizer, as float32.
  """
  read = {}

  def quantize(node, x):
    read[node.name] = x
    return theirs[node.name]

  return reference.run(net, image, quantize=quantize), read


def _count(quantizer: Quantizer, x: np.ndarray, theirs: np.ndarray) -> tuple[int, int, int]:
  """How many codes there are, how many differ, and how many of those not at a tie."""
  # In NumPy: counted inside the program, they double its compilation.
  reach = np.float32(_TIE * (quantizer.high - quantizer.low) / quantizer.inverse)
  different = theirs != reference.codes(quantizer, x)
  explained = (reference.codes(quantizer, x - reach) <= theirs) & (
    theirs <= reference.codes(quantizer, x + reach)
  )
  return theirs.size, np.count_nonzero(different), np.count_nonzero(~explained)


def check_file(
  net: Net, images: list[np.ndarray], runner: Runner, trained: TrainedModel
) -> FileCheck:
  """Compares a file's codes with the reference's, and its top-1 with the trained model's.

  Args:
    net: the reference, which the file was written from.
    images: whose codes are compared, in parts `[N, H, W, C]`.
    runner: the file, read back.
    trained: the model, its data and its top-1.
  """
  problem, comparison = None, None
  try:
    comparison = compare(net, images, file_codes(runner))
    if not comparison.exact:
      problem = f"{comparison.differing:,} of {comparison.codes:,} codes differ"
  except WatchedDiffers as error:
    problem = str(error)
  correct, examples = count_correct(
    lambda image: runner.run(image)[0], trained.source, trained.settings.train.eval_batch_size
  )
  trained_correct = round(trained.top1 * examples / 100.0)
  at_ties = None
  if problem is None and not top1_equal(correct, trained_correct, examples):
    if abs(correct - trained_correct) <= _TOP1_AT_TIES * examples:
      at_ties = _images_at_ties(net, len(images[0]), runner, trained)
    if at_ties is None:
      problem = "its top-1 is another"
  return FileCheck(problem, comparison, correct, trained_correct, examples, at_ties)


def _images_at_ties(net: Net, size: int, runner: Runner, trained: TrainedModel) -> int | None:
  """How many evaluation images a file puts into another class than the trained model; None where
  one of them is not explained by ties.

  Args:
    net: the reference.
    size: of the parts in which images are compared.
    runner: the file, read back.
    trained: the model and its data.
  """
  given = trained.spec, trained.variables, trained.normalization
  bits = trained.spec.bits.at(np.int32(net.weight_bits), np.int32(net.act_bits))
  logits = trained_logits(*given, bits)
  found: list[np.ndarray] = []
  for batch in trained.source.eval_batches(size):
    theirs, ours = runner.run(batch["image"])[0], jax.device_get(logits(batch["image"]))
    other = np.argmax(theirs, axis=1) != np.argmax(ours, axis=1)
    found += list(batch["image"][other & batch["mask"]])
  if not found:
    return 0
  # The last part is filled with its last image, so that all are one program.
  padded = np.stack(found + [found[-1]] * (-len(found) % size))
  parts = np.split(padded, len(padded) // size)
  for run in (trained_codes(net, *given), file_codes(runner)):
    compared = compare(net, parts, run)
    if not compared.at_ties or compared.logits > _LOGITS:
      return None
  return len(found)


def count_correct(
  run: Callable[[np.ndarray], np.ndarray], source: Source, batch_size: int
) -> tuple[int, int]:
  """How many evaluation images get the right class, and how many there are.

  Args:
    run: images `[batch_size, H, W, C]` -> logits.
    source: the data.
    batch_size: of all calls, the last one padded.
  """
  correct = examples = 0
  for batch in source.eval_batches(batch_size):
    mask = batch["mask"]
    # The first of equal logits, as `np.argmax`, and as the evaluation while training.
    correct += int(
      np.count_nonzero((np.argmax(run(batch["image"]), axis=1) == batch["label"]) & mask)
    )
    examples += int(mask.sum())
  return correct, examples


def top1_equal(correct: int, trained_correct: int, examples: int) -> bool:
  """Whether two counts are the same top-1, to two decimals of a percent."""
  return abs(correct - trained_correct) <= _TOP1_SHARE * examples
