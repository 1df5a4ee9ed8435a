"""Integer files of nets, and what is compared of them."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from profit_jax.data.normalize import Normalization
from profit_jax.export import formats, reference, verify
from profit_jax.export.integer import lower, ranges
from profit_jax.export.integer.net import IntegerNet
from profit_jax.export.net import (
  IMAGE,
  Activation,
  Affine,
  Clip,
  Concat,
  Layer,
  Net,
  Pool,
  Reshape,
  Value,
)
from tests.export.nets import NORMALIZATION, SIZE, Maker, images

FORMATS = ("onnx_int8", "litert_int8")
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def images_of(net):
  """Images that a net takes, the same ones at every call."""
  if net.normalization is not None:
    return images()[..., : net.image_shape[-1]]
  return np.float32(np.random.default_rng(0).normal(0.3, 1.0, (24, *net.image_shape)))


@functools.cache
def ranges_of(net):
  return ranges.measure(net, [images_of(net)])


@functools.cache
def lowered(net, name):
  """The integer net of a format."""
  return lower.lower(net, ranges_of(net), formats.load(name).RUNTIME)


class File(NamedTuple):
  """A file of a net, and what it computes of the net's images.

  Attributes:
    integer: the net that was written.
    path: of the file.
    runner: the file, read back.
    logits: of the images.
    codes: by quantizer.
  """

  integer: IntegerNet
  path: str
  runner: formats.Runner
  logits: np.ndarray
  codes: dict[str, np.ndarray]


@functools.cache
def written(net, name, folder):
  """A file of the net in a folder."""
  module, made = formats.load(name), lowered(net, name)
  path = str(folder / f"{len(list(folder.iterdir()))}{formats.FORMATS[name].suffix}")
  module.write(made, path)
  runner = module.open_file(path)
  return File(made, path, runner, *runner.run(images_of(net), with_codes=True))


class Compared(NamedTuple):
  """A file's codes beside those that the net computes of the file's codes before.

  Attributes:
    largest: difference of two codes, by quantizer.
    shares: of the codes, how many differ, by quantizer.
    apart: how many of them are not at a tie.
    logits: that follow from the file's codes.
  """

  largest: dict[str, int]
  shares: dict[str, float]
  apart: dict[str, int]
  logits: np.ndarray


@functools.cache
def compared(net, name, folder):
  """Teacher-forced."""
  codes = {key: np.float32(array) for key, array in written(net, name, folder).codes.items()}
  logits, read = jax.device_get(verify.forced(net, images_of(net), codes))
  largest, shares, apart = {}, {}, {}
  for node in net.quantizers:
    theirs, x = codes[node.name], read[node.name]
    count, differing, apart[node.name] = verify._count(node, x, theirs)
    largest[node.name] = int(np.abs(theirs - reference.codes(node, x)).max())
    shares[node.name] = differing / count
  return Compared(largest, shares, apart, logits)


def direct(net):
  """The quantizers of what a layer computes of codes, which nothing else reads."""
  writers, codes = {node.name: node for node in net.nodes}, net.code_sources()
  readers = [name for node in net.nodes for name in _inputs(node)]

  def is_direct(name):
    node = writers.get(name)
    if readers.count(name) != 1 or node is None:
      return False
    if isinstance(node, Layer):
      return node.quantized and node.input in codes
    bounding = isinstance(node, Clip) or (
      isinstance(node, Activation) and node.function in ("relu", "relu6")
    )
    return bounding and is_direct(node.input)

  return [node for node in net.quantizers if is_direct(node.input)]


def _inputs(node):
  return [getattr(node, field) for field in ("input", "other") if hasattr(node, field)] + [
    *getattr(node, "others", ())
  ]


@functools.cache
def signed_mean():
  """A net whose mean of signed values is clipped by an unsigned quantizer."""
  net = Maker(4, 4)
  x = net.quantizer(net.layer(IMAGE, "stem", (3, 3, 3, 8), stride=2), "first", "symmetric")
  x = net.mean(net.layer(x, "block", (1, 1, 8, 32), gain=4.0))
  net.layer(net.quantizer(x, "second", "unsigned"), "classifier", (32, 10))
  return _net("signed_mean", net)


@functools.cache
def bounded(low, high, interval):
  """A net whose stem's result has bounds, and is read by a quantizer and a shortcut."""
  net = Maker(4, 4)
  x = net.layer(IMAGE, "stem", (3, 3, 3, 8), gain=4.0 * max(high, -low), stride=2)
  x = net.clip(x, low, high) if (low, high) != (0.0, 6.0) else net.activation(x, "relu6")
  first = net.quantizer(x, "first", "symmetric", interval=interval)
  y = net.layer(first, "block", (1, 1, 8, 8), gain=0.01)
  net.quantizer(net.add(y, x), "second", "symmetric", interval=interval)
  net.layer(net.mean("second"), "classifier", (8, 10))
  return _net("bounded", net)


