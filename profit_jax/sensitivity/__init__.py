"""Where bits matter: what every layer alone loses at fewer bits, and the bits that a budget buys.

found = measure_sensitivity(result, data, bits=(2, 3, 4))
print(assign_bits(found, "bytes", 100_000).rules)
"""

from profit_jax.sensitivity.budget import Assignment, Budget, assign_bits
from profit_jax.sensitivity.measure import (
  LayerSensitivity,
  MeasuredModel,
  Reduction,
  Sensitivity,
  measure,
  measure_sensitivity,
)

__all__ = [
  "Assignment",
  "Budget",
  "LayerSensitivity",
  "MeasuredModel",
  "Reduction",
  "Sensitivity",
  "assign_bits",
  "measure",
  "measure_sensitivity",
]
