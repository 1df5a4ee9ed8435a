r"""ResNet-34 at 4 bits on ImageNet, ResNet-101 as teacher, by MobileNet-v2's recipe; 22 phases, 200
epochs.

Command:  python main.py --config configs/resnet34_w4.py --workdir RUN \
            --config.init.weights=resnet34-b627a593.pth \
            --config.teacher.model=resnet101 --config.teacher.weights=resnet101-63fe2227.pth
Weights:  torchvision's resnet34-b627a593.pth (73.314 % by its table) and resnet101-63fe2227.pth
          (77.374 %), from https://download.pytorch.org/models/.
Cost:     1,000,800 steps of 256 images at 224 px, each with a forward pass of the teacher; not run.
Result:   not run. The paper does not have this model.
"""

from configs import base


def get_config():
  """`base.py` with the model."""
  config = base.get_config()
  config.model.name = "resnet34"
  return config
