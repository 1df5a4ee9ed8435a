"""Normalization, non-linearity and quantizer in one: what they give, and pass back, one after the
other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.nn import fused
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
    a, s, steps = (jnp.asarray(value) for value in (interval, 0.01, 7.0))

    def whole(x, scale, bias, a, s):
      mean, var = fused.moments_near(jax.lax.stop_gradient(x), jnp.ones(4))
      pending = fused.Normalized(x, s, mean, var, scale, bias, 1e-5, activation)
      if kind is None:
        y = pending.value()
      else:
        y = pending.quantized(duq.Interval(a, jnp.asarray(0.3)), steps, kind).value()
      return jnp.sum(upstream * y), y

    def parts(x, scale, bias, a, s):
      mean, var = fused.moments(x * s)
      y = ACTIVATIONS[activation]((x * s - mean) / jnp.sqrt(var + 1e-5) * scale + bias)
      if kind is not None:
        y = duq.Interval(a, jnp.asarray(0.3)).quantized(y, steps, kind).value()
      return jnp.sum(upstream * y), y

    arguments = x, scale, bias, a, s
    both = [jax.grad(f, range(5), has_aux=True) for f in (whole, parts)]
    ours, formula = jax.jit(lambda *arguments: [f(*arguments) for f in both])(*arguments)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(formula), strict=True):
      np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("slope", ["step", "clip"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_other_quantizers_and_scales_of_every_channel(slope, per_channel):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, upstream = (jnp.asarray(rng.normal(1, 2, (4, 3, 3, 4))) for _ in range(2))
    scale, bias = jnp.asarray(rng.normal(2, 1, 4)), jnp.asarray(rng.normal(size=4))
    s = jnp.asarray([0.01, 0.02, 0.5, 1.0]) if per_channel else jnp.asarray(0.01)

    def quantized(y, a, of):
      return jnp.sum(upstream * of(y, duq.Interval(a, a / 15.0, slope)).value())

    def whole(x, s, a):
      mean, var = fused.moments(jax.lax.stop_gradient(x))
      pending = fused.Normalized(x, s, mean, var, scale, bias, 1e-5, "relu")
      return quantized(pending, a, lambda y, by: y.quantized(by, jnp.asarray(15.0), "unsigned"))

    def parts(x, s, a):
      mean, var = fused.moments(x * s)
      y = jnp.maximum((x * s - mean) / jnp.sqrt(var + 1e-5) * scale + bias, 0.0)
      return quantized(y, a, lambda y, by: by.quantized(y, jnp.asarray(15.0), "unsigned"))

    arguments = x, s, jnp.asarray(1.5)
    for left, right in zip(*(jax.jit(jax.grad(f, range(3)))(*arguments) for f in (whole, parts)),
                           strict=True):  # fmt: skip
      np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-11)


def test_moments_in_one_pass_are_stable_near_the_mean():
  x = np.float32(1000 + np.random.default_rng(0).normal(size=(64, 8, 8, 3)))
  exact = np.float64(x)
  mean, var = jax.jit(fused.moments_near)(x, np.full(3, 990, np.float32))
  np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-4)
  _, var = jax.jit(fused.moments_near)(np.full((8, 4, 4, 3), 7, np.float32), np.float32([0, 7, 5]))
  np.testing.assert_array_equal(var, 0)


@pytest.mark.parametrize(("activation", "kind"), [("relu6", "unsigned"), ("hard_swish", "hswish")])
def test_bfloat16_is_rounded_where_it_is_stored_only(activation, kind):
  rng = np.random.default_rng(0)
  x, upstream = (jnp.asarray(rng.normal(3, 2, (8, 5, 5, 4)), jnp.bfloat16) for _ in range(2))
  scale, bias, a = jnp.float32([1, 2, 0.5, 1]), jnp.float32([0, 1, -1, 2]), jnp.float32(2)

  @functools.partial(jax.jit, static_argnums=0)
  def codes_and_gradients(dtype):
    def quantized(x, scale, bias, a):
      mean, var = fused.moments_near(jax.lax.stop_gradient(x), jnp.zeros(4))
      pending = fused.Normalized(x, jnp.float32(0.1), mean, var, scale, bias, 1e-5, activation)
      return pending.quantized(duq.Interval(a, jnp.float32(1)), jnp.float32(15), kind).codes

    codes, vjp = jax.vjp(quantized, x.astype(dtype), scale, bias, a)
    return codes, vjp(upstream.astype(dtype))

  (codes, (dx, *small)), (exact, (dx_exact, *small_exact)) = (
    codes_and_gradients(dtype) for dtype in (jnp.bfloat16, jnp.float32)
  )
  assert codes.dtype == dx.dtype == jnp.bfloat16
  np.testing.assert_array_equal(codes.astype(jnp.float32), exact)
  np.testing.assert_allclose(dx.astype(jnp.float32), dx_exact, rtol=2**-8, atol=1e-5)
  for ours, theirs in zip(small, small_exact, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
