"""The ranges of a net's float tensors, measured on images."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from profit_jax.export import reference
from profit_jax.export.net import IMAGE, Net

# Of an image's logits only the best say anything: `eval` counts whether the right class is one of
# them.
_BEST = 5
# By which part of its range the logits of other images may be larger.
_HEADROOM = 0.125


def measure(net: Net, images: Iterable[np.ndarray]) -> dict[str, tuple[float, float]]:
  """The least and the largest value of every tensor.

  Args:
    net: in the code domain.
    images: parts `[N, H, W, C]`, of the net's `image_dtype`.

  Returns:
    By name. Under `logits` the range of the best logits of each image, with headroom above.
  """
  parts = [jax.device_get(_extremes(net, image)) for image in images]
  found = {}
  for name in parts[0]:
    lows, highs = zip(*(part[name] for part in parts), strict=True)
    found[name] = float(min(lows)), float(max(highs))
  low, high = found["logits"]
  found["logits"] = low, high + _HEADROOM * (high - min(low, 0.0))
  return found


# The net's arrays are constants of the program.
@functools.partial(jax.jit, static_argnums=0)
def _extremes(net: Net, image: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
  found = {}

  def watch(name, values):
    found[name] = values.min(), values.max()

  watch(IMAGE, reference.normalized(net, image))
  logits = reference.run(net, image, watch=watch)
  ranked = jnp.sort(logits, axis=-1)
  best = ranked[..., -min(_BEST, logits.shape[-1]) :]
  found["logits"] = best.min(), best.max()
  return found
