"""What every data source gives: `DatasetInfo` and batches."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

from profit_jax.data.normalize import Normalization
from profit_jax.typing import Batch

# Longer side to shorter side: of an image that is longer still, the evaluation cuts the ends off
# first.
LONGEST = 4
# Bytes. A TFDS split whose files are smaller is kept in memory and shuffled as a whole; every host
# holds all of it. A larger split is streamed.
MEMORY_LIMIT = 512 * 2**20
# Which images a source's evaluation batches hold: the evaluation's, or those that are trained on,
# prepared as the evaluation's.
Evaluated = Literal["eval", "train"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
  """What is known of a data set without reading its images.

  Attributes:
    train_examples: their number.
    eval_examples: their number.
    num_classes: labels are 0 to num_classes - 1.
    normalization: of its images.
    class_names: by label; empty where nobody has named them.
  """

  train_examples: int
  eval_examples: int
  num_classes: int
  normalization: Normalization
  class_names: tuple[str, ...] = ()


class HostShard(NamedTuple):
  """One of the processes that share every batch.

  Attributes:
    index: which one, from 0.
    count: how many there are.
  """

  index: int = 0
  count: int = 1

  def rows(self, batch_size: int) -> slice:
    """Its part of the rows of a global batch: an equal one, in the order of the processes."""
    part = batch_size // self.count
    return slice(self.index * part, (self.index + 1) * part)


class Source(Protocol):
  """A loaded data set, as one host sees it.

  A batch is `image` uint8 `[n, H, W, 3]`, `label` int32 `[n]`, `mask` bool `[n]`, with n the host's
  part of a global batch. `mask` is False where a row holds no example: in the last batch of an
  evaluation, and for a broken image.

  What stands in which row of which global batch does not depend on the number of hosts.
  """

  @property
  def info(self) -> DatasetInfo:
    """What is known of the data."""
    ...

  def fingerprint(self) -> str:
    """The same on all hosts that see the same data."""
    ...

  def train_batches(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """One epoch, in an order and with changes that are functions of (seed, epoch, place in the
    order).

    Args:
      epoch: over the whole run, from 0.
      batch_size: of the global batch; the examples that fill none are left out.
      start: batches that are passed over: those that an interrupted run has seen.
    """
    ...

  def eval_batches(self, batch_size: int) -> Iterator[Batch]:
    """Every evaluation example exactly once over all hosts; as many batches on each, padded."""
    ...
