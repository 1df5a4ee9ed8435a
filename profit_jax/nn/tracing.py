"""Trace mode: every layer and non-linearity is one opaque operation of the traced program.

Export reads a model's graph from its jaxpr. In a plain jaxpr a quantizer is a dozen unnamed
operations. In trace mode each layer binds `operation_p` instead, with its path and attributes, and
returns its usual type. Its parameters are not operands: export looks them up by path.

    jaxpr = tracing.make_jaxpr(lambda x: model.apply(variables, x, bits, False), x, failure="...")
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from profit_jax.config import ConfigError
from profit_jax.kernels.padding import output_extent
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import Unquantized, value_of

_traced = contextvars.ContextVar("profit_jax_traced", default=False)

# Operands: the input and, of a quantizer that is on, its largest code. Parameters: `kind`
# (conv, dense, quantizer, norm, activation or mean), `path` of the layer (empty for functions),
# `shape` of the output, and the layer's own attributes.
operation_p = core.Primitive("profit_operation")


@operation_p.def_abstract_eval
def _abstract(x, *qmax, shape, **attributes):
  del qmax, attributes
  return jax.core.ShapedArray(shape, x.dtype)


# Calls that are looked into, and the parameters in which their jaxprs are.
_CALLS = (
  "jit",
  "pjit",
  "closed_call",
  "core_call",
  "custom_jvp_call",
  "custom_vjp_call",
  "custom_vjp_call_jaxpr",
  "remat",
  "remat2",
  "checkpoint",
)
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def make_jaxpr(function: Callable[..., Any], *arguments: Any, failure: str) -> core.ClosedJaxpr:
  """`jax.make_jaxpr(function)(*arguments)`, in which layers are opaque operations.

  Args:
    function: calls a model.
    *arguments: of the function, or their shapes.
    failure: how a message begins that says what cannot be done.

  Raises:
    ConfigError: a layer inside a transformation, which cannot be traced.
  """
  try:
    with traced():
      return jax.make_jaxpr(function)(*arguments)
  except NotImplementedError as error:
    raise ConfigError(
      f"{failure}: a layer of profit_jax.nn is called inside a transformation such as vmap or grad "
      f"({error}). Call it outside."
    ) from error


def inner_jaxpr(equation: Any) -> tuple[Any, Any] | None:
  """The open jaxpr of a call, and its constants; None of other operations."""
  if equation.primitive.name not in _CALLS:
    return None
  inner = next(equation.params[name] for name in _INNER if name in equation.params)
  consts = inner.consts if isinstance(inner, core.ClosedJaxpr) else ()
  return getattr(inner, "jaxpr", inner), consts


def path_of(layer: nn.Module) -> str:
  """The path of a layer in its model, `block01/expand_conv`."""
  return "/".join(layer.path)


def active() -> bool:
  """Whether layers bind opaque operations."""
  return _traced.get()


@contextlib.contextmanager
def traced() -> Iterator[None]:
  """Inside, layers and functions of `nn/` bind opaque operations, and `jit` is off.

  JAX caches functions under `jit` by their arguments, not by this mode: one that ran before would
  give its plain operations.
  """
  token = _traced.set(True)
  try:
    with jax.disable_jit():
      yield
  finally:
    _traced.reset(token)


def conv(layer: nn.Module, x: Any, bits: Bits) -> jax.Array:
  """A `QuantConv`."""
  margin = layer.margin_for(x.shape)
  height, width = output_extent(layer.kernel_size, layer.stride, margin, x.shape[1:3])
  features = x.shape[-1] if layer.depthwise else layer.features
  return _bind(
    layer,
    x,
    bits.kernel_qmax(path_of(layer)),
    kind="conv",
    shape=(x.shape[0], height, width, features),
    stride=layer.stride,
    margin=margin,
    depthwise=layer.depthwise,
    pad_value=layer.pad_value,
    quantizer=bits.quantizer,
  )


def dense(layer: nn.Module, x: Any, bits: Bits) -> jax.Array:
  """A `QuantDense`."""
  shape = (*x.shape[:-1], layer.features)
  qmax = bits.kernel_qmax(path_of(layer))
  return _bind(layer, x, qmax, kind="dense", shape=shape, quantizer=bits.quantizer)


def quantizer(layer: nn.Module, x: Any, bits: Bits) -> Unquantized:
  """A `QuantAct`."""
  y = _bind(
    layer,
    x,
    bits.act_qmax(layer.kind, path_of(layer)),
    kind="quantizer",
    shape=x.shape,
    codes=layer.kind,
    quantizer=bits.quantizer,
  )
  return Unquantized(y)


def norm(layer: nn.Module, x: Any, function: str | None) -> jax.Array:
  """A `BatchNorm` with its running statistics, and the non-linearity after it."""
  x = _bind(layer, x, None, kind="norm", shape=x.shape, epsilon=layer.epsilon)
  return activation(x, function)


def activation(x: Any, function: str | None) -> jax.Array:
  """A non-linearity, one of `export.net.Activation`'s; None is none."""
  if function is None:
    return x
  return _bind(None, x, None, kind="activation", shape=x.shape, function=function)


def mean(x: Any) -> jax.Array:
  """The mean over space, `[N, H, W, C]` -> `[N, C]`."""
  return _bind(None, x, None, kind="mean", shape=(x.shape[0], x.shape[-1]))


def _bind(layer: nn.Module | None, x: Any, qmax: jax.Array | None, **attributes: Any) -> jax.Array:
  x = value_of(x)
  operands = [x] if qmax is None else [x, jnp.asarray(qmax, jnp.float32)]
  path = () if layer is None else layer.path
  return operation_p.bind(*operands, path=path, **attributes)
