"""How far a float32 training step is from the float64 step of the same net, with quantized values
as codes, as they travel here, and as fake-quantized values.

    python benchmarks/float32_step.py [--nets 12] [--image_size 64] [--batch_size 16]

Random nets: MobileNet-v2 at width 1, both kinds at 4 bits, calibrated, on random images. A figure
is an array's largest error over its largest value; a line has the median and the largest of all
such arrays. A code that flips changes all that follows, and then both sides are far off: what
counts is in how many nets that does not happen.
"""

import argparse
import contextlib
import functools
import pathlib
import sys
import unittest.mock
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from profit_jax.data import Normalization
from profit_jax.models import REGISTRY
from profit_jax.nn import layers
from profit_jax.nn.spec import describe
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import value_of
from profit_jax.train import steps

NORMALIZATION = Normalization((0.0,) * 3, (1.0,) * 3)  # the images are normalized ones
KINDS = {"kernels": "/kernel", "a": "/quant_a", "c": "/quant_c"}  # leaves, by the end of their path


@contextlib.contextmanager
def fake_quantized():
  """Inside, every layer multiplies values, whose scales have the gradients of plain automatic
  differentiation.
  """

  def of_values(call, args, kwargs, context):
    if isinstance(context.module, layers.QuantConv | layers.QuantDense):
      args = tuple(value_of(argument) for argument in args)
    return call(*args, **kwargs)

  kernel = layers._quantized_kernel

  def kernel_values(*arguments):
    return value_of(kernel(*arguments))

  with (
    nn.intercept_methods(of_values),
    unittest.mock.patch.object(layers, "_quantized_kernel", kernel_values),
  ):
    yield


def make_gradient(model: nn.Module, form: contextlib.AbstractContextManager) -> Any:
  """The compiled `(params, batch_stats, image, label) -> loss, gradients`."""

  def loss(params, batch_stats, image, label):
    with form():
      logits, _ = model.apply(
        {"params": params, "batch_stats": batch_stats},
        image,
        Bits(4, 4),
        True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
      )
    return jnp.mean(steps.cross_entropy(logits, label))

  return jax.jit(jax.value_and_grad(loss))


def draw(model: nn.Module, seed: int, size: int, pixels: int) -> tuple[Any, ...]:
  """The arguments of a gradient, in float32: a net's variables, images and labels."""
  draws = np.random.default_rng(seed)
  image = jnp.asarray(draws.normal(size=(size, pixels, pixels, 3)), jnp.float32)
  variables = describe(model, (pixels, pixels, 3)).init(jax.random.key(seed))
  params = calibrate(model, pixels)(variables, image)
  label = draws.integers(0, model.num_classes, size).astype(np.int32)
  return params, variables["batch_stats"], image, label


@functools.cache
def calibrate(model: nn.Module, pixels: int) -> Any:
  """The compiled `(variables, image) -> params` with the first a and c of both kinds."""

  def params(variables, image):
    key, spec = jax.random.key(0), describe(model, (pixels, pixels, 3))
    acts = steps.calibrate_acts(model, variables, image, NORMALIZATION, key, Bits(act=4))
    return steps.calibrate_weights(acts, Bits(weight=4), spec)

  return jax.jit(params)


def errors(found: Any, expected: Any) -> dict[str, np.ndarray]:
  """The relative errors of the loss and of the gradients of each kind of leaf."""
  gradients = [traverse_util.flatten_dict(each[1], sep="/") for each in (found, expected)]
  of_kind = {kind: [] for kind in KINDS}
  for path, right in gradients[1].items():
    for kind, end in KINDS.items():
      if path.endswith(end):
        of_kind[kind].append(_relative(gradients[0][path], right))
  return {"loss": np.array([_relative(found[0], expected[0])])} | {
    kind: np.array(found) for kind, found in of_kind.items()
  }


def _relative(found: Any, expected: Any) -> float:
  found, expected = np.float64(found), np.float64(expected)
  return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def is_near(figures: dict[str, np.ndarray]) -> bool:
  """Whether the errors of the loss and, in the median, of the kernels' gradients are below 2e-6,
  and of every gradient of c below 1e-3.

  Kernels' gradients were 1e-5 off or more with a flipped code, and 1.2e-6 to 1.5e-6 without.
  """
  return bool(
    max(figures["loss"].max(), np.median(figures["kernels"])) < 2e-6 and figures["c"].max() < 1e-3
  )


def main() -> None:
  """Prints a line for each net and form, and in how many nets a form is as near as it should be."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--nets", type=int, default=12)
  parser.add_argument("--image_size", type=int, default=64, help="pixels")
  parser.add_argument("--batch_size", type=int, default=16, help="images")
  options = parser.parse_args()
  model = REGISTRY["mobilenet_v2"](num_classes=1000, dropout=0.0, activation="relu")
  forms = {"codes": contextlib.nullcontext, "values": fake_quantized}
  gradients = {name: make_gradient(model, form) for name, form in forms.items()}
  near = dict.fromkeys(forms, 0)
  for seed in range(options.nets):
    single = draw(model, seed, options.batch_size, options.image_size)
    for form, gradient in gradients.items():
      found = jax.device_get(gradient(*single))
      with jax.enable_x64(True):
        double = jax.tree.map(
          lambda leaf: np.asarray(leaf, np.float64) if leaf.dtype == np.float32 else leaf, single
        )
        expected = jax.device_get(gradient(*double))
      figures = errors(found, expected)
      near[form] += is_near(figures)
      text = ", ".join(
        f"{kind} {np.median(each):.1e} {each.max():.1e}" for kind, each in figures.items()
      )
      print(f"net {seed:2} {form:6}: {text}", flush=True)
  for form, count in near.items():
    print(f"{form}: near in {count} of {options.nets} nets; see is_near")


if __name__ == "__main__":
  main()
