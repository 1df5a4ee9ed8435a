"""The format `jax`: an artifact of `jax.export` that needs nothing of this package, with the codes
packed in bytes.

    exported = jax.export.deserialize(bytearray(open(FILE, "rb").read()))
    logits = exported.call(images)

`images` is uint8 `[N, H, W, C]` (float32, if the net does not normalize), `logits` float32
`[N, num_classes]`.

Any batch; lowered for CPU, CUDA and TPU. Kernels stand in the program as uint8 constants, several
codes each, since StableHLO writes int4 constants with a byte per code; the program takes them apart
with shifts. Every quantizer is a function of its own, `codes_of__` and its name with `__` for `/`:
`open_file` finds them there.
"""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func, stablehlo
from jax.interpreters import mlir

from profit_jax import devices
from profit_jax.export import reference
from profit_jax.export.net import Net, Quantizer
from profit_jax.export.packing import pack, unpack

PLATFORMS = ("cpu", "cuda", "tpu")
_PREFIX = "codes_of__"


def write(net: Net, path: str | os.PathLike) -> None:
  """Writes the artifact."""
  packed = {
    layer.name: pack(layer.kernel, layer.field_bits) for layer in net.layers if layer.quantized
  }

  def kernel(layer):
    if not layer.quantized:
      return layer.kernel
    return unpack(jnp.asarray(packed[layer.name]), layer.field_bits, layer.kernel.shape)

  def classify(image):
    kernels = {layer.name: kernel(layer) for layer in net.layers}
    return reference.run(net, image, kernels, _named_codes)

  (batch,) = jax.export.symbolic_shape("batch")
  image = jax.ShapeDtypeStruct((batch, *net.image_shape), net.image_dtype)
  exported = jax.export.export(jax.jit(classify), platforms=PLATFORMS)(image)
  pathlib.Path(path).write_bytes(exported.serialize())


def _named_codes(node: Quantizer, x: jax.Array) -> jax.Array:
  def compute(x):
    return reference.codes(node, x)

  compute.__name__ = _PREFIX + node.name.replace("/", "__")
  return jax.jit(compute)(x)


def open_file(path: str | os.PathLike) -> "Runner":
  """Reads a file that `write` wrote; raises as `devices.require`."""
  devices.require()
  return Runner(jax.export.deserialize(bytearray(pathlib.Path(path).read_bytes())))


class Runner:
  """The artifact in JAX, on the default device."""

  def __init__(self, exported: jax.export.Exported):
    """Args: exported, as read from the file."""
    self._logits = jax.jit(exported.call)
    self._exported, self._with_codes = exported, None

  def run(
    self, image: np.ndarray, with_codes: bool = False
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and if asked for every quantizer's codes: those of the same program, with more
    results.
    """
    if not with_codes:
      return np.asarray(self._logits(image)), {}
    if self._with_codes is None:
      observed, self._names = _with_results(self._exported)
      self._with_codes = jax.jit(observed.call)
    logits, *codes = jax.device_get(self._with_codes(image))
    return logits, dict(zip(self._names, codes, strict=True))


def _with_results(exported: jax.export.Exported) -> tuple[jax.export.Exported, list[str]]:
  """The same artifact with every quantizer's codes as a further result, and their names.

  Its outer function wraps the one with the computation; both give on what the inner one's calls of
  quantizers give.
  """
  with mlir.make_ir_context() as context, ir.Location.unknown(context):
    module = ir.Module.parse(exported.mlir_module())
    functions = {function.name.value: function for function in module.body.operations}
    main = functions["main"]
    (wrapper,) = [
      op for op in main.regions[0].blocks[0].operations if op.operation.name == "func.call"
    ]
    inner = functions[wrapper.callee.value]
    calls = [
      op
      for op in inner.regions[0].blocks[0].operations
      if op.operation.name == "func.call" and op.callee.value.startswith(_PREFIX)
    ]
    types = [call.results[0].type for call in calls]
    _return_more(inner, [call.results[0] for call in calls])
    with ir.InsertionPoint(wrapper):
      call = func.CallOp(
        [*(result.type for result in wrapper.results), *types],
        wrapper.callee,
        list(wrapper.operands),
      )
    for before, after in zip(wrapper.results, call.results, strict=False):
      before.replace_all_uses_with(after)
    wrapper.erase()
    _return_more(main, list(call.results)[len(call.results) - len(types) :])
    module.operation.verify()
    serialized = stablehlo.serialize_portable_artifact_str(
      str(module), stablehlo.get_current_version()
    )
    names = [call.callee.value.removeprefix(_PREFIX).replace("__", "/") for call in calls]
    batch = exported.in_avals[0].shape[0]
    shapes = [
      tuple(
        batch if ir.ShapedType(kind).is_dynamic_dim(i) else n
        for i, n in enumerate(ir.ShapedType(kind).shape)
      )
      for kind in types
    ]
  results = (*exported.out_avals, *(jax.core.ShapedArray(shape, np.float32) for shape in shapes))
  more = len(results) - len(exported.out_avals)
  return dataclasses.replace(
    exported,
    out_tree=jax.tree.structure([0] * len(results)),
    out_avals=results,
    out_shardings_hlo=(*exported.out_shardings_hlo, *[None] * more),
    _out_named_shardings=(*exported._out_named_shardings, *[None] * more),
    mlir_module_serialized=serialized,
  ), names


def _return_more(function, values) -> None:
  """Adds results to a function."""
  block = function.regions[0].blocks[0]
  end = block.operations[len(block.operations) - 1]
  kind = ir.FunctionType(function.type)
  with ir.InsertionPoint(end):
    func.ReturnOp([*end.operands, *values])
  end.erase()
  results = [*kind.results, *(value.type for value in values)]
  function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(kind.inputs, results))
  if "res_attrs" in function.attributes:
    del function.attributes["res_attrs"]
