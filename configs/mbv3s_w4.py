r"""MobileNet-v3 small at 4 bits on ImageNet, ResNet-101 as teacher, by MobileNet-v2's recipe; 22
phases, 200 epochs.

Command:  python main.py --config configs/mbv3s_w4.py --workdir RUN \
            --config.init.weights=model.safetensors --config.teacher.model=resnet101 \
            --config.teacher.weights=resnet101-63fe2227.pth
Weights:  timm's mobilenetv3_small_100.lamb_in1k (67.636 % by its table): model.safetensors, from
          https://huggingface.co/timm/mobilenetv3_small_100.lamb_in1k; torchvision's
          resnet101-63fe2227.pth (77.374 %), from https://download.pytorch.org/models/.
          Torchvision's mobilenet_v3_small-047dcff4.pth (67.668 %) wants
          --config.model.bn_epsilon=1e-3 besides.
Cost:     1,000,800 steps of 256 images at 224 px, each with a forward pass of the teacher; not run.
Result:   not run. The authors' code does not have this model.
"""

from configs import mbv3_w4


def get_config():
  """`mbv3_w4.py` with the smaller model."""
  config = mbv3_w4.get_config()
  config.model.name = "mobilenet_v3_small"
  return config
