"""A net of four quantized layers: everything the loop needs to see, and compiled in a second."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Levels


class TinyNet(nn.Module):
  """Takes the attributes of a registered model."""

  num_classes: int = 10
  width: float = 1.0
  strides: tuple[int, ...] = ()
  activation: str = "relu"
  dropout: float = 0.0
  quant: Any = None

  @nn.compact
  def __call__(self, x, levels=Levels(), train=False):
    levels = levels._replace(quant=self.quant)
    for index, (features, stride, depthwise) in enumerate(
      [(8, 2, False), (8, 2, True), (16, 1, False)]
    ):
      x = QuantConv(features, 3, stride, depthwise, name=f"conv{index}")(
        x, levels if index else levels.first()
      )
      x = nn.relu(BatchNorm(name=f"norm{index}")(x, train))
      x = QuantAct("unsigned", 6.0, name=f"quant{index}")(x, levels)
    x = QuantAct("symmetric", name="signed_quant")(x - 0.5, levels)
    x = Dropout(self.dropout, name="dropout")(jnp.mean(x, (1, 2)), train)
    return QuantDense(self.num_classes, name="classifier")(x, levels.last())


CONVS = ("conv0", "conv1", "conv2")
