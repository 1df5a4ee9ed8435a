"""A run: what is trained, and how. The command line and the library both make one."""

from typing import NamedTuple

import numpy as np

from profit_jax.config import Settings
from profit_jax.data import Source
from profit_jax.schedule import Phase
from profit_jax.train.optimizer import OptimizerFactory
from profit_jax.train.start import Student, Teacher
from profit_jax.train.steps import LossFunction


class Run(NamedTuple):
  """What is trained, and how.

  Attributes:
    settings: of the sections train, oscillation, checkpoint and recovery, and the seed.
    phases: the schedule.
    source: the data.
    student: the model and its first weights.
    teacher: likewise, as far as there is one.
    image_dtype: of the batches.
    loss: of the labels; None is the cross-entropy.
    optimizer: replaces SGD for weights and norms; None keeps it.
  """

  settings: Settings
  phases: tuple[Phase, ...]
  source: Source
  student: Student
  teacher: Teacher
  image_dtype: np.dtype = np.dtype(np.uint8)
  loss: LossFunction | None = None
  optimizer: OptimizerFactory | None = None
