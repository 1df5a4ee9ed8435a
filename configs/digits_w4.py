"""The demo: the whole method on scikit-learn's digits, MobileNet-v2 at width 0.25, 4-bit weights and activations.

Command:  make demo      (python main.py --config configs/digits_w4.py --workdir runs/digits_w4)
Cost:     4:32 minutes on 2 CPU cores, compilation included; 3.5 GB of memory.
Result:   top-1 99.11 % at W4A4, 98.44 % in full precision (seed 0; 450 images, one is 0.22 points).
"""

from configs import base


def get_config():
  """`base.py` with a small net, small images and few epochs."""
  config = base.get_config()
  with config.unlocked():
    config.data.name = "digits"
    config.data.image_size = 32
    config.model.width = 0.25
    config.model.strides = (2, 1, 2, 2, 2, 1, 1, 1)  # 32 -> 2: the published strides would end at 1x1
    config.plan.full_precision_epochs = 30
    config.plan.finetune_epochs = 4
    config.plan.bn_epochs = 1
    config.plan.sampling_epochs = 2
    config.plan.warmup_epochs = 1
    config.train.batch_size = 64
    config.train.eval_batch_size = 232  # 450 images in two batches, on up to 8 devices
    config.train.full_precision_learning_rate = 0.1
    config.train.learning_rate = 0.02
    config.train.ema_rate = 0.98
  return config
