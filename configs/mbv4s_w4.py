r"""MobileNet-v4 conv small at 4 bits on ImageNet, ResNet-101 as teacher, by MobileNet-v2's recipe;
22 phases, 200 epochs.

Command:  python main.py --config configs/mbv4s_w4.py --workdir RUN \
            --config.init.weights=mobilenetv4_conv_small.safetensors \
            --config.teacher.model=resnet101 --config.teacher.weights=resnet101-63fe2227.pth
Weights:  timm's mobilenetv4_conv_small.e2400_r224_in1k: model.safetensors, from
          https://huggingface.co/timm/mobilenetv4_conv_small.e2400_r224_in1k; torchvision's
          resnet101-63fe2227.pth (77.374 %), from https://download.pytorch.org/models/.
          Medium: --config.model.name=mobilenet_v4_conv_medium.
Cost:     1,000,800 steps of 256 images at 224 px, each with a forward pass of the teacher; not run.
Result:   not run. The paper does not have this model.
"""

from configs import base


def get_config():
  """`base.py` with the model."""
  config = base.get_config()
  config.model.name = "mobilenet_v4_conv_small"
  return config
