"""Models as users write them: nothing but their layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from profit_jax.nn.functions import hard_sigmoid, hard_swish, spatial_mean
from profit_jax.nn.layers import BatchNorm, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import value_of

# 15 x 12 pixels of one channel, floats.
IMAGE_SHAPE = (15, 12, 1)


class Branches(nn.Module):
  """Signed inputs, an affine layer without a convolution before it, 5x5 kernels with strides, and
  branches that meet.
  """

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = BatchNorm(name="input_norm")(x, train)
    x = QuantAct("symmetric", name="input_quant")(x, bits)
    x = QuantConv(8, 5, 2, name="stem")(x, bits)
    x = BatchNorm(name="stem_norm")(x, train, "relu")
    x = QuantAct("unsigned", name="stem_quant")(x, bits)
    left = QuantConv(8, 5, 1, depthwise=True, name="left")(x, bits)
    left = BatchNorm(name="left_norm")(left, train)
    right = QuantConv(8, 3, name="right")(x, bits)  # read with and without its norm
    left = left + BatchNorm(name="right_norm")(right, train)
    pooled = nn.max_pool(value_of(x), (3, 3), (1, 1), ((1, 1), (1, 1)))
    x = jnp.concatenate([left + right, value_of(right), pooled], axis=-1)
    x = QuantAct("symmetric", name="joined_quant")(x, bits)
    x = QuantConv(12, 3, 2, name="join")(x, bits)
    x = BatchNorm(name="join_norm")(x, train, "hard_swish")
    x = QuantAct("hswish", name="join_quant")(x, bits)
    return QuantDense(5, name="head")(spatial_mean(x), bits)


class Same(nn.Module):
  """TensorFlow's SAME padding, of even and odd sizes, with zeros, with -3/8, and without a border
  at stride 3.
  """

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantConv(8, 3, 3, padding="same", name="stem")(x, bits)  # 15 x 12 -> 5 x 4
    x = BatchNorm(name="stem_norm")(x, train, "hard_swish")
    x = QuantAct("hswish", name="stem_quant")(x, bits)
    x = QuantConv(8, 5, 2, True, -0.375, "same", name="deep")(x, bits)  # 3 x 2
    x = BatchNorm(name="deep_norm")(x, train, "relu6")
    x = QuantAct("unsigned", name="deep_quant")(x, bits)
    x = QuantConv(8, 3, 2, padding="same", name="last")(x, bits)  # 2 x 1
    x = BatchNorm(name="last_norm")(x, train, "relu")
    x = QuantAct("unsigned", name="last_quant")(x, bits)
    x = QuantConv(8, 3, 1, True, padding="same", name="flat")(x, bits)
    x = BatchNorm(name="flat_norm")(x, train)
    x = QuantAct("symmetric", name="flat_quant")(x, bits)
    return QuantDense(5, name="head")(spatial_mean(x), bits)


class Plain(nn.Module):
  """All that may stand between layers, as flax and jnp write it."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantAct("symmetric", name="input_quant")((x - 0.5) * 2.0, bits)
    x = QuantConv(8, 3, name="stem")(x, bits)
    x = nn.BatchNorm(use_running_average=not train, name="stem_norm")(value_of(x))
    gate = jnp.mean(x, axis=(1, 2), keepdims=True)
    gate = QuantAct("symmetric", name="gate_quant")(gate, bits)
    gate = nn.hard_sigmoid(value_of(QuantConv(8, 1, name="gate")(gate, bits)))
    x = QuantAct("hswish", name="stem_quant")(nn.hard_swish(x) * gate, bits)
    deep = QuantConv(8, 3, pad_value=-0.375, depthwise=True, name="deep")(x, bits)
    deep = nn.relu6(nn.BatchNorm(use_running_average=not train, name="deep_norm")(value_of(deep)))
    shallow = nn.pool(value_of(x), 0.0, jax.lax.add, (3, 3), (1, 1), ((1, 1), (1, 1))) / 9.0
    x = jnp.maximum(deep, shallow) - jnp.minimum(shallow, 0.5) / 4.0
    x = QuantAct("symmetric", name="deep_quant")(jnp.clip(x - 0.75, -1.1, 1.6), bits)
    x = nn.max_pool(value_of(x), (2, 2), (2, 2))
    x = QuantConv(6, 5, 2, name="last")(x, bits)
    x = QuantAct("unsigned", name="last_quant")(nn.relu(value_of(x)), bits)
    x = QuantDense(16, name="hidden")(value_of(x).reshape(len(x), -1), bits)
    x = QuantAct("hswish", name="hidden_quant")(x * nn.relu6(x + 3.0) / 6.0, bits)
    return QuantDense(5, name="head")(x, bits)


class Vectors(nn.Module):
  """Without convolutions; at every place of an image, or of vectors."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantAct("symmetric", name="input_quant")(x, bits)
    x = QuantDense(16, name="wide")(x, bits)
    x = BatchNorm(name="wide_norm")(x, train, "relu6")
    gate = hard_sigmoid(
      QuantDense(16, name="gate")(QuantAct("unsigned", name="quant")(x, bits), bits)
    )
    x = jnp.maximum(x * gate, 0.1 - x) * 4.0 - 1.5
    x = spatial_mean(x) if x.ndim == 4 else x
    x = QuantAct("symmetric", name="head_quant")(x, bits)
    return QuantDense(5, name="head")(x, bits) - 0.5


@jax.jit
def swish(x):
  """Compiled before it is traced."""
  return hard_swish(x)


class Codes(nn.Module):
  """Codes that stay codes: pooled, joined and flattened; 3 bits, and 8 at both ends."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    ends = bits if bits.weight is None else bits.at(8, 8)
    x = QuantConv(8, 5, 2, name="stem")(x, ends)
    x = swish(BatchNorm(name="stem_norm")(x, train))
    x = value_of(QuantAct("hswish", name="stem_quant")(x, bits))
    x = jnp.concatenate([x, nn.max_pool(x, (3, 3), padding="SAME")], axis=-1)
    x = QuantConv(12, 1, name="deep")(x, bits)
    x = BatchNorm(name="deep_norm")(x, train)
    x = QuantAct("unsigned", name="deep_quant")(nn.relu(x), ends)
    x = nn.max_pool(value_of(x), (2, 2), (2, 2))
    return QuantDense(5, use_bias=False, name="head")(x.reshape(len(x), -1), ends)
