"""The formats of exported files, by the name that `--formats` takes. Their modules are imported
when they are needed.
"""

import importlib
import os
from typing import Any, NamedTuple, Protocol

import numpy as np

from profit_jax import optional
from profit_jax.config import ConfigError


class Runner(Protocol):
  """An exported file in its own runtime."""

  def run(
    self, image: np.ndarray, with_codes: bool = False
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Classifies images.

    Args:
      image: `[N, H, W, C]`, of the net's `image_dtype`.
      with_codes: whether codes are wanted.

    Returns:
      Logits float32 `[N, num_classes]`, and the codes of every quantizer, by its name,
      `[N, H, W, C]` or `[N, C]`, as the file's own program computes them; without `with_codes`
      none.
    """
    ...


class Module(Protocol):
  """What a format's module holds."""

  def write(self, net: Any, path: str | os.PathLike) -> None:
    """Writes a net: a `Net`; of integer formats an `IntegerNet`."""
    ...

  def open_file(self, path: str | os.PathLike) -> Runner:
    """Reads a file."""
    ...


class IntegerModule(Module, Protocol):
  """What the module of an integer format holds. If its files take and give other numbers than
  `Runner.run`, a function `interface` gives what the card says of them.

  Attributes:
    RUNTIME: the `integer.lower.Runtime` that computes its files.
  """

  RUNTIME: Any


class Format(NamedTuple):
  """A kind of file.

  Attributes:
    suffix: of its files.
    module: in this package.
    packages: that execute it and whose versions a card names.
    runtime: what computes in integers there and what does not, for the card.
    extra: of pyproject.toml, which installs them; None if they belong to every installation.
    opened_by: the package that users open a file with, whose lowest version a card names (see
      `runtimes.py`); None if it is this package.
    integer: whether its files compute on int8, and differ from the trained model.
  """

  suffix: str
  module: str
  packages: tuple[str, ...]
  runtime: str
  extra: str | None = None
  opened_by: str | None = None
  integer: bool = False


_EXACT = (
  "Convolutions and dense layers compute on integer values held in float32: their sums are whole "
  "numbers below 2^24, so "
  "that they are exact in any order. Multipliers, biases, shortcuts, means and squeeze-excite are "
  "float32."
)
_INTEGER = (
  "Convolutions, dense layers, shortcuts, means, products and squeeze-excite compute on 8-bit "
  "integers. Codes keep their 2, 3 or 4 bits' steps; shortcuts, and what h-swish and "
  "squeeze-excite read, are rounded to 8 bits, so that codes behind them may differ from the "
  "trained model's."
)
FORMATS = {
  "onnx": Format(
    ".onnx",
    "onnx_file",
    ("onnx", "onnxruntime"),
    f"The kernels are packed in the file; onnxruntime unpacks them when it loads it. {_EXACT} "
    "Activation codes are uint8 "
    "or int8 between QuantizeLinear and DequantizeLinear. Nothing computes below 8 bits on a CPU.",
    "onnx",
    "onnxruntime",
  ),
  "jax": Format(
    ".jax",
    "jax_file",
    ("jax", "jaxlib"),
    f"The kernels are packed in the program, which unpacks them with shifts. {_EXACT} Activation "
    "codes are float32. "
    "Lowered for CPU, CUDA and TPU; any batch. JAX reads an artifact for at least six months "
    "after it was written.",
    opened_by="jax",
  ),
  "safetensors": Format(
    ".safetensors",
    "safetensors_file",
    ("safetensors", "jax", "jaxlib"),
    "Data without a program, for kernels of your own; its layout stands in "
    "profit_jax/export/safetensors_file.py. In the "
    f"verification JAX executes it. {_EXACT}",
  ),
  "qonnx": Format(
    ".qonnx.onnx",
    "qonnx_file",
    ("qonnx", "onnx", "onnxruntime"),
    "For FPGA flows such as FINN: integer datatypes are annotated, the file's kernels are "
    "float32 with integer values. In "
    f"the verification QONNX's executor computes it. {_EXACT}",
    "qonnx",
    "qonnx",
  ),
  "litert": Format(
    ".tflite",
    "litert_file",
    ("ai-edge-litert",),
    "The kernels are int8 in the file; LiteRT's XNNPACK delegate unpacks them before the first "
    f"image. {_EXACT} Activation codes are float32.",
    "litert",
    "ai-edge-litert",
  ),
  "litert_packed": Format(
    ".packed.tflite",
    "litert_packed_file",
    ("ai-edge-litert",),
    "The kernels are packed in the file; LiteRT unpacks them before the first image. Its XNNPACK "
    f"delegate computes none of the convolutions. {_EXACT} Activation codes are float32.",
    "litert",
    "ai-edge-litert",
  ),
  "onnx_int8": Format(
    ".int8.onnx",
    "integer.onnx",
    ("onnx", "onnxruntime"),
    f"{_INTEGER} Tensors are uint8, kernels int8 with a scale for each output channel, biases "
    "int32. The input is uint8, the logits are float32.",
    "onnx",
    "onnxruntime",
    integer=True,
  ),
  "litert_int8": Format(
    ".int8.tflite",
    "integer.litert",
    ("ai-edge-litert",),
    f"{_INTEGER} Tensors are int8, input and logits too, kernels int8 with a scale for each output "
    "channel, biases int32: no operator computes on floats.",
    "litert",
    "ai-edge-litert",
    integer=True,
  ),
}
DEFAULT = ("onnx", "jax", "safetensors")


def named(names: list[str]) -> list[str]:
  """Names of formats, each once.

  Raises:
    ConfigError: none, or one that does not exist.
  """
  for name in names or [""]:
    if name not in FORMATS:
      raise ConfigError(
        f"--formats={','.join(names)} is not allowed: {name!r} must be one of {', '.join(FORMATS)}."
      )
  return list(dict.fromkeys(names))


def load(name: str) -> Module:
  """The module of a format.

  Raises:
    ConfigError: what executes it is not installed.
  """
  format = FORMATS[name]
  if format.extra:
    optional.require(format.extra, f"Format {name}")
  return importlib.import_module(f"profit_jax.export.{format.module}")


def of_file(path: str | os.PathLike) -> str:
  """The name of a file's format, by its suffix.

  Raises:
    ConfigError: no format has it.
  """
  # The longest first: a `.qonnx.onnx` is no `.onnx`.
  for name, format in sorted(FORMATS.items(), key=lambda item: -len(item[1].suffix)):
    if os.fspath(path).endswith(format.suffix):
      return name
  suffixes = ", ".join(format.suffix for format in FORMATS.values())
  raise ConfigError(
    f"{os.fspath(path)!r} is no exported model: its name must end in one of {suffixes}."
  )
