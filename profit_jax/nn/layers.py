"""Quantized building blocks (linen).

Quantized tensors travel as codes (`quant/quantized.py`): `QuantAct` gives them, `QuantConv` and
`QuantDense` multiply them. The other layers give plain arrays. What these were made of is
remembered (`nn/pending.py`), so that a `BatchNorm` directly behind a `QuantConv` takes the scale of
the sums into its own, and a `QuantAct` directly behind a `BatchNorm` is one operation with it.

Activations have the dtype of the images; parameters, statistics and scales keep their own. The
precision of products is that of `products.py`.

A layer's kernel and its quantizer's scalars live side by side:
`{kernel, [bias,] quant_a, quant_c}`. Leaf names that begin with `quant_` are reserved for
quantizers: the optimizer groups find them by name.

Besides `params` and `batch_stats`, the layers know three collections, each used only when the
caller asks for it:

- `previous` (given): per convolution, the quantized kernel of the step before, its codes as
  `kernel` and their `scale` `[C]`. Convolutions then convolve twice and write to `moments` the
  per-channel moments of both outputs, from which `train/aiwq.py` computes AIWQ, and to `quantized`
  the present quantized kernel in the same form.
- `calibration` (mutable): activation quantizers write the first values of their scalars to it, and
  quantize nothing.
- `clip_rate` (mutable): every active quantizer writes which share of its input it clips.

What a layer is, and which of its parameters is what, it says itself: see `nn/spec.py`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from profit_jax.config import ConfigError
from profit_jax.kernels import products
from profit_jax.kernels.padding import Margin, Padding, margin_of
from profit_jax.nn import tracing
from profit_jax.nn.fused import Activation, Normalized, activate, moments, moments_near
from profit_jax.nn.pending import parts_of, remember
from profit_jax.nn.spec import record
from profit_jax.quant import duq
from profit_jax.quant.base import Kind
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import Product, Quantized, Tensor, Unquantized, value_of

# torch's kaiming_normal_(mode="fan_out"), which the authors start from.
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


# Deviations up to this many units in the last place of the mean count as 0.
NOISE_UNITS = 8


def _require(module: nn.Module, field: str, value: Any, allowed: Sequence[Any] | str) -> None:
  """Raises a ConfigError of a layer's argument, unless `allowed` has it."""
  if isinstance(allowed, str) or value not in allowed:
    listed = allowed if isinstance(allowed, str) else ", ".join(map(repr, allowed))
    name = "/".join(module.path) or type(module).__name__
    raise ConfigError(f"The layer {name} has {field} = {value!r}: it must be {listed}.")


def _keep(_, new):
  """A sow reducer that overwrites: one value per layer and call."""
  return new


def _sow(module: nn.Module, collection: str, name: str, value: Any) -> None:
  module.sow(collection, name, value, reduce_fn=_keep, init_fn=lambda: None)


def _quantizer_params(
  module: nn.Module, leaves: tuple[str, ...], shape: tuple[int, ...] = ()
) -> dict[str, jax.Array]:
  """The raw scalars of a quantizer; 1 (the value, not the raw) until calibrated or loaded."""

  def one(_):
    return duq.inverse_softplus(jnp.ones(shape, jnp.float32))

  return {leaf: module.param(leaf, one) for leaf in leaves}


def _quantized_kernel(module: nn.Module, kernel: jax.Array, bits: Bits) -> jax.Array | Quantized:
  quantizer, qmax = bits.quantizer, bits.kernel_qmax(tracing.path_of(module))
  shape = kernel.shape[-1:] if quantizer.per_channel else ()
  scalars = _quantizer_params(module, quantizer.kernel_scalars, shape)
  if qmax is None:
    return kernel
  if module.is_mutable_collection("clip_rate") and not module.is_initializing():
    clipped = quantizer.of_kernel(quantizer.kernel_clipped, kernel, scalars)
    _sow(module, "clip_rate", "kernel", jnp.mean(clipped, dtype=jnp.float32))
  return quantizer.of_kernel(quantizer.quantize_kernel, kernel, scalars, qmax)


def _operand(x: jax.Array | Quantized) -> jax.Array:
  return x.codes if isinstance(x, Quantized) else x


