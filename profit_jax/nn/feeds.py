"""Which quantizer feeds which layer, read from a trace of the model.

Between a quantizer and the layer may be anything that moves its values, takes means or extremes of
them, or shifts and scales them by constants. A sum or a product of two tensors, another layer and
any other function ends the way: what they give has no quantizer.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core

from profit_jax.nn import tracing
from profit_jax.nn.spec import ModelSpec, describe
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import value_of

Quantizers = tuple[str, ...]
# Of a tensor: the quantizers whose values it has; None of a constant.
_Known = dict[Any, Quantizers | None]

_MOVES = frozenset(
  (
    *("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "concatenate", "slice"),
    *("split", "rev", "pad", "reduce_sum", "reduce_max", "reduce_min", "reduce_window_sum"),
    *("reduce_window_max", "reduce_window_min", "convert_element_type", "copy", "copy_p", "neg"),
    *("optimization_barrier", "sharding_constraint", "name"),
  )
)
_WITH_CONSTANTS = frozenset(("add", "add_any", "sub", "mul", "div", "max", "min", "clamp"))


def quantizers_of(spec: ModelSpec) -> dict[str, Quantizers]:
  """The quantizers that feed each convolution and dense layer, by path: none, one, or several that
  are concatenated.

  Raises:
    ConfigError: a layer inside a transformation, which cannot be traced.
  """
  found = _traced(spec.model, spec.input_shape, dataclasses.replace(spec.bits, own=()))
  return {layer: found.get(layer, ()) for layer in spec.all_kernels}


@functools.lru_cache(maxsize=32)
def _traced(model: nn.Module, input_shape: tuple[int, ...], bits: Bits) -> dict[str, Quantizers]:
  shapes = describe(model, input_shape, bits).shapes
  image = jax.ShapeDtypeStruct((2, *input_shape), np.float32)

  def run(variables, x):
    return value_of(model.apply(variables, x, bits, False))

  failure = "The bits of single layers cannot be set"
  closed = tracing.make_jaxpr(run, shapes, image, failure=failure)
  found: dict[str, Quantizers] = {}
  given = [None] * len(jax.tree.leaves(shapes)) + [()]
  _walk(closed.jaxpr, given, found)
  return found


def _walk(
  jaxpr: Any, given: Sequence[Quantizers | None], found: dict[str, Quantizers]
) -> list[Quantizers | None]:
  """What the results of a jaxpr hold, given its arguments; adds layers to `found`."""
  known: _Known = dict.fromkeys(jaxpr.constvars) | dict(zip(jaxpr.invars, given, strict=True))

  def read(atom):
    return None if isinstance(atom, core.Literal) else known[atom]

  for equation in jaxpr.eqns:
    held, inner = [read(atom) for atom in equation.invars], tracing.inner_jaxpr(equation)
    if inner is not None:
      results = _walk(inner[0], held, found)
    else:
      results = [_result(equation, held, found)] * len(equation.outvars)
    known.update(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _result(equation, held, found):
  if equation.primitive is tracing.operation_p:
    return _of_layer(equation.params, held[0], found)
  tensors = [each for each in held if each is not None]
  if not tensors:
    return None
  name = equation.primitive.name
  if name in _MOVES or (name in _WITH_CONSTANTS and len(tensors) == 1):
    return tuple(dict.fromkeys(path for each in tensors for path in each))
  return ()


def _of_layer(params, held, found):
  path, kind = "/".join(params["path"]), params["kind"]
  if kind == "quantizer":
    return (path,)
  if kind in ("conv", "dense"):
    found[path] = held or ()
  return (held or ()) if kind == "mean" else ()
