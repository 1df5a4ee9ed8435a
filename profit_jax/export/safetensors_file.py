"""The format `safetensors`: codes and numbers with a documented layout, for people who write
kernels.

Tensors, of every layer:

| name           | type             | what                                                     |
|----------------|------------------|----------------------------------------------------------|
| `LAYER.codes`  | uint8 `[bytes]`  | the kernel's codes, row-major, as two's complement,      |
|                |                  | 8 / `field` to a byte, the first in the lowest bits      |
| `LAYER.kernel` | float32 `shape`  | in place of `.codes`: a kernel in full precision         |
| `LAYER.affine` | float32 `[2, F]` | multiplier and bias per channel:                         |
|                |                  | `y = acc * affine[0] + affine[1]`                        |

`Affine` nodes have `.affine` too. The metadata entry `net` is JSON: `model`, `image_shape`,
`mean`, `std` (of pixels / 255, per channel; null where float32 images are taken as they are),
`weight_bits`, `act_bits`, and `nodes`, in order of execution: `[kind, name, input, ...]` with

    ["Layer", name, input, shape, field, bits, stride = 1, depthwise = false, code_bits = null,
     padding = null]
        shape [K, K, C, F], depthwise [K, K, 1, F], dense [C, F]; a code takes `field` bits here,
        32 are floats; padding [[above, below], [left, right]] of zeros, null for `(K - 1) / 2`
        everywhere
    ["Quantizer", name, input, inverse, margin, low, high, bits, scale, offset = 0]
        code = clip(round((x + margin) * inverse), low, high), worth code * scale + offset
    ["Activation", name, input, function]
        relu, relu6, hard_swish, hard_sigmoid
    ["Value", name, input, scale, offset]
        code * scale + offset
    ["Affine", name, input]
        x * affine[0] + affine[1]
    ["Clip", name, input, low, high]
    ["Mean", name, input]
        over space
    ["Pool", name, input, function, window, strides, padding]
        max, or mean (of the padding's zeros too)
    ["Reshape", name, input, shape]
        of one example
    ["Concat", name, input, others]
        of channels
    ["Sum", name, input, other], also Product, Maximum, Minimum
        element by element; a [N, C] over space

What ends a row and has the value given here is left out.

Images and activations are NHWC, kernels HWIO. Round half to even.
"""

import dataclasses
import functools
import json
import os
import typing
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from profit_jax import __version__
from profit_jax.config import ConfigError
from profit_jax.data.normalize import Normalization
from profit_jax.export import reference
from profit_jax.export.net import FLOAT_BITS, Affine, Layer, Net, Node
from profit_jax.export.packing import pack, unpack

_KINDS = {kind.__name__: kind for kind in typing.get_args(Node)}
_NO_DEFAULT = object()
_LAYER_FIELDS = ("bits", "stride", "depthwise", "code_bits", "padding")


def write(net: Net, path: str | os.PathLike) -> None:
  """Writes the file."""
  tensors = {}
  for node in net.nodes:
    if isinstance(node, Layer):
      if node.quantized:
        tensors[f"{node.name}.codes"] = pack(node.kernel, node.field_bits)
      else:
        tensors[f"{node.name}.kernel"] = np.ascontiguousarray(node.kernel)
    if isinstance(node, (Layer, Affine)):
      tensors[f"{node.name}.affine"] = np.stack([node.multiplier, node.bias])
  pixels = net.normalization
  content = {
    "model": net.model,
    "image_shape": net.image_shape,
    "mean": pixels and pixels.mean,
    "std": pixels and pixels.std,
    "weight_bits": net.weight_bits,
    "act_bits": net.act_bits,
    "nodes": [_row(node) for node in net.nodes],
  }
  safetensors.numpy.save_file(
    tensors, os.fspath(path), {"net": json.dumps(content, separators=(",", ":"))}
  )


def _fields(kind: str) -> tuple[str, ...]:
  """What a row says of a node, after its name and input."""
  if kind == "Layer":
    return _LAYER_FIELDS
  if kind == "Affine":
    return ()
  return tuple(field.name for field in dataclasses.fields(_KINDS[kind])[2:])


def _row(node: Node) -> list[Any]:
  kind = type(node).__name__
  stored = [node.kernel.shape, node.field_bits] if isinstance(node, Layer) else []
  fields = list(_fields(kind))
  while fields and getattr(node, fields[-1]) == getattr(type(node), fields[-1], _NO_DEFAULT):
    fields.pop()
  return [kind, node.name, node.input, *stored, *(_short(getattr(node, field)) for field in fields)]


def _short(value: Any) -> Any:
  # Nine digits say which float32 it is; seventeen would be a tenth of the file's description.
  return float(f"{value:.9g}") if isinstance(value, float) else value


def read(path: str | os.PathLike) -> Net:
  """The net of a file, equal in every number to the one that was written.

  Raises:
    ConfigError: a file that `write` did not write, or that another version wrote in another layout.
  """
  try:
    with safetensors.safe_open(os.fspath(path), "numpy") as file:
      content = json.loads((file.metadata() or {})["net"])
      if "field_bits" in content:
        raise ConfigError(
          f"{os.fspath(path)!r} was exported by profit_jax 0.1.0, whose layout this version does "
          "not read. Export the run again, or use version 0.1.0."
        )
      nodes = tuple(_node(row, file.get_tensor) for row in content["nodes"])
    pixels = content["mean"] and Normalization(tuple(content["mean"]), tuple(content["std"]))
    return Net(
      content["model"],
      nodes,
      tuple(content["image_shape"]),
      pixels,
      content["weight_bits"],
      content["act_bits"],
    )
  except ConfigError:
    raise
  except Exception as error:  # whatever its parts stumble over
    raise ConfigError(
      f"{os.fspath(path)!r} cannot be read by profit_jax {__version__}: {error!r}. It is damaged, "
      "no exported file, or of another version. Export the run again."
    ) from error


def _node(row: list[Any], tensor: Any) -> Node:
  kind, name, source, *values = row
  given = {"name": name, "input": source}
  if kind in ("Layer", "Affine"):
    given["multiplier"], given["bias"] = tensor(f"{name}.affine")
  if kind == "Layer":
    shape, field, *values = values
    if field == FLOAT_BITS:
      given["kernel"] = tensor(f"{name}.kernel")
    else:
      given["kernel"] = unpack(tensor(f"{name}.codes"), field, tuple(shape))
  for field, value in zip(_fields(kind), values, strict=False):
    given[field] = _long(value)
  return _KINDS[kind](**given)


def _long(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(map(_long, value))
  return float(np.float32(value)) if isinstance(value, float) else value


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
