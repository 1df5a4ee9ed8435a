"""Re-estimation of batch statistics before an evaluation (Nagel et al., section 3)."""

from collections.abc import Mapping
from typing import ClassVar

from profit_jax.schedule import ProgramKey
from profit_jax.train.oscillation.base import MeanStatistics, Remedy, Stage, register
from profit_jax.train.packing import Packed


@register
class BnReestimation(Remedy):
  """Replaces the running statistics by the mean of those of the epoch's first batches."""

  name = "bn_reestimation"
  stage: ClassVar[Stage] = "evaluation"

  @property
  def is_on(self) -> bool:
    """See `Remedy`."""
    return self._settings.bn_reestimation_batches > 0

  def summary(self) -> str:
    """See `Remedy`."""
    batches = self._settings.bn_reestimation_batches
    return f"batch statistics of {batches} batches before each evaluation"

  def acts_in(self, program: ProgramKey) -> bool:
    """In every quantized phase."""
    return program.quantized_weights or program.quantized_acts

  def for_evaluation(
    self, variables: Mapping[str, Packed], statistics: MeanStatistics
  ) -> Mapping[str, Packed]:
    """See `Remedy`."""
    return {**variables, "batch_stats": statistics(self._settings.bn_reestimation_batches)}
