"""The smallest net that can be exported: a stem and a block of MobileNet-v1. The whole command runs
on it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from profit_jax.models.mobilenet_v1 import DepthwiseSeparable
from profit_jax.nn.layers import BatchNorm, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Levels


class TinyV1(nn.Module):
  """Takes the attributes of a registered model."""

  num_classes: int = 10
  activation: str = "relu6"
  bn_epsilon: float = 1e-5
  quant: Any = None

  @nn.compact
  def __call__(self, x, levels=Levels(), train=False):
    levels = levels._replace(quant=self.quant)
    norm = functools.partial(BatchNorm, epsilon=self.bn_epsilon)
    x = QuantConv(8, 3, 2, name="stem_conv")(x, levels.first())
    x = norm(name="stem_norm").pending(x, train, self.activation)
    x = QuantAct("unsigned", 6.0, name="stem_quant")(x, levels)
    x = DepthwiseSeparable(16, 2, self.activation, QuantConv, norm, name="block00")(
      x, levels, train
    )
    return QuantDense(self.num_classes, name="classifier")(jnp.mean(x, (1, 2)), levels.last())
