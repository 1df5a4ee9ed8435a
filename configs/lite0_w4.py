r"""EfficientNet-Lite0 at 4 bits on ImageNet, ResNet-101 as teacher, by MobileNet-v2's recipe; 22
phases, 200 epochs.

Command:  python main.py --config configs/lite0_w4.py --workdir RUN \
            --config.init.weights=tf_efficientnet_lite0.safetensors \
            --config.teacher.model=resnet101 --config.teacher.weights=resnet101-63fe2227.pth
Weights:  timm's tf_efficientnet_lite0.in1k, TensorFlow's: model.safetensors, from
          https://huggingface.co/timm/tf_efficientnet_lite0.in1k; torchvision's
          resnet101-63fe2227.pth (77.374 %), from https://download.pytorch.org/models/.
          timm's own efficientnet_lite0.ra_in1k wants --config.model.padding=torch,
          --config.model.bn_epsilon=1e-5 and --config.data.normalization=dataset. Lite1 to lite4:
          --config.model.name=efficientnet_lite1, data.image_size of 240, 260, 280 and 300.
Cost:     1,000,800 steps of 256 images at 224 px, each with a forward pass of the teacher; not run.
Result:   not run. The paper does not have this model.
"""

from configs import base


def get_config():
  """`base.py` with the model as TensorFlow trained it, and its pixels: mean and deviation 0.5."""
  config = base.get_config()
  config.model.name = "efficientnet_lite0"
  config.model.padding = "same"
  config.model.bn_epsilon = 1e-3
  config.data.normalization = "inception"
  return config
