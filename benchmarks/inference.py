"""Exported files beside the float model in the same runtime: size, latency, throughput.

python benchmarks/inference.py [--model mobilenet_v2] [--bits 4] [--image_size 224] [--net
FILE.safetensors] [--threads 1] [--batch 1] [--json FILE]

Weights are random (time does not depend on them) unless --net gives an exported net. The float
model has the same layers, batch normalization folded into its kernels, ReLU6 in place of
quantizers. Post-training int8 is what the runtime's own tool makes of the float model:
`quantize_static` of onnxruntime (per channel, QDQ), and ai-edge-quantizer for LiteRT, which no
extra of this package installs: `pip install ai-edge-quantizer==0.10.0`. All files of a runtime take
turns in one process that has as many cores as threads; figures are medians. What cannot run says
why.

--json writes `ratio_to_float` by format: times over that of the runtime's float model, with
`milliseconds`, `bytes`, `not_run`, the processor and the versions.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import logging
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

POST_TRAINING = "post_training_int8"
CALIBRATION = 8  # images, of the tools that need some
PACKAGES = ("onnxruntime", "ai-edge-litert", "ai-edge-quantizer", "jax")


class Measured(NamedTuple):
  """A file and how it is run.

  Attributes:
    path: of the file.
    run: images -> anything.
  """

  path: pathlib.Path
  run: Callable[[Any], Any]


class Runtime(NamedTuple):
  """Files that take turns.

  Attributes:
    prefix: of the names of its other files.
    formats: of this package.
    float_model: net, path, threads -> the float model.
    post_training: path of the float model, images, threads -> the same as int8; None without.
  """

  prefix: str
  formats: tuple[str, ...]
  float_model: Callable[[Any, pathlib.Path, int], Measured]
  post_training: Callable[[pathlib.Path, Any, int], Measured] | None


class Missing(Exception):
  """What cannot run; the argument says why."""


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="mobilenet_v2")
  parser.add_argument("--bits", type=int, default=4, help="of weights and activations")
  parser.add_argument("--image_size", type=int, default=224)
  parser.add_argument(
    "--net", help="a .safetensors file that --mode export wrote, instead of random weights"
  )
  parser.add_argument(
    "--formats",
    default="onnx,onnx_int8,litert,litert_packed,litert_int8,jax,safetensors",
    help="of exported files",
  )
  parser.add_argument("--threads", type=int, default=1, help="and cores of the process")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--seconds", type=float, default=10.0, help="measured per runtime")
  parser.add_argument("--json", help="a file for the figures")
  options = parser.parse_args()
  available = sorted(os.sched_getaffinity(0))
  if options.threads > len(available):
    parser.error(f"--threads={options.threads}: this process has {len(available)} cores")
  # Before JAX and the runtimes count them.
  os.sched_setaffinity(0, available[: options.threads])
  for logger in ("root", "absl"):
    logging.getLogger(logger).setLevel(logging.ERROR)
  warnings.simplefilter("ignore")  # of the quantization tools
  found = measure(options)
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


def measure(options) -> dict[str, Any]:
  """Measures all formats; returns what --json writes."""
  import numpy as np

  from profit_jax.export import safetensors_file

  net = safetensors_file.read(options.net) if options.net else random_net(options)
  images = np.random.default_rng(0).integers(
    0, 256, (max(options.batch, CALIBRATION), *net.image_shape), np.uint8
  )
  images = images.astype(net.image_dtype)
  found: dict[str, Any] = {
    "net": f"{net.model} {net.bits_name}",
    "image_shape": net.image_shape,
    "num_classes": net.num_classes,
    "threads": options.threads,
    "batch": options.batch,
    "processor": processor(),
    "versions": versions(),
    **{what: {} for what in ("ratio_to_float", "milliseconds", "bytes", "not_run")},
  }
  print(f"{found['net']}, {net.image_shape[0]} pixels, {net.num_classes} classes")
  print(f"{options.threads} threads, batch {options.batch}, {found['processor']}")
  print(f"{'file':27}{'bytes':>12}{'ms':>9}{'ratio':>7}{'img/s':>9}", flush=True)
  for runtime in RUNTIMES:
    formats = [name for name in runtime.formats if name in options.formats.split(",")]
    if formats:
      with tempfile.TemporaryDirectory() as folder:
        measure_runtime(runtime, formats, net, images, pathlib.Path(folder), options, found)
  return found


def measure_runtime(runtime, formats, net, images, folder, options, found) -> None:
  """Measures the files of a runtime and adds them to `found`."""
  float_name, threads = f"{runtime.prefix}_float", options.threads
  made: dict[str, Callable[[], Measured]] = {
    name: functools.partial(exported, name, net, images, folder, threads) for name in formats
  }
  files: dict[str, Measured] = {}
  try:
    files[float_name] = runtime.float_model(net, folder / "float", threads)
  except ImportError as error:
    for name in formats:
      found["not_run"][name] = f"needs {error.name}"
    made = {}
  if made and runtime.post_training:
    made[f"{runtime.prefix}_{POST_TRAINING}"] = functools.partial(
      runtime.post_training, files[float_name].path, images, threads
    )
  for name, make in made.items():
    try:
      files[name] = make()
    except Missing as error:
      found["not_run"][name] = str(error)
  image = images[: options.batch]
  times = take_turns(
    {name: functools.partial(file.run, image) for name, file in files.items()}, options.seconds
  )
  for name, seconds in times.items():
    size, ratio = files[name].path.stat().st_size, seconds / times[float_name]
    found["ratio_to_float"][name] = round(ratio, 3)
    found["milliseconds"][name] = round(1e3 * seconds, 2)
    found["bytes"][name] = size
    rate = options.batch / seconds
    print(f"{name:27}{size:>12,}{1e3 * seconds:>9.2f}{ratio:>7.2f}{rate:>9.1f}", flush=True)
  for name in dict.fromkeys([*formats, *made]):
    if name in found["not_run"]:
      print(f"{name:27}not run: {found['not_run'][name]}", flush=True)


def take_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
  """The median seconds of calls that take turns."""
  for _ in range(3):
    for call in calls.values():
      call()
  times: dict[str, list[float]] = {name: [] for name in calls}
  end = time.perf_counter() + seconds
  while calls and (time.perf_counter() < end or min(map(len, times.values())) < 5):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - start)
  return {name: statistics.median(found) for name, found in times.items()}


def processor() -> str:
  """Its name, and whether it multiplies 8-bit integers in one instruction."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor() or platform.machine()
  facts = dict(line.split(":", 1) for line in lines if ":" in line)
  facts = {key.strip(): value.strip() for key, value in facts.items()}
  flags = facts.get("flags", facts.get("Features", "")).split()
  known = [
    flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp") if flag in flags
  ]
  return f"{facts.get('model name', platform.machine())} ({', '.join(known) or 'no vectors'})"


