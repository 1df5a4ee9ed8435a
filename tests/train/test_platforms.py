"""The steps compile for every platform: they are lowered here for machines that are not here."""

import functools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from profit_jax.data import Normalization
from profit_jax.models import REGISTRY, variable_shapes
from profit_jax.quant.levels import levels
from profit_jax.train import aiwq, optimizer, steps
from profit_jax.train.state import create_state

PIXELS, BATCH = 32, 8
# It has what the others have: h-swish, squeeze-excite, negative padding, both strides.
MODEL = REGISTRY["mobilenet_v3_small"](num_classes=10, width=0.25)


@functools.cache
def traced(step):
  """A step with everything quantized, traced for no platform yet."""
  shapes = variable_shapes(MODEL, PIXELS)
  batch = {
    "image": jax.ShapeDtypeStruct((BATCH, PIXELS, PIXELS, 3), np.uint8),
    "label": jax.ShapeDtypeStruct((BATCH,), np.int32),
    "mask": jax.ShapeDtypeStruct((BATCH,), bool),
  }
  normalization = Normalization((0.5,) * 3, (0.25,) * 3, "bfloat16")
  if step == "eval":
    evaluate = steps.make_eval_step(MODEL, normalization=normalization, num_classes=10)
    return jax.jit(evaluate).trace(shapes, batch, levels(4, 4))
  labels = optimizer.label_params(shapes["params"], train_kernels=True, frozen=frozenset())
  sgd = optimizer.SgdSettings(weight_decay=1e-4, momentum=0.9, quantizer_lr_scale=0.01)
  tx = optimizer.make_optimizer(labels, sgd)
  train = steps.make_train_step(MODEL, tx, normalization=normalization, ema_rate=0.9, teacher_model=MODEL)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  state = create_state(zeros, ema=True)
  state = state.replace(opt_state=jax.eval_shape(tx.init, state.params))
  sampling = aiwq.start(shapes["params"]) if step == "sampling" else None
  rate, key = jax.ShapeDtypeStruct((), np.float32), jax.eval_shape(lambda: jax.random.key(0))
  return jax.jit(train).trace(state, batch, levels(4, 4), rate, key, shapes, sampling)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("step", ["train", "sampling", "eval"])
def test_steps_lower_for_every_platform(step, platform):
  text = traced(step).lower(lowering_platforms=(platform,)).as_text()
  convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
  assert convolutions
  # Each platform has its own form of the depthwise convolution.
  assert any("feature_group_count = 1 " not in line for line in convolutions) == (platform != "cpu")


@pytest.mark.parametrize("step", ["train", "sampling"])
def test_bfloat16_computes_convolutions_and_leaves_what_is_kept_in_float32(step):
  closed = traced(step).jaxpr
  convolutions = set()

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name in ("conv_general_dilated", "dot_general"):
        convolutions.add(str(equation.outvars[0].aval.dtype))
      for inner in jaxprs_in_params(equation.params):
        walk(inner)

  walk(closed.jaxpr)
  assert convolutions == {"bfloat16"}
  kept = {str(leaf.dtype) for leaf in jax.tree.leaves(traced(step).out_info)}
  assert kept <= {"float32", "int32", "bool"}
