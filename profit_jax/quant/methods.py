"""The quantizers that `config.quant.method` chooses from, behind one interface.

All of them run under the same plan, bits and policy: kernels and signed activations on -n to n
(PACT's kernels apart), unsigned ones on 0 to n, half to even. Their scalars are leaves whose names
begin with `quant_`, stored raw: the value is the softplus.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from profit_jax.config import QuantSettings
from profit_jax.quant import calibration, duq, lsq, pact, qil
from profit_jax.quant.bits import kernel_steps
from profit_jax.quant.quantized import Quantized

Params = Mapping[str, jax.Array]
PREFIX = "quant_"


class Method(NamedTuple):
  """A way to quantize.

  Attributes:
    kernel_leaves: scalars of a kernel's quantizer.
    act_leaves: of an activation's.
    kernel: `(kernel, params, steps) -> Quantized`.
    act: `(x, params, steps, kind) -> Quantized`.
    interval: `(params, steps, features of an example) -> Interval`, of activations whose quantizer
      is one; else None.
    kernel_codes: `(kernel, params, steps) -> integers` of its shape, in any dtype, that fit into 8
      bits.
    kernel_clipped: `(kernel, params) -> bool` of its shape, whether an element lies beyond the
      interval.
    act_clipped: `(x, params, kind) -> bool`.
    first_kernel: `(kernel, steps) -> values of the scalars`, positive.
    first_act: `(x, steps, kind, largest interval or None) -> values of the scalars`.
  """

  kernel_leaves: tuple[str, ...]
  act_leaves: tuple[str, ...]
  kernel: Callable[[jax.Array, Params, jax.Array], Quantized]
  act: Callable[[jax.Array, Params, jax.Array, duq.Kind], Quantized]
  interval: Callable[[Params, jax.Array, int], duq.Interval] | None
  kernel_codes: Callable[[jax.Array, Params, jax.Array], jax.Array]
  kernel_clipped: Callable[[jax.Array, Params], jax.Array]
  act_clipped: Callable[[jax.Array, Params, duq.Kind], jax.Array]
  first_kernel: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
  first_act: Callable[[jax.Array, jax.Array, duq.Kind, float | None], dict[str, jax.Array]]


def _interval_clipped(x, params, kind="symmetric"):
  return duq.clipped(x, params["quant_a"], kind)


def _interval_codes(kernel, params, steps):
  return duq.codes(kernel, params["quant_a"], steps, "symmetric")


def _halves(interval):
  # From 0 to the interval: nothing is pruned at first.
  return {"quant_center": interval / 2.0, "quant_width": interval / 2.0}


def _duq_interval(params, steps, features=0):
  del features
  return duq.interval(params["quant_a"], params["quant_c"], steps)


def _duq_kernel(kernel, params, steps):
  return _duq_interval(params, steps).quantized(kernel, steps, "symmetric")


def _duq_act(x, params, steps, kind):
  return _duq_interval(params, steps).quantized(x, steps, kind)


def _both(interval):
  return {"quant_a": interval, "quant_c": interval}


METHODS: dict[str, Method] = {
  "duq": Method(
    kernel_leaves=("quant_a", "quant_c"),
    act_leaves=("quant_a", "quant_c"),
    kernel=_duq_kernel,
    act=_duq_act,
    interval=_duq_interval,
    kernel_codes=_interval_codes,
    kernel_clipped=_interval_clipped,
    act_clipped=_interval_clipped,
    first_kernel=lambda kernel, _: _both(calibration.weight_interval(kernel)),
    first_act=lambda x, _, kind, largest: _both(calibration.act_interval(x, kind, largest)),
  ),
  "lsq": Method(
    kernel_leaves=lsq.LEAVES,
    act_leaves=lsq.LEAVES,
    kernel=lsq.quantize_kernel,
    act=lsq.quantize,
    interval=lsq.interval,
    kernel_codes=_interval_codes,
    kernel_clipped=_interval_clipped,
    act_clipped=_interval_clipped,
    first_kernel=lambda kernel, steps: {"quant_a": lsq.first_interval(kernel, steps, "symmetric")},
    first_act=lambda x, steps, kind, _: {"quant_a": lsq.first_interval(x, steps, kind)},
  ),
  "pact": Method(
    kernel_leaves=(),
    act_leaves=pact.LEAVES,
    kernel=pact.quantize_kernel,
    act=pact.quantize,
    interval=lambda params, steps, _: pact.interval(params, steps),
    kernel_codes=pact.kernel_codes,
    kernel_clipped=lambda kernel, _: jnp.zeros(kernel.shape, bool),
    act_clipped=_interval_clipped,
    first_kernel=lambda _, __: {},
    # The paper starts high and lets its penalty bring alpha down; here it starts where DuQ's
    # interval does.
    first_act=lambda x, _, kind, largest: {"quant_a": calibration.act_interval(x, kind, largest)},
  ),
  "qil": Method(
    kernel_leaves=qil.KERNEL_LEAVES,
    act_leaves=qil.LEAVES,
    kernel=qil.quantize_kernel,
    act=qil.quantize,
    interval=None,
    kernel_codes=qil.kernel_codes,
    kernel_clipped=lambda kernel, params: qil.clipped(kernel, params, "symmetric"),
    act_clipped=qil.clipped,
    first_kernel=lambda kernel, _: {
      **_halves(calibration.weight_interval(kernel)),
      "quant_gamma": jnp.ones((), kernel.dtype),
    },
    first_act=lambda x, _, kind, largest: _halves(calibration.act_interval(x, kind, largest)),
  ),
}


def per_channel(
  function: Callable[..., Any], kernel: jax.Array, params: Params, *rest: jax.Array
) -> Any:
  """A function of a kernel and scalars, with own scalars for every output channel (the last axis).

  Arrays of the kernel's shape keep it; a `Quantized` has a scale for every channel.
  """

  def of_channel(k, p):
    result = function(k, p, *rest)
    return (result.codes, result.scale) if isinstance(result, Quantized) else (result, ())

  # The channels are the last axis of the arrays, and the only one of their scales.
  values, scale = jax.vmap(of_channel, in_axes=(-1, 0), out_axes=(-1, 0))(kernel, params)
  return values if isinstance(scale, tuple) else Quantized(values, scale)


def kernel_codes(
  params: Mapping[str, Any], steps: jax.Array, quant: QuantSettings
) -> dict[str, jax.Array]:
  """The integer codes of every kernel, as int8 of its shape, by layer (`block01/expand_conv`).

  Args:
    params: of a model.
    steps: scalar, `Levels.weight`.
    quant: which quantizers they are.
  """
  flat, method = traverse_util.flatten_dict(params), METHODS[quant.method]
  found = {}
  for path, kernel in flat.items():
    if path[-1] == "kernel":
      scalars, layer = (
        {leaf: flat[*path[:-1], leaf] for leaf in method.kernel_leaves},
        "/".join(path[:-1]),
      )
      of = (
        (lambda k, p, n: per_channel(method.kernel_codes, k, p, n))
        if quant.per_channel
        else method.kernel_codes
      )
      found[layer] = of(kernel, scalars, kernel_steps(layer, steps, quant)).astype(jnp.int8)
  return found