def _input(x: Tensor) -> jax.Array | Quantized:
  """What a convolution or dense layer multiplies: codes as they are, all else as an array."""
  return x if isinstance(x, Quantized) else value_of(x)


def _product(
  sums: jax.Array, x: jax.Array | Quantized, kernel: jax.Array | Quantized
) -> jax.Array | Product:
  """Sums of products, with what belongs to the two operands that gave them."""
  scales = [each.scale for each in (x, kernel) if isinstance(each, Quantized)]
  if not scales:
    return sums
  shift = None
  if isinstance(x, Quantized) and x.offset:
    # The padding has the offset's value, so that every output has all of its kernel.
    weights = _operand(kernel)
    shift = x.offset * jnp.sum(weights, axis=tuple(range(weights.ndim - 1)))
    if isinstance(kernel, Quantized):
      shift = shift * kernel.scale
  return Product(sums, functools.reduce(jnp.multiply, scales), shift)


def _every(x: Any, count: int) -> Any:
  """Every `count`-th image, of an array or of what stands for one."""
  if isinstance(x, Quantized):
    return dataclasses.replace(x, codes=_every(x.codes, count), source=None)
  if isinstance(x, Product):
    return dataclasses.replace(x, sums=_every(x.sums, count))
  # Not `x[::count]`: each device takes its own part's.
  return x.reshape(len(x) // count, count, *x.shape[1:])[:, 0] if count > 1 else x


class QuantConv(nn.Module):
  """A convolution without bias whose kernel is quantized when `bits.weight` is given.

  Attributes:
    features: number of output channels; ignored by a depthwise convolution, which keeps its
      input's.
    kernel_size: odd, in both directions.
    stride: in both directions.
    depthwise: one filter per channel; the kernel is `[K, K, 1, C]`, otherwise
      `[K, K, C_in, features]`.
    pad_value: what the border is padded with: 0, or -3/8 where the input is quantized after h-swish
      (paper section 3.3).
    padding: how wide the border is. `torch`: `(kernel_size - 1) / 2` on every side. `same`:
      TensorFlow's SAME, which differs at strides above 1, and depends on the input's size there.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  depthwise: bool = False
  pad_value: float = 0.0
  padding: Padding = "torch"

  @nn.compact
  def __call__(self, x: Tensor, bits: Bits = Bits()) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H', W', features]`, in the dtype of x."""
    record(self, "conv", bits)
    if self.kernel_size < 1 or not self.kernel_size % 2:
      _require(self, "kernel_size", self.kernel_size, "odd")
    _require(self, "padding", self.padding, get_args(Padding))
    if tracing.active():
      return tracing.conv(self, x, bits)
    x, size = _input(x), self.kernel_size
    channels_in, features = (1, x.shape[-1]) if self.depthwise else (x.shape[-1], self.features)
    kernel = self.param("kernel", _conv_init, (size, size, channels_in, features), jnp.float32)
    quantized = _quantized_kernel(self, kernel, bits)
    if isinstance(x, Quantized) and size > 1 and self.pad_value != x.offset:
      x = x.value()  # no code stands for the padding
    if isinstance(x, Quantized) and self.has_variable("previous", "kernel"):
      x = dataclasses.replace(x, source=None)  # both kernels see the same codes, to the last bit
    y = self._convolve(x, quantized)

    if self.has_variable("previous", "kernel"):
      x, y_now, quantized = jax.lax.stop_gradient((x, y, quantized))
      one = jnp.ones((), kernel.dtype)
      previous = Quantized(
        self.get_variable("previous", "kernel"), self.get_variable("previous", "scale", one)
      )
      thinned, present = (_every(each, bits.aiwq_every) for each in (x, y_now))
      _sow(self, "moments", "present", output_moments(present))
      _sow(self, "moments", "previous", output_moments(self._convolve(thinned, previous)))
      scale = quantized.scale if isinstance(quantized, Quantized) else one
      _sow(self, "quantized", "kernel", _operand(quantized))
      _sow(self, "quantized", "scale", jnp.broadcast_to(scale, kernel.shape[-1:]))
    return remember(y.value(), y) if isinstance(y, Product) else y

  def margin_for(self, shape: Sequence[int]) -> Margin:
    """What it puts around an input `[N, H, W, C]`."""
    height, width = shape[1:3]
    return margin_of(self.padding, self.kernel_size, self.stride, (height, width))

  def _convolve(
    self, x: jax.Array | Quantized, kernel: jax.Array | Quantized
  ) -> jax.Array | Product:
    pad_value = 0.0 if isinstance(x, Quantized) else self.pad_value  # of codes, that of the offset
    sums = products.conv(
      _operand(x),
      _operand(kernel).astype(x.dtype),
      self.stride,
      pad_value,
      margin=self.margin_for(x.shape),
      depthwise=self.depthwise,
      exact=isinstance(x, Quantized) and isinstance(kernel, Quantized),
      source=x.source if isinstance(x, Quantized) else None,
    )
    return _product(sums, x, kernel)


class QuantDense(nn.Module):
  """A dense layer whose kernel `[C, features]` is quantized when `bits.weight` is given.

  Attributes:
    features: size of the output.
    use_bias: whether it adds a bias, which is not quantized.
    kernel_init: first values of the kernel.
  """

  features: int
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.01)

  @nn.compact
  def __call__(self, x: Tensor, bits: Bits = Bits()) -> jax.Array:
    """`[N, C]` -> `[N, features]`, in the dtype of x."""
    record(self, "dense", bits)
    if tracing.active():
      return tracing.dense(self, x, bits)
    x = _input(x)
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    wide, bias = kernel.dtype, None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    kernel = _quantized_kernel(self, kernel, bits)
    exact = isinstance(x, Quantized) and isinstance(kernel, Quantized)
    y = _product(
      products.dot(_operand(x), _operand(kernel).astype(x.dtype), exact=exact), x, kernel
    )
    # In the parameters' precision, and with it the sum over the batch that is the bias's gradient.
    if isinstance(y, Product):
      y = dataclasses.replace(y, sums=y.sums.astype(wide))
    y = value_of(y).astype(wide)
    return (y if bias is None else y + bias).astype(x.dtype)


