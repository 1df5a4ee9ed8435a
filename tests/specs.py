"""What layers say of themselves, of whole models and of parameters made by hand."""

import jax

from profit_jax.nn.spec import Layer, ModelSpec, describe
from profit_jax.quant.bits import Bits


def spec_of(model, size=32, bits=Bits()):
  """A model's, for square images of three channels."""
  return describe(model, (size, size, 3), bits)


def init_variables(model, key, size=32):
  """A model's first variables."""
  return spec_of(model, size).init(key)


def variable_shapes(model, size=32):
  """Their shapes."""
  return spec_of(model, size).shapes


def hand_made(params, bits=Bits()):
  """As if a convolution had made each layer of `{LAYER: {kernel, scalars}}`, nested or not.

  Args:
    params: arrays or shapes.
    bits: with the quantizer.
  """
  layers = {}

  def visit(tree, path):
    if "kernel" in tree:
      name = "/".join(path)
      layers[name] = Layer(name, "conv", {})
      return
    for part, inner in tree.items():
      visit(inner, (*path, part))

  visit(params, ())
  shapes = jax.eval_shape(lambda: params)
  return ModelSpec(None, (), bits, {"params": shapes, "batch_stats": {}}, layers, 0)
