"""How an integer file differs from the trained network, and whether that is within limits.

Codes are compared twice on the first evaluation images. Teacher-forced, the code-domain net
computes each quantizer's codes from those that the file had before it: what differs arose at this
quantizer. Free-running, the file's codes are compared with the trained model's own: what differs
arose anywhere before. A network of few bits carries a single code that differs to many others, so
that the second says little about the file; the predictions of the whole evaluation set do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from profit_jax.config import ConfigError
from profit_jax.export import reference, verify
from profit_jax.export.formats import Runner
from profit_jax.export.net import Net


@dataclasses.dataclass(frozen=True)
class IntegerLimits:
  """What an integer file must reach to be kept.

  Attributes:
    agreement: in percent of the evaluation images, how many at least get the trained model's class.
    top1_loss: in points, by how much top-1 may be lower than the trained model's.

  Raises:
    ConfigError: a number that no file can be measured by.
  """

  agreement: float = 99.0
  top1_loss: float = 0.5

  def __post_init__(self):
    """Checks both."""
    for name, field in (("min_agreement", "agreement"), ("max_top1_loss", "top1_loss")):
      value = getattr(self, field)
      if not 0.0 <= value <= 100.0:
        raise ConfigError(
          f"{name}={value:g} is not allowed: it is in percent of the evaluation images, 0 to 100."
        )


@dataclasses.dataclass(frozen=True)
class Row:
  """How a quantizer's codes differ.

  Attributes:
    quantizer: its name.
    codes: compared.
    differing: of them, teacher-forced.
    largest: the largest difference of two codes, teacher-forced.
    free_differing: free-running.
    free_largest: likewise.
  """

  quantizer: str
  codes: int
  differing: int
  largest: int
  free_differing: int
  free_largest: int


@dataclasses.dataclass(frozen=True)
class Difference:
  """An integer file beside the trained network.

  Attributes:
    problem: which limits are missed, or why the codes prove nothing; None if the file is kept.
    rows: by quantizer, in the net's order; none if asking for codes changes the file's logits.
    images: whose codes were compared.
    correct: evaluation images that the file classifies correctly.
    trained_correct: evaluation images that the trained model classifies correctly.
    agreeing: evaluation images that both put into one class.
    examples: size of the evaluation set.
    limits: that were asked for.
  """

  problem: str | None
  rows: tuple[Row, ...]
  images: int
  correct: int
  trained_correct: int
  agreeing: int
  examples: int
  limits: IntegerLimits

  @property
  def codes(self) -> int:
    """Compared in all."""
    return sum(row.codes for row in self.rows)

  @property
  def differing(self) -> int:
    """Of them, teacher-forced."""
    return sum(row.differing for row in self.rows)

  @property
  def largest(self) -> int:
    """The largest difference of two codes, teacher-forced."""
    return max((row.largest for row in self.rows), default=0)

  @property
  def free_differing(self) -> int:
    """Of the codes, free-running."""
    return sum(row.free_differing for row in self.rows)

  @property
  def agreement(self) -> float:
    """In percent of the evaluation images."""
    return 100.0 * self.agreeing / self.examples


def measure(
  net: Net,
  images: list[np.ndarray],
  runner: Runner,
  trained: verify.TrainedModel,
  limits: IntegerLimits,
) -> Difference:
  """Compares a file's codes, and its predictions on the whole evaluation set.

  Args:
    net: in the code domain, which the file was made of.
    images: whose codes are compared, in parts `[N, H, W, C]`.
    runner: the file, read back.
    trained: the model, its data and its top-1.
    limits: that the file must reach.

  Returns:
    The difference; its `problem` names the limits that are missed.
  """
  given = trained.spec, trained.variables, trained.normalization
  problem, rows = None, ()
  try:
    rows = _rows(net, images, verify.file_codes(runner), verify.trained_codes(net, *given))
  except verify.WatchedDiffers as error:
    problem = str(error)
  bits = trained.spec.bits.at(np.int32(net.weight_bits), np.int32(net.act_bits))
  logits = verify.trained_logits(*given, bits)
  correct = agreeing = examples = 0
  for batch in trained.source.eval_batches(trained.settings.train.eval_batch_size):
    own = np.argmax(jax.device_get(logits(batch["image"])), axis=1)
    theirs = np.argmax(runner.run(batch["image"])[0], axis=1)
    correct += int(np.count_nonzero((theirs == batch["label"]) & batch["mask"]))
    agreeing += int(np.count_nonzero((theirs == own) & batch["mask"]))
    examples += int(batch["mask"].sum())
  found = Difference(
    None,
    rows,
    sum(map(len, images)),
    correct,
    round(trained.top1 * examples / 100.0),
    agreeing,
    examples,
    limits,
  )
  return dataclasses.replace(found, problem=problem or _missed(found))


def _missed(found: Difference) -> str | None:
  missed = []
  if found.agreement < found.limits.agreement:
    missed.append(
      f"{found.agreement:.2f} % of its predictions are the trained model's, where "
      f"{found.limits.agreement:g} % are asked for"
    )
  loss = 100.0 * (found.trained_correct - found.correct) / found.examples
  if loss > found.limits.top1_loss:
    missed.append(
      f"its top-1 is {loss:.2f} points lower, where {found.limits.top1_loss:g} are allowed"
    )
  return " and ".join(missed) or None


def _rows(
  net: Net,
  images: list[np.ndarray],
  file: Callable[[np.ndarray], Any],
  trained: Callable[[np.ndarray], Any],
) -> tuple[Row, ...]:
  counts = {quantizer.name: np.zeros(5, np.int64) for quantizer in net.quantizers}
  for image in images:
    _, theirs = file(image)
    theirs = {name: np.float32(codes) for name, codes in theirs.items()}
    _, read = jax.device_get(verify.forced(net, image, theirs))
    _, own = trained(image)
    for quantizer in net.quantizers:
      name = quantizer.name
      forced = np.abs(theirs[name] - reference.codes(quantizer, read[name]))
      free = np.abs(theirs[name] - own[name])
      seen = counts[name]
      seen[[0, 1, 3]] += forced.size, np.count_nonzero(forced), np.count_nonzero(free)
      seen[[2, 4]] = np.maximum(seen[[2, 4]], [forced.max(), free.max()])
  return tuple(Row(name, *map(int, seen)) for name, seen in counts.items())