def versions() -> dict[str, str]:
  """Of the packages that are installed."""
  found = {}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def exported(name, net, images, folder, threads) -> Measured:
  """A file of a format of this package."""
  from profit_jax.config import ConfigError
  from profit_jax.export import formats
  from profit_jax.export.integer import lower, ranges

  try:
    module = formats.load(name)
  except ConfigError as error:
    raise Missing(str(error)) from None
  path = folder / f"net{formats.FORMATS[name].suffix}"
  if formats.FORMATS[name].integer:
    net = lower.lower(net, ranges.measure(net, [images[:CALIBRATION]]), module.RUNTIME)
  module.write(net, path)
  # JAX takes all cores of the process.
  options = {} if name in ("jax", "safetensors") else {"threads": threads}
  return Measured(path, module.open_file(path, **options).run)


def random_net(options):
  """A net with random weights."""
  import jax

  from configs import base
  from profit_jax.config import parse
  from profit_jax.data import NORMALIZATIONS
  from profit_jax.export.build import build_net
  from profit_jax.models import REGISTRY, student_spec
  from profit_jax.quant.bits import Bits
  from profit_jax.train.steps import calibrate_weights

  config = base.get_config()
  config.model.name, config.data.image_size = options.model, options.image_size
  settings = parse(config, REGISTRY)
  spec = student_spec(settings, 1000)
  variables = dict(spec.init(jax.random.key(0)))
  bits = Bits(weight=options.bits)
  variables["params"] = calibrate_weights(variables["params"], bits, spec)
  net = build_net(
    spec,
    jax.device_get(variables),
    name=options.model,
    normalization=NORMALIZATIONS["imagenet"],
    weight_bits=options.bits,
    act_bits=options.bits,
  )
  return spread(net)


def spread(net):
  """The net with random multipliers and biases, which make of random kernels a net whose
  quantizers use all of their codes.
  """
  import numpy as np

  random, sources = np.random.default_rng(0), net.code_sources()
  nodes = []
  for node in net.nodes:
    if node in net.layers:
      source = sources.get(node.input)
      size = 1.0 if source is None else source.high / 2  # of what it reads, roughly
      kernel = np.float64(node.kernel).reshape(-1, node.kernel.shape[-1])
      norm = size * np.sqrt((kernel**2).sum(0)) + 1e-6
      signs = random.choice([-1.0, 1.0], norm.shape)
      multiplier = signs * random.uniform(0.3, 0.9, norm.shape) / norm
      bias = random.uniform(-0.2, 0.4, norm.shape)
      node = dataclasses.replace(node, multiplier=np.float32(multiplier), bias=np.float32(bias))
    nodes.append(node)
  return net._replace(nodes=tuple(nodes))


