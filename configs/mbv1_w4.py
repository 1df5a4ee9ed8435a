r"""MobileNet-v1 at 4 bits on ImageNet, ResNet-101 as teacher, by MobileNet-v2's recipe; 22 phases,
200 epochs.

Command:  python main.py --config configs/mbv1_w4.py --workdir RUN \
            --config.init.weights=model.safetensors --config.teacher.model=resnet101 \
            --config.teacher.weights=resnet101-63fe2227.pth
Weights:  timm's mobilenetv1_100.ra4_e3600_r224_in1k (75.388 % at 224 px by its table):
          model.safetensors, from
          https://huggingface.co/timm/mobilenetv1_100.ra4_e3600_r224_in1k; torchvision's
          resnet101-63fe2227.pth (77.374 %) from https://download.pytorch.org/models/.
Cost:     1,000,800 steps of 256 images at 224 px, each with a forward pass of the teacher; not run.
Result:   not run. The authors published neither a command nor code for this model.
"""

from configs import base


def get_config():
  """`base.py` with the model, and the pixels that its weights were trained with; the teacher keeps
  ImageNet's.
  """
  config = base.get_config()
  config.model.name = "mobilenet_v1"
  config.model.dropout = 0.0
  config.data.normalization = "inception"
  return config
