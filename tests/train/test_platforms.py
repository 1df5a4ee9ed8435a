"""The steps compile for every platform: they are lowered here for machines that are not here."""

import functools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

from configs import digits_w4
from profit_jax.config import parse
from profit_jax.data.digits import INFO
from profit_jax.models import REGISTRY
from profit_jax.schedule import ProgramKey
from profit_jax.train.mesh import default_dtype
from profit_jax.train.programs import Programs
from tests.specs import spec_of
from tests.traced import TwoBlocks


@functools.cache
def traced(step, platform="cpu", dtype="bfloat16"):
  """A step with everything quantized, traced for a platform."""
  config = digits_w4.get_config()
  config.update_from_flattened_dict(
    {"data.image_size": 16, "train.batch_size": 8, "train.dtype": dtype}
  )
  settings, spec = parse(config, REGISTRY), spec_of(TwoBlocks(), 16)
  mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
  programs = Programs(settings, INFO, spec, spec, mesh, platform=platform)
  programs.close()  # nothing is compiled
  if step == "eval":
    return programs.tracer.eval_step(quantized_weights=True, quantized_acts=True)
  program = ProgramKey(
    quantized_weights=True,
    quantized_acts=True,
    train_kernels=True,
    sampling=step == "sampling",
    distill=step == "train",
  )
  return programs.tracer.train_step(program)


@pytest.mark.parametrize(("platform", "name"), [("cpu", "cpu"), ("gpu", "cuda"), ("tpu", "tpu")])
@pytest.mark.parametrize("step", ["train", "sampling", "eval"])
def test_steps_lower_for_every_platform(step, platform, name):
  text = traced(step, platform).lower(lowering_platforms=(name,)).as_text()
  convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
  assert convolutions
  # Each platform has its own form of the depthwise convolution.
  assert any("feature_group_count = 1 " not in line for line in convolutions) == (platform == "tpu")
  assert ("triton" in text) == (platform == "gpu")


def equations(jaxpr):
  """Those of a program and of its inner programs; an equation that has inner ones is left out."""
  for equation in jaxpr.eqns:
    inner = list(jaxprs_in_params(equation.params))
    if not inner:
      yield equation
    for program in inner:
      yield from equations(program)


PRODUCTS = {"conv_general_dilated", "dot_general"}


def operands(step, dtype):
  """The types of the operands of products, and of everything that is added up over a batch."""
  products, sums = set(), set()
  for equation in equations(traced(step, "tpu", dtype).jaxpr.jaxpr):
    types = {str(getattr(var.aval, "dtype", "")) for var in equation.invars}
    if equation.primitive.name in PRODUCTS:
      products |= types
    elif equation.primitive.name == "reduce_sum":
      sums |= types
  return products, sums


@pytest.mark.parametrize(
  ("step", "dtype"),
  [("train", "bfloat16"), ("sampling", "bfloat16"), ("train", "tfloat32"), ("eval", "bfloat16")],
)
def test_only_training_stores_bfloat16_and_nothing_adds_it_up(step, dtype):
  products, sums = operands(step, dtype)
  assert products == {"bfloat16" if dtype == "bfloat16" and step != "eval" else "float32"}
  assert "bfloat16" not in sums
  kept = {str(leaf.dtype) for leaf in jax.tree.leaves(traced(step, "tpu", dtype).out_info)}
  assert kept <= {"float32", "int32", "bool"}


@pytest.mark.parametrize(
  ("step", "dtype", "expected"),
  [
    # The image's convolution and all gradients are no products of codes.
    ("train", "float32", {"DEFAULT", "HIGHEST"}),
    ("train", "tfloat32", {"DEFAULT"}),
    ("eval", "tfloat32", {"DEFAULT", "HIGHEST"}),
  ],
)
def test_the_precision_of_products_is_that_of_the_kind_of_arithmetic(step, dtype, expected):
  found = {
    str(equation.params["precision"] and equation.params["precision"][0])
    for equation in equations(traced(step, "tpu", dtype).jaxpr.jaxpr)
    if equation.primitive.name in PRODUCTS
  }
  assert found == expected


@pytest.mark.parametrize(
  ("platform", "expected"), [("cpu", "float32"), ("cuda", "tfloat32"), ("tpu", "bfloat16")]
)
def test_auto_is_what_users_of_the_platform_choose(platform, expected):
  assert default_dtype(platform) == expected
