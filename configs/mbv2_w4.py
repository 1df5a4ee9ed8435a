"""The published recipe: MobileNet-v2 at 4 bits on ImageNet, ResNet-101 as teacher; 22 phases, 200 epochs.

Command:  python main.py --config configs/mbv2_w4.py --workdir RUN --mode plan
Cost:     200 epochs of ImageNet at 224 px; not run.
Result:   not run.

This release has neither ImageNet's loading nor ResNet teachers: `--mode plan` works, training says what is missing.
The published run starts from torchvision's weights with a ResNet-101 teacher; here the teacher is the student before
quantization, which gives the same phases.
"""

from configs import base


def get_config():
  """`base.py` is this recipe."""
  return base.get_config()
