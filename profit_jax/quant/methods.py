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

from profit_jax.quant import calibration, duq, lsq, pact, qil
from profit_jax.quant.levels import kernel_steps
from profit_jax.settings import QuantSettings

Params = Mapping[str, jax.Array]
PREFIX = "quant_"


class Method(NamedTuple):
  """A way to quantize.

  Attributes:
    kernel_leaves: scalars of a kernel's quantizer.
    act_leaves: of an activation's.
    kernel: `(kernel, params, steps) -> values`.
    act: `(x, params, steps, kind) -> values`.
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
  kernel: Callable[[jax.Array, Params, jax.Array], jax.Array]
  act: Callable[[jax.Array, Params, jax.Array, duq.Kind], jax.Array]
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


def _duq_kernel(kernel, params, steps):
  return duq.quantize(kernel, params["quant_a"], params["quant_c"], steps, "symmetric")


def _duq_act(x, params, steps, kind):
  return duq.quantize(x, params["quant_a"], params["quant_c"], steps, kind)


def _both(interval):
  return {"quant_a": interval, "quant_c": interval}


METHODS: dict[str, Method] = {
  "duq": Method(
    kernel_leaves=("quant_a", "quant_c"),
    act_leaves=("quant_a", "quant_c"),
    kernel=_duq_kernel,
    act=_duq_act,
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
  function: Callable[..., jax.Array], kernel: jax.Array, params: Params, *rest: jax.Array
) -> jax.Array:
  """A function of a kernel and scalars, with scalars of its own for every output channel (the last
  axis).
  """
  return jax.vmap(lambda k, p: function(k, p, *rest), in_axes=(-1, 0), out_axes=-1)(kernel, params)


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