class QuantAct(nn.Module):
  """Quantizes activations when `bits.act` is given; the non-linearity comes before it.

  Attributes:
    kind: which quantizer: unsigned (after ReLU), symmetric (signed inputs), hswish.
    largest_interval: upper bound of the calibrated interval (6 in the authors' MobileNet-v2), or
      None.
  """

  kind: Kind
  largest_interval: float | None = None

  @nn.compact
  def __call__(self, x: Tensor, bits: Bits = Bits()) -> Quantized | Unquantized:
    """Any array or what a layer gives, the batch first, to the same shape.

    Directly behind a `BatchNorm` both are computed at once.
    """
    record(self, "act", bits)
    _require(self, "kind", self.kind, get_args(Kind))
    if tracing.active():
      return tracing.quantizer(self, x, bits)
    path = tracing.path_of(self)
    quantizer, qmax = bits.quantizer, bits.act_qmax(self.kind, path)
    scalars = _quantizer_params(self, quantizer.act_scalars)
    # `init` without `mutable` makes every collection mutable, and asks for nothing.
    calibrates, rates = (
      self.is_mutable_collection(name) and not self.is_initializing()
      for name in ("calibration", "clip_rate")
    )
    normalized = parts_of(x)
    if isinstance(normalized, Normalized) and qmax is not None and not (calibrates or rates):
      interval = quantizer.act_interval(scalars, qmax, max(1, x.size // len(x)))
      if interval is not None:
        return normalized.quantized(interval, qmax, self.kind)
    x = value_of(x)
    if calibrates and qmax is not None:
      for leaf, first in quantizer.first_act(x, qmax, self.kind, self.largest_interval).items():
        _sow(self, "calibration", leaf, first)
      return Unquantized(x)
    if qmax is None:
      return Unquantized(x)
    if rates:
      # Per example, so that the caller can leave out the examples that only pad a batch.
      beyond = quantizer.act_clipped(x, scalars, self.kind)
      _sow(
        self, "clip_rate", "act", jnp.mean(beyond, axis=tuple(range(1, x.ndim)), dtype=jnp.float32)
      )
    return quantizer.quantize_act(x, scalars, qmax, self.kind)


class Dropout(nn.Module):
  """`nn.Dropout` that keeps codes where 0 is the value of code 0.

  Attributes:
    rate: share of the elements that become 0.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Tensor, train: bool) -> Tensor:
    """Any shape -> the same; takes the key `dropout` in training, unless the rate is 0."""
    if not train or not self.rate:
      return x
    drop = nn.Dropout(self.rate, deterministic=False, name="dropout")
    if not isinstance(x, Quantized) or x.offset or self.rate == 1:
      return drop(value_of(x))
    # It divides what it keeps by the rate of keeping.
    kept = drop(jnp.ones_like(x.codes)) > 0
    return Quantized(jnp.where(kept, x.codes, 0.0), x.scale / (1.0 - self.rate))


class BatchNorm(nn.Module):
  """Batch normalization over all axes but the last, with torch's running statistics.

  flax's own keeps the biased running variance; this keeps the unbiased one, n/(n-1), as torch does.
  Under jit over a mesh the statistics are those of the global batch.

  Attributes:
    momentum: share of the old running value that an update keeps (torch's momentum 0.1 is 0.9
      here).
    epsilon: added to the variance.
    fused: whether a `QuantAct` directly behind it may compute both at once. False is faster where
      others read the result too.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  fused: bool = True

  @nn.compact
  def __call__(self, x: Tensor, train: bool, activation: Activation | None = None) -> jax.Array:
    """Normalizes, with the batch's statistics if `train`, else with the running ones.

    Args:
      x: `[..., C]`, an array or what a layer gives.
      train: which statistics, and whether the running ones move.
      activation: non-linearity of the result.

    Returns:
      An array of x's shape and dtype.
    """
    record(self, "norm", Bits())
    _require(self, "activation", activation, (None, *get_args(Activation)))
    if tracing.active():
      return tracing.norm(self, x, activation)
    made_of = parts_of(x)
    x = made_of if isinstance(made_of, Product) else x
    channels = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
    x = x if isinstance(x, Product) else Product(value_of(x), jnp.ones((), scale.dtype))
    shift = jnp.zeros_like(bias) if x.shift is None else x.shift

    if not train:
      factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
      centred = x.sums.astype(scale.dtype) * x.scale - (running_mean.value - shift)
      return activate((centred * factor + bias).astype(x.dtype), activation)

    s, shift = jax.lax.stop_gradient((x.scale, shift))
    near = (running_mean.value - shift) / s
    mean, var = moments_near(jax.lax.stop_gradient(x.sums), near)
    if self.is_mutable_collection("batch_stats") and not self.is_initializing():
      count = x.size // x.shape[-1]
      unbiased = jnp.square(s) * var * (count / max(count - 1, 1))
      keep = self.momentum
      running_mean.value = keep * running_mean.value + (1 - keep) * (s * mean + shift)
      running_var.value = keep * running_var.value + (1 - keep) * unbiased
    made = Normalized(x.sums, x.scale, mean, var, scale, bias, self.epsilon, activation)
    return remember(made.value(), made) if self.fused else made.value()


def at_least_float32(x: jax.Array) -> jax.Array:
  """Statistics and losses are in float32 (float64 stays), whatever the network's precision."""
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def output_moments(y: jax.Array | Product) -> tuple[jax.Array, jax.Array]:
  """Per-channel mean and unbiased standard deviation of `[N, H, W, C]`, in at least float32."""
  product = y if isinstance(y, Product) else Product(y, jnp.ones((), at_least_float32(y).dtype))
  mean, var = moments(at_least_float32(product.sums))
  count = y.size // y.shape[-1]
  std = jnp.sqrt(var * (count / max(count - 1, 1)))
  # A constant channel has an std of rounding errors of its mean, which the shift may take away.
  std = jnp.where(std > NOISE_UNITS * jnp.finfo(std.dtype).eps * jnp.abs(mean), std, 0.0)
  mean, std = mean * product.scale, std * product.scale
  return (mean if product.shift is None else mean + product.shift), std
