"""Exported files beside the float model in the same runtime: size, latency, throughput.

python benchmarks/inference.py [--model mobilenet_v2] [--bits 4] [--image_size 224] [--net
FILE.safetensors]

Weights are random (time does not depend on them) unless --net gives an exported net. The float
model has the same layers, batch normalization folded into its kernels, ReLU6 in place of
quantizers. Each line's two sides take turns in one process that has as many cores as the line says.
"""

import argparse
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

CORES, BATCHES = (1, 2), (1, 16)


def main() -> None:
  """Starts a process for every number of cores."""
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
    "--formats", default="onnx,jax,safetensors", help="also qonnx, litert, where they are installed"
  )
  parser.add_argument("--seconds", type=float, default=5.0, help="measured per line")
  parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.cores is not None:
    measure(options)
    return
  available = sorted(os.sched_getaffinity(0))
  for cores in CORES:
    if cores > len(available):
      print(f"{cores} cores: not run, {len(available)} available")
      continue
    # Before JAX and onnxruntime count them.
    subprocess.run(
      [sys.executable, *sys.argv, f"--cores={cores}"],
      check=True,
      preexec_fn=lambda cores=cores: os.sched_setaffinity(0, available[:cores]),
    )


def measure(options) -> None:
  """Measures all formats on this process's cores."""
  import jax
  import numpy as np

  from profit_jax.export import formats, safetensors_file

  net = safetensors_file.read(options.net) if options.net else random_net(options)
  images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), *net.image_shape), np.uint8)
  images = images.astype(net.image_dtype)
  first = options.cores == CORES[0]
  if first:
    print(
      f"{net.model} {net.bits_name}, {net.image_shape[0]} pixels, {net.num_classes} classes; "
      f"JAX on {jax.devices()[0]}"
    )
    print(
      f"{'format':12}{'cores':>6}{'batch':>6}{'file ms':>10}{'float ms':>10}{'ratio':>7}"
      f"{'file img/s':>12}{'float img/s':>12}"
    )
  with tempfile.TemporaryDirectory() as folder:
    for name in options.formats.split(","):
      path = pathlib.Path(folder) / f"net{formats.FORMATS[name].suffix}"
      module = formats.load(name)
      module.write(net, path)
      float_path, float_run = FLOAT.get(name, float_jax)(net, pathlib.Path(folder) / "float")
      runner = module.open_file(path)
      if first:
        size, float_size = path.stat().st_size, float_path.stat().st_size
        print(
          f"{name:12}{size:,} bytes, float {float_size:,} bytes: {float_size / size:.2f}x smaller"
        )
      for batch in BATCHES:
        image = images[:batch]
        calls = functools.partial(runner.run, image), functools.partial(float_run, image)
        ours, theirs = take_turns(*calls, options.seconds)
        print(
          f"{name:12}{options.cores:>6}{batch:>6}{1e3 * ours:>10.2f}{1e3 * theirs:>10.2f}"
          f"{ours / theirs:>7.2f}{batch / ours:>12.1f}{batch / theirs:>12.1f}",
          flush=True,
        )


def take_turns(ours, theirs, seconds) -> tuple[float, float]:
  """The median seconds of two calls that take turns."""
  for _ in range(3):
    ours(), theirs()
  times = [], []
  end = time.perf_counter() + seconds
  while time.perf_counter() < end or len(times[0]) < 5:
    for call, found in zip((ours, theirs), times, strict=True):
      start = time.perf_counter()
      call()
      found.append(time.perf_counter() - start)
  return statistics.median(times[0]), statistics.median(times[1])


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
  return build_net(
    spec,
    jax.device_get(variables),
    name=options.model,
    normalization=NORMALIZATIONS["imagenet"],
    weight_bits=options.bits,
    act_bits=options.bits,
  )


def float_kernel(net, layer):
  """The kernel that gives y without a multiplier, from the values of the layer's input."""
  import numpy as np

  scales = {quantizer.name: quantizer.scale for quantizer in net.quantizers}
  return np.float32(layer.kernel * (layer.multiplier / np.float32(scales.get(layer.input, 1.0))))


def float_onnx(net, path):
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
      shape = {
        "kernel_shape": kernel.shape[:2],
        "pads": [node.margin] * 4,
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
  runner = onnx_file.open_file(path)
  return path, lambda image: runner.run(image)


def float_litert(net, path):
  """The float model in LiteRT: convolutions with bias, and Relu6."""
  import numpy as np

  from profit_jax.export import litert_file

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
      return x if node.signed or node.margin else self._op("RELU6", [x], result)

    def _value(self, node, result):
      return self._names[node.input]

  path = path.with_suffix(".tflite")
  litert_file.save(net, Graph(net), path)
  runner = litert_file.open_file(path)
  return path, lambda image: runner.run(image)


def float_jax(net, path):
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
        margins = [(node.margin, node.margin)] * 2
        if node.dense:
          y = x @ kernel
        elif node.depthwise:
          padded = jnp.pad(x, [(0, 0), *margins, (0, 0)])
          cpu = jax.default_backend() == "cpu"
          y = (sum_of_taps if cpu else grouped)(padded, kernel, stride=node.stride)
        else:
          strides = (node.stride, node.stride)
          y = jax.lax.conv_general_dilated(
            x, kernel, strides, margins, dimension_numbers=("NHWC", "HWIO", "NHWC")
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
  return path, lambda image: np.asarray(run(placed, image))


FLOAT = {"onnx": float_onnx, "litert": float_litert}

if __name__ == "__main__":
  main()
