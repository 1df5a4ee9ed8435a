"""Normalization, non-linearity and quantizer in one: what they give, and pass back, one after the
other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax import fused
from profit_jax.quant import duq

# As torch has them, whose derivative at a corner is 0.
ACTIVATIONS = {
  None: lambda z: z,
  "relu": lambda z: jnp.where(z > 0, z, 0.0),
  "relu6": lambda z: jnp.where(z > 0, jnp.where(z < 6, z, 6.0), 0.0),
  "hard_swish": lambda z: jnp.where(z >= 3, z, jnp.where(z > -3, z * (z + 3) / 6, 0.0)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_corners_pass_nothing(activation):
  x = jnp.asarray([-4.0, -3.0, -1.0, 0.0, 2.0, 3.0, 6.0, 7.0])
  np.testing.assert_allclose(fused.activate(x, activation), ACTIVATIONS[activation](x), rtol=1e-6)
  slope = fused.activate_backward(x, jnp.ones_like(x), activation)
  expected = {
    None: [1, 1, 1, 1, 1, 1, 1, 1],
    "relu": [0, 0, 0, 0, 1, 1, 1, 1],
    "relu6": [0, 0, 0, 0, 1, 1, 0, 0],
    "hard_swish": [0, 0, 1 / 6, 1 / 2, 7 / 6, 1, 1, 1],
  }
  np.testing.assert_allclose(slope, expected[activation], rtol=1e-6)


@pytest.mark.parametrize(
  ("activation", "kind", "interval", "shape"),
  [
    (None, None, 1.0, (2, 5, 3, 4)),
    ("relu", None, 1.0, (2, 5, 3, 4)),
    ("hard_swish", None, 1.0, (2, 5, 3, 4)),
    ("relu", "unsigned", 1.5, (2, 5, 3, 4)),
    ("relu6", "unsigned", 4.0, (2, 5, 3, 4)),
    # Beyond the bound, whose elements then still move a.
    ("relu6", "unsigned", 8.0, (2, 5, 3, 4)),
    ("hard_swish", "hswish", 1.5, (2, 5, 3, 4)),
    (None, "symmetric", 1.5, (2, 5, 3, 4)),
    # Other numbers of rows, with and without axes of space.
    ("relu", "unsigned", 1.5, (6, 3, 3, 4)),
    ("hard_swish", None, 1.0, (20, 4)),
    ("hard_swish", "hswish", 1.5, (20, 4)),
  ],
)
def test_value_and_gradients_are_those_of_the_parts(activation, kind, interval, shape):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, upstream = jnp.asarray(rng.normal(1, 2, shape)), jnp.asarray(rng.normal(size=shape))
    scale, bias = jnp.asarray(rng.normal(2, 1, 4)), jnp.asarray(rng.normal(size=4))
    raw_a, raw_c = (duq.inverse_softplus(jnp.asarray(value)) for value in (interval, 1.2))
    steps = jnp.asarray(7.0)

    def whole(x, scale, bias, raw_a, raw_c):
      pending = fused.Normalized(
        x, *fused.moments(jax.lax.stop_gradient(x)), scale, bias, 1e-5, activation
      )
      y = pending.value() if kind is None else pending.quantized(raw_a, raw_c, steps, kind)
      return jnp.sum(upstream * y), y

    def parts(x, scale, bias, raw_a, raw_c):
      mean, var = fused.moments(x)
      y = ACTIVATIONS[activation]((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias)
      y = y if kind is None else duq.quantize(y, raw_a, raw_c, steps, kind)
      return jnp.sum(upstream * y), y

    arguments = x, scale, bias, raw_a, raw_c
    both = [jax.grad(f, range(5), has_aux=True) for f in (whole, parts)]
    ours, formula = jax.jit(lambda *arguments: [f(*arguments) for f in both])(*arguments)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(formula), strict=True):
      np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-11)
