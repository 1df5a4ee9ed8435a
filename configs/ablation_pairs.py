"""Freezing and its rivals on images harder than the digits: pairs of them, 100 classes; a grid for `profit_jax.ablate`.

Command:  python -m profit_jax.ablate --config configs/ablation_pairs.py --workdir runs/pairs
Cost and result: docs/ablation.md.
"""


def get_grid():
  """As `ablation_digits.get_grid`: MobileNet-v2, progressive bits throughout."""
  return {
    "config": "configs/digits_w4.py:{model}",
    "fields": {
      "data.name": "digit_pairs",
      "data.image_size": 16,
      "model.strides": (1, 1, 2, 2, 2, 1, 1, 1),
      "plan.full_precision_epochs": 20,
      "plan.finetune_epochs": 3,
      "train.eval_batch_size": 250,
    },
    "axes": {
      "model": {"mobilenet_v2": {}},
      "bits": {
        "W3A3": {"plan.weight_bits": (8, 4, 3), "plan.act_bits": (8, 4, 3), "plan.profit_bits": (3,)},
        "W2A2": {
          "plan.weight_bits": (8, 4, 2),
          "plan.act_bits": (8, 4, 2),
          "plan.profit_bits": (2,),
          "plan.fitted_bits": (2,),
        },
      },
      "freezing": {"on": {}, "off": {"plan.freeze_fractions": (0.0, 0.0, 0.0)}},
    },
    "keep": lambda labels: True,
    "seeds": 5,
  }
