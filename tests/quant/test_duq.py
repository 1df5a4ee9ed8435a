"""The table of `quant/duq.py`, code by code, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.quant import duq
from profit_jax.quant.bits import Bits
from tests import golden_data

BITS = [2, 3, 4, 5, 6, 7, 8]
KINDS = ["symmetric", "unsigned", "hswish"]
A, C = 1.7, 0.6
RAW_A, RAW_C = (np.float64(golden_data.inverse_softplus(v)) for v in (A, C))
COUNT = 400  # elements of every input of `gradients`: one shape, so one program per kind


def steps_of(kind, bits):
  return np.float64(2 ** (bits - 1) - 1 if kind == "symmetric" else 2**bits - 1)


@functools.cache
def quantizer(kind):
  """`(x, raw_a, raw_c, n) -> (codes, values)`. The bits are a value: one program for all."""
  return jax.jit(
    lambda x, a, c, n: (duq.codes(x, a, n, kind), duq.quantize(x, a, c, n, kind)),
  )


@functools.cache
def gradients(kind):
  """`(x, raw_a, raw_c, n, upstream) -> gradients of x, raw_a, raw_c`."""

  def total(x, a, c, n, upstream):
    return jnp.sum(upstream * duq.quantize(x, a, c, n, kind))

  return jax.jit(jax.grad(total, (0, 1, 2)))


def test_levels_follow_the_table():
  for bits in BITS:
    made = Bits(bits, bits)
    assert made.kernel_qmax() == made.act_qmax("symmetric") == 2 ** (bits - 1) - 1
    assert made.act_qmax("unsigned") == made.act_qmax("hswish") == 2**bits - 1
    traced = jax.jit(lambda b: (b.kernel_qmax(), b.act_qmax("unsigned")))(made)
    assert traced == (2 ** (bits - 1) - 1, 2**bits - 1)


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_outside_2_to_8_bits_are_refused(bits):
  with pytest.raises(ValueError, match=str(bits)):
    Bits(bits, None)
  with pytest.raises(ValueError, match=str(bits)):
    Bits(None, bits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_and_what_rounds_to_it(kind):
  offset = -3 / 8 if kind == "hswish" else 0.0
  for bits in BITS:
    n = steps_of(kind, bits)
    codes = np.arange(-n if kind == "symmetric" else 0, n + 1)
    padded = np.resize(codes, 256)
    # 0.49 of a step away, it is still the same code.
    shifted = [(padded + shift) * A / n + offset for shift in (-0.49, 0.0, 0.49)]
    expected = np.concatenate([padded, padded, padded, codes[[0, -1]]])
    with jax.enable_x64(True):
      found, values = quantizer(kind)(np.concatenate([*shifted, [-50.0, 50.0]]), RAW_A, RAW_C, n)
    np.testing.assert_array_equal(found, expected, err_msg=f"{bits} bits")
    np.testing.assert_allclose(
      values, C * expected / n + offset, rtol=1e-12, atol=1e-15, err_msg=f"{bits} bits"
    )


def test_ties_round_to_even():
  with jax.enable_x64(True):
    raw_one = np.float64(golden_data.inverse_softplus(1.0))
    # 1 up to rounding: scale the ties so that x/a*n is a half exactly.
    one = float(jax.nn.softplus(raw_one))
    halves = np.array([0.5, 1.5, 2.5, 3.5])
    x = jnp.asarray(halves / 8 * one)
    assert np.array_equal(duq.codes(x, raw_one, np.float64(8), "symmetric"), [0, 2, 2, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_at_and_around_the_ends_of_the_interval(kind):
  with jax.enable_x64(True):
    a = float(jax.nn.softplus(RAW_A))
    offset = -3 / 8 if kind == "hswish" else 0.0
    low = -a if kind == "symmetric" else 0.0
    # CPUs flush what is smaller to 0.
    inside = [np.nextafter(a, 0), 0.3 * a, np.nextafter(low, 1) if low else 1e-300]
    outside = [a, np.nextafter(a, 9), 2 * a, low, low - 1e-9]
    # An offset would round the neighbours of the ends away: h-swish is tested a little further in.
    if kind == "hswish":
      inside, outside = [a - 1e-9, 0.3 * a, 1e-9], [a + 1e-9, 2 * a, -1e-9]
    x = np.resize(np.array([*inside, *outside]) + offset, COUNT)
    found = gradients(kind)(x, RAW_A, RAW_C, steps_of(kind, 4), np.ones(COUNT))[0]
  np.testing.assert_allclose(found[: len(inside)], C / A, rtol=1e-9)
  np.testing.assert_array_equal(found[len(inside) : len(inside) + len(outside)], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_and_c_are_the_formulas(kind):
  rng = np.random.default_rng(0)
  x, upstream = rng.normal(0, 1.5, COUNT), rng.normal(0, 1, COUNT)
  low = -1.0 if kind == "symmetric" else 0.0
  v = (x + (3 / 8 if kind == "hswish" else 0.0)) / A
  inside = (v > low) & (v < 1)
  sigmoid_a, sigmoid_c = 1 / (1 + np.exp(-np.array([RAW_A, RAW_C])))
  for bits in (2, 4, 8):
    n = steps_of(kind, bits)
    q = np.round(np.clip(v, low, 1) * n) / n
    with jax.enable_x64(True):
      _, d_a, d_c = gradients(kind)(x, RAW_A, RAW_C, n, upstream)
    np.testing.assert_allclose(d_a, np.sum(upstream * inside * -C * v / A) * sigmoid_a, rtol=1e-9)
    np.testing.assert_allclose(d_c, np.sum(upstream * q) * sigmoid_c, rtol=1e-9)


@pytest.mark.parametrize("name", ["relu", "symmetric", "hswish", "weight"])
def test_authors_quantizers(name):
  golden = golden_data.load("quantizers.npz")
  raw_a, raw_c = (0.7, 0.5) if name == "weight" else (0.9, 1.4)
  kind = {"relu": "unsigned", "weight": "symmetric"}.get(name, name)
  before = {"relu": jax.nn.relu, "hswish": jax.nn.hard_swish}.get(name, lambda x: x)

  @jax.jit
  def value_and_gradients(x, a, c, n, upstream):
    y, vjp = jax.vjp(lambda x, a, c: duq.quantize(before(x), a, c, n, kind), x, a, c)
    return y, *vjp(upstream)

  # What the authors' h-swish passes where its slope changes (x = -3 and x = 3) is a convention, not
  # this module's.
  smooth = np.abs(np.abs(golden["x"]) - 3) > 1e-9 if name == "hswish" else slice(None)
  for bits in (2, 3, 4, 5, 8):
    with jax.enable_x64(True):
      y, d_x, d_a, d_c = value_and_gradients(
        golden["x"],
        np.float64(raw_a),
        np.float64(raw_c),
        steps_of(kind, bits),
        golden["upstream"],
      )
    expected = {leaf: golden[f"{name}_{bits}_{leaf}"] for leaf in ("y", "dx", "da", "dc")}
    np.testing.assert_allclose(y, expected["y"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(d_x[smooth], expected["dx"][smooth], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(d_a, expected["da"][0], rtol=1e-11)
    np.testing.assert_allclose(d_c, expected["dc"][0], rtol=1e-11)


def test_progressive_bits_share_one_trace():
  traces = []

  @jax.jit
  def quantize(x, bits):
    traces.append(1)
    return duq.quantize(x, jnp.float32(RAW_A), jnp.float32(RAW_C), bits.kernel_qmax(), "symmetric")

  x = np.linspace(-2, 2, 1001, dtype=np.float32)
  sizes = [len(np.unique(quantize(x, Bits(bits, None)))) for bits in (8, 5, 4)]
  assert sizes == [255, 31, 15]
  assert len(traces) == 1


def test_inverse_softplus_survives_large_and_small_values():
  values = np.array([1e-3, 0.1, 1.0, 30.0, 100.0, 1e4], np.float32)
  np.testing.assert_allclose(jax.nn.softplus(duq.inverse_softplus(values)), values, rtol=1e-5)


def test_clipped_counts_what_lies_beyond_the_interval():
  x = jnp.array([-1.8, -1.0, 0.0, 1.0, 1.8])
  raw = jnp.float32(RAW_A)
  assert duq.clipped(x, raw, "symmetric").tolist() == [True, False, False, False, True]
  assert duq.clipped(x, raw, "unsigned").tolist() == [True, True, False, False, True]
