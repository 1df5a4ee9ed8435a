"""Which part of a runtime executes which operators of a file, found by opening the file there."""

import collections
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

# What computes integers by integers; a Conv or MatMul computes floats.
_INTEGER = (
  "ConvInteger",
  "MatMulInteger",
  "MatMulIntegerToFloat",
  "QGemm",
  "QLinearConv",
  "QLinearMatMul",
)


def checked(runtime: str | None, path: str | os.PathLike) -> dict[str, Any]:
  """What a runtime does with a file.

  Args:
    runtime: the package, as `Format.opened_by`.
    path: of the file.

  Returns:
    For `onnxruntime`: `ir_version`, `opsets` (by domain), `operators` (numbers by execution
    provider and operator, after onnxruntime's optimizations) and `integer_operators`. For `qonnx`:
    `ir_version` and `opsets`. For `ai-edge-litert`: `partitions`, and `operators` by `XNNPACK` and
    `LiteRT`. For others nothing.
  """
  check = _CHECKS.get(runtime or "")
  return check(os.fspath(path)) if check else {}


def _versions(path: str) -> dict[str, Any]:
  import onnx

  model = onnx.load_model(path)
  return {
    "ir_version": model.ir_version,
    "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
  }


def _onnxruntime(path: str) -> dict[str, Any]:
  import onnx
  import onnxruntime

  model = onnx.load_model(path)
  (image,) = model.graph.input
  sizes = [size.dim_value for size in image.type.tensor_type.shape.dim]
  dtype = onnx.helper.tensor_dtype_to_np_dtype(image.type.tensor_type.elem_type)
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  options.enable_profiling = True
  with tempfile.TemporaryDirectory() as folder:
    options.profile_file_prefix = f"{folder}/profile"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {image.name: np.zeros([1, *sizes[1:]], dtype)})
    events = json.loads(pathlib.Path(session.end_profiling()).read_text())
  # A node may have several events.
  nodes = {
    event["name"]: (event["args"]["provider"], event["args"]["op_name"])
    for event in events
    if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
  }
  found: dict[str, list[str]] = {}
  for provider, kind in nodes.values():
    found.setdefault(provider, []).append(kind)
  operators = {provider: _counted(kinds) for provider, kinds in found.items()}
  return {
    **_versions(path),
    "operators": operators,
    "integer_operators": sum(
      number for kinds in operators.values() for kind, number in kinds.items() if kind in _INTEGER
    ),
  }


def _litert(path: str) -> dict[str, Any]:
  from ai_edge_litert.interpreter import Interpreter

  interpreter = Interpreter(path)
  interpreter.allocate_tensors()
  if not hasattr(interpreter, "_get_ops_details"):  # private: a version may lack it
    return {}
  operators = interpreter._get_ops_details()
  partitions = [operator for operator in operators if operator["op_name"] == "DELEGATE"]
  own = [operator for operator in operators if operator["op_name"] != "DELEGATE"]
  left = _left(own, partitions, [detail["index"] for detail in interpreter.get_output_details()])
  taken = [operator["op_name"] for operator in own if operator["index"] not in left]
  kinds = {"XNNPACK": _counted(taken), "LiteRT": _counted(left.values())}
  return {
    "partitions": len(partitions),
    "operators": {who: counts for who, counts in kinds.items() if counts},
  }


def _left(
  own: list[dict[str, Any]], partitions: list[dict[str, Any]], outputs: Iterable[int]
) -> dict[int, str]:
  """The operators that a delegate leaves to LiteRT, by index. LiteRT lists those that it took, too:
  the others are what partitions and outputs need and no partition computes.
  """
  writer = {int(tensor): operator for operator in own for tensor in operator["outputs"]}
  for partition in partitions:
    for tensor in partition["outputs"]:
      writer.pop(int(tensor), None)
  needed = [
    *map(int, outputs),
    *(int(tensor) for partition in partitions for tensor in partition["inputs"]),
  ]
  found: dict[int, str] = {}
  while needed:
    operator = writer.get(needed.pop())
    if operator is not None and operator["index"] not in found:
      found[operator["index"]] = operator["op_name"]
      needed += map(int, operator["inputs"])
  return found


def _counted(kinds: Iterable[str]) -> dict[str, int]:
  """Numbers by kind, the most frequent first."""
  return dict(collections.Counter(kinds).most_common())


_CHECKS: dict[str, Callable[[str], dict[str, Any]]] = {
  "onnxruntime": _onnxruntime,
  "qonnx": _versions,
  "ai-edge-litert": _litert,
}
