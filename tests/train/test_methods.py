"""Other quantizers in a whole run: calibrated, trained through falling bits, saved, evaluated,
restarted from.
"""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.cli import app, compare, to_torch
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, build, check
from profit_jax.nn.layers import QuantAct, QuantConv, QuantDense
from profit_jax.quant import Bits, DuQ, bits_of
from profit_jax.train import steps
from tests.export.nets import settings_of
from tests.specs import hand_made, spec_of
from tests.train.shared import tiny_config

# Full precision, activations, sampling, one fine-tuning with half of the kernels frozen. Without a
# teacher, which every program would compile.
SHORT = {"plan.stabilize": False, "plan.freeze_fractions": (0.5,), "teacher.model": "none"}
# Without sampling and freezing: what does not depend on PROFIT.
SHORTEST = {"plan.stabilize": False, "plan.profit": False, "teacher.model": "none"}


@pytest.mark.parametrize(
  "changes",
  [
    {**SHORT, "quant.method": "lsq", "quant.per_channel": True},
    {**SHORTEST, "quant.method": "pact", "quant.last_bits": 8},
    {**SHORTEST, "quant.method": "qil", "quant.first_bits": 8},
  ],
  ids=lambda changes: changes["quant.method"],
)
def test_a_whole_run(tiny, tmp_path, capsys, changes):
  run = tmp_path / "run"
  # Pictures of quantizers with one interval a channel; other tests have those of the others.
  hooks = app.Hooks(plots="quant.per_channel" in changes)
  app.main(tiny_config(**changes), str(run), "train", hooks=hooks)
  final = json.loads((run / "result.json").read_text())["final"]
  capsys.readouterr()
  app.main(None, str(run), "eval")
  assert f"top-1 {final['top1']:.2f} %" in capsys.readouterr().out
  assert changes["quant.method"] in (run / "report.md").read_text()
  assert compare.main([str(run)]) == 0
  # As first weights of another run, under our own names; the authors' have no place for such
  # scalars.
  assert to_torch.main([str(run), str(tmp_path / "w.safetensors"), "--names=profit_jax"]) == 0
  again = tiny_config(**changes, **{"init.weights": str(tmp_path / "w.safetensors")})
  capsys.readouterr()
  app.main(again, "", "eval")
  assert f"top-1 {final['top1']:.2f} %" in capsys.readouterr().out


def test_first_and_last_bits_are_least_bits():
  def largest(bits):
    return bits.kernel_qmax(), bits.act_qmax("unsigned")

  given = Bits(4, 3, first=8, last=6)
  assert largest(given.of_first()) == (127, 7)
  assert largest(given.of_last()) == (31, 63)
  higher = Bits(8, 8, first=8, last=6)
  assert largest(higher.of_first()) == largest(higher.of_last()) == (127, 255)
  assert given.at(None, 4).of_last().kernel_qmax() is None
  assert largest(Bits(4, 4).of_first()) == largest(Bits(4, 4)) == (7, 15)


@pytest.mark.parametrize("per_channel", [False, True])
def test_intervals_are_fitted_at_the_bits_of_their_layer(per_channel):
  kernel = jnp.float32(np.random.default_rng(0).normal(size=(3, 3, 4, 8)))
  scalars = {name: jnp.ones((8,) if per_channel else ()) for name in ("quant_a", "quant_c")}
  tree = {layer: {"kernel": kernel, **scalars} for layer in ("stem_conv", "conv")}
  bits = Bits(2, quantizer=DuQ(per_channel=per_channel), first=8)
  fitted = steps.fit_weights(tree, bits, hand_made(tree, bits, first=("stem_conv",)))
  interval = {layer: np.logaddexp(0, fitted[layer]["quant_a"]) for layer in fitted}
  largest = jnp.abs(kernel).max((0, 1, 2) if per_channel else None)
  # With 255 values next to nothing is clipped; with three, the interval lies within the kernel.
  assert np.all(interval["stem_conv"] > 0.8 * largest)
  assert np.all(interval["conv"] < 0.8 * largest)


def ends_of(model, given):
  """The kernels and activations of a model that get other bits than given; nothing runs."""
  kernels, acts = [], []

  def watch(call, args, kwargs, context):
    if context.method_name == "__call__":
      path = "/".join(context.module.path)
      if isinstance(context.module, (QuantConv, QuantDense)) and args[1].kernel_qmax() > 1:
        kernels.append(path)
      elif isinstance(context.module, QuantAct) and args[1].act_qmax("unsigned") > 3:
        acts.append(path)
    return call(*args, **kwargs)

  with nn.intercept_methods(watch):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    jax.eval_shape(lambda x: model.init(jax.random.key(0), x, given), image)
  return kernels, acts


@pytest.mark.parametrize(
  ("name", "acts"),
  [
    ("mobilenet_v1", []),
    ("mobilenet_v2", ["head_quant"]),
    ("mobilenet_v3_small", ["pre_classifier_quant"]),
  ],
)
def test_only_the_ends_see_their_bits(name, acts):
  model = build(settings_of(name).model, 10)
  assert ends_of(model, Bits(2, 2, first=8, last=8)) == (["stem_conv", "classifier"], acts)


def test_bits_are_values_for_every_method(tiny):
  for method in ("lsq", "pact", "qil"):
    settings = parse(tiny_config(**{"quant.method": method}), REGISTRY)
    model, bits_of_run = build(settings.model, 10), bits_of(settings.quant)
    variables = spec_of(model, 16, bits_of_run).init(jax.random.key(0))
    apply = jax.jit(model.apply)
    image = np.float32(np.random.default_rng(0).uniform(size=(4, 16, 16, 3)))
    eight, four = (apply(variables, image, bits_of_run.at(bits, bits)) for bits in (8, 4))
    assert apply._cache_size() == 1
    assert not np.array_equal(eight, four)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"quant.method": "lsq", "plan.refit_bits": (4,)}, r"plan\.refit_bits = \(4,\)"),
    ({"quant.first_bits": 1}, r"quant\.first_bits = 1"),
    ({"quant.method": "dorefa"}, r"quant\.method = 'dorefa' .*duq, lsq, pact, qil"),
  ],
)
def test_what_cannot_be_combined(tiny, changes, named):
  with pytest.raises(ConfigError, match=named):
    check(parse(tiny_config(**changes), REGISTRY))
