"""Scalars of quantizers for other bits: the trained ones times a common factor.

The factor gives the least squared distance to the values that the quantizer gives at its own bits,
because the rest of the network was trained with them. It has the same meaning for every method, as
a method's codes stay where values and scalars grow alike.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from profit_jax.data.normalize import Normalization, normalize
from profit_jax.kernels import target
from profit_jax.nn.layers import QuantAct
from profit_jax.nn.tracing import path_of
from profit_jax.quant import base
from profit_jax.quant.bits import Bits
from profit_jax.quant.duq import inverse_softplus
from profit_jax.quant.quantized import Quantized, value_of

_FACTORS = np.float32(np.geomspace(0.05, 1.5, 60))
_SAMPLES = 2**16  # of the values that a quantizer reads


def kernel_scalars(
  by: base.Quantizer, kernel: np.ndarray, scalars: base.Scalars, qmax: float, own: float | None
) -> dict[str, np.ndarray]:
  """The raw scalars of a kernel at other bits.

  Args:
    by: the quantizer.
    kernel: in full precision.
    scalars: raw, as trained.
    qmax: the largest code, as `Bits.kernel_qmax`.
    own: that at the bits that it was trained for; None where it was not quantized.
  """
  # As `export.quantizers`: padded to a power of two, so that kernels share programs.
  last = kernel.shape[-1] if by.per_channel else 1
  rows = kernel.reshape(-1, last)
  padded = np.pad(rows, [(0, (1 << (len(rows) - 1).bit_length()) - len(rows)), (0, 0)])
  if own is None:
    first = by.of_kernel(by.first_kernel, jnp.asarray(padded), np.float32(qmax))
    scalars = jax.tree.map(inverse_softplus, first)
  found = _of_kernel(by, own is not None, padded, dict(scalars), np.float32(qmax), _number(own))
  return jax.device_get(found)


def act_scalars(
  by: base.Quantizer,
  kind: base.Kind,
  values: np.ndarray,
  scalars: base.Scalars,
  qmax: float,
  own: float | None,
) -> dict[str, np.ndarray]:
  """The raw scalars of a quantizer of activations at other bits.

  Args:
    by: the quantizer.
    kind: of the activations.
    values: that it reads, `[N]`.
    scalars: raw; as trained, or first values.
    qmax: the largest code, as `Bits.act_qmax`.
    own: that at the bits that it was trained for; None where it was not quantized.
  """
  given = dict(scalars), np.float32(qmax), _number(own)
  return jax.device_get(_of_act(by, kind, own is not None, values, *given))


def _number(qmax: float | None) -> np.float32:
  return np.float32(1.0 if qmax is None else qmax)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_kernel(by, trained, kernel, scalars, qmax, own):
  def fitted(kernel, scalars, qmax, own):
    wanted = by.quantize_kernel(kernel, scalars, own).value() if trained else kernel

    def quantize(found):
      return by.quantize_kernel(kernel, found, qmax)

    return _best(by, quantize, scalars, wanted)

  return by.of_kernel(fitted, kernel, scalars, qmax, own)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _of_act(by, kind, trained, values, scalars, qmax, own):
  wanted = by.quantize_act(values, scalars, own, kind).value() if trained else values

  def quantize(found):
    return by.quantize_act(values, found, qmax, kind)

  return _best(by, quantize, scalars, wanted)


def _best(
  by: base.Quantizer,
  quantize: Callable[[base.Scalars], Quantized],
  scalars: base.Scalars,
  wanted: jax.Array,
) -> dict[str, jax.Array]:
  def scaled(factor):
    return {
      leaf: raw if leaf in by.unscaled else inverse_softplus(jax.nn.softplus(raw) * factor)
      for leaf, raw in scalars.items()
    }

  def distance(factor):
    return jnp.sum(jnp.square(quantize(scaled(factor)).value() - wanted))

  # One after the other: all at once would take the memory of 60 kernels.
  distances = jax.lax.map(distance, jnp.asarray(_FACTORS))
  return scaled(jnp.asarray(_FACTORS)[jnp.argmin(distances)])


@functools.partial(jax.jit, static_argnums=(0, 1))
def inputs_of_quantizers(
  model: nn.Module,
  normalization: Normalization | None,
  variables: Any,
  image: jax.Array,
  bits: Bits,
) -> dict[str, jax.Array]:
  """Values that each quantizer of activations reads in evaluation, `[65536]`, by path.

  Args:
    model: that is evaluated.
    normalization: of uint8 images; None where images are floats.
    variables: its `params` and `batch_stats`.
    image: a batch.
    bits: of the evaluation.
  """
  found = {}

  def keep(call, args, kwargs, context):
    if isinstance(context.module, QuantAct) and context.method_name == "__call__":
      found[path_of(context.module)] = _samples(value_of(args[0]))
    return call(*args, **kwargs)

  platform = target.platform_of(jax.default_backend())
  # Plain operations where the tuned ones might not run.
  with (
    target.tracing_for(target.Target(platform, "tuned" if platform == "cpu" else "xla")),
    jax.default_matmul_precision("highest"),
    nn.intercept_methods(keep),
  ):
    seen = image if normalization is None else normalize(image, normalization)
    model.apply(variables, seen, bits, False)
  return found


def _samples(x: jax.Array) -> jax.Array:
  """Every so many elements, of all channels alike."""
  step = max(1, x.size // _SAMPLES)
  while math.gcd(step, x.shape[-1]) > 1:
    step += 1
  return jnp.resize(x.reshape(-1)[::step], (_SAMPLES,))
