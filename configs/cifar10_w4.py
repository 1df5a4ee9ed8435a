"""CIFAR-10 from random weights to 4 bits: MobileNet-v2 for 32x32 images, its own teacher; 22
phases, 335 epochs.

Command:  profit prepare cifar10
          python main.py --config configs/cifar10_w4.py --workdir RUN
Data:     tensorflow-datasets' cifar10: 50,000 training and 10,000 test images, 162 MB to download.
Cost:     130,650 steps of 128 images at 32 px; not run.
Result:   not run. With the published strides, learning rates and calibration, CIFAR-10 falls to
          13 % in the first activation phase (issue 1 of the authors' repository). Calibration is
          every configuration's here: on what a quantizer sees.
"""

from configs import base


def get_config():
  """`base.py` for small images: what differs says why."""
  config = base.get_config()
  with config.unlocked():
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.train_crop = "pad_crop"  # a random 8 % of the area would be 9x9 pixels
    config.data.crop_pct = 1.0
    # 32 -> 4. The published strides end at 1x1 after five halvings, where batch statistics are
    # those of single pixels.
    config.model.strides = (1, 1, 1, 2, 2, 1, 2, 1)
    config.model.dropout = 0.0
    config.plan.full_precision_epochs = 150  # from random weights
    config.plan.warmup_epochs = 3
    config.train.batch_size = 128
    config.train.eval_batch_size = 256
    config.train.full_precision_learning_rate = 0.1
    config.train.learning_rate = 0.01
    config.train.weight_decay = 1e-4
    config.train.ema_rate = 0.999  # an epoch is 390 steps, not 5,004
  return config
