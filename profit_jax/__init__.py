"""PROFIT (Park & Yoo, ECCV 2020, arXiv 2008.04693) in JAX and Flax.

    import profit_jax as pj

Layers and quantizers make a model, `profit_schedule` its phases, `Data` takes batches, `Trainer`
trains, and `export` writes integer model files. See the README for a whole example.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
  from profit_jax.config import (
    CheckpointSettings,
    OscillationSettings,
    RecoverySettings,
    TrainSettings,
  )
  from profit_jax.data.batches import Data
  from profit_jax.data.normalize import Normalization
  from profit_jax.export.evaluate import Evaluation, evaluate_file
  from profit_jax.export.integer.difference import IntegerLimits
  from profit_jax.export.write import NotEqual, Report, export
  from profit_jax.fields import ConfigError, ProfitError
  from profit_jax.nn.functions import hard_sigmoid, hard_swish, relu, relu6, spatial_mean
  from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
  from profit_jax.quant import HSWISH_MINIMUM, LSQ, PACT, QIL, Bits, DuQ, Quantized, Quantizer
  from profit_jax.report.tensorboard import TensorBoard
  from profit_jax.schedule import Phase, profit_schedule
  from profit_jax.sensitivity import Assignment, Sensitivity, assign_bits, measure_sensitivity
  from profit_jax.train.interrupt import Stopped
  from profit_jax.train.nonfinite import NotFinite
  from profit_jax.train.observer import EpochReport, Observer
  from profit_jax.train.trainer import Options, Result, Trainer
  from profit_jax.weights.library import load_weights, save_weights

# Imported when first used: the schedule and `--help` need no JAX.
_MODULES = {
  "Assignment": "profit_jax.sensitivity",
  "BatchNorm": "profit_jax.nn.layers",
  "Bits": "profit_jax.quant",
  "CheckpointSettings": "profit_jax.config",
  "ConfigError": "profit_jax.fields",
  "Data": "profit_jax.data.batches",
  "Dropout": "profit_jax.nn.layers",
  "DuQ": "profit_jax.quant",
  "EpochReport": "profit_jax.train.observer",
  "Evaluation": "profit_jax.export.evaluate",
  "HSWISH_MINIMUM": "profit_jax.quant",
  "IntegerLimits": "profit_jax.export.integer.difference",
  "LSQ": "profit_jax.quant",
  "Normalization": "profit_jax.data.normalize",
  "NotEqual": "profit_jax.export.write",
  "NotFinite": "profit_jax.train.nonfinite",
  "Observer": "profit_jax.train.observer",
  "Options": "profit_jax.train.trainer",
  "OscillationSettings": "profit_jax.config",
  "PACT": "profit_jax.quant",
  "Phase": "profit_jax.schedule",
  "ProfitError": "profit_jax.fields",
  "QIL": "profit_jax.quant",
  "QuantAct": "profit_jax.nn.layers",
  "QuantConv": "profit_jax.nn.layers",
  "QuantDense": "profit_jax.nn.layers",
  "Quantized": "profit_jax.quant",
  "Quantizer": "profit_jax.quant",
  "RecoverySettings": "profit_jax.config",
  "Report": "profit_jax.export.write",
  "Result": "profit_jax.train.trainer",
  "Sensitivity": "profit_jax.sensitivity",
  "Stopped": "profit_jax.train.interrupt",
  "TensorBoard": "profit_jax.report.tensorboard",
  "TrainSettings": "profit_jax.config",
  "Trainer": "profit_jax.train.trainer",
  "assign_bits": "profit_jax.sensitivity",
  "evaluate_file": "profit_jax.export.evaluate",
  "hard_sigmoid": "profit_jax.nn.functions",
  "hard_swish": "profit_jax.nn.functions",
  "load_weights": "profit_jax.weights.library",
  "measure_sensitivity": "profit_jax.sensitivity",
  "profit_schedule": "profit_jax.schedule",
  "relu": "profit_jax.nn.functions",
  "relu6": "profit_jax.nn.functions",
  "save_weights": "profit_jax.weights.library",
  "spatial_mean": "profit_jax.nn.functions",
}

__all__ = [
  "HSWISH_MINIMUM",
  "LSQ",
  "PACT",
  "QIL",
  "Assignment",
  "BatchNorm",
  "Bits",
  "CheckpointSettings",
  "ConfigError",
  "Data",
  "Dropout",
  "DuQ",
  "EpochReport",
  "Evaluation",
  "IntegerLimits",
  "Normalization",
  "NotEqual",
  "NotFinite",
  "Observer",
  "Options",
  "OscillationSettings",
  "Phase",
  "ProfitError",
  "QuantAct",
  "QuantConv",
  "QuantDense",
  "Quantized",
  "Quantizer",
  "RecoverySettings",
  "Report",
  "Result",
  "Sensitivity",
  "Stopped",
  "TensorBoard",
  "TrainSettings",
  "Trainer",
  "__version__",
  "assign_bits",
  "evaluate_file",
  "export",
  "hard_sigmoid",
  "hard_swish",
  "load_weights",
  "measure_sensitivity",
  "profit_schedule",
  "relu",
  "relu6",
  "save_weights",
  "spatial_mean",
]


def __getattr__(name: str) -> Any:
  if name == "export":  # the package, which can be called
    return importlib.import_module("profit_jax.export")
  if name not in _MODULES:
    raise AttributeError(f"module 'profit_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
  return __all__
