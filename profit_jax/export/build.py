"""Trained variables -> the code-domain net. The topology of each model stands here once more, in
terms of `net.py`.

That it is the model's is not believed but measured, with every export: each quantizer's codes are
compared with those of the trained network (`verify.py`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from profit_jax.config import ConfigError, QuantSettings, Settings
from profit_jax.data.normalize import Normalization
from profit_jax.export.net import (
  IMAGE,
  Activation,
  Layer,
  Mean,
  Net,
  Node,
  Product,
  Quantizer,
  Sum,
  Value,
)
from profit_jax.models import STRIDES, mobilenet_v1, mobilenet_v2, mobilenet_v3
from profit_jax.quant import duq
from profit_jax.quant.base import HSWISH_MINIMUM

_SIXTH = 6.0  # where ReLU6 ends


def build_net(
  settings: Settings,
  variables: dict[str, Any],
  normalization: Normalization,
  weight_bits: int,
  act_bits: int,
) -> Net:
  """The code-domain net of a trained model.

  Args:
    settings: of the run.
    variables: its `params` and `batch_stats`, on the host.
    normalization: of its images.
    weight_bits: 2 to 8.
    act_bits: 2 to 8.

  Raises:
    ConfigError: a model that pads with 0 where an h-swish quantizer has no code for it; other
      quantizers than DuQ with one interval per kernel.
  """
  model = settings.model
  if settings.quant != QuantSettings():
    raise ConfigError(
      f"config.quant = {dataclasses.asdict(settings.quant)} cannot be exported: only DuQ "
      "quantizers with one interval per "
      f"kernel and the same bits in all layers can be. Train with the defaults."
    )
  if model.name.startswith("mobilenet_v3") and model.pad_value != HSWISH_MINIMUM:
    raise ConfigError(
      f"config.model.pad_value = {model.pad_value} cannot be exported: h-swish quantizers begin "
      "at -3/8, and a border "
      f"of {model.pad_value} lies between two codes (paper section 3.3). Train with "
      "config.model.pad_value=-0.375."
    )
  builder = Builder(variables, model.bn_epsilon, weight_bits, act_bits)
  NETWORKS[model.name](builder, model, model.strides or STRIDES.get(model.name, ()))
  return Net(
    model.name, tuple(builder.nodes), settings.data.image_size, normalization, weight_bits, act_bits
  )


class Builder:
  """Appends nodes; a tensor is the name of the node that computes it.

  Attributes:
    nodes: so far.
  """

  def __init__(self, variables: dict[str, Any], epsilon: float, weight_bits: int, act_bits: int):
    self.nodes: list[Node] = []
    self._variables, self._epsilon = variables, epsilon
    self._weight_bits, self._act_bits = weight_bits, act_bits
    # Of every tensor of codes: what a code is worth, and the value of code 0.
    self._scales: dict[str, tuple[np.float64, float]] = {}
    self._channels = {IMAGE: 3}

  def channels(self, x: str) -> int:
    """The channels of a tensor."""
    return self._channels[x]

  def has(self, path: str) -> bool:
    """Whether the model has parameters there."""
    return self._find("params", path) is not None

  def conv(self, x: str, path: str, norm: str, stride: int = 1, depthwise: bool = False) -> str:
    """A convolution and the batch normalization behind it."""
    params, stats = self._get("params", norm), self._get("batch_stats", norm)
    gain = np.float64(params["scale"]) / np.sqrt(np.float64(stats["var"]) + self._epsilon)
    shift = np.float64(params["bias"]) - np.float64(stats["mean"]) * gain
    return self._layer(x, path, gain, shift, stride=stride, depthwise=depthwise)

  def dense(self, x: str, path: str) -> str:
    """A dense layer with its own bias."""
    bias = np.float64(self._get("params", path)["bias"])
    return self._layer(x, path, np.ones_like(bias), bias)

  def quantize(self, x: str, path: str, kind: duq.Kind, activation: str | None = None) -> str:
    """A quantizer, behind an activation of its input; ReLUs that its own lower and upper end do
    already are left out.
    """
    params = self._get("params", path)
    interval, scale = (_softplus(params[name]) for name in ("quant_a", "quant_c"))
    signed = kind == "symmetric"
    high = 2 ** (self._act_bits - signed) - 1
    does_it = kind == "unsigned" and (
      activation == "relu" or (activation == "relu6" and interval <= _SIXTH)
    )
    x = x if does_it else self.activation(x, activation)
    margin = -duq.OFFSET[kind]
    self._append(
      Quantizer(
        name=path,
        input=x,
        inverse=float(np.float32(high / interval)),
        margin=margin,
        low=-high if signed else 0,
        high=high,
        bits=self._act_bits,
        scale=float(np.float32(scale / high)),
      ),
      self._channels[x],
    )
    self._scales[path] = scale / high, -margin
    return path

  def activation(self, x: str, function: str | None) -> str:
    """A non-linearity, one of `Activation`'s; None is none."""
    if function is None:
      return x
    return self._append(
      Activation(name=f"{x}/{function}", input=x, function=function), self._channels[x]
    )

  def mean(self, x: str, path: str) -> str:
    """The mean over space, of codes or of floats."""
    name = self._append(Mean(name=path, input=x), self._channels[x])
    if x in self._scales:
      self._scales[name] = self._scales[x]
    return name

  def add(self, x: str, shortcut: str, path: str) -> str:
    """The sum with a shortcut, which may be codes."""
    if shortcut in self._scales:
      scale, offset = self._scales[shortcut]
      value = Value(
        name=f"{shortcut}/value", input=shortcut, scale=float(np.float32(scale)), offset=offset
      )
      shortcut = self._append(value, self._channels[shortcut])
    return self._append(Sum(name=path, input=x, other=shortcut), self._channels[x])

  def multiply(self, x: str, scale: str, path: str) -> str:
    """Each channel times its scale, `[N, C]`."""
    return self._append(Product(name=path, input=x, other=scale), self._channels[x])

  def _layer(self, x: str, path: str, gain: np.ndarray, shift: np.ndarray, **shape: Any) -> str:
    params = self._get("params", path)
    steps = 2 ** (self._weight_bits - 1) - 1
    codes = kernel_codes(params["kernel"], params["quant_a"], steps)
    worth = _softplus(params["quant_c"]) / steps
    scale, offset = self._scales.get(x, (1.0, 0.0))
    sums = codes.sum(axis=tuple(range(codes.ndim - 1)), dtype=np.int64)
    layer = Layer(
      name=path,
      input=x,
      kernel=codes,
      multiplier=np.float32(scale * worth * gain),
      bias=np.float32(shift + offset * worth * sums * gain),
      bits=self._weight_bits,
      **shape,
    )
    return self._append(layer, codes.shape[-1])

  def _append(self, node: Node, channels: int) -> str:
    self.nodes.append(node)
    self._channels[node.name] = channels
    return node.name

  def _find(self, collection: str, path: str) -> Any:
    return functools.reduce(
      lambda tree, part: tree and tree.get(part), path.split("/"), self._variables[collection]
    )

  def _get(self, collection: str, path: str) -> Any:
    found = self._find(collection, path)
    if found is None:
      raise KeyError(f"{path} is not among the model's {collection}")
    return found


