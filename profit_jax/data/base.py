"""What every data source gives: facts that are known without its files, and batches."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from profit_jax.data.normalize import Normalization

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """What is known of a data set before it is loaded.

  Attributes:
    train_examples: their number.
    eval_examples: their number.
    num_classes: labels are 0 to num_classes - 1.
    normalization: of its images.
  """

  train_examples: int
  eval_examples: int
  num_classes: int
  normalization: Normalization


class Source(Protocol):
  """A loaded data set.

  A batch is `image` uint8 `[N, H, W, 3]`, `label` int32 `[N]`, `mask` bool `[N]`, False where an example only pads the
  batch.
  """

  facts: Facts

  def train_batches(self, epoch: int, batch_size: int) -> Iterator[Batch]:
    """One epoch in an order and with changes that are functions of (seed, epoch); what fills no batch is left out."""
    ...

  def eval_batches(self, batch_size: int) -> Iterator[Batch]:
    """Every evaluation example exactly once; the last batch is padded."""
    ...
