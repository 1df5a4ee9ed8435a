"""A run whose layers have bits of their own."""

import signal

import jax
import numpy as np
import pytest
from flax import traverse_util

from profit_jax.cli import app, compare
from profit_jax.config import parse
from profit_jax.models import REGISTRY, student_spec
from profit_jax.train.interrupt import Stopped
from tests.train.runs import (
  STEPS_PER_EPOCH,
  WITHOUT_PLOTS,
  SignalAt,
  assert_same_run,
  newest_of,
  number,
  result_of,
)
from tests.train.shared import tiny_config

# Activations, then weights: sampling, two fine-tunings.
PLAN = {
  "plan.stabilize": False,
  "plan.act_bits": (5, 4),
  "plan.weight_bits": (5, 3),
  "plan.profit_bits": (3,),
  "teacher.model": "none",
  "oscillation.freeze_thresholds": (0.2, 0.1),
  "oscillation.freeze_momentum": 0.05,
}
RULES = {
  "quant.rules": (("conv1", 8, 6), ("classifier", 6, None)),
  "quant.policy": "lsq_paper",
}


@pytest.fixture(scope="module")
def runs(tiny, compiled, tmp_path_factory):
  """The directories of two whole runs, with rules and without, and their programs."""
  found = {}
  for name, rules in (("ruled", RULES), ("usual", {})):
    compiled.clear()
    directory = tmp_path_factory.mktemp(name)
    app.main(tiny_config(**PLAN, **rules), str(directory), "train")
    found[name] = directory, list(compiled)
  return found


def test_rules_need_no_more_programs(runs):
  assert runs["ruled"][1] == runs["usual"][1]
  assert len(set(runs["ruled"][1])) == len(runs["ruled"][1])


def test_every_layer_is_trained_at_its_bits(runs):
  settings = parse(tiny_config(**PLAN, **RULES), REGISTRY)
  spec = student_spec(settings, 10)
  arrays = newest_of(runs["ruled"][0]).section("best")
  best = traverse_util.unflatten_dict({tuple(k.split("/")): v for k, v in arrays.items()})
  codes = spec.kernel_codes(best["params"], spec.bits.at(3, None))
  largest = {layer: int(np.abs(code).max()) for layer, code in jax.device_get(codes).items()}
  assert {layer: most > 31 for layer, most in largest.items()} == {
    "conv0": True,
    "conv1": True,
    "conv2": False,
    "classifier": False,
  }
  assert largest["conv2"] == 3
  assert 15 < largest["classifier"] <= 31
  assert result_of(runs["ruled"][0])["layer_bits"] == {
    "weights": {"conv0": 8, "conv1": 8, "conv2": 3, "classifier": 6},
    "activations": {"quant0": 6, "quant1": 4, "quant2": 4, "signed_quant": 4},
  }


def test_reports_and_comparisons_say_the_bits_of_every_layer(runs, capsys):
  report = (runs["ruled"][0] / "report.md").read_text()
  assert "| bits | w3a4, policy lsq_paper; `('conv1', 8, 6)`; `('classifier', 6, None)`" in report
  assert "| conv1 | 3x3x1x8 | 8 |" in report
  assert "| quant0 | activations | 6 |" in report
  assert (runs["ruled"][0] / "plots" / "weight_codes.png").exists()
  assert compare.main([str(directory) for directory, _ in runs.values()]) == 0
  lines = capsys.readouterr().out.splitlines()
  (other,) = (line for line in lines if line.split()[:2] == ["other", "bits"])
  assert "1 x a6, 1 x w6, 2 x w8" in other
  assert other.rstrip().endswith("-")
  assert any("quant.policy" in line and "lsq_paper" in line for line in lines)


def test_a_stopped_run_ends_the_same(runs, tmp_path):
  # While codes are watched and fixed; and between the last step and the evaluation.
  signals = {number(6, 7): signal.SIGTERM, number(6, STEPS_PER_EPOCH): signal.SIGTERM}
  sent = SignalAt(signals)
  for _ in signals:
    with pytest.raises(Stopped):
      app.main(tiny_config(**PLAN, **RULES), str(tmp_path), "train", hooks=sent.hooks)
  app.main(tiny_config(**PLAN, **RULES), str(tmp_path), "train", hooks=WITHOUT_PLOTS)
  assert sent.reached == list(signals)
  assert_same_run(tmp_path, runs["ruled"][0])
