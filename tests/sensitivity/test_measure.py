"""What one layer alone loses at fewer bits."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import profit_jax as pj
from profit_jax.config import ConfigError, Settings
from profit_jax.data.batches import BatchSource
from profit_jax.nn.rules import with_rules
from profit_jax.nn.spec import describe
from profit_jax.quant.quantized import value_of
from profit_jax.sensitivity import MeasuredModel, measure, measure_sensitivity
from profit_jax.sensitivity.measure import _spread, parts_of
from tests.export.nets import random_values
from tests.nn.test_rules import SHAPE, Shared
from tests.train.tiny import TinyNet

ROWS, CLASSES = 8, 10


def batch(seed, rows=ROWS):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.normal(size=(rows, *SHAPE)).astype(np.float32),
    "label": rng.integers(0, CLASSES, rows),
  }


DATA = pj.Data(train=[batch(0), batch(1)], eval=[batch(2), batch(3, rows=5)], steps_per_epoch=2)


def measured_model(rules=(), model=None, weight_bits=4, act_bits=6):
  model = model or TinyNet(num_classes=CLASSES)
  spec = with_rules(describe(model, SHAPE), rules, "profit")
  source = BatchSource(DATA)
  source.num_classes = spec.outputs
  return MeasuredModel(
    settings=Settings().with_batch_size(ROWS),
    source=source,
    spec=spec,
    variables=random_values(spec.shapes),
    weight_bits=weight_bits,
    act_bits=act_bits,
    normalization=None,
  )


def loss_and_top1(model, bits, params):
  """On all evaluation images, by hand."""
  variables, losses, correct = {**model.variables, "params": params}, [], []
  module = model.spec.model
  run = jax.jit(lambda image: value_of(module.apply(variables, image, bits, False)))
  for each in DATA.eval:
    logits = run(each["image"])
    chances = jax.nn.log_softmax(logits)
    losses += [-row[label] for row, label in zip(chances, each["label"], strict=True)]
    correct += list(np.argmax(logits, -1) == each["label"])
  return float(np.mean(losses)), 100.0 * np.mean(correct)


@pytest.fixture(scope="module")
def found(compiled):
  model = measured_model(rules=(("conv1", 8, None),))
  return measure(model, (3, 2, 5), image_dtype=np.float32)


def test_one_compiled_evaluation_serves_all(found, compiled):
  assert compiled == [("eval_step", True, True, "student")]


def test_every_layer_falls_from_its_own_bits(found):
  widths = {(p.side, p.layers): (p.bits, [f.bits for f in p.reductions]) for p in found.parts}
  assert widths == {
    ("weights", ("conv0",)): (4, [2, 3]),
    ("weights", ("conv1",)): (8, [2, 3, 5]),
    ("inputs", ("conv1",)): (6, [2, 3, 5]),
    ("weights", ("conv2",)): (4, [2, 3]),
    ("inputs", ("conv2",)): (6, [2, 3, 5]),
    ("weights", ("classifier",)): (4, [2, 3]),
    ("inputs", ("classifier",)): (6, [2, 3, 5]),
  }
  assert [part.layers[0] for part in found.parts][:3] == ["conv0", "conv1", "conv1"]


def test_the_loss_is_that_of_the_model_with_one_layer_at_fewer_bits(found):
  model = found.model
  bits, params = model.spec.bits.at(4, 6), model.variables["params"]
  loss, top1 = loss_and_top1(model, bits, params)
  np.testing.assert_allclose(found.scores["loss"], loss, rtol=1e-4)
  np.testing.assert_allclose(found.scores["top1"], top1, rtol=1e-6)
  assert found.scores["examples"] == 13
  # What a fall to 3 bits computes: conv2's kernel at its refitted scalars.
  part = next(p for p in found.parts if p.side == "weights" and p.layers == ("conv2",))
  scalars = pj.sensitivity.refit.kernel_scalars(
    model.spec.bits.quantizer,
    np.asarray(params["conv2"]["kernel"]),
    {leaf: params["conv2"][leaf] for leaf in ("quant_a", "quant_c")},
    np.float32(3),
    np.float32(7),
  )
  fallen = dataclasses.replace(bits, layers={**bits.layers, "conv2": np.int32(3)})
  loss3, top3 = loss_and_top1(model, fallen, params | {"conv2": params["conv2"] | scalars})
  reduction = next(reduction for reduction in part.reductions if reduction.bits == 3)
  np.testing.assert_allclose(reduction.loss, loss3 - loss, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(reduction.top1, top3 - top1, rtol=1e-6)


def test_what_is_found_is_plain(found):
  plain = json.loads(json.dumps(found.to_dict()))
  assert plain["bits"] == [2, 3, 5]
  assert [part["layers"] for part in plain["parts"]] == [list(p.layers) for p in found.parts]
  broken = dataclasses.replace(
    found.parts[0], reductions=(pj.sensitivity.Reduction(2, math.nan, 0.0),)
  )
  plain = dataclasses.replace(found, parts=(broken,)).to_dict()
  assert plain["parts"][0]["reductions"][0]["loss"] is None


def test_layers_that_share_quantizers_fall_together():
  model = measured_model(model=Shared(), rules=(("head", "float", "float"),))
  parts = [(part.side, part.layers, part.paths) for part in parts_of(model)]
  assert ("inputs", ("left", "right"), ("shared_quant",)) in parts
  assert ("inputs", ("joined",), ("left_quant", "right_quant")) in parts
  assert not any({"head", "stem", "added"} & set(p[1]) for p in parts if p[0] == "inputs")
  assert ("weights", ("head",), ("head",)) not in parts


def test_a_model_in_full_precision_falls_from_8_bits():
  model = measured_model(weight_bits=None, act_bits=None)
  found = measure(model, (4, 8), image_dtype=np.float32)
  assert {part.bits for part in found.parts} == {8}
  assert all([reduction.bits for reduction in part.reductions] == [4] for part in found.parts)
  loss, _ = loss_and_top1(model, model.spec.bits, model.variables["params"])
  np.testing.assert_allclose(found.scores["loss"], loss, rtol=0.05)


@pytest.mark.parametrize(
  ("bits", "images", "message"),
  [
    ((1, 2), 9, r"bits has 1, which is not allowed: each must be 2 to 8"),
    ((9,), 9, r"bits has 9"),
    ((), 9, r"bits has no width"),
    (3, 9, r"bits=3 is not allowed"),
    ((7, 8), 9, r"bits=7,8 is not allowed: no layer has more than 6 bits"),
    ((2,), 0, r"images=0"),
  ],
)
def test_what_cannot_be_measured_is_named(bits, images, message):
  with pytest.raises(ConfigError, match=message):
    measure(measured_model(), bits, images, image_dtype=np.float32)


class Plain(nn.Module):
  """Nothing in it is quantized."""

  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    return nn.Dense(5)(x.reshape(len(x), -1))


def test_a_model_without_quantizers_has_nothing_to_measure():
  with pytest.raises(ConfigError, match="the model quantizes no layer"):
    measure(measured_model(model=Plain()), (2,), image_dtype=np.float32)


@pytest.mark.parametrize(("wanted", "count"), [(1, 1), (7, 7), (30, 30), (100, 100), (1000, 100)])
def test_fewer_images_are_spread_over_the_set(wanted, count):
  values = np.arange(100)
  batches = [
    {"image": part[:, None, None, None], "label": part, "mask": np.ones(10, bool)}
    for part in values.reshape(10, 10)
  ]
  image, label = _spread(batches, wanted)
  assert len(label) == count
  assert image.shape == (count, 1, 1, 1)
  assert len(set(label)) == count
  assert max(np.diff(label), default=0) <= 2 * -(-100 // count)
  if count > 1:
    assert label[-1] >= 100 - 2 * -(-100 // count)


class Thin(nn.Module):
  """Two layers."""

  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    x = pj.BatchNorm(name="norm")(pj.QuantConv(4, 3, stride=2, name="conv")(x, bits), train, "relu")
    x = pj.QuantAct("unsigned", name="quant")(pj.spatial_mean(x), bits)
    return pj.QuantDense(CLASSES, name="head")(x, bits)


def test_a_result_of_the_library_is_measured_and_assigned(tmp_path):
  schedule = pj.profit_schedule(
    weight_bits=(8,),
    act_bits=(8,),
    full_precision_epochs=0,
    finetune_epochs=1,
    bn_epochs=0,
    sampling_epochs=1,
    freeze_fractions=(0.0,),
  )
  result = pj.Trainer(Thin(), schedule, tmp_path, rules=(("head", None, "float"),)).fit(DATA)
  found = measure_sensitivity(result, DATA, bits=(2, 4), images=10)
  assert found.scores["examples"] == 10
  assert {(part.side, part.layers) for part in found.parts} == {
    ("weights", ("conv",)),
    ("weights", ("head",)),
  }
  assigned = pj.assign_bits(found, "bytes", 60)
  assert assigned.bytes <= 60 < assigned.full_bytes
  assert assigned.act_bits is None
  assert all(jnp.isfinite(reduction.loss) for part in found.parts for reduction in part.reductions)
  assert measure_sensitivity(result, DATA, np.array([2]), images=10).bits == (2,)
  grey = dataclasses.replace(DATA, train=[{**batch(0), "image": np.zeros((8, 8, 8, 1), np.uint8)}])
  for data, message in (
    (DATA.eval, "must be a profit_jax.Data, not list"),
    (grey, r"images are uint8 of the shape \(8, 8, 1\), but the model was trained on float32"),
  ):
    with pytest.raises(ConfigError, match=message):
      measure_sensitivity(result, data)
