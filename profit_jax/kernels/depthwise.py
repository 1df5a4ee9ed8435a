"""Depthwise convolution in the form that is fastest on each platform."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from profit_jax.kernels import depthwise_triton, target
from profit_jax.kernels.affine import Affine
from profit_jax.kernels.lowering import channel_sums, own_kernel
from profit_jax.kernels.padding import Margin, border_of

# XLA on CPU is 4-5x slower with `feature_group_count` than with one shifted multiply-add per tap;
# TPUs have kernels for the grouped form.


def depthwise_conv(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  margin: Margin = 0,
  pad_value: float = 0.0,
  source: Affine | None = None,
) -> jax.Array:
  """Convolves each channel with its own filter.

  Args:
    x: `[N, H, W, C]`.
    kernel: `[KH, KW, 1, C]`.
    stride: in both directions.
    margin: what is put around the images.
    pad_value: what they are filled with.
    source: what x is computed from. GPUs compute it as they read, and x itself only takes the
      gradient.

  Returns:
    `[N, (H + above + below - KH) // stride + 1, (W + left + right - KW) // stride + 1, C]`.
  """
  to = target.current()
  if to.is_tuned_for("gpu") and depthwise_triton.supports(x):
    return depthwise_triton.depthwise_conv(x, kernel, stride, margin, pad_value, codes=source)
  if to.is_tuned_for("cpu"):
    return _on_cpu(x, kernel, stride, margin, pad_value)
  return grouped(x, kernel, stride, margin, pad_value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _on_cpu(x, kernel, stride, margin, pad_value):
  return _forward(x, kernel, stride, margin, pad_value)[0]


def _forward(x, kernel, stride, margin, pad_value):
  padded = x
  if margin:
    padded = own_kernel(lambda x: pad(x, margin, pad_value), kernel, x)
  return _shifted(padded, kernel, stride), (padded, kernel)


def pad(x: jax.Array, margin: Margin, value: float) -> jax.Array:
  """`[N, H, W, C]` with `margin` pixels of `value` around the images."""
  rows, columns = border_of(margin)
  around = [(0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)]
  return lax.pad(x, jnp.asarray(value, x.dtype), around)


def grouped(
  x: jax.Array, kernel: jax.Array, stride: int, margin: Margin = 0, pad_value: float = 0.0
) -> jax.Array:
  """The form of plain XLA; arguments as `depthwise_conv`'s."""
  return convolution(x, kernel, stride, margin, pad_value, groups=x.shape[-1])


def convolution(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  margin: Margin = 0,
  pad_value: float = 0.0,
  groups: int = 1,
) -> jax.Array:
  """XLA's convolution of `[N, H, W, C]`; `groups` of the channels, the rest as `depthwise_conv`."""
  if pad_value:
    x, margin = pad(x, margin, pad_value), 0
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    border_of(margin),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def _taps(x_shape, kernel_shape, stride):
  """For each tap (i, j): the strided window of x it multiplies, as (start, limit) of H and W."""
  height = (x_shape[1] - kernel_shape[0]) // stride + 1
  width = (x_shape[2] - kernel_shape[1]) // stride + 1
  for i in range(kernel_shape[0]):
    for j in range(kernel_shape[1]):
      yield i, j, (i, i + stride * (height - 1) + 1), (j, j + stride * (width - 1) + 1)


def _widened(*arrays):
  # The other platforms' convolutions sum bfloat16 in float32. A filter gradient is a sum over a
  # whole batch: in bfloat16 it stops growing at 256 times its terms.
  return [array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array for array in arrays]


def _shifted(x, kernel, stride):
  return own_kernel(functools.partial(sum_of_taps, stride=stride), kernel, x, kernel)


def sum_of_taps(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """The form of CPUs, of an x that is padded already; shapes as `depthwise_conv`'s."""
  dtype, (x, kernel) = x.dtype, _widened(x, kernel)
  total = None
  for i, j, rows, columns in _taps(x.shape, kernel.shape, stride):
    term = x[:, slice(*rows, stride), slice(*columns, stride), :] * kernel[i, j, 0]
    total = term if total is None else total + term
  return total.astype(dtype)


def _backward(stride, margin, pad_value, residuals, upstream):
  padded, kernel = residuals
  # dx is the upstream, spread out by the stride, convolved with the flipped kernel.
  around = []
  for size, (low, high), extent, out in zip(
    kernel.shape[:2], border_of(margin), padded.shape[1:3], upstream.shape[1:3], strict=True
  ):
    around.append((size - 1 - low, extent - 1 - stride * (out - 1) - high, stride - 1))
  zero = jnp.zeros((), upstream.dtype)
  spread = own_kernel(
    lambda upstream: lax.pad(upstream, zero, [(0, 0, 0), *around, (0, 0, 0)]), kernel, upstream
  )
  dx = _shifted(spread, kernel[::-1, ::-1], 1)

  # Sums of some rows at a time, see lowering.py: their error is 2e-7 where that of one long sum in
  # float32 is 5e-6.
  wide, upstream = _widened(padded, upstream)
  products = [
    wide[:, slice(*rows, stride), slice(*columns, stride), :] * upstream
    for _, _, rows, columns in _taps(padded.shape, kernel.shape, stride)
  ]
  dk = channel_sums(products, rows=16)
  return dx.astype(padded.dtype), jnp.stack(dk).reshape(kernel.shape).astype(kernel.dtype)


_on_cpu.defvjp(_forward, _backward)
