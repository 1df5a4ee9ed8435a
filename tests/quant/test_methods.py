"""LSQ, PACT, QIL: every level's value, the papers' gradients, and one interface."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from profit_jax.quant import duq, lsq, pact, qil
from profit_jax.quant.methods import METHODS, per_channel

KINDS = ("symmetric", "unsigned", "hswish")


def raw(value):
  return duq.inverse_softplus(jnp.asarray(value, jnp.float32))


def steps_of(bits, kind):
  return np.float32(2 ** (bits - 1) - 1 if kind == "symmetric" else 2**bits - 1)


def test_the_default_is_the_paper_and_the_others_are_there():
  assert list(METHODS) == ["duq", "lsq", "pact", "qil"]


@pytest.mark.parametrize("method", ["lsq", "pact"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_interval_gives_every_code_its_value(method, kind, bits):
  n, a = steps_of(bits, kind), 1.5
  codes = np.arange(-n if kind == "symmetric" else 0, n + 1)
  # A third of a step beside every code, and far beyond the ends.
  x = np.concatenate(
    [codes + third / 3 for third in (-1, 0, 1)] + [[codes[0] - 5, codes[-1] + 5]]
  ).astype(np.float32)
  expected = np.concatenate([codes, codes, codes, codes[[0, -1]]])
  values = METHODS[method].act((x * a / n + duq.OFFSET[kind])[None], {"quant_a": raw(a)}, n, kind)
  np.testing.assert_allclose(values[0], expected * a / n + duq.OFFSET[kind], rtol=1e-5, atol=1e-6)


def gradients(method, x, params, n, kind, upstream):
  def total(x, params):
    return jnp.sum(METHODS[method].act(x, params, n, kind) * upstream)

  return jax.grad(total, argnums=(0, 1))(jnp.asarray(x), params)


@pytest.mark.parametrize("kind", KINDS)
def test_lsq_gradients_are_the_papers(kind):
  rng, n, a = np.random.default_rng(0), steps_of(3, kind), 1.7
  x, upstream = np.float32(rng.normal(0.3, 1.5, (4, 25))), np.float32(rng.normal(size=(4, 25)))
  d_x, d_params = gradients("lsq", x, {"quant_a": raw(a)}, n, kind, upstream)
  v, low = (np.float64(x) - duq.OFFSET[kind]) * n / a, -n if kind == "symmetric" else 0
  inside = (v > low) & (v < n)
  # Equation 3, and g of section 2.2.
  d_s = np.where(inside, np.rint(v) - v, np.clip(v, low, n)) / np.sqrt(25 * n)
  sigmoid = 1 - np.exp(-a)  # of the raw value: the derivative of softplus
  np.testing.assert_allclose(d_params["quant_a"], np.sum(upstream * d_s) / n * sigmoid, rtol=1e-4)
  np.testing.assert_array_equal(d_x, np.where(inside, upstream, 0))


def test_lsq_starts_at_the_papers_step():
  kernel = np.float32(np.random.default_rng(0).normal(size=(3, 3, 4, 8)))
  first = METHODS["lsq"].first_kernel(jnp.asarray(kernel), jnp.float32(7))
  np.testing.assert_allclose(
    first["quant_a"] / 7, 2 * np.abs(kernel).mean() / np.sqrt(7), rtol=1e-5
  )


@pytest.mark.parametrize("kind", KINDS)
def test_pact_gradients_are_the_papers(kind):
  rng, n, a = np.random.default_rng(1), steps_of(4, kind), 1.2
  x, upstream = np.float32(rng.normal(0.3, 1.5, (4, 25))), np.float32(rng.normal(size=(4, 25)))
  d_x, d_params = gradients("pact", x, {"quant_a": raw(a)}, n, kind, upstream)
  v = (np.float64(x) - duq.OFFSET[kind]) / a
  d_alpha = 1.0 * (v >= 1) - (1.0 * (v <= -1) if kind == "symmetric" else 0.0)  # equation 3
  np.testing.assert_allclose(
    d_params["quant_a"], np.sum(upstream * d_alpha) * (1 - np.exp(-a)), rtol=1e-5
  )
  np.testing.assert_array_equal(
    d_x, np.where((v > (-1 if kind == "symmetric" else 0)) & (v < 1), upstream, 0)
  )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pact_kernels_have_all_of_dorefas_values(bits):
  kernel = np.float32(np.random.default_rng(bits).uniform(-3, 3, 4000))
  values = pact.quantize_kernel(jnp.asarray(kernel), {}, steps_of(bits, "symmetric"))
  most = 2**bits - 1
  np.testing.assert_allclose(np.unique(values), 2 * np.arange(most + 1) / most - 1, atol=1e-6)
  t = np.tanh(np.float64(kernel)) / np.abs(np.tanh(np.float64(kernel))).max()
  np.testing.assert_allclose(
    values, 2 * np.rint((t / 2 + 0.5) * most) / most - 1, atol=2 / most * 1e-3
  )


def test_pact_kernels_pass_the_gradient_of_tanh():
  kernel = jnp.asarray(np.float32([0.2, -0.7, 1.1, 2.0]))
  d = jax.grad(lambda k: pact.quantize_kernel(k, {}, np.float32(7))[1])(kernel)
  smooth = jax.grad(lambda k: (jnp.tanh(k) / jnp.max(jnp.abs(jnp.tanh(k))))[1])(kernel)
  np.testing.assert_allclose(d, smooth, rtol=1e-6)


QIL = {"quant_center": 0.8, "quant_width": 0.5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_qil_prunes_below_its_interval_and_clips_above(kind, bits):
  n, rng = steps_of(bits, kind), np.random.default_rng(bits)
  x = np.float32(rng.uniform(-2, 2, 500))
  values = qil.quantize(jnp.asarray(x), {name: raw(value) for name, value in QIL.items()}, n, kind)
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
  n, params = np.float32(7), {**QIL, "quant_gamma": 0.6}
  x = np.float32([-1.5, -1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0, 1.5])
  values = qil.quantize_kernel(
    jnp.asarray(x), {name: raw(value) for name, value in params.items()}, n
  )
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

    def smooth(x, stored):
      c, d, gamma = (jax.nn.softplus(stored[name]) for name in params)
      u = (jnp.abs(x) - c + d) / (2 * d)
      return jnp.sum(
        upstream * 1.3 * jnp.sign(x) * jnp.where(u > 0, jnp.where(u > 0, u, 0.5) ** gamma, 0.0)
      )

    # By finite differences.
    check_grads(smooth, (jnp.asarray(x), stored), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)
    expected = jax.grad(smooth, argnums=(0, 1))(jnp.asarray(x), stored)
    found = jax.grad(
      lambda x, p: jnp.sum(upstream * qil.quantize_kernel(x, p, jnp.asarray(7.0))), argnums=(0, 1)
    )(jnp.asarray(x), stored)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_scalars_of_every_channel_are_those_of_kernels_alone(method):
  chosen, n = METHODS[method], jnp.float32(3)
  kernel = jnp.asarray(
    np.float32(np.random.default_rng(0).normal(size=(3, 3, 4, 5)) * np.arange(1, 6))
  )
  first = jax.vmap(lambda k: chosen.first_kernel(k, n), in_axes=-1)(kernel)
  params = {name: duq.inverse_softplus(value) for name, value in first.items()}
  together = per_channel(chosen.kernel, kernel, params, n)
  for channel in range(5):
    alone = chosen.kernel(
      kernel[..., channel], {name: value[channel] for name, value in params.items()}, n
    )
    np.testing.assert_allclose(together[..., channel], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("method", "kind"), [*itertools.product(METHODS, KINDS)])
def test_what_is_clipped_has_no_gradient(method, kind):
  x = jnp.asarray(np.float32(np.random.default_rng(0).normal(0, 2, (2, 200))))
  chosen, n = METHODS[method], steps_of(2, kind)
  params = {name: duq.inverse_softplus(v) for name, v in chosen.first_act(x, n, kind, None).items()}
  clipped = chosen.act_clipped(x, params, kind)
  assert 0 < np.mean(clipped) < 0.6
  d = jax.grad(lambda x: jnp.sum(chosen.act(x, params, n, kind)))(x)
  assert not np.any(np.where(clipped, d, 0))


def test_lsq_counts_the_features_of_one_example():
  x = jnp.ones((8, 3, 3, 2)) * 0.3
  one = jax.grad(lambda a: jnp.sum(lsq.quantize(x[:1], {"quant_a": a}, np.float32(7), "unsigned")))(
    raw(1.0)
  )
  eight = jax.grad(lambda a: jnp.sum(lsq.quantize(x, {"quant_a": a}, np.float32(7), "unsigned")))(
    raw(1.0)
  )
  np.testing.assert_allclose(eight, 8 * one, rtol=1e-5)