def kernel_codes(kernel: np.ndarray, raw_a: np.ndarray, steps: int) -> np.ndarray:
  """The int8 codes of a float32 kernel, computed by the trained quantizer itself.

  NumPy would round some other way near ties: XLA's quotient and its softplus differ from NumPy's in
  the last bits.
  """
  # Padded to a power of two: the kernels of a net have dozens of shapes, and share a few programs.
  size = 1 << (kernel.size - 1).bit_length()
  padded = np.pad(kernel.reshape(-1), (0, size - kernel.size))
  codes = _codes(jnp.asarray(padded), jnp.asarray(raw_a), jnp.float32(steps), "symmetric")
  return np.asarray(codes)[: kernel.size].reshape(kernel.shape).astype(np.int8)


_codes = jax.jit(duq.codes, static_argnames="kind")


def _softplus(raw: Any) -> np.float64:
  return np.logaddexp(np.float64(0.0), np.float64(raw))


def _mobilenet_v1(net: Builder, model: Any, strides: tuple[int, ...]) -> None:
  x = net.conv(IMAGE, "stem_conv", "stem_norm", strides[0])
  x = net.quantize(x, "stem_quant", "unsigned", model.activation)
  blocks = [
    stride if position == 0 else 1
    for (_, count), stride in zip(mobilenet_v1.STAGES, strides[1:], strict=True)
    for position in range(count)
  ]
  for index, stride in enumerate(blocks):
    block = f"block{index:02d}"
    for part, options in (("depthwise", {"stride": stride, "depthwise": True}), ("pointwise", {})):
      x = net.conv(x, f"{block}/{part}_conv", f"{block}/{part}_norm", **options)
      x = net.quantize(x, f"{block}/{part}_quant", "unsigned", model.activation)
  net.dense(net.mean(x, "mean"), "classifier")


