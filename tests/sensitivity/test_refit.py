"""Scalars for other bits: nearest to what the quantizer gave at its own."""

import jax
import numpy as np
import pytest

from profit_jax.data.normalize import Normalization
from profit_jax.nn.spec import describe
from profit_jax.quant import QUANTIZERS, Bits, DuQ, named
from profit_jax.quant.duq import inverse_softplus
from profit_jax.sensitivity import refit
from tests.train.tiny import TinyNet

SHAPE = (8, 8, 3)


def raw(by, values, kind=None):
  """First scalars at 8 bits, raw."""
  qmax = Bits(8, 8).kernel_qmax() if kind is None else Bits(8, 8).act_qmax(kind)
  first = by.first_kernel(values, qmax) if kind is None else by.first_act(values, qmax, kind, None)
  return jax.tree.map(inverse_softplus, first)


@pytest.fixture(scope="module")
def kernel():
  return np.random.default_rng(0).normal(0.0, 0.1, (3, 3, 4, 6)).astype(np.float32)


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_kernel_is_nearer_to_the_trained_one(kernel, method, per_channel):
  by = named(method, per_channel=per_channel)
  scalars = {
    leaf: np.broadcast_to(value, (6,) if per_channel else ())
    for leaf, value in by.of_kernel(lambda k: raw(by, k), kernel).items()
  }
  own, qmax = Bits(8).kernel_qmax(), Bits(2).kernel_qmax()
  trained = by.of_kernel(by.quantize_kernel, kernel, scalars, own).value()
  found = refit.kernel_scalars(by, kernel, scalars, qmax, own)
  assert found.keys() == set(by.kernel_scalars)

  def distance(given):
    quantized = by.of_kernel(by.quantize_kernel, kernel, given, qmax).value()
    return np.sum(np.square(quantized - trained))

  if by.kernel_scalars:
    assert distance(found) < 0.8 * distance(scalars)
    assert all(found[leaf].shape == np.shape(scalars[leaf]) for leaf in found)
  for leaf in by.unscaled:
    np.testing.assert_array_equal(found[leaf], scalars[leaf])


def test_the_interval_of_ternary_weights_is_that_of_least_squares(kernel):
  # The best ternary values of a normal distribution: +-1.224 standard deviations, with the ends of
  # the zero at half of it (Max, "Quantizing for minimum distortion", 1960).
  by, scalars = DuQ(), raw(DuQ(), kernel)
  normal = np.random.default_rng(1).normal(0.0, 0.1, (64, 64)).astype(np.float32)
  scalars = raw(by, normal)
  qmax = Bits(2).kernel_qmax()
  found = refit.kernel_scalars(by, normal, scalars, qmax, None)
  np.testing.assert_allclose(np.logaddexp(0, found["quant_a"]), 0.1224, rtol=0.06)


@pytest.mark.parametrize("kind", ["unsigned", "symmetric", "hswish"])
@pytest.mark.parametrize("method", QUANTIZERS)
def test_activations_are_nearer_to_the_trained_ones(method, kind):
  by = named(method)
  values = np.random.default_rng(2).normal(0.5, 1.0, 4096).astype(np.float32)
  values = {"unsigned": lambda x: np.maximum(x, 0), "hswish": lambda x: np.maximum(x, -0.375)}.get(
    kind, lambda x: x
  )(values)
  scalars, own, qmax = raw(by, values, kind), Bits(8, 8).act_qmax(kind), Bits(2, 2).act_qmax(kind)
  trained = by.quantize_act(values, scalars, own, kind).value()
  found = refit.act_scalars(by, kind, values, scalars, qmax, own)

  def distance(given):
    return np.sum(np.square(by.quantize_act(values, given, qmax, kind).value() - trained))

  assert distance(found) <= distance(scalars)
  assert found.keys() == set(by.act_scalars)


def test_the_inputs_of_all_quantizers_are_sampled():
  spec = describe(TinyNet(), SHAPE)
  variables = spec.init(jax.random.key(0))
  images = np.random.default_rng(3).integers(0, 256, (4, *SHAPE), np.uint8)
  normalization = Normalization((0.5,) * 3, (0.25,) * 3)
  found = refit.inputs_of_quantizers(
    spec.model, normalization, variables, images, spec.bits.at(4, 4)
  )
  assert set(found) == set(spec.quantizers)
  assert {values.shape for values in found.values()} == {(2**16,)}
  assert np.min(found["quant0"]) == 0.0  # behind a ReLU
  assert np.min(found["signed_quant"]) < 0.0


def test_samples_have_every_channel():
  x = np.broadcast_to(np.arange(24, dtype=np.float32), (8, 64, 64, 24))
  counts = np.bincount(np.asarray(refit._samples(x), int), minlength=24)
  assert counts.min() > 0.9 * counts.max()