def float_kernel(net, layer):
  """The kernel that gives y without a multiplier, from the values of the layer's input."""
  import numpy as np

  scales = {quantizer.name: quantizer.scale for quantizer in net.quantizers}
  return np.float32(layer.kernel * (layer.multiplier / np.float32(scales.get(layer.input, 1.0))))


def float_onnx(net, path, threads) -> Measured:
  """The float model in onnxruntime: Conv with bias, and Clip."""
  import numpy as np
  import onnx
  from onnx import TensorProto, helper

  from profit_jax.export import onnx_file
  from profit_jax.export.net import IMAGE

  class Graph(onnx_file.Graph):
    """Floats in place of codes."""

    def _layer(self, node, result):
      kernel, bias = float_kernel(net, node), self._array(f"{node.name}/bias", node.bias)
      if node.dense:
        weight = self._array(f"{node.name}/kernel", kernel)
        return self._op("Gemm", [self._names[node.input], weight, bias], result)
      weight = self._array(
        f"{node.name}/kernel", np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
      )
      (above, below), (left, right) = node.border
      shape = {
        "kernel_shape": kernel.shape[:2],
        "pads": [above, left, below, right],
        "strides": [node.stride] * 2,
      }
      group = kernel.shape[-1] if node.depthwise else 1
      return self._op("Conv", [self._names[node.input], weight, bias], result, group=group, **shape)

    def quantizer(self, node, result):
      if node.signed or node.margin:
        return self._names[node.input]
      return self._op(
        "Clip", [self._names[node.input], self._constant(0.0), self._constant(6.0)], result
      )

    def _value(self, node, result):
      return self._names[node.input]

  graph = Graph(net)
  shape = ["N", *net.image_shape]
  model = helper.make_model(
    helper.make_graph(
      graph.nodes,
      "float",
      [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, shape)],
      [helper.make_tensor_value_info(onnx_file.LOGITS, TensorProto.FLOAT, ["N", net.num_classes])],
      graph.initializers,
    ),
    opset_imports=[helper.make_opsetid("", 21)],
    ir_version=10,
  )
  path = path.with_suffix(".onnx")
  onnx.save_model(model, path)
  return Measured(path, onnx_file.open_file(path, threads).run)


def float_litert(net, path, threads) -> Measured:
  """The float model in LiteRT: convolutions with bias, and Relu6."""
  import numpy as np

  from profit_jax.export import litert_file
  from profit_jax.export.net import IMAGE

  class Graph(litert_file.Graph):
    """Floats in place of codes."""

    def _kernel(self, node):
      kernel = float_kernel(net, node)
      kernel = np.moveaxis(kernel, 2, 0) if node.depthwise else np.moveaxis(kernel, -1, 0)
      return self._array(f"{node.name}/kernel", np.ascontiguousarray(kernel))

    def _scaled(self, x, node, result):
      # The output must have its name: a sum with 0.
      if result != litert_file.LOGITS:
        return x
      return self._op("ADD", [x, self._constant(0.0)], result)

    def _bias(self, node):
      return self._array(f"{node.name}/bias", node.bias)

    def _quantizer(self, node, result):
      x = self._names[node.input]
      return x if node.signed or node.margin else relu6(self, x, result)

    def _activation(self, node, result):
      if node.function != "relu6":
        return super()._activation(node, result)
      return relu6(self, self._names[node.input], result)

    def _value(self, node, result):
      return self._names[node.input]

  path = path.with_suffix(".tflite")
  graph = Graph(net)
  litert_file.save(net, graph, path)
  sign(path, graph.index(IMAGE), graph.index(litert_file.LOGITS))
  return Measured(path, litert_file.open_file(path, threads).run)


def relu6(graph, x, result):
  """As converters write it: part of the convolution, if that is the operation before."""
  from ai_edge_litert import schema_py_generated as schema

  last = graph.operators[-1]
  if last.outputs == [graph.index(x)] and hasattr(last.builtinOptions, "strideW"):
    last.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.RELU6
    return x
  return graph._op("RELU6", [x], result)


