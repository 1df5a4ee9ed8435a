"""A complete model as a user writes it: all that is known of it, and the configuration of a run.

python main.py --config tests/models/one_file_model.py --workdir RUN
"""

import flax.linen as nn

from profit_jax.config import default_config
from profit_jax.models import Naming, register
from profit_jax.nn.functions import relu, spatial_mean
from profit_jax.nn.layers import BatchNorm, QuantAct, QuantConv, QuantDense
from profit_jax.quant.bits import Bits

STRIDES = (2, 2)  # of the stem and of the depthwise convolution
LAYERS = {
  "stem": "features.0",
  "stem_norm": "features.1",
  "depthwise": "features.3",
  "depthwise_norm": "features.4",
  "pointwise": "features.6",
  "pointwise_norm": "features.7",
  "squeeze": "squeeze",
  "fc": "fc",
}
NAMING = Naming(
  source="torchvision",
  layer_names=lambda layers: {layer: LAYERS[layer[0]] for layer in layers if layer[0] in LAYERS},
  settings={"bn_epsilon": 1e-3},
  pointwise=frozenset({"squeeze"}),
)


@register("pebble", strides=STRIDES, head="fc", names=(NAMING,))
class Pebble(nn.Module):
  """Two convolutions and two dense layers."""

  num_classes: int = 10
  strides: tuple[int, ...] = ()
  bn_epsilon: float = 1e-3

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    stem, depthwise = self.strides or STRIDES
    x = QuantConv(8, 3, stem, name="stem")(x, bits)
    x = BatchNorm(epsilon=self.bn_epsilon, name="stem_norm")(x, train, "relu")
    x = QuantAct("unsigned", name="stem_quant")(x, bits)
    x = QuantConv(8, 3, depthwise, depthwise=True, name="depthwise")(x, bits)
    x = BatchNorm(epsilon=self.bn_epsilon, name="depthwise_norm")(x, train, "relu")
    x = QuantAct("unsigned", name="depthwise_quant")(x, bits)
    x = QuantConv(16, name="pointwise")(x, bits)
    x = BatchNorm(epsilon=self.bn_epsilon, name="pointwise_norm")(x, train, "relu")
    x = QuantAct("unsigned", name="pointwise_quant")(spatial_mean(x), bits)
    x = relu(QuantDense(16, name="squeeze")(x, bits))
    x = QuantAct("unsigned", name="squeeze_quant")(x, bits)
    return QuantDense(self.num_classes, name="fc")(x, bits)


def get_config():
  """Digits of 16 pixels."""
  config = default_config()
  config.model.name = "pebble"
  config.model.bn_epsilon = 1e-3
  config.data.name = "digits"
  config.data.image_size = 16
  config.plan.weight_bits = config.plan.act_bits = (4,)
  config.plan.profit_bits = (4,)
  config.train.batch_size = 64
  return config