def _net(name, net, normalization=NORMALIZATION):
  return Net(name, tuple(net.nodes), (SIZE, SIZE, 3), normalization, 4, 4)


@functools.cache
def image_read_by(what):
  """A net whose image, of three units, is not read by a full convolution."""
  net, kernel = Maker(4, 4), (3, 3, 3, 8)
  if what == "depthwise convolution":
    x = net.layer(IMAGE, "depthwise", (3, 3, 1, 3), depthwise=True)
  elif what == "affine":
    scale, shift = np.float32([1.0, 0.5, 2.0]), np.float32([0.1, 0.2, 0.3])
    x = net.append(Affine(name="norm", input=IMAGE, multiplier=scale, bias=shift))
  elif what == "clip":
    x = net.clip(IMAGE, -1.0, 1.0)
  elif what == "concat":
    own = net.activation(net.layer(IMAGE, "stem", kernel), "relu")
    x, kernel = net.append(Concat(name="both", input=IMAGE, others=(own,))), (3, 3, 11, 8)
  elif what == "reshape":
    x = net.append(Reshape(name="flat", input=IMAGE, shape=(3 * SIZE**2,)))
    x, kernel = net.layer(x, "dense", (3 * SIZE**2, 8)), (8, 8)
  else:
    x, kernel = net.mean(IMAGE), (3, 8)
  net.layer(net.quantizer(x, "first", "symmetric"), "block", kernel)
  x = net.quantizer("block", "second", "unsigned")
  net.layer(net.mean(x) if len(kernel) == 4 else x, "classifier", (8, 10))
  return _net("image", net, IMAGENET)


@functools.cache
def mean_pool(function):
  """A net with a mean of windows of codes, and an activation behind."""
  net = Maker(4, 4)
  codes = net.quantizer(net.layer(IMAGE, "stem", (3, 3, 3, 8), gain=2.0), "first", "unsigned")
  x = net.append(Value(name="values", input=codes, scale=2.2 / 15, offset=0.0))
  x = net.append(
    Pool(
      name="pool",
      input=x,
      function="mean",
      window=(3, 3),
      strides=(2, 2),
      padding=((0, 1), (0, 1)),
    )
  )
  if function:
    x = net.activation(x, function)
  net.quantizer(x, "second", "symmetric", interval=0.7)
  net.layer(net.mean("second"), "classifier", (8, 10))
  return _net("mean_pool", net)


@functools.cache
def relu_before_hard_swish():
  """A net with bounds behind one another."""
  net = Maker(4, 4)
  x = net.quantizer(net.layer(IMAGE, "stem", (3, 3, 3, 8)), "first", "unsigned")
  x = net.activation(net.layer(x, "block", (1, 1, 8, 8), gain=2.0), "relu")
  x = net.quantizer(net.activation(x, "hard_swish"), "second", "hswish")
  net.layer(net.mean(x), "classifier", (8, 10))
  return _net("relu_before_hard_swish", net)


@functools.cache
def bounds_beside_zero(what, size, bounds):
  """A net with bounds of one sign that only a quantizer reads, and a layer of a size behind."""
  net = Maker(4, 4)
  codes = net.quantizer(net.layer(IMAGE, "stem", (3, 3, 3, 8)), "first", "unsigned")
  if what == "mean":
    x = net.mean(net.append(Value(name="values", input=codes, scale=2.2 / 15, offset=0.0)))
    kernel = (8, 8)
  else:
    x, kernel = net.layer(codes, "block", (1, 1, 8, 8), gain=2.0), (size, size, 8, 8)
  x = net.quantizer(net.clip(x, *bounds), "second", "symmetric")
  x = net.quantizer(net.layer(x, "last", kernel), "third", "unsigned")
  net.layer(x if what == "mean" else net.mean(x), "classifier", (8, 10))
  return _net("bounds_beside_zero", net)


@functools.cache
def ends_in_relu():
  """A net without negative logits."""
  net = Maker(4, 4)
  x = net.quantizer(net.layer(IMAGE, "stem", (3, 3, 3, 8)), "first", "unsigned")
  net.activation(net.layer(net.mean(x), "classifier", (8, 10)), "relu")
  return _net("ends_in_relu", net)
