"""The steps compile for every platform: they are lowered here for machines that are not here."""

import functools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

from configs import digits_w4
from profit_jax.data.digits import FACTS
from profit_jax.models import REGISTRY
from profit_jax.plan import Program
from profit_jax.settings import parse
from profit_jax.train.programs import Programs
from tests.traced import TwoBlocks


@functools.cache
def traced(step):
  """A step with everything quantized, traced for no platform yet; training is in bfloat16."""
  config = digits_w4.get_config()
  config.update_from_flattened_dict(
    {"data.image_size": 16, "train.batch_size": 8, "train.dtype": "bfloat16"}
  )
  settings, model = parse(config, REGISTRY), TwoBlocks()
  mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
  programs = Programs(settings, FACTS, model, model, mesh)
  programs.close()  # nothing is compiled
  if step == "eval":
    return programs.trace_eval_step(quantized_weights=True, quantized_acts=True)
  program = Program(
    quantized_weights=True,
    quantized_acts=True,
    train_kernels=True,
    sampling=step == "sampling",
    frozen_fraction=0.0,
    distill=step == "train",
  )
  return programs.trace_train_step(program, frozenset())


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("step", ["train", "sampling", "eval"])
def test_steps_lower_for_every_platform(step, platform):
  text = traced(step).lower(lowering_platforms=(platform,)).as_text()
  convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
  assert convolutions
  # Each platform has its own form of the depthwise convolution.
  assert any("feature_group_count = 1 " not in line for line in convolutions) == (platform != "cpu")


def equations(jaxpr):
  """Those of a program and of its inner programs; an equation that has inner ones is left out."""
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
