"""Nets with random numbers of the size that training gives: nothing is trained, and no level of a
quantizer is empty.
"""

import functools

import jax
import numpy as np

from configs import digits_w4
from profit_jax import data
from profit_jax.config import parse
from profit_jax.export.build import build_net
from profit_jax.export.net import (
  IMAGE,
  Activation,
  Clip,
  Layer,
  Mean,
  Net,
  Product,
  Quantizer,
  Sum,
  Value,
)
from profit_jax.models import REGISTRY, student_spec

NORMALIZATION = data.KNOWN["digits"].normalization
SIZE = 16  # pixels
# Strides that end 16 pixels at 2x2, where a 3x3 kernel uses all of its taps. The 5x5 kernels of
# MobileNet-v3 begin at 8x8.
STRIDES = {
  "mobilenet_v1": (2, 1, 2, 1, 2, 1),
  "mobilenet_v2": (2, 1, 2, 2, 1, 1, 1, 1),
  "mobilenet_v3_large": (2, 1, 1, 2, 2, 1, 1),
  "mobilenet_v3_small": (2, 1, 1, 2, 1, 2),
  "mobilenet_v4_conv_small": (2, 1, 2, 2, 1, 1),
  "efficientnet_lite0": (2, 1, 2, 2, 1, 1, 1, 1),
  "mnasnet": (2, 1, 2, 2, 1, 1, 1, 1),
  "resnet34": (1, 2, 1, 2, 2, 1),
}


# Ranges of the scalars of activations' quantizers, and what those of kernels are of the largest
# weight.
QUANTIZERS = {
  "quant_a": (1.5, 3.0),
  "quant_c": (1.5, 3.0),
  "quant_center": (1.0, 1.5),
  "quant_width": (0.7, 1.0),
  "quant_gamma": (0.8, 1.2),
}
KERNEL_QUANTIZERS = {
  "quant_a": 0.6,
  "quant_c": 0.8,
  "quant_center": 0.4,
  "quant_width": 0.3,
}


def config(name, **changes):
  result = digits_w4.get_config(name)
  result.compilation_cache = ""
  result.update_from_flattened_dict(changes)
  return result


def settings_of(name, **changes):
  return parse(config(name, **changes), REGISTRY)


def small_settings(name, **changes):
  """The settings of a small net for small images."""
  return settings_of(name, **{"data.image_size": SIZE, "model.strides": STRIDES[name], **changes})


def random_variables(settings, classes=10, seed=0):
  return random_values(student_spec(settings, classes).shapes, seed)


def random_values(shapes, seed=0):
  """Numbers for the variables of any model."""
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    kind, size = path[-1].key, shape.shape
    if kind == "kernel":
      fan_in = np.prod(size[:-1])
      return np.float32(rng.normal(0.0, fan_in**-0.5, size))
    if kind.startswith("quant_"):
      return raw(rng.uniform(*QUANTIZERS[kind], size))
    # Some negative, as training makes some of batch normalization's.
    spread = {"scale": (1.0, 0.5), "bias": (0.2, 0.5), "mean": (0.0, 0.1), "var": (1.0, 0.1)}[kind]
    value = rng.normal(*spread, size)
    return np.float32(np.abs(value) if kind == "var" else value)

  variables = jax.tree_util.tree_map_with_path(leaf, shapes)

  def of_kernels(tree):
    if "kernel" in tree:  # a kernel's interval is of its own size
      channels = tree["kernel"].reshape(-1, tree["kernel"].shape[-1])
      for name in tree.keys() & KERNEL_QUANTIZERS.keys():
        largest = np.abs(channels).max(0 if tree[name].ndim else None)
        tree[name] = raw(KERNEL_QUANTIZERS[name] * largest)
    return {
      name: of_kernels(part) if isinstance(part, dict) else part for name, part in tree.items()
    }

  return {**variables, "params": of_kernels(variables["params"])}


def raw(value):
  """The parameter of a quantizer's positive number, whose softplus it is."""
  return np.float32(np.log(np.expm1(value)))


@functools.cache
def random_net(name, weight_bits, act_bits, **changes):
  """Settings, variables and the code-domain net of a small model."""
  settings = small_settings(name, **changes)
  variables = random_variables(settings)
  return settings, variables, net_of(settings, variables, weight_bits, act_bits)


def net_of(settings, variables, weight_bits, act_bits, classes=10):
  """The code-domain net of a registered model."""
  return build_net(
    student_spec(settings, classes),
    variables,
    name=settings.model.name,
    normalization=NORMALIZATION,
    weight_bits=weight_bits,
    act_bits=act_bits,
  )


@functools.cache
def full_net(name, bits):
  """The published size, 1000 classes."""
  settings = settings_of(name, **{"model.width": 1.0, "model.strides": (), "data.image_size": 224})
  return net_of(settings, random_variables(settings, 1000), bits, bits, 1000)


@functools.cache
def images(count=24):
  """The first evaluation digits, uint8."""
  return next(digits().eval_batches(count))["image"]


@functools.cache
def digits():
  return data.digits.Digits(image_size=SIZE, augment=False, seed=0)


def changed(net, node_name, **fields):
  """A net with other fields of one node."""
  nodes = tuple(
    type(node)(**{**vars(node), **fields}) if node.name == node_name else node for node in net.nodes
  )
  return net._replace(nodes=nodes)


