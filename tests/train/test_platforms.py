"""The steps compile for every platform: they are lowered here for machines that are not here."""

import functools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from profit_jax.data import Normalization, load
from profit_jax.models import REGISTRY, build, variable_shapes
from profit_jax.plan import plan
from profit_jax.quant.levels import levels
from profit_jax.settings import parse
from profit_jax.train import aiwq, optimizer, steps
from profit_jax.train.programs import Programs, make_mesh
from profit_jax.train.state import create_state
from tests.train.conftest import tiny_config

PIXELS, BATCH = 32, 8
# It has what the others have: h-swish, squeeze-excite, negative padding, both strides.
MODEL = REGISTRY["mobilenet_v3_small"](num_classes=10, width=0.25)


@functools.cache
def traced(step):
  """A step with everything quantized, training in bfloat16, traced for no platform yet."""
  shapes = variable_shapes(MODEL, PIXELS)
  batch = {
    "image": jax.ShapeDtypeStruct((BATCH, PIXELS, PIXELS, 3), np.uint8),
    "label": jax.ShapeDtypeStruct((BATCH,), np.int32),
    "mask": jax.ShapeDtypeStruct((BATCH,), bool),
  }
  normalization = Normalization((0.5,) * 3, (0.25,) * 3)
  if step == "eval":
    evaluate = steps.make_eval_step(MODEL, normalization=normalization, num_classes=10)
    return jax.jit(evaluate).trace(shapes, batch, levels(4, 4))
  labels = optimizer.label_params(shapes["params"], train_kernels=True, frozen=frozenset())
  sgd = optimizer.SgdSettings(weight_decay=1e-4, momentum=0.9, quantizer_lr_scale=0.01)
  tx = optimizer.make_optimizer(labels, sgd)
  model = MODEL.clone(dtype="bfloat16")
  train = steps.make_train_step(
    model, tx, normalization=normalization, ema_rate=0.9, teacher_model=model
  )
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


def equations(jaxpr):
  """All of a program's, those of its inner programs included; of what holds a program only the
  inner ones.
  """
  for equation in jaxpr.eqns:
    inner = list(jaxprs_in_params(equation.params))
    if not inner:
      yield equation
    for program in inner:
      yield from equations(program)


PRODUCTS = {"conv_general_dilated", "dot_general"}
MOVES = {
  "convert_element_type",
  "pad",
  "slice",
  "squeeze",
  "reshape",
  "broadcast_in_dim",
  "transpose",
  "rev",
  "stop_gradient",
}


@pytest.mark.parametrize(
  ("step", "dtype"), [("train", "bfloat16"), ("sampling", "bfloat16"), ("eval", "float32")]
)
def test_training_multiplies_in_bfloat16_and_nothing_else_does(step, dtype):
  products, others = set(), set()
  for equation in equations(traced(step).jaxpr.jaxpr):
    name, types = (
      equation.primitive.name,
      {str(getattr(var.aval, "dtype", "")) for var in equation.invars},
    )
    if name in PRODUCTS:
      products |= types
    elif "bfloat16" in types:
      others.add(name)
  assert products == {dtype}
  assert others <= MOVES
  kept = {str(leaf.dtype) for leaf in jax.tree.leaves(traced(step).out_info)}
  assert kept <= {"float32", "int32", "bool"}


def test_the_setting_is_of_training_only(tiny, monkeypatch):
  settings = parse(tiny_config(**{"train.dtype": "bfloat16"}), REGISTRY)
  model = build(settings.model, 10)
  programs = Programs(settings, load(settings).facts, model, model, make_mesh(settings))
  dtypes = {}
  for name in ("make_train_step", "make_eval_step"):

    def record(model, *args, name=name, make=getattr(steps, name), **kwargs):
      dtypes[name] = [module.dtype for module in (model, kwargs.get("teacher_model")) if module]
      return make(model, *args, **kwargs)

    monkeypatch.setattr(steps, name, record)
  programs.train_step(plan(settings)[-1].program, frozenset())
  programs.eval_step(True, True)
  programs.close()
  assert dtypes == {"make_train_step": ["bfloat16"] * 2, "make_eval_step": [None]}
