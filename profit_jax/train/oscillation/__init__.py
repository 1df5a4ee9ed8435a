"""Remedies for oscillating weights (Nagel et al., "Overcoming Oscillations in Quantization-Aware
Training", ICML 2022, arXiv 2203.11086). All of them can be combined with PROFIT.

A remedy is one file of this package: a subclass of `Remedy`, `register`ed. Its settings are fields
of `config.OscillationSettings`.
"""

import importlib
import pkgutil

from profit_jax.train.oscillation.base import (
  REMEDIES,
  AddedLoss,
  Remedies,
  Remedy,
  added_losses,
  register,
)

__all__ = ["REMEDIES", "AddedLoss", "Remedies", "Remedy", "added_losses", "register"]
for _file in pkgutil.iter_modules(__path__):  # each registers its remedy
  importlib.import_module(f"{__name__}.{_file.name}")
