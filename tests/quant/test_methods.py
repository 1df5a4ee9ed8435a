"""LSQ, PACT, QIL: every level's value, the papers' gradients, and one interface."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from profit_jax.quant import PACT, QIL, QUANTIZERS, duq
from profit_jax.quant.base import per_channel

KINDS = ("symmetric", "unsigned", "hswish")
# Of a gradient that passes: it is multiplied by the scale a/n and by the codes' slope n/a, each of
# which is rounded, and so are the products.
PASSED = 4 * 2**-24


def raw(value):
  return duq.inverse_softplus(jnp.asarray(value, jnp.float32))


def steps_of(bits, kind):
  return np.float32(2 ** (bits - 1) - 1 if kind == "symmetric" else 2**bits - 1)


# The bits are a value, so that one program serves all of them.
@functools.cache
def act(method, kind):
  """`(x, params, n) -> values`."""
  return jax.jit(lambda x, params, n: QUANTIZERS[method]().quantize_act(x, params, n, kind))


@functools.cache
def gradients(method, kind):
  """`(x, params, n, upstream) -> gradients of x and params`."""

  def total(x, params, n, upstream):
    return jnp.sum(QUANTIZERS[method]().quantize_act(x, params, n, kind) * upstream)

  return jax.jit(jax.grad(total, argnums=(0, 1)))


pact_kernel = jax.jit(PACT().quantize_kernel)
qil_kernel = jax.jit(QIL().quantize_kernel)


@pytest.mark.parametrize("method", ["lsq", "pact"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_interval_gives_every_code_its_value(method, kind):
  a = 1.5
  for bits in (2, 3, 4, 8):
    n = steps_of(bits, kind)
    codes = np.arange(-n if kind == "symmetric" else 0, n + 1)
    padded = np.resize(codes, 256)
    # A third of a step beside every code, and far beyond the ends.
    x = np.concatenate(
      [padded + third / 3 for third in (-1, 0, 1)] + [[codes[0] - 5, codes[-1] + 5]]
    ).astype(np.float32)
    expected = np.concatenate([padded, padded, padded, codes[[0, -1]]])
    values = act(method, kind)((x * a / n + duq.OFFSET[kind])[None], {"quant_a": raw(a)}, n)
    np.testing.assert_allclose(
      values[0],
      expected * a / n + duq.OFFSET[kind],
      rtol=1e-5,
      atol=1e-6,
      err_msg=f"{bits} bits",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_lsq_gradients_are_the_papers(kind):
  rng, n, a = np.random.default_rng(0), steps_of(3, kind), 1.7
  x, upstream = np.float32(rng.normal(0.3, 1.5, (4, 25))), np.float32(rng.normal(size=(4, 25)))
  d_x, d_params = gradients("lsq", kind)(x, {"quant_a": raw(a)}, n, upstream)
  v, low = (np.float64(x) - duq.OFFSET[kind]) * n / a, -n if kind == "symmetric" else 0
  inside = (v > low) & (v < n)
  # Equation 3, and g of section 2.2.
  d_s = np.where(inside, np.rint(v) - v, np.clip(v, low, n)) / np.sqrt(25 * n)
  sigmoid = 1 - np.exp(-a)  # of the raw value: the derivative of softplus
  np.testing.assert_allclose(d_params["quant_a"], np.sum(upstream * d_s) / n * sigmoid, rtol=1e-4)
  np.testing.assert_allclose(d_x, np.where(inside, upstream, 0), rtol=PASSED)


def test_lsq_starts_at_the_papers_step():
  kernel = np.float32(np.random.default_rng(0).normal(size=(3, 3, 4, 8)))
  first = QUANTIZERS["lsq"]().first_kernel(kernel, np.float32(7))
  np.testing.assert_allclose(
    first["quant_a"] / 7, 2 * np.abs(kernel).mean() / np.sqrt(7), rtol=1e-5
  )


@pytest.mark.parametrize("kind", KINDS)
def test_pact_gradients_are_the_papers(kind):
  rng, n, a = np.random.default_rng(1), steps_of(4, kind), 1.2
  x, upstream = np.float32(rng.normal(0.3, 1.5, (4, 25))), np.float32(rng.normal(size=(4, 25)))
  d_x, d_params = gradients("pact", kind)(x, {"quant_a": raw(a)}, n, upstream)
  v = (np.float64(x) - duq.OFFSET[kind]) / a
  d_alpha = 1.0 * (v >= 1) - (1.0 * (v <= -1) if kind == "symmetric" else 0.0)  # equation 3
  np.testing.assert_allclose(
    d_params["quant_a"], np.sum(upstream * d_alpha) * (1 - np.exp(-a)), rtol=1e-5
  )
  np.testing.assert_allclose(
    d_x, np.where((v > (-1 if kind == "symmetric" else 0)) & (v < 1), upstream, 0), rtol=PASSED
  )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pact_kernels_have_all_of_dorefas_values(bits):
  kernel = np.float32(np.random.default_rng(bits).uniform(-3, 3, 4000))
  values = pact_kernel(kernel, {}, steps_of(bits, "symmetric"))
  most = 2**bits - 1
  np.testing.assert_allclose(np.unique(values), 2 * np.arange(most + 1) / most - 1, atol=1e-6)
  t = np.tanh(np.float64(kernel)) / np.abs(np.tanh(np.float64(kernel))).max()
  np.testing.assert_allclose(
    values, 2 * np.rint((t / 2 + 0.5) * most) / most - 1, atol=2 / most * 1e-3
  )


def test_pact_kernels_pass_the_gradient_of_tanh():
  @jax.jit
  def found_and_expected(kernel, n):
    return (
      jax.grad(lambda k: PACT().quantize_kernel(k, {}, n)[1])(kernel),
      jax.grad(lambda k: (jnp.tanh(k) / jnp.max(jnp.abs(jnp.tanh(k))))[1])(kernel),
    )

  found, expected = found_and_expected(np.float32([0.2, -0.7, 1.1, 2.0]), np.float32(7))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


QIL_SCALARS = {"quant_center": 0.8, "quant_width": 0.5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_qil_prunes_below_its_interval_and_clips_above(kind, bits):
  n, rng = steps_of(bits, kind), np.random.default_rng(bits)
  x = np.float32(rng.uniform(-2, 2, 500))
  values = act("qil", kind)(x, {name: raw(value) for name, value in QIL_SCALARS.items()}, n)
  shifted = np.float64(x) - duq.OFFSET[kind]
  u = np.clip(((np.abs(shifted) if kind == "symmetric" else shifted) - 0.3) / 1.0, 0, 1)
  at_tie = np.abs(u * n % 1 - 0.5) < 1e-4
  expected = (np.sign(shifted) if kind == "symmetric" else 1) * 1.3 * np.rint(
    u * n
  ) / n + duq.OFFSET[kind]
  np.testing.assert_allclose(np.where(at_tie, 0, values), np.where(at_tie, 0, expected), atol=1e-5)
  levels = np.unique(np.round((np.asarray(values) - duq.OFFSET[kind]) / 1.3 * n))
  assert len(levels) == (2 * n + 1 if kind == "symmetric" else n + 1)


def test_qil_kernels_have_an_exponent():
  n, params = np.float32(7), {**QIL_SCALARS, "quant_gamma": 0.6}
  x = np.float32([-1.5, -1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0, 1.5])
  values = qil_kernel(x, {name: raw(value) for name, value in params.items()}, n)
  u = np.clip(np.abs(np.float64(x)) - 0.3, 0, 1) ** 0.6
  np.testing.assert_allclose(values, np.sign(x) * 1.3 * np.rint(u * 7) / 7, atol=1e-6)


def test_qil_gradients_are_those_without_rounding_and_scale():
  rng = np.random.default_rng(0)
  x = np.float64(rng.uniform(-1.25, 1.25, 60))
  x = x[np.abs(np.abs(x) - 0.3) > 0.02]  # not at the corner
  params = {"quant_center": 0.8, "quant_width": 0.5, "quant_gamma": 0.6}
  upstream = rng.normal(size=x.shape)
  with jax.enable_x64(True):
    stored = {name: jnp.asarray(np.log(np.expm1(value))) for name, value in params.items()}

    @jax.jit
    def smooth(x, stored):
      c, d, gamma = (jax.nn.softplus(stored[name]) for name in params)
      u = (jnp.abs(x) - c + d) / (2 * d)
      return jnp.sum(
        upstream * 1.3 * jnp.sign(x) * jnp.where(u > 0, jnp.where(u > 0, u, 0.5) ** gamma, 0.0)
      )

    # By finite differences.
    check_grads(smooth, (jnp.asarray(x), stored), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)

    def quantized(x, stored):
      return jnp.sum(upstream * QIL().quantize_kernel(x, stored, jnp.asarray(7.0)))

    expected, found = (
      jax.jit(jax.grad(function, argnums=(0, 1)))(jnp.asarray(x), stored)
      for function in (smooth, quantized)
    )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", QUANTIZERS)
def test_scalars_of_every_channel_are_those_of_kernels_alone(method):
  chosen, n = QUANTIZERS[method](), np.float32(3)
  kernel = np.float32(np.random.default_rng(0).normal(size=(3, 3, 4, 5)) * np.arange(1, 6))

  @jax.jit
  def scalars_and_values(kernel, n):
    first = jax.vmap(lambda k: chosen.first_kernel(k, n), in_axes=-1)(kernel)
    params = {name: duq.inverse_softplus(value) for name, value in first.items()}
    return params, per_channel(chosen.quantize_kernel, kernel, params, n)

  params, together = jax.device_get(scalars_and_values(kernel, n))
  apply = jax.jit(chosen.quantize_kernel)
  for channel in range(5):
    scalars = {name: value[channel] for name, value in params.items()}
    alone = apply(kernel[..., channel], scalars, n)
    np.testing.assert_allclose(together[..., channel], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("method", "kind"), [*itertools.product(QUANTIZERS, KINDS)])
def test_what_is_clipped_has_no_gradient(method, kind):
  chosen = QUANTIZERS[method]()

  @jax.jit
  def clipped_and_gradient(x, n):
    first = chosen.first_act(x, n, kind, None)
    params = {name: duq.inverse_softplus(value) for name, value in first.items()}
    d = jax.grad(lambda x: jnp.sum(chosen.quantize_act(x, params, n, kind)))(x)
    return chosen.act_clipped(x, params, kind), d

  x = np.float32(np.random.default_rng(0).normal(0, 2, (2, 200)))
  clipped, d = jax.device_get(clipped_and_gradient(x, steps_of(2, kind)))
  assert 0 < np.mean(clipped) < 0.6
  assert not np.any(np.where(clipped, d, 0))


def test_lsq_counts_the_features_of_one_example():
  x = np.full((8, 3, 3, 2), 0.3, np.float32)
  one, eight = (
    gradients("lsq", "unsigned")(part, {"quant_a": raw(1.0)}, np.float32(7), np.ones_like(part))[1]
    for part in (x[:1], x)
  )
  np.testing.assert_allclose(eight["quant_a"], 8 * one["quant_a"], rtol=1e-5)
