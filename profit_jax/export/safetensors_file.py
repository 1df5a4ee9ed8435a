"""The format `safetensors`: codes and numbers with a documented layout, for people who write
kernels.

Tensors, of every layer:

| name           | type             | what                                                     |
|----------------|------------------|----------------------------------------------------------|
| `LAYER.codes`  | uint8 `[bytes]`  | the kernel's codes, row-major, as two's complement,      |
|                |                  | 8 / `field_bits` to a byte, the first in the lowest bits |
| `LAYER.affine` | float32 `[2, F]` | multiplier and bias per channel:                         |
|                |                  | `y = acc * affine[0] + affine[1]`                        |

The metadata entry `net` is JSON: `model`, `image_size`, `mean`, `std` (of pixels / 255, per
channel), `weight_bits`, `act_bits`, `field_bits`, and `nodes`, in order of execution:
`[kind, name, input, ...]` with

    ["Layer", name, input, shape, stride, depthwise]
        shape [K, K, C, F], depthwise [K, K, 1, F], dense [C, F]
    ["Quantizer", name, input, inverse, margin, low, high, scale]
        code = clip(round((x + margin) * inverse), low, high)
    ["Activation", name, input, function]
        relu, relu6, hard_swish, hard_sigmoid
    ["Value", name, input, scale, offset]
        code * scale + offset
    ["Mean", name, input]
        over space
    ["Sum", name, input, other], ["Product", name, input, other]
        element by element; a [N, C] over space

Images and activations are NHWC, kernels HWIO; every border is zeros, `(K - 1) / 2` wide. Round half
to even.
"""

import functools
import json
import os
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from profit_jax.data.normalize import Normalization
from profit_jax.export import reference
from profit_jax.export.net import Activation, Layer, Mean, Net, Node, Product, Quantizer, Sum, Value
from profit_jax.export.packing import field_bits, pack, unpack

_FIELDS = {
  "Layer": ("stride", "depthwise"),
  "Quantizer": ("inverse", "margin", "low", "high", "scale"),
  "Activation": ("function",),
  "Value": ("scale", "offset"),
  "Mean": (),
  "Sum": ("other",),
  "Product": ("other",),
}
_KINDS = {kind.__name__: kind for kind in (Layer, Quantizer, Activation, Value, Mean, Sum, Product)}


def write(net: Net, path: str | os.PathLike) -> None:
  """Writes the file."""
  width, tensors = field_bits(net.weight_bits), {}
  for layer in net.layers:
    tensors[f"{layer.name}.codes"] = pack(layer.kernel, width)
    tensors[f"{layer.name}.affine"] = np.stack([layer.multiplier, layer.bias])
  content = {
    "model": net.model,
    "image_size": net.image_size,
    "mean": net.normalization.mean,
    "std": net.normalization.std,
    "weight_bits": net.weight_bits,
    "act_bits": net.act_bits,
    "field_bits": width,
    "nodes": [_row(node) for node in net.nodes],
  }
  safetensors.numpy.save_file(
    tensors, os.fspath(path), {"net": json.dumps(content, separators=(",", ":"))}
  )


def _row(node: Node) -> list[Any]:
  kind = type(node).__name__
  shape = [list(node.kernel.shape)] if isinstance(node, Layer) else []
  return [
    kind,
    node.name,
    node.input,
    *shape,
    *(_short(getattr(node, field)) for field in _FIELDS[kind]),
  ]


def _short(value: Any) -> Any:
  # Nine digits say which float32 it is; seventeen would be a tenth of the file's description.
  return float(f"{value:.9g}") if isinstance(value, float) else value


def read(path: str | os.PathLike) -> Net:
  """The net of a file, equal in every number to the one that was written."""
  with safetensors.safe_open(os.fspath(path), "numpy") as file:
    content = json.loads(file.metadata()["net"])
    nodes = tuple(_node(row, content, file.get_tensor) for row in content["nodes"])
  normalization = Normalization(mean=tuple(content["mean"]), std=tuple(content["std"]))
  return Net(
    content["model"],
    nodes,
    content["image_size"],
    normalization,
    content["weight_bits"],
    content["act_bits"],
  )


def _node(row: list[Any], content: dict[str, Any], tensor: Any) -> Node:
  kind, name, source, *values = row
  given = {"name": name, "input": source}
  if kind == "Layer":
    shape, *values = values
    multiplier, bias = tensor(f"{name}.affine")
    kernel = unpack(tensor(f"{name}.codes"), content["field_bits"], tuple(shape))
    given |= {
      "kernel": kernel,
      "multiplier": multiplier,
      "bias": bias,
      "bits": content["weight_bits"],
    }
  elif kind == "Quantizer":
    given["bits"] = content["act_bits"]
  given |= dict(zip(_FIELDS[kind], values, strict=True))
  for field in ("inverse", "scale"):
    if field in given:
      given[field] = float(np.float32(given[field]))
  return _KINDS[kind](**given)


def open_file(path: str | os.PathLike) -> "Runner":
  """Reads a file that `write` wrote."""
  return Runner(read(path))


class Runner:
  """The net that the file describes, in JAX."""

  def __init__(self, net: Net):
    """Args: net, as read from the file."""
    self._logits = jax.jit(functools.partial(reference.run, net))
    self._with_codes = jax.jit(functools.partial(reference.run_with_codes, net))

  def run(
    self, image: np.ndarray, with_codes: bool = False
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and if asked for every quantizer's codes."""
    if not with_codes:
      return np.asarray(self._logits(image)), {}
    return jax.device_get(self._with_codes(image))
