"""MobileNet-v2 against the authors' logits."""

import functools

import jax
import numpy as np
import pytest

from profit_jax.models import REGISTRY
from profit_jax.models.common import divisible_by_8
from profit_jax.quant.bits import Bits
from profit_jax.weights.load import import_variables
from tests import golden_data
from tests.specs import variable_shapes


@functools.cache
def golden_model():
  model = REGISTRY["mobilenet_v2"](num_classes=10, width=0.5, activation="relu", dropout=0.0)
  tensors = golden_data.tensors(golden_data.load("mobilenet_v2.json"))
  loaded = import_variables(
    "mobilenet_v2", variable_shapes(model, 64), tensors, "golden", dtype=np.float64
  )
  assert (loaded.source, loaded.quantizers) == ("authors", True)
  return model, loaded.variables


@functools.cache
def golden_program(mode):
  model, _ = golden_model()
  return jax.jit(
    lambda v, x, steps: model.apply(v, x, steps, mode == "train", mutable=["batch_stats"])[0]
  )


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
  ("weight_bits", "act_bits"),
  [(8, 8), (4, 4), (3, 3), (None, 8), (None, None)],
  ids=["w8a8", "w4a4", "w3a3", "w0a8", "w0a0"],  # as in the golden file
)
def test_authors_logits(weight_bits, act_bits, mode):
  _, variables = golden_model()
  image = golden_data.images("input:mobilenet_v2", (4, 3, 64, 64))
  expected = golden_data.load("mobilenet_v2.npz")[f"w{weight_bits or 0}a{act_bits or 0}_{mode}"]
  with jax.enable_x64(True):
    logits = golden_program(mode)(variables, image, Bits(weight_bits, act_bits))
  assert np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max() < 1e-9


@pytest.mark.parametrize(
  ("channels", "expected"),
  [(32 * 0.25, 8), (24 * 0.25, 8), (96 * 0.35, 32), (11, 16), (320 * 0.75, 240)],
)
def test_channels_round_to_multiples_of_8_and_at_most_a_tenth_down(channels, expected):
  assert divisible_by_8(channels) == expected


def test_small_image_strides_keep_a_map_of_more_than_one_pixel():
  model = REGISTRY["mobilenet_v2"](num_classes=7, width=0.25, strides=(2, 1, 2, 2, 2, 1, 1, 1))
  _, sown = jax.eval_shape(
    lambda key: model.init_with_output(
      key, np.zeros((1, 32, 32, 3), np.float32), capture_intermediates=True
    ),
    jax.random.key(0),
  )
  assert sown["intermediates"]["head_norm"]["__call__"][0].shape == (1, 2, 2, 1280)
  assert sown["intermediates"]["__call__"][0].shape == (1, 7)


def test_relu6_bounds_what_relu_does_not():
  image, largest = np.full((1, 32, 32, 3), 40.0, np.float32), {}
  for activation in ("relu", "relu6"):
    model = REGISTRY["mobilenet_v2"](num_classes=10, width=0.25, activation=activation, dropout=0.0)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variable_shapes(model, 32))
    # XLA drops all but the stem.
    stem = jax.jit(
      lambda v, x, model=model: model.apply(v, x, capture_intermediates=True)[1]["intermediates"][
        "stem_quant"
      ]
    )
    largest[activation] = float(stem(ones, image)["__call__"][0].value().max())
  assert largest["relu6"] == 6.0
  assert largest["relu"] > 6.0
