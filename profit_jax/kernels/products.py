"""Products of convolutions and dense layers, in the precision that their operands need.

Products of codes take one pass of a matrix unit, which is exact for them. All others, gradients
included, have the precision that JAX's `default_matmul_precision` names where they are traced.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from profit_jax.kernels import target
from profit_jax.kernels.affine import Affine
from profit_jax.kernels.depthwise import convolution, depthwise_conv
from profit_jax.kernels.padding import Margin

Linear = Callable[[jax.Array, jax.Array], jax.Array]


def conv(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  pad_value: float,
  *,
  margin: Margin,
  depthwise: bool,
  exact: bool,
  source: Affine | None = None,
) -> jax.Array:
  """A convolution.

  Args:
    x: `[N, H, W, C]`.
    kernel: `[K, K, C, features]`, or `[K, K, 1, C]` if depthwise, K odd; of x's dtype.
    stride: in both directions.
    pad_value: of the padding.
    margin: what is put around the images.
    depthwise: one filter per channel.
    exact: whether both operands are codes.
    source: what x is computed from, for a depthwise form that can compute it as it reads.
  """
  if depthwise and source is not None:
    return depthwise_conv(
      x, kernel, stride, margin, pad_value, source
    )  # multiplies in float32 anyway
  if depthwise:
    form = functools.partial(depthwise_conv, stride=stride, margin=margin, pad_value=pad_value)
  elif kernel.shape[0] == stride == 1 and not _needs_images():
    form = _rows
  else:
    form = functools.partial(convolution, stride=stride, margin=margin, pad_value=pad_value)
  return _product(form, x, kernel, exact)


def _needs_images() -> bool:
  """Whether 1x1 convolutions should stay convolutions: on TPUs, and in plain XLA."""
  to = target.current()
  return to.platform == "tpu" or to.kernels == "xla"


def dot(x: jax.Array, kernel: jax.Array, *, exact: bool) -> jax.Array:
  """`x @ kernel`; `exact` as `conv`'s."""
  return _product(jnp.matmul, x, kernel, exact)


def _product(form: Linear, x: jax.Array, kernel: jax.Array, exact: bool) -> jax.Array:
  # CPUs have no cheaper pass, and bfloat16 needs but one.
  one = x.dtype == jnp.bfloat16 or target.current().platform == "cpu"
  return _one_pass(form, x, kernel) if exact and not one else form(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_pass(form: Linear, x: jax.Array, kernel: jax.Array) -> jax.Array:
  with jax.default_matmul_precision("default"):
    return form(x, kernel)


def _forward(form, x, kernel):
  return _one_pass(form, x, kernel), (x, kernel)


def _backward(form, operands, upstream):
  # Bilinear: what it gives is not used, and XLA does not compute it.
  return jax.vjp(form, *operands)[1](upstream)


_one_pass.defvjp(_forward, _backward)


def _rows(x, kernel):
  # Rows by channels: of three contracted axes, XLA on CPU copies both operands first to make one.
  # The kernel's gradient at [16, 112, 112, 96] and 24 features takes 6 ms so, and 28 ms as an
  # einsum of the images. On a TPU the batch lies in the lanes, and every reshape is a copy.
  y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
  return y.reshape(*x.shape[:-1], -1)
