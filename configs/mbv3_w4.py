r"""MobileNet-v3 large at 4 bits on ImageNet, ResNet-101 as teacher, by MobileNet-v2's recipe; 22
phases, 200 epochs.

Command:  python main.py --config configs/mbv3_w4.py --workdir RUN \
            --config.init.weights=model.safetensors --config.teacher.model=resnet101 \
            --config.teacher.weights=resnet101-63fe2227.pth
Weights:  timm's mobilenetv3_large_100.ra_in1k (75.784 % by its table): model.safetensors, from
          https://huggingface.co/timm/mobilenetv3_large_100.ra_in1k; torchvision's
          resnet101-63fe2227.pth (77.374 %), from https://download.pytorch.org/models/.
          Torchvision's mobilenet_v3_large-8738ca79.pth (74.042 %) wants
          --config.model.bn_epsilon=1e-3 besides.
Cost:     1,000,800 steps of 256 images at 224 px, each with a forward pass of the teacher; not run.
Result:   not run. The authors published no command for this model, and not their initial weights.

These weights were trained with zero padding: before training the run prints top-1 with it and with
negative padding, to which the full-precision phase adapts them.
"""

from configs import base


def get_config():
  """`base.py` with the model and the authors' momentum of its running statistics."""
  config = base.get_config()
  config.model.name = "mobilenet_v3_large"
  config.model.bn_momentum = 0.9997
  return config
