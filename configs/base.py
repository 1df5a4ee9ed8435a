r"""The published recipe, which the other files change; each field is documented in
`profit_jax/config.py`.

    python main.py --config configs/digits_w4.py --config.train.batch_size=32 \
      --config.plan.weight_bits="(8, 4)"
"""

from profit_jax.config import default_config


def get_config():
  """All fields, with the published values of PROFIT."""
  return default_config()
