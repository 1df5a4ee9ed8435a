"""The code-domain net, executed in JAX: what every other format is measured against."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from profit_jax.export.net import (
  IMAGE,
  Activation,
  Affine,
  Clip,
  Concat,
  Elementwise,
  Layer,
  Maximum,
  Mean,
  Minimum,
  Net,
  Pool,
  Product,
  Quantizer,
  Reshape,
  Sum,
  Value,
  inputs,
)
from profit_jax.kernels.depthwise import grouped, sum_of_taps

Arrays = dict[str, jax.Array]


def run(
  net: Net,
  image: jax.Array,
  kernels: Mapping[str, jax.Array] | None = None,
  quantize: Callable[[Quantizer, jax.Array], jax.Array] | None = None,
  watch: Callable[[str, jax.Array], None] | None = None,
) -> jax.Array:
  """The logits float32 `[N, num_classes]` of images.

  Args:
    net: what to compute.
    image: uint8, or float32 if the net does not normalize, `[N, H, W, C]`.
    kernels: each layer's codes, in place of the net's own arrays (of any type that float32 holds).
    quantize: computes a quantizer's codes as float32, in place of `codes`.
    watch: is called with the name and the values of every tensor.

  Every operation rounds to float32 by itself, under jit too.
  """
  values = {IMAGE: normalized(net, image)}
  kernels = {layer.name: layer.kernel for layer in net.layers} if kernels is None else kernels
  last_use = {name: index for index, node in enumerate(net.nodes) for name in inputs(node)}
  for index, node in enumerate(net.nodes):
    arguments = [values[name] for name in inputs(node)]
    if isinstance(node, Layer):
      values[node.name] = _layer(node, arguments[0], kernels[node.name])
    elif isinstance(node, Quantizer):
      values[node.name] = (quantize or codes)(node, arguments[0])
    else:
      values[node.name] = _OTHERS[type(node)](node, *arguments)
    if watch is not None:
      watch(node.name, values[node.name])
    for name in {*inputs(node)}:  # one may be read twice, as in x * x
      if last_use[name] == index:
        del values[name]
  return values[net.nodes[-1].name]


def normalized(net: Net, image: jax.Array) -> jax.Array:
  """Images as the net's layers read them, float32."""
  image, scale = image.astype(jnp.float32), net.pixel_scale()
  return image if scale is None else _rounded(image * scale[0]) + scale[1]


def run_with_codes(net: Net, image: jax.Array) -> tuple[jax.Array, Arrays]:
  """The logits, and the codes of every quantizer."""
  found = {}

  def quantize(node, x):
    found[node.name] = codes(node, x)
    return found[node.name]

  return run(net, image, quantize=quantize), found


def codes(node: Quantizer, x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  """The codes of floats, as float32. NumPy computes the same as JAX, without a compilation."""
  array = np if isinstance(x, np.ndarray) else jnp
  if node.margin:
    x = x + array.float32(node.margin)
  return array.clip(array.round(x * array.float32(node.inverse)), node.low, node.high)


def _layer(node: Layer, x: jax.Array, kernel: jax.Array) -> jax.Array:
  kernel = jnp.asarray(kernel).astype(jnp.float32)
  if node.dense:
    total = jnp.matmul(x, kernel, precision="highest")
  elif node.depthwise:
    # Without the training's custom_vjp: nothing is differentiated here, and the artifact is
    # smaller.
    padded = jnp.pad(x, [(0, 0), *node.border, (0, 0)])
    total = lax.platform_dependent(padded, kernel, **_depthwise_forms(node.stride))
  else:
    total = lax.conv_general_dilated(
      x,
      kernel,
      (node.stride, node.stride),
      node.border,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision="highest",
    )
  return _rounded(total * node.multiplier) + node.bias


def _depthwise_forms(stride: int) -> dict[str, Callable[..., jax.Array]]:
  return {
    "cpu": functools.partial(sum_of_taps, stride=stride),
    "default": functools.partial(grouped, stride=stride),
  }


def _rounded(product: jax.Array) -> jax.Array:
  """A product before it is added to: XLA would join the two into one operation that rounds once.

  No product lies below, but the compiler cannot know. Without it 27 % of the sums are a unit in the
  last place off, and a value at a tie gets another code than in onnxruntime.
  """
  return jnp.maximum(product, jnp.finfo(jnp.float32).min)


def _activation(node: Activation, x: jax.Array) -> jax.Array:
  sixth = jnp.float32(1 / 6)
  if node.function == "relu":
    return jnp.maximum(x, 0.0)
  if node.function == "relu6":
    return jnp.clip(x, 0.0, 6.0)
  gate = jnp.clip(x + 3.0, 0.0, 6.0)
  return gate * sixth if node.function == "hard_sigmoid" else _rounded(x * gate * sixth)


def _affine(node: Affine, x: jax.Array) -> jax.Array:
  return _rounded(x * node.multiplier) + node.bias


def _pool(node: Pool, x: jax.Array) -> jax.Array:
  start, combine = (-jnp.inf, lax.max) if node.function == "max" else (0.0, lax.add)
  window, strides = (1, *node.window, 1), (1, *node.strides, 1)
  found = lax.reduce_window(x, start, combine, window, strides, ((0, 0), *node.padding, (0, 0)))
  return found if node.function == "max" else found / jnp.float32(math.prod(node.window))


_ELEMENTWISE = {
  Sum: jnp.add,
  Product: jnp.multiply,
  Maximum: jnp.maximum,
  Minimum: jnp.minimum,
}


def _elementwise(node: Elementwise, x: jax.Array, other: jax.Array) -> jax.Array:
  other = other[:, None, None, :] if other.ndim < x.ndim else other
  return _ELEMENTWISE[type(node)](x, other)


_OTHERS: dict[type, Callable[..., jax.Array]] = {
  Activation: _activation,
  Value: lambda node, x: _rounded(x * jnp.float32(node.scale)) + jnp.float32(node.offset),
  Mean: lambda _, x: jnp.mean(x, axis=(1, 2)),
  Affine: _affine,
  Clip: lambda node, x: jnp.clip(x, jnp.float32(node.low), jnp.float32(node.high)),
  Pool: _pool,
  Reshape: lambda node, x: x.reshape(x.shape[0], *node.shape),
  Concat: lambda _, *read: jnp.concatenate(read, axis=-1),
  **dict.fromkeys(_ELEMENTWISE, _elementwise),
}