def _mobilenet_v2(net: Builder, model: Any, strides: tuple[int, ...]) -> None:
  x = net.conv(IMAGE, "stem_conv", "stem_norm", strides[0])
  x = net.quantize(x, "stem_quant", "unsigned", model.activation)
  blocks = [
    stride if position == 0 else 1
    for (_, _, count), stride in zip(mobilenet_v2.STAGES, strides[1:], strict=True)
    for position in range(count)
  ]
  for index, stride in enumerate(blocks):
    block, shortcut = f"block{index:02d}", x
    if index > 0:
      x = net.quantize(x, f"{block}/input_quant", "symmetric")
    if net.has(f"{block}/expand_conv"):
      x = net.conv(x, f"{block}/expand_conv", f"{block}/expand_norm")
      x = net.quantize(x, f"{block}/expand_quant", "unsigned", model.activation)
    x = net.conv(x, f"{block}/depthwise_conv", f"{block}/depthwise_norm", stride, depthwise=True)
    x = net.quantize(x, f"{block}/depthwise_quant", "unsigned", model.activation)
    x = net.conv(x, f"{block}/project_conv", f"{block}/project_norm")
    x = _with_shortcut(net, x, shortcut, stride, block)
  x = net.quantize(x, "head_input_quant", "symmetric")
  x = net.activation(net.conv(x, "head_conv", "head_norm"), model.activation)
  x = net.quantize(net.mean(x, "mean"), "head_quant", "unsigned")
  net.dense(x, "classifier")


def _mobilenet_v3(net: Builder, model: Any, strides: tuple[int, ...], variant: str) -> None:
  x = net.activation(net.conv(IMAGE, "stem_conv", "stem_norm", strides[0]), "hard_swish")
  blocks = [
    (spec, stride if position == 0 else 1)
    for stage, stride in zip(mobilenet_v3.VARIANTS[variant].stages, strides[1:], strict=True)
    for position, spec in enumerate(stage)
  ]
  for index, (spec, stride) in enumerate(blocks):
    block, shortcut = f"block{index:02d}", x
    activation, kind = ("hard_swish", "hswish") if spec.hswish else ("relu", "unsigned")
    x = net.quantize(x, f"{block}/input_quant", "symmetric" if index else "hswish")
    if net.has(f"{block}/expand_conv"):
      x = net.conv(x, f"{block}/expand_conv", f"{block}/expand_norm")
      x = net.quantize(x, f"{block}/expand_quant", kind, activation)
    x = net.conv(x, f"{block}/depthwise_conv", f"{block}/depthwise_norm", stride, depthwise=True)
    if spec.squeeze_excite and model.squeeze_excite == "after":
      x = _squeeze_excite(net, net.activation(x, activation), f"{block}/squeeze_excite")
      x = net.quantize(x, f"{block}/depthwise_quant", kind)
    else:
      x = _squeeze_excite(net, x, f"{block}/squeeze_excite") if spec.squeeze_excite else x
      x = net.quantize(x, f"{block}/depthwise_quant", kind, activation)
    x = net.conv(x, f"{block}/project_conv", f"{block}/project_norm")
    x = _with_shortcut(net, x, shortcut, stride, block)
  x = net.quantize(x, "head_input_quant", "symmetric")
  x = net.activation(net.conv(x, "head_conv", "head_norm"), "hard_swish")
  x = net.quantize(net.mean(x, "mean"), "head_quant", "hswish")
  x = net.quantize(net.dense(x, "pre_classifier"), "pre_classifier_quant", "hswish", "hard_swish")
  net.dense(x, "classifier")


def _with_shortcut(net: Builder, x: str, shortcut: str, stride: int, block: str) -> str:
  same = stride == 1 and net.channels(x) == net.channels(shortcut)
  return net.add(x, shortcut, f"{block}/sum") if same else x


def _squeeze_excite(net: Builder, x: str, path: str) -> str:
  scale = net.quantize(net.mean(x, f"{path}/mean"), f"{path}/input_quant", "symmetric")
  scale = net.quantize(
    net.dense(scale, f"{path}/reduce"), f"{path}/reduce_quant", "unsigned", "relu"
  )
  scale = net.activation(net.dense(scale, f"{path}/expand"), "hard_sigmoid")
  return net.multiply(x, scale, f"{path}/product")


# By the model's name: appends its nodes, given its settings and the strides of its stages. A model
# that is added to `models.REGISTRY` can be exported once its topology is here.
NETWORKS: dict[str, Callable[[Builder, Any, tuple[int, ...]], None]] = {
  "mobilenet_v1": _mobilenet_v1,
  "mobilenet_v2": _mobilenet_v2,
  "mobilenet_v3_large": functools.partial(_mobilenet_v3, variant="large"),
  "mobilenet_v3_small": functools.partial(_mobilenet_v3, variant="small"),
}