def sign(path, image, logits) -> None:
  """Gives a LiteRT file a signature, by which ai-edge-quantizer finds the input."""
  from ai_edge_litert import schema_py_generated as schema
  from ai_edge_litert.tools import flatbuffer_utils

  from profit_jax.export.litert_file import LOGITS
  from profit_jax.export.net import IMAGE

  model = flatbuffer_utils.read_model(path)
  model.signatureDefs = [
    schema.SignatureDefT(
      signatureKey=SIGNATURE,
      inputs=[schema.TensorMapT(name=IMAGE, tensorIndex=image)],
      outputs=[schema.TensorMapT(name=LOGITS, tensorIndex=logits)],
      subgraphIndex=0,
    )
  ]
  flatbuffer_utils.write_model(model, path)


def float_jax(net, path, threads) -> Measured:
  """The float model in JAX; its file is safetensors of its kernels and biases."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import safetensors.numpy

  from profit_jax.export import reference
  from profit_jax.export.net import IMAGE, Layer, Quantizer, Value
  from profit_jax.kernels.depthwise import grouped, sum_of_taps

  arrays = {}
  for layer in net.layers:
    arrays[f"{layer.name}.kernel"], arrays[f"{layer.name}.bias"] = (
      float_kernel(net, layer),
      layer.bias,
    )

  @jax.jit
  def run(arrays, image):
    factor, summand = net.pixel_scale() or (1.0, 0.0)
    values = {IMAGE: image.astype(jnp.float32) * factor + summand}
    for node in net.nodes:
      x, *more = (values[name] for name in reference.inputs(node))
      if isinstance(node, Layer):
        kernel, bias = arrays[f"{node.name}.kernel"], arrays[f"{node.name}.bias"]
        if node.dense:
          y = x @ kernel
        elif node.depthwise:
          padded = jnp.pad(x, [(0, 0), *node.border, (0, 0)])
          cpu = jax.default_backend() == "cpu"
          y = (sum_of_taps if cpu else grouped)(padded, kernel, stride=node.stride)
        else:
          strides = (node.stride, node.stride)
          y = jax.lax.conv_general_dilated(
            x, kernel, strides, node.border, dimension_numbers=("NHWC", "HWIO", "NHWC")
          )
        values[node.name] = y + bias
      elif isinstance(node, Quantizer):
        values[node.name] = x if node.signed or node.margin else jnp.clip(x, 0.0, 6.0)
      elif isinstance(node, Value):
        values[node.name] = x
      else:
        values[node.name] = reference._OTHERS[type(node)](node, x, *more)
    return values[net.nodes[-1].name]

  path = path.with_suffix(".safetensors")
  safetensors.numpy.save_file(arrays, path)
  placed = jax.device_put(arrays)
  return Measured(path, lambda image: np.asarray(run(placed, image)))


def post_training_onnx(float_path, images, threads) -> Measured:
  """The float model as int8 by onnxruntime: uint8 activations, int8 kernels per channel."""
  import onnx
  from onnxruntime import quantization

  from profit_jax.export import onnx_file
  from profit_jax.export.net import IMAGE

  class Images(quantization.CalibrationDataReader):
    """One after the other."""

    def __init__(self):
      self._left = iter(images[:CALIBRATION])

    def get_next(self):
      image = next(self._left, None)
      return None if image is None else {IMAGE: image[None]}

  path = float_path.with_suffix(".int8.onnx")
  model = onnx.shape_inference.infer_shapes(onnx.load(float_path))
  quantization.quantize_static(
    model,
    path,
    Images(),
    quant_format=quantization.QuantFormat.QDQ,
    per_channel=True,
    activation_type=quantization.QuantType.QUInt8,
    weight_type=quantization.QuantType.QInt8,
  )
  return Measured(path, onnx_file.open_file(path, threads).run)


def post_training_litert(float_path, images, threads) -> Measured:
  """The float model as int8 by ai-edge-quantizer: int8 activations, int8 kernels per channel."""
  try:
    from ai_edge_quantizer import quantizer, recipe
  except ImportError:
    raise Missing("needs ai-edge-quantizer") from None
  from profit_jax.export import litert_file
  from profit_jax.export.net import IMAGE

  path = float_path.with_suffix(".int8.tflite")
  given = {SIGNATURE: [{IMAGE: image[None]} for image in images[:CALIBRATION]]}
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    tool = quantizer.Quantizer(str(float_path), recipe.static_wi8_ai8())
    tool.quantize(tool.calibrate(given)).export_model(str(path), overwrite=True)
  return Measured(path, litert_file.open_file(path, threads).run)


SIGNATURE = "serving_default"
RUNTIMES = (
  Runtime("onnx", ("onnx", "onnx_int8"), float_onnx, post_training_onnx),
  Runtime("litert", ("litert", "litert_packed", "litert_int8"), float_litert, post_training_litert),
  Runtime("jax", ("jax", "safetensors"), float_jax, None),
)

if __name__ == "__main__":
  main()
