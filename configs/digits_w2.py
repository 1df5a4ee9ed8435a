"""Digits at 2 bits: weights on 3 levels, activations on 4.

Command:  python main.py --config configs/digits_w2.py --workdir runs/digits_w2
          (or digits_w2.py:mobilenet_v1, ...)
Cost:     a few minutes on 2 CPU cores.
Result:   top-1 94.00 % at W2A2, 99.11 % in full precision (seed 0; 450 images, one is 0.22 points).
          The other models: README.md.
"""

from configs import digits_w4


def get_config(model: str = "mobilenet_v2"):
  """The demo, straight from 4 bits to 2, where the kernels' intervals are fitted anew."""
  config = digits_w4.get_config(model)
  config.plan.weight_bits = (8, 4, 2)
  config.plan.act_bits = (8, 4, 2)
  config.plan.profit_bits = config.plan.refit_bits = (2,)
  config.plan.finetune_epochs = 8
  return config
