"""Freezing and progressive bits on images harder than the digits, pairs of them; a grid for
`profit ablate`.

Command:  profit ablate --config configs/ablation_pairs.py --workdir runs/pairs
Cost and result: docs/ablation.md.
"""

from configs import ablation_digits


def get_grid():
  """As `ablation_digits.get_grid`: MobileNet-v2, freezing and progressive bits on and off."""
  grid = ablation_digits.get_grid()
  axes = {name: grid["axes"][name] for name in ("model", "bits", "freezing", "progressive")}
  return {
    **grid,
    "fields": {**grid["fields"], "data.name": "digit_pairs", "train.eval_batch_size": 250},
    "axes": {**axes, "model": {"mobilenet_v2": axes["model"]["mobilenet_v2"]}},
    "keep": lambda labels: True,
  }
