"""Depthwise convolution in the form that is fastest on each platform."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from profit_jax.sums import channel_sums

# XLA on CPU is 4-5x slower with `feature_group_count` than with one shifted multiply-add per tap; GPUs and TPUs have
# kernels of their own for the grouped form. `platform_dependent` decides at lowering, so a program that is lowered here
# for another platform has that platform's form. The custom_vjp keeps the choice out of what autodiff sees:
# differentiating through it would make both forms' residuals live.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Convolves each channel with its own filter, without padding.

  Args:
    x: `[N, H, W, C]`, already padded.
    kernel: `[KH, KW, 1, C]`.
    stride: in both directions.

  Returns:
    `[N, (H - KH) // stride + 1, (W - KW) // stride + 1, C]`.
  """
  return lax.platform_dependent(
    x, kernel, cpu=functools.partial(_shifted, stride=stride), default=functools.partial(_grouped, stride=stride)
  )


def _grouped(x, kernel, stride):
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
  )


def _taps(x_shape, kernel_shape, stride):
  """For each tap (i, j): the strided window of x that it multiplies, as (start, limit) of H and W."""
  height = (x_shape[1] - kernel_shape[0]) // stride + 1
  width = (x_shape[2] - kernel_shape[1]) // stride + 1
  for i in range(kernel_shape[0]):
    for j in range(kernel_shape[1]):
      yield i, j, (i, i + stride * (height - 1) + 1), (j, j + stride * (width - 1) + 1)


def _widened(*arrays):
  # The other platforms' convolutions sum bfloat16 in float32. A filter gradient is a sum over a whole batch: in bfloat16 it
  # stops growing at 256 times its terms.
  return [array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array for array in arrays]


def _shifted(x, kernel, stride):
  dtype, (x, kernel) = x.dtype, _widened(x, kernel)
  total = None
  for i, j, rows, columns in _taps(x.shape, kernel.shape, stride):
    term = x[:, slice(*rows, stride), slice(*columns, stride), :] * kernel[i, j, 0]
    total = term if total is None else total + term
  return total.astype(dtype)


def _shifted_backward(x, kernel, upstream, stride):
  dtype, (x, kernel, upstream) = x.dtype, _widened(x, kernel, upstream)
  size_h, size_w = kernel.shape[:2]
  # dx is the upstream, spread out by the stride, convolved with the flipped kernel: one padding and one fused sum.
  low_high = []
  for size, extent, out in ((size_h, x.shape[1], upstream.shape[1]), (size_w, x.shape[2], upstream.shape[2])):
    low_high.append((size - 1, extent - 1 - stride * (out - 1), stride - 1))
  spread = lax.pad(upstream, jnp.zeros((), upstream.dtype), [(0, 0, 0), *low_high, (0, 0, 0)])
  dx = _shifted(spread, kernel[::-1, ::-1], 1)

  # Sums of some rows at a time, see sums.py: their error is 2e-7 where that of one long sum in float32 is 5e-6.
  products = [
    x[:, slice(*rows, stride), slice(*columns, stride), :] * upstream
    for _, _, rows, columns in _taps(x.shape, kernel.shape, stride)
  ]
  dk = channel_sums(products, rows=16)
  return dx.astype(dtype), jnp.stack(dk).reshape(kernel.shape).astype(dtype)


def _grouped_backward(x, kernel, upstream, stride):
  return jax.vjp(functools.partial(_grouped, stride=stride), x, kernel)[1](upstream)


def _forward(x, kernel, stride):
  return depthwise_conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, upstream):
  x, kernel = residuals
  return lax.platform_dependent(
    x,
    kernel,
    upstream,
    cpu=functools.partial(_shifted_backward, stride=stride),
    default=functools.partial(_grouped_backward, stride=stride),
  )


depthwise_conv.defvjp(_forward, _backward)
