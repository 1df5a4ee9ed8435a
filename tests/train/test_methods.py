"""Other quantizers in a whole run: calibrated, trained through falling bits, saved, evaluated,
restarted from.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.cli import app, compare, to_torch
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, build, check
from profit_jax.quant import Bits, DuQ, bits_of
from profit_jax.train import steps
from tests.specs import hand_made, spec_of
from tests.traced import deep_check
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
    {**SHORTEST, "quant.method": "pact", "quant.policy": "lsq_paper"},
    {**SHORTEST, "quant.method": "qil", "quant.rules": (("conv0", 8, None),)},
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


@pytest.mark.parametrize(
  "changes",
  [{"quant.per_channel": True}, *({"quant.method": name} for name in ("lsq", "pact", "qil"))],
  ids=lambda changes: str(next(iter(changes.values()))),
)
def test_the_net_before_quantization_teaches(tiny, changes):
  size = {"model.name": "tiny", "model.width": 1.0, "model.strides": (), "data.image_size": 16}
  deep_check("mobilenet_v1", {**size, **changes, "teacher.model": "self"})


@pytest.mark.parametrize("per_channel", [False, True])
def test_intervals_are_fitted_at_the_bits_of_their_layer(per_channel):
  kernel = jnp.float32(np.random.default_rng(0).normal(size=(3, 3, 4, 8)))
  scalars = {name: jnp.ones((8,) if per_channel else ()) for name in ("quant_a", "quant_c")}
  tree = {layer: {"kernel": kernel, **scalars} for layer in ("stem_conv", "conv")}
  bits = Bits(2, quantizer=DuQ(per_channel=per_channel), layers={"stem_conv": 8})
  fitted = steps.fit_weights(tree, bits, hand_made(tree, bits))
  interval = {layer: np.logaddexp(0, fitted[layer]["quant_a"]) for layer in fitted}
  largest = jnp.abs(kernel).max((0, 1, 2) if per_channel else None)
  # With 255 values next to nothing is clipped; with three, the interval lies within the kernel.
  assert np.all(interval["stem_conv"] > 0.8 * largest)
  assert np.all(interval["conv"] < 0.8 * largest)


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
    ({"quant.rules": (("conv0", 1, None),)}, r"quant\.rules .*'conv0', 1, None\) with the bits 1"),
    ({"quant.method": "dorefa"}, r"quant\.method = 'dorefa' .*duq, lsq, pact, qil"),
  ],
)
def test_what_cannot_be_combined(tiny, changes, named):
  with pytest.raises(ConfigError, match=named):
    check(parse(tiny_config(**changes), REGISTRY))
