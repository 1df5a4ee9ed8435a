r"""MobileNet-v3 large at 3 bits on ImageNet, ResNet-101 as teacher; 28 phases, 250 epochs.

Command:  python main.py --config configs/mbv3_w3.py --workdir RUN \
            --config.init.weights=model.safetensors --config.teacher.model=resnet101 \
            --config.teacher.weights=resnet101-63fe2227.pth
Weights:  as configs/mbv3_w4.py.
Cost:     1,251,000 steps of 256 images at 224 px, each with a forward pass of the teacher; not run.
Result:   not run. The authors published no command for it. The step from 4 to 3 bits is our choice.
"""

from configs import mbv3_w4


def get_config():
  """`mbv3_w4.py` with one more rung, and PROFIT there."""
  config = mbv3_w4.get_config()
  config.plan.weight_bits = (8, 5, 4, 3)
  config.plan.act_bits = (8, 5, 4, 3)
  config.plan.profit_bits = (3,)
  return config
