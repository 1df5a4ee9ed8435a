"""The smallest net that can be exported: a stem and a block of MobileNet-v1. The whole command runs
on it.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from profit_jax.models.mobilenet_v1 import DepthwiseSeparable
from profit_jax.nn.layers import BatchNorm, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits

# A kernel and an activation in full precision, and other bits than the phase's.
MIXED = (
  ("stem_conv", "float", None),
  (r".*depthwise.*", 8, 6),
  (r".*pointwise.*", None, "float"),
  ("classifier", "float", 8),
)


class TinyV1(nn.Module):
  """Takes the attributes of a registered model."""

  num_classes: int = 10
  width: float = 1.0
  strides: tuple[int, ...] = ()
  activation: str = "relu6"
  bn_epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    norm = functools.partial(BatchNorm, epsilon=self.bn_epsilon)
    x = QuantConv(8, 3, 2, name="stem_conv")(x, bits)
    x = norm(name="stem_norm")(x, train, self.activation)
    x = QuantAct("unsigned", 6.0, name="stem_quant")(x, bits)
    x = DepthwiseSeparable(16, 2, self.activation, norm, name="block00")(x, bits, train)
    return QuantDense(self.num_classes, name="classifier")(jnp.mean(x, (1, 2)), bits)
