"""Own data with tf.data: shuffled, augmented, resumed: python own_data_tfdata.py [WORKDIR]"""

import sys

import flax.linen as nn
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import profit_jax as pj

STEPS, BATCH = 21, 64


class Net(nn.Module):
  """A small convolutional network."""

  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    for i, width in enumerate((16, 32)):
      x = pj.QuantConv(width, 3, stride=2, name=f"conv{i}")(x, bits)
      x = pj.BatchNorm(name=f"norm{i}")(x, train, "relu")
      x = pj.QuantAct("unsigned", name=f"quant{i}")(x, bits)
    return pj.QuantDense(10, name="head")(pj.spatial_mean(x), bits)


digits = load_digits()
# uint8 images are divided by 255 on the device; see `Data.normalization`.
images = np.uint8(digits.images[..., None] * (255 / 16))
examples = {"image": images, "label": digits.target}
first = {name: values[: STEPS * BATCH] for name, values in examples.items()}
rest = {name: values[STEPS * BATCH :] for name, values in examples.items()}


def moved(example, seed):
  """Moves a digit by up to one pixel; the seed decides where to."""
  padded = tf.pad(example["image"], [[1, 1], [1, 1], [0, 0]])
  image = tf.image.stateless_random_crop(
    padded, (8, 8, 1), tf.stack([seed, tf.constant(0, tf.int64)])
  )
  return {**example, "image": image}


def train_batches(epoch, first_step):
  """An epoch from a step on: all that is random is a function of the epoch and the place in it."""
  dataset = tf.data.Dataset.from_tensor_slices(first)
  dataset = dataset.shuffle(STEPS * BATCH, seed=epoch, reshuffle_each_iteration=False)
  seeds = tf.data.Dataset.counter(epoch * STEPS * BATCH)
  dataset = tf.data.Dataset.zip(dataset, seeds).skip(first_step * BATCH).map(moved)
  return dataset.batch(BATCH).prefetch(2).as_numpy_iterator()


def eval_batches():
  """The other 453 digits, in order."""
  return tf.data.Dataset.from_tensor_slices(rest).batch(BATCH).as_numpy_iterator()


data = pj.Data(train=train_batches, eval=eval_batches, steps_per_epoch=STEPS)
schedule = pj.profit_schedule(
  weight_bits=(4,), act_bits=(4,), full_precision_epochs=20, finetune_epochs=10, stabilize=False,
  profit_bits=(), learning_rate=0.05,
)  # fmt: skip
options = pj.Options(train=pj.TrainSettings(ema_rate=0.95))
workdir = sys.argv[1] if len(sys.argv) > 1 else "own_data"
result = pj.Trainer(Net(), schedule, workdir, callbacks=[pj.TensorBoard()], options=options).fit(
  data
)
print(f"full precision {result.full_precision_top1:.2f} %, W4A4 {result.top1:.2f} %")
