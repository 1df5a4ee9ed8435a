"""A net of four quantized layers: everything the loop needs to see, and compiled in a second."""

import flax.linen as nn
import jax.numpy as jnp

from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits


class TinyNet(nn.Module):
  """Takes the attributes of a registered model."""

  num_classes: int = 10
  width: float = 1.0
  strides: tuple[int, ...] = ()
  activation: str = "relu"
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    for index, (features, stride, depthwise) in enumerate(
      [(8, 2, False), (8, 2, True), (16, 1, False)]
    ):
      x = QuantConv(features, 3, stride, depthwise, name=f"conv{index}")(x, bits)
      x = nn.relu(BatchNorm(name=f"norm{index}")(x, train))
      x = QuantAct("unsigned", 6.0, name=f"quant{index}")(x, bits)
    x = QuantAct("symmetric", name="signed_quant")(x - 0.5, bits)
    x = Dropout(self.dropout, name="dropout")(jnp.mean(x, (1, 2)), train)
    return QuantDense(self.num_classes, name="classifier")(x, bits)


CONVS = ("conv0", "conv1", "conv2")
