"""Plain Flax nets in full precision, the yardstick of `benchmarks/aot.py`: what a user who does not
quantize would write.

`nn.Conv`, `nn.BatchNorm` and `nn.Dense`, with the layers, channels and strides of this project's
models; SGD with Nesterov momentum and weight decay; no average of the weights, no dropout.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from profit_jax.models import mobilenet_v1, mobilenet_v2, mobilenet_v3
from profit_jax.models.common import divisible_by_8


def _relu6(x: jax.Array) -> jax.Array:
  return jnp.clip(x, 0, 6)


class Unit(nn.Module):
  """A convolution, its batch normalization, and a non-linearity.

  Attributes:
    features: output channels.
    size: of the kernel.
    stride: of the convolution.
    depthwise: one kernel for each channel.
    act: the non-linearity.
    dtype: of products and outputs.
  """

  features: int
  size: int = 1
  stride: int = 1
  depthwise: bool = False
  act: Callable[[jax.Array], jax.Array] | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[N, H, W, C]` -> `[N, H / stride, W / stride, features]`."""
    x = nn.Conv(
      self.features,
      (self.size, self.size),
      self.stride,
      padding=[(self.size // 2, self.size // 2)] * 2,
      feature_group_count=self.features if self.depthwise else 1,
      use_bias=False,
      dtype=self.dtype,
    )(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)(x)
    return x if self.act is None else self.act(x)


class SqueezeExcite(nn.Module):
  """Scales each channel by a number that two dense layers make of the channels' means.

  Attributes:
    squeezed: channels between the two.
    dtype: of products and outputs.
  """

  squeezed: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[N, H, W, C]` -> the same."""
    scale = jnp.mean(x, (1, 2), keepdims=True)
    scale = nn.relu(nn.Dense(self.squeezed, dtype=self.dtype)(scale))
    return x * nn.hard_sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype)(scale))


class PlainNet(nn.Module):
  """What the plain nets share.

  Attributes:
    width: multiplies the channels of every layer.
    num_classes: size of the head.
    dtype: of products and outputs; parameters and statistics are float32.
  """

  width: float = 1.0
  num_classes: int = 1000
  dtype: Any = jnp.float32

  def channels(self, channels: int) -> int:
    """Channels of a layer, given those at width 1."""
    return divisible_by_8(channels * self.width)


class PlainMobileNetV1(PlainNet):
  """MobileNet-v1."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Logits of normalized images."""
    stem_stride, *strides = mobilenet_v1.IMAGENET_STRIDES
    stem = self.channels(mobilenet_v1.STEM_CHANNELS)
    x = Unit(stem, 3, stem_stride, act=_relu6, dtype=self.dtype)(x, train)
    for (channels, blocks), stride in zip(mobilenet_v1.STAGES, strides, strict=True):
      for index in range(blocks):
        depthwise = {"stride": 1 if index else stride, "depthwise": True}
        x = Unit(x.shape[-1], 3, **depthwise, act=_relu6, dtype=self.dtype)(x, train)
        x = Unit(self.channels(channels), act=_relu6, dtype=self.dtype)(x, train)
    return nn.Dense(self.num_classes)(jnp.mean(x, (1, 2)))


class PlainMobileNetV2(PlainNet):
  """MobileNet-v2."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Logits of normalized images."""
    stem_stride, *strides = mobilenet_v2.IMAGENET_STRIDES
    stem = self.channels(mobilenet_v2.STEM_CHANNELS)
    x = Unit(stem, 3, stem_stride, act=_relu6, dtype=self.dtype)(x, train)
    for (expansion, channels, blocks), stride in zip(mobilenet_v2.STAGES, strides, strict=True):
      for index in range(blocks):
        shortcut, hidden = x, x.shape[-1] * expansion
        if expansion != 1:
          x = Unit(hidden, act=_relu6, dtype=self.dtype)(x, train)
        depthwise = {"stride": 1 if index else stride, "depthwise": True}
        x = Unit(hidden, 3, **depthwise, act=_relu6, dtype=self.dtype)(x, train)
        x = Unit(self.channels(channels), dtype=self.dtype)(x, train)
        x = x + shortcut if x.shape == shortcut.shape else x
    head = divisible_by_8(mobilenet_v2.HEAD_CHANNELS * max(1.0, self.width))
    x = Unit(head, act=_relu6, dtype=self.dtype)(x, train)
    return nn.Dense(self.num_classes)(jnp.mean(x, (1, 2)))


class PlainMobileNetV3(PlainNet):
  """MobileNet-v3 in torchvision's layout: squeeze-excite after the non-linearity, zero padding.

  Attributes:
    variant: a key of `mobilenet_v3.VARIANTS`.
  """

  variant: str = "large"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Logits of normalized images."""
    variant = mobilenet_v3.VARIANTS[self.variant]
    stem_stride, *strides = variant.strides
    stem = self.channels(mobilenet_v3.STEM_CHANNELS)
    x = Unit(stem, 3, stem_stride, act=nn.hard_swish, dtype=self.dtype)(x, train)
    for stage, stride in zip(variant.stages, strides, strict=True):
      for index, spec in enumerate(stage):
        x = self._block(x, spec, 1 if index else stride, train)
    head = mobilenet_v3.HEAD_EXPANSION * self.channels(variant.stages[-1][-1].channels)
    x = jnp.mean(Unit(head, act=nn.hard_swish, dtype=self.dtype)(x, train), (1, 2))
    pre_classifier = self.channels(variant.pre_classifier)
    x = nn.hard_swish(nn.Dense(pre_classifier, dtype=self.dtype)(x))
    return nn.Dense(self.num_classes)(x)

  def _block(
    self, x: jax.Array, spec: mobilenet_v3.BlockSpec, stride: int, train: bool
  ) -> jax.Array:
    act = nn.hard_swish if spec.hswish else nn.relu
    shortcut, hidden = x, self.channels(spec.hidden)
    if hidden != x.shape[-1]:
      x = Unit(hidden, act=act, dtype=self.dtype)(x, train)
    depthwise = {"stride": stride, "depthwise": True}
    x = Unit(hidden, spec.kernel_size, **depthwise, act=act, dtype=self.dtype)(x, train)
    if spec.squeeze_excite:
      x = SqueezeExcite(divisible_by_8(hidden // mobilenet_v3.SQUEEZE), self.dtype)(x)
    x = Unit(self.channels(spec.channels), dtype=self.dtype)(x, train)
    return x + shortcut if x.shape == shortcut.shape else x


NETS: dict[str, Callable[..., PlainNet]] = {
  "mobilenet_v1": PlainMobileNetV1,
  "mobilenet_v2": PlainMobileNetV2,
  "mobilenet_v3_large": functools.partial(PlainMobileNetV3, variant="large"),
  "mobilenet_v3_small": functools.partial(PlainMobileNetV3, variant="small"),
}


def _optimizer() -> optax.GradientTransformation:
  return optax.chain(optax.add_decayed_weights(4e-5), optax.sgd(0.1, 0.9, nesterov=True))


def first_state(net: PlainNet, image_size: int) -> tuple[Any, Any, Any]:
  """Parameters, batch statistics and the optimizer's state, as a run would start with them."""
  image = jnp.zeros((1, image_size, image_size, 3), net.dtype)
  variables = net.init(jax.random.key(0), image, train=False)
  return variables["params"], variables["batch_stats"], _optimizer().init(variables["params"])


def _normalized(image: jax.Array, dtype: Any) -> jax.Array:
  return (image.astype(dtype) / 255 - 0.5) / 0.25


def train_step(net: PlainNet, state: tuple[Any, Any, Any], image: jax.Array, label: jax.Array):
  """A training step: the next state, and the loss."""
  params, statistics, opt_state = state

  def loss_of(params):
    logits, updated = net.apply(
      {"params": params, "batch_stats": statistics},
      _normalized(image, net.dtype),
      train=True,
      mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(np.float32), label)
    return losses.mean(), updated["batch_stats"]

  (loss, statistics), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
  updates, opt_state = _optimizer().update(gradient, opt_state, params)
  return (optax.apply_updates(params, updates), statistics, opt_state), loss


def eval_step(net: PlainNet, params: Any, statistics: Any, image: jax.Array, label: jax.Array):
  """An evaluation step: the sum of losses, and the number of images that are right."""
  variables = {"params": params, "batch_stats": statistics}
  logits = net.apply(variables, _normalized(image, net.dtype), train=False).astype(np.float32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  return losses.sum(), (logits.argmax(-1) == label).sum()
