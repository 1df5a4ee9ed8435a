"""Where bits matter: what every layer alone loses at fewer bits, and the bits that a budget buys.

found = measure_sensitivity(result, data, bits=(2, 3, 4))
print(assign(found, "bytes", 100_000).rules)
"""

from profit_jax.sensitivity.assign import Assignment, Budget, assign
from profit_jax.sensitivity.measure import (
  Fall,
  Part,
  Sensitivity,
  Subject,
  measure,
  measure_sensitivity,
)

__all__ = [
  "Assignment",
  "Budget",
  "Fall",
  "Part",
  "Sensitivity",
  "Subject",
  "assign",
  "measure",
  "measure_sensitivity",
]
