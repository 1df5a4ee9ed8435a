"""Nets with random numbers of the size that training gives: nothing is compiled, and no level of a
quantizer is empty.
"""

import functools

import jax
import numpy as np

from configs import digits_w4
from profit_jax import data
from profit_jax.export.build import build_net
from profit_jax.models import REGISTRY, build, variable_shapes
from profit_jax.settings import parse

NORMALIZATION = data.KNOWN["digits"].normalization


def config(name, **changes):
  result = digits_w4.get_config(name)
  result.compilation_cache = ""
  result.update_from_flattened_dict(changes)
  return result


def settings_of(name, **changes):
  return parse(config(name, **changes), REGISTRY)


def random_variables(settings, classes=10, seed=0):
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    kind, size = path[-1].key, shape.shape
    if kind == "kernel":
      fan_in = np.prod(size[:-1])
      return np.float32(rng.normal(0.0, fan_in**-0.5, size))
    if kind == "quant_a":
      return np.float32(np.log(np.expm1(rng.uniform(1.5, 3.0))))  # softplus of it
    if kind == "quant_c":
      return np.float32(np.log(np.expm1(rng.uniform(1.5, 3.0))))
    # Some negative, as training makes some of batch normalization's.
    spread = {"scale": (1.0, 0.5), "bias": (0.2, 0.5), "mean": (0.0, 0.1), "var": (1.0, 0.1)}[kind]
    value = rng.normal(*spread, size)
    return np.float32(np.abs(value) if kind == "var" else value)

  variables = jax.tree_util.tree_map_with_path(
    leaf, variable_shapes(build(settings.model, classes), settings.data.image_size)
  )

  def of_kernels(tree):
    if "kernel" in tree:  # a kernel's interval is of its own size
      largest = np.abs(tree["kernel"]).max()
      for name, share in (("quant_a", 0.6), ("quant_c", 0.8)):
        tree[name] = np.float32(np.log(np.expm1(share * largest)))
    return {
      name: of_kernels(part) if isinstance(part, dict) else part for name, part in tree.items()
    }

  return {"params": of_kernels(variables["params"]), "batch_stats": variables["batch_stats"]}


@functools.cache
def random_net(name, weight_bits, act_bits, classes=10, **changes):
  """Settings, variables and the code-domain net."""
  settings = settings_of(name, **changes)
  variables = random_variables(settings, classes)
  return settings, variables, build_net(settings, variables, NORMALIZATION, weight_bits, act_bits)


def full_net(name, bits):
  """The published size, 1000 classes."""
  changes = {"model.width": 1.0, "model.strides": (), "data.image_size": 224}
  return random_net(name, bits, bits, 1000, **changes)[2]


@functools.cache
def images(size=32, count=24):
  """The first evaluation digits, uint8."""
  source = data.digits.Digits(image_size=size, augment=False, seed=0)
  return next(source.eval_batches(count))["image"]
