"""The CPU form of the depthwise convolution against XLA's grouped one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.kernels import depthwise
from profit_jax.kernels.padding import margin_of
from profit_jax.kernels.target import Target, platform_of, tracing_for


@pytest.mark.parametrize(
  ("size", "kernel", "stride"), [(9, 3, 1), (9, 3, 2), (8, 3, 2), (11, 5, 1), (12, 5, 2), (3, 3, 1)]
)
def test_forms_agree_forward_and_backward(size, kernel, stride):
  rng = np.random.default_rng(size)
  with jax.enable_x64(True):
    x, k = (
      jnp.asarray(rng.normal(size=(2, size, size + 1, 5))),
      jnp.asarray(rng.normal(size=(kernel, kernel, 1, 5))),
    )
    forms = depthwise.depthwise_conv, depthwise.grouped
    shape = jax.eval_shape(lambda x, k: depthwise.grouped(x, k, stride), x, k).shape
    upstream = jnp.asarray(rng.normal(size=shape))

    def both(x, k, upstream):
      results = [jax.vjp(lambda x, k, form=form: form(x, k, stride), x, k) for form in forms]
      return [(y, vjp(upstream)) for y, vjp in results]

    (y, ours), (expected, theirs) = jax.jit(both)(x, k, upstream)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
    for left, right in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("extent", [(8, 7), (9, 8)])
def test_forms_agree_with_another_border_on_each_side(extent):
  rng = np.random.default_rng(0)
  margin, stride, value = margin_of("same", 5, 2, extent), 2, -0.375
  assert isinstance(margin, tuple)
  with jax.enable_x64(True):
    x, k = jnp.asarray(rng.normal(size=(2, *extent, 3))), jnp.asarray(rng.normal(size=(5, 5, 1, 3)))

    def gradients(form):
      def loss(x, k):
        return jnp.sum(jnp.sin(form(x, k, stride, margin, value)))

      return jax.value_and_grad(loss, (0, 1))(x, k)

    for ours, theirs in zip(
      *map(jax.tree.leaves, map(gradients, (depthwise.depthwise_conv, depthwise.grouped))),
      strict=True,
    ):
      np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_summed_in_float32():
  rng = np.random.default_rng(0)
  x, k = (
    jnp.asarray(rng.normal(1, 1, (32, 16, 16, 8)), jnp.float32),
    jnp.asarray(rng.normal(size=(3, 3, 1, 8)), jnp.float32),
  )
  x, k = (value.astype(jnp.bfloat16) for value in (x, k))
  upstream = jnp.ones((32, 14, 14, 8), jnp.bfloat16)

  def gradient(x, k):
    return jax.vjp(lambda k: depthwise.depthwise_conv(x, k, 1), k)[1](upstream.astype(x.dtype))[0]

  gradient = jax.jit(gradient)
  ours, exact = gradient(x, k), gradient(x.astype(jnp.float32), k.astype(jnp.float32))
  assert ours.dtype == jnp.bfloat16
  # A sum of 6272 numbers near 1 in bfloat16 would stop at 256.
  np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8)


@pytest.mark.parametrize(
  ("platform", "kernels", "grouped"),
  [("cpu", "tuned", False), ("cpu", "xla", True), ("cuda", "xla", True), ("tpu", "tuned", True)],
)
def test_each_platform_has_its_form(platform, kernels, grouped):
  x, k = (
    jax.ShapeDtypeStruct((2, 8, 8, 4), np.float32),
    jax.ShapeDtypeStruct((3, 3, 1, 4), np.float32),
  )
  with tracing_for(Target(platform_of(platform), kernels)):
    traced = jax.jit(lambda x, k: depthwise.depthwise_conv(x, k, 1)).trace(x, k)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("feature_group_count = 4" in text) == grouped
