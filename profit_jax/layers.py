"""Quantized building blocks (linen). Every layer computes in the dtype of its input; parameters
keep their own.

With `dtype` given, a convolution or dense layer multiplies in it and gives its result in the dtype
of its input: for float32 images and bfloat16, operands, products and their gradients are bfloat16
(summed in float32), all else is float32.

A layer's kernel and its quantizer's scalars live side by side:
`{kernel, [bias,] quant_a, quant_c}`. Leaf names that begin with `quant_` are reserved for
quantizers: the optimizer groups find them by name.

Besides `params` and `batch_stats`, the layers know three collections, each used only when the
caller asks for it:

- `previous` (given): per convolution, the quantized kernel of the step before. Convolutions then
  convolve twice and write to `moments` the per-channel moments of both outputs, from which
  `train/aiwq.py` computes AIWQ, and to `quantized` the present quantized kernel.
- `calibration` (mutable): activation quantizers write the first values of their scalars to it, and
  quantize nothing.
- `clip_rate` (mutable): every active quantizer writes which share of its input it clips.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from profit_jax.depthwise import depthwise_conv
from profit_jax.fused import Activation, Normalized, activate, moments
from profit_jax.quant import duq
from profit_jax.quant.levels import Levels, symmetric_steps
from profit_jax.quant.methods import METHODS, Method, per_channel

# torch's kaiming_normal_(mode="fan_out"), which the authors start from.
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _keep(_, new):
  """A sow reducer that overwrites: one value per layer and call."""
  return new


def _sow(module: nn.Module, collection: str, name: str, value: Any) -> None:
  module.sow(collection, name, value, reduce_fn=_keep, init_fn=lambda: None)


def _method(levels: Levels) -> Method:
  return METHODS["duq" if levels.quant is None else levels.quant.method]


def _quantizer_params(
  module: nn.Module, leaves: tuple[str, ...], shape: tuple[int, ...] = ()
) -> dict[str, jax.Array]:
  """The raw scalars of a quantizer; 1 (the value, not the raw) until calibrated or loaded."""

  def one(_):
    return duq.inverse_softplus(jnp.ones(shape, jnp.float32))

  return {leaf: module.param(leaf, one) for leaf in leaves}


def _quantized_kernel(module: nn.Module, kernel: jax.Array, levels: Levels) -> jax.Array:
  method = _method(levels)
  split = levels.quant is not None and levels.quant.per_channel
  params = _quantizer_params(module, method.kernel_leaves, kernel.shape[-1:] if split else ())
  if levels.weight is None:
    return kernel
  apply = functools.partial(per_channel, method.kernel) if split else method.kernel
  if module.is_mutable_collection("clip_rate"):
    clipped = (
      per_channel(method.kernel_clipped, kernel, params)
      if split
      else method.kernel_clipped(kernel, params)
    )
    _sow(module, "clip_rate", "kernel", jnp.mean(clipped, dtype=jnp.float32))
  return apply(kernel, params, levels.weight)


def _every(x: jax.Array, count: int) -> jax.Array:
  # Not `x[::count]`: each device takes its own part's.
  return x.reshape(len(x) // count, count, *x.shape[1:])[:, 0] if count > 1 else x


class QuantConv(nn.Module):
  """A convolution without bias whose kernel is quantized when `levels.weight` is given.

  Pads `(k - 1) / 2` on every side, as torch does (`SAME` differs for strides above 1).

  Attributes:
    features: number of output channels; ignored by a depthwise convolution, which keeps its
      input's.
    kernel_size: odd, in both directions.
    stride: in both directions.
    depthwise: one filter per channel; the kernel is `[K, K, 1, C]`, otherwise
      `[K, K, C_in, features]`.
    pad_value: what the border is padded with: 0, or -3/8 where the input is quantized after h-swish
      (paper section 3.3).
    dtype: in which it multiplies, as bfloat16; None is the input's. The output has the input's
      dtype.
    sampling_every: the moments are those of every so many-th image of the batch, which it divides.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  depthwise: bool = False
  pad_value: float = 0.0
  dtype: Any = None
  sampling_every: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, levels: Levels) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H', W', features]`."""
    size = self.kernel_size
    channels_in, features = (1, x.shape[-1]) if self.depthwise else (x.shape[-1], self.features)
    kernel = self.param("kernel", _conv_init, (size, size, channels_in, features), jnp.float32)
    quantized = _quantized_kernel(self, kernel, levels)

    # In bfloat16 results are rounded too. Kept in float32 they train no better: the demo's full
    # precision, at rate 0.03, ends at 99.04 % either way (mean of 3 seeds; float32 99.33). And XLA
    # on GPUs has no convolution of bfloat16 into float32: it widens the operands.
    operand = x.astype(self.dtype or x.dtype)
    y = self._convolve(operand, quantized).astype(x.dtype)

    if self.has_variable("previous", "kernel"):
      sampled, present = (
        _every(array, self.sampling_every) for array in jax.lax.stop_gradient((operand, y))
      )
      previous = self._convolve(sampled, self.get_variable("previous", "kernel")).astype(x.dtype)
      _sow(self, "moments", "present", output_moments(present))
      _sow(self, "moments", "previous", output_moments(previous))
      _sow(self, "quantized", "kernel", jax.lax.stop_gradient(quantized))
    return y

  def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    kernel, margin = kernel.astype(x.dtype), (self.kernel_size - 1) // 2
    if self.depthwise:
      return depthwise_conv(x, kernel, self.stride, margin, self.pad_value)
    if self.kernel_size == 1 and self.stride == 1:
      # Rows by channels: of three contracted axes, XLA on CPU copies both operands first to make
      # one. The kernel's gradient at [16, 112, 112, 96] and 24 features takes 6 ms so, and 28 ms as
      # an einsum of the images.
      y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
      return y.reshape(*x.shape[:-1], -1)
    around = [(0, 0, 0), (margin, margin, 0), (margin, margin, 0), (0, 0, 0)]
    padded = jax.lax.pad(x, jnp.asarray(self.pad_value, x.dtype), around)
    return jax.lax.conv_general_dilated(
      padded,
      kernel,
      (self.stride, self.stride),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class QuantDense(nn.Module):
  """A dense layer with bias whose kernel `[C, features]` is quantized when `levels.weight` is
  given.

  Attributes:
    features: size of the output.
    kernel_init: first values of the kernel.
    dtype: as `QuantConv`'s.
  """

  features: int
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.01)
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, levels: Levels) -> jax.Array:
    """`[N, C]` -> `[N, features]`."""
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    kernel = _quantized_kernel(self, kernel, levels)
    dtype = self.dtype or x.dtype
    y = x.astype(dtype) @ kernel.astype(dtype)
    # In the bias's precision, and with it the sum over the batch that is its gradient.
    return (y.astype(bias.dtype) + bias).astype(x.dtype)


class QuantAct(nn.Module):
  """Quantizes activations when `levels.act` is given; the non-linearity comes before, see
  `BatchNorm.pending`.

  Attributes:
    kind: which quantizer: unsigned (after ReLU), symmetric (signed inputs), hswish.
    largest_interval: upper bound of the calibrated interval (6 in the authors' MobileNet-v2), or
      None.
  """

  kind: duq.Kind
  largest_interval: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array | Normalized, levels: Levels) -> jax.Array:
    """Any shape, the batch first; or what `BatchNorm.pending` gives."""
    method = _method(levels)
    params = _quantizer_params(self, method.act_leaves)
    steps = (
      symmetric_steps(levels.act)
      if self.kind == "symmetric" and levels.act is not None
      else levels.act
    )
    if isinstance(x, Normalized):
      watched = self.is_mutable_collection("calibration") or self.is_mutable_collection("clip_rate")
      if levels.act is not None and not watched and method is METHODS["duq"]:
        return x.quantized(params["quant_a"], params["quant_c"], steps, self.kind)
      x = x.value()
    if self.is_mutable_collection("calibration"):
      for leaf, first in method.first_act(x, steps, self.kind, self.largest_interval).items():
        _sow(self, "calibration", leaf, first)
      return x
    if levels.act is None:
      return x
    if self.is_mutable_collection("clip_rate"):
      # Per example, so that the caller can leave out the examples that only pad a batch.
      beyond = method.act_clipped(x, params, self.kind)
      _sow(
        self, "clip_rate", "act", jnp.mean(beyond, axis=tuple(range(1, x.ndim)), dtype=jnp.float32)
      )
    return method.act(x, params, steps, self.kind)


class BatchNorm(nn.Module):
  """Batch normalization over all axes but the last, with torch's running statistics.

  flax's own keeps the biased running variance; this keeps the unbiased one, n/(n-1), as torch does.
  Under jit over a mesh the statistics are those of the global batch.

  Attributes:
    momentum: share of the old running value that an update keeps (torch's momentum 0.1 is 0.9
      here).
    epsilon: added to the variance.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5

  def __call__(self, x: jax.Array, train: bool, activation: Activation | None = None) -> jax.Array:
    """`activation` of x normalized with the batch's statistics if `train`, else with the running
    ones.
    """
    return value(self.pending(x, train, activation))

  @nn.compact
  def pending(
    self, x: jax.Array, train: bool, activation: Activation | None = None
  ) -> jax.Array | Normalized:
    """The same for a `QuantAct` to take, which computes both at once."""
    channels = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)

    if not train:
      factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
      return activate(
        ((x.astype(scale.dtype) - running_mean.value) * factor + bias).astype(x.dtype), activation
      )

    mean, var = moments(jax.lax.stop_gradient(x).astype(scale.dtype))
    if self.is_mutable_collection("batch_stats") and not self.is_initializing():
      count = x.size // x.shape[-1]
      unbiased = var * (count / max(count - 1, 1))
      keep = self.momentum
      running_mean.value = keep * running_mean.value + (1 - keep) * mean
      running_var.value = keep * running_var.value + (1 - keep) * unbiased
    return Normalized(x, mean, var, scale, bias, self.epsilon, activation)


def value(x: jax.Array | Normalized) -> jax.Array:
  """The array, computed where it is pending."""
  return x.value() if isinstance(x, Normalized) else x


def at_least_float32(x: jax.Array) -> jax.Array:
  """Statistics and losses are in float32 (float64 stays), whatever the network's precision."""
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def output_moments(y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Per-channel mean and unbiased standard deviation of `[N, H, W, C]`, in at least float32."""
  mean, var = moments(at_least_float32(y))
  count = y.size // y.shape[-1]
  return mean, jnp.sqrt(var * (count / max(count - 1, 1)))
