"""An own network on own data at 4 bits, exported: python own_model.py [WORKDIR]"""

import sys

import flax.linen as nn
import numpy as np
from sklearn.datasets import load_digits

import profit_jax as pj


class Net(nn.Module):
  """Depthwise convolution after h-swish, squeeze-excite, a residual, and a plain layer."""

  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    x = pj.QuantConv(16, 3, name="stem")(x, bits)
    x = pj.BatchNorm(fused=False, name="stem_norm")(x, train, "hard_swish")
    shortcut = x
    x = pj.QuantAct("hswish", name="stem_quant")(x, bits)
    x = pj.QuantConv(16, 3, depthwise=True, pad_value=pj.HSWISH_MINIMUM, name="depthwise")(x, bits)
    x = pj.BatchNorm(name="depthwise_norm")(x, train, "relu")
    scale = pj.QuantAct("symmetric", name="squeeze_quant")(pj.spatial_mean(x), bits)
    scale = pj.hard_sigmoid(pj.QuantDense(16, name="excite")(scale, bits))
    x = pj.QuantAct("unsigned", name="depthwise_quant")(x * scale[:, None, None, :], bits)
    x = pj.BatchNorm(name="project_norm")(pj.QuantConv(16, name="project")(x, bits), train)
    x = pj.QuantAct("symmetric", name="head_quant")(pj.spatial_mean(x + shortcut), bits)
    return pj.QuantDense(10, name="head")(x, bits)


digits = load_digits()
images, labels = np.float32(digits.images[..., None] / 16), digits.target


def train_batches(epoch, first_step):
  """Batches of 64 of the first 1,344 digits, in another order each epoch."""
  order = np.random.default_rng(epoch).permutation(1344).reshape(21, 64)
  for rows in order[first_step:]:
    yield {"image": images[rows], "label": labels[rows]}


def eval_batches():
  """The other 453 digits."""
  for start in range(1344, 1797, 64):
    yield {"image": images[start : start + 64], "label": labels[start : start + 64]}


data = pj.Data(train=train_batches, eval=eval_batches, steps_per_epoch=21)
schedule = pj.profit_schedule(
  weight_bits=(4,), act_bits=(4,), full_precision_epochs=20, finetune_epochs=10, stabilize=False,
  profit_bits=(), learning_rate=0.05,
)  # fmt: skip
options = pj.Options(train=pj.TrainSettings(ema_rate=0.95))
workdir = sys.argv[1] if len(sys.argv) > 1 else "own"
result = pj.Trainer(Net(), schedule, workdir, options=options).fit(data)
report = pj.export(result, "own.onnx", data.eval)
print(f"full precision {result.full_precision_top1:.2f} %, W4A4 {result.top1:.2f} %; {report}")