@functools.cache
def every_operation(weight_bits, act_bits):
  """The smallest net with every operation, after every kind of input that the models have."""
  net = Maker(weight_bits, act_bits)
  x = net.layer(IMAGE, "stem_conv", (3, 3, 3, 8), stride=2)
  shortcut = net.quantizer(net.activation(x, "hard_swish"), "block00/input_quant", "hswish")
  # Squeeze-excite after the non-linearity, then a shortcut that begins with codes.
  x = net.layer(shortcut, "block00/depthwise_conv", (5, 5, 1, 8), depthwise=True)
  x = net.activation(x, "relu")
  gate = net.quantizer(net.mean(x), "block00/squeeze_excite/input_quant", "symmetric")
  gate = net.layer(gate, "block00/squeeze_excite/reduce", (8, 8))
  gate = net.quantizer(gate, "block00/squeeze_excite/reduce_quant", "unsigned")
  gate = net.layer(gate, "block00/squeeze_excite/expand", (8, 8))
  x = net.multiply(x, net.activation(gate, "hard_sigmoid"))
  x = net.quantizer(x, "block00/depthwise_quant", "unsigned")
  x = net.layer(x, "block00/project_conv", (1, 1, 8, 8))
  x = shortcut = net.add(x, net.value(shortcut))
  # Squeeze-excite by a mean of codes, then a shortcut of floats.
  x = net.quantizer(x, "block01/input_quant", "symmetric")
  x = net.activation(net.layer(x, "block01/expand_conv", (1, 1, 8, 16), gain=4.0), "relu6")
  x = net.quantizer(x, "block01/expand_quant", "unsigned", interval=8.0)
  x = net.layer(x, "block01/depthwise_conv", (3, 3, 1, 16), depthwise=True)
  x = net.quantizer(x, "block01/depthwise_quant", "unsigned")
  gate = net.activation(
    net.layer(net.mean(x), "block01/squeeze_excite/expand", (16, 8)), "hard_sigmoid"
  )
  x = net.multiply(net.layer(x, "block01/project_conv", (1, 1, 16, 8)), gate)
  x = net.quantizer(net.add(x, shortcut), "block02/input_quant", "symmetric")
  x = net.layer(x, "block02/depthwise_conv", (3, 3, 1, 8), stride=2, depthwise=True)
  x = net.quantizer(net.activation(x, "hard_swish"), "head_input_quant", "hswish")
  x = net.activation(net.layer(x, "head_conv", (1, 1, 8, 16)), "hard_swish")
  x = net.quantizer(net.mean(x), "head_quant", "hswish")
  x = net.activation(net.layer(x, "pre_classifier", (16, 24)), "hard_swish")
  x = net.quantizer(x, "pre_classifier_quant", "hswish")
  net.layer(x, "classifier", (24, 10))
  return Net(
    "every_operation", tuple(net.nodes), (SIZE, SIZE, 3), NORMALIZATION, weight_bits, act_bits
  )


class Maker:
  """Appends nodes with random numbers. A tensor is the name of the node that computes it."""

  def __init__(self, weight_bits, act_bits):
    self.nodes = []
    self._bits = weight_bits, act_bits
    self._rng = np.random.default_rng(0)
    self._largest = {}  # code of a tensor of codes

  def append(self, node):
    """Another node."""
    self.nodes.append(node)
    return node.name

  def layer(self, x, name, shape, gain=1.0, **options):
    bits, features = self._bits[0], shape[-1]
    qmax = 2 ** (bits - 1) - 1
    kernel = self._rng.integers(-qmax, qmax + 1, shape).astype(np.int8)
    # Outputs are about as large as `gain`.
    size = 0.3 * qmax * self._largest.get(x, 2.0) * np.prod(shape[:-1]) ** 0.5
    return self.append(
      Layer(
        name=name,
        input=x,
        kernel=kernel,
        multiplier=np.float32(gain * self._rng.normal(1.0, 0.3, features) / size),
        bias=np.float32(self._rng.normal(0.2, 0.5, features)),
        bits=bits,
        **options,
      )
    )

  def quantizer(self, x, name, kind, interval=2.0):
    bits = self._bits[1]
    high = 2 ** (bits - (kind == "symmetric")) - 1
    self._largest[name] = high
    return self.append(
      Quantizer(
        name=name,
        input=x,
        inverse=float(np.float32(high / interval)),
        margin=0.375 if kind == "hswish" else 0.0,
        low=-high if kind == "symmetric" else 0,
        high=high,
        bits=bits,
        scale=float(np.float32(1.1 * interval / high)),
        offset=-0.375 if kind == "hswish" else 0.0,
      )
    )

  def activation(self, x, function):
    return self.append(Activation(name=f"{x}/{function}", input=x, function=function))

  def value(self, codes):
    scale = float(np.float32(2.2 / self._largest[codes]))
    return self.append(Value(name=f"{codes}/value", input=codes, scale=scale, offset=-0.375))

  def mean(self, x):
    if x in self._largest:
      self._largest[f"{x}/mean"] = self._largest[x]
    return self.append(Mean(name=f"{x}/mean", input=x))

  def clip(self, x, low, high):
    return self.append(Clip(name=f"{x}/clip", input=x, low=low, high=high))

  def add(self, x, other):
    return self.append(Sum(name=f"{x}/sum", input=x, other=other))

  def multiply(self, x, other):
    return self.append(Product(name=f"{x}/product", input=x, other=other))
