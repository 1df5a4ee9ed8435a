"""Other quantizers in a whole run: calibrated, trained through falling bits, saved, evaluated,
restarted from.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax import app, compare, to_torch
from profit_jax.export import build as export_build
from profit_jax.models import REGISTRY, build, init_variables
from profit_jax.quant.levels import levels
from profit_jax.settings import ConfigError, QuantSettings, parse
from profit_jax.train import steps
from tests.export.nets import random_variables, settings_of
from tests.train.conftest import tiny_config

SHORT = {
  "plan.weight_bits": (8, 4),
  "plan.act_bits": (4,),
  "plan.full_precision_epochs": 1,
  "plan.finetune_epochs": 1,
  "plan.sampling_epochs": 1,
  "plan.stabilize": False,
  "plan.profit_bits": (4,),
  "plan.freeze_fractions": (0.5,),
}


@pytest.mark.parametrize(
  "quant",
  [
    {"quant.method": "lsq", "quant.per_channel": True},
    {"quant.method": "pact", "quant.last_bits": 8},
    {"quant.method": "qil", "quant.first_bits": 8},
  ],
  ids=lambda quant: "-".join(str(value) for value in quant.values()),
)
def test_a_whole_run(tiny, tmp_path, capsys, quant):
  run = tmp_path / "run"
  app.main(tiny_config(**SHORT, **quant), str(run), "train")
  final = json.loads((run / "result.json").read_text())["final"]
  capsys.readouterr()
  app.main(None, str(run), "eval")
  assert f"top-1 {final['top1']:.2f} %" in capsys.readouterr().out
  assert quant.get("quant.method", "duq") in (run / "report.md").read_text()
  assert compare.main([str(run)]) == 0
  # As first weights of another run, under our own names; the authors' have no place for such
  # scalars.
  assert to_torch.main([str(run), str(tmp_path / "w.safetensors"), "--names=profit_jax"]) == 0
  again = tiny_config(**SHORT, **quant, **{"init.weights": str(tmp_path / "w.safetensors")})
  capsys.readouterr()
  app.main(again, "", "eval")
  assert f"top-1 {final['top1']:.2f} %" in capsys.readouterr().out


def test_first_and_last_bits_are_least_bits():
  quant = QuantSettings(first_bits=8, last_bits=6)
  given = levels(4, 3)._replace(quant=quant)
  assert (given.first().weight, given.first().act) == (127, 7)
  assert (given.last().weight, given.last().act) == (31, 63)
  higher = levels(8, 8)._replace(quant=quant)
  assert (higher.first().weight, higher.last().weight, higher.last().act) == (127, 127, 255)
  assert levels(None, 4)._replace(quant=quant).last().weight is None
  assert levels(4, 4).first() == levels(4, 4)


@pytest.mark.parametrize("per_channel", [False, True])
def test_intervals_are_fitted_at_the_bits_of_their_layer(per_channel):
  kernel = jnp.float32(np.random.default_rng(0).normal(size=(3, 3, 4, 8)))
  scalars = {name: jnp.ones((8,) if per_channel else ()) for name in ("quant_a", "quant_c")}
  tree = {layer: {"kernel": kernel, **scalars} for layer in ("stem_conv", "conv")}
  quant = QuantSettings(per_channel=per_channel, first_bits=8)
  fitted = steps.fit_weights(tree, jnp.float32(1), quant)
  interval = {layer: np.logaddexp(0, fitted[layer]["quant_a"]) for layer in fitted}
  largest = jnp.abs(kernel).max((0, 1, 2) if per_channel else None)
  # With 255 values next to nothing is clipped; with three, the interval lies within the kernel.
  assert np.all(interval["stem_conv"] > 0.8 * largest)
  assert np.all(interval["conv"] < 0.8 * largest)


@pytest.mark.parametrize("model", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"])
def test_only_the_ends_see_their_bits(model):
  settings = settings_of(model)
  image = np.float32(np.random.default_rng(0).normal(size=(2, 32, 32, 3)))
  plain, ends = (
    build(settings.model, 10),
    build(settings.model, 10, QuantSettings(first_bits=8, last_bits=8)),
  )
  variables = random_variables(settings)
  # With all layers at 8 bits the ends have nothing to add; at 2 bits they do.
  for bits, same in ((8, True), (2, False)):
    found = [jax.jit(net.apply)(variables, image, levels(bits, bits)) for net in (plain, ends)]
    assert np.array_equal(*found) == same


def test_bits_are_values_for_every_method(tiny):
  for method in ("lsq", "pact", "qil"):
    settings = parse(tiny_config(**{"quant.method": method}), REGISTRY)
    model = build(settings.model, 10, settings.quant)
    variables = init_variables(model, jax.random.key(0), 16)
    apply = jax.jit(model.apply)
    image = np.float32(np.random.default_rng(0).uniform(size=(4, 16, 16, 3)))
    eight, four = (apply(variables, image, levels(bits, bits)) for bits in (8, 4))
    assert apply._cache_size() == 1
    assert not np.array_equal(eight, four)


def test_what_cannot_be_combined_or_exported(tiny):
  with pytest.raises(
    ConfigError, match=r"plan\.fitted_bits = \(4,\) is not allowed: .* with quant\.method = lsq"
  ):
    parse(tiny_config(**{"quant.method": "lsq", "plan.fitted_bits": (4,)}), REGISTRY)
  with pytest.raises(ConfigError, match=r"quant\.first_bits = 1 is not allowed"):
    parse(tiny_config(**{"quant.first_bits": 1}), REGISTRY)
  with pytest.raises(
    ConfigError,
    match=r"quant\.method = 'dorefa' is not allowed: it must be one of duq, lsq, pact, qil",
  ):
    parse(tiny_config(**{"quant.method": "dorefa"}), REGISTRY)
  settings = parse(tiny_config(**{"quant.method": "lsq"}), REGISTRY)
  with pytest.raises(ConfigError, match="cannot be exported: only DuQ"):
    export_build.build_net(settings, {}, None, 4, 4)
