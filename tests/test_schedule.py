"""The published plan, and every option."""

import importlib
import pathlib
import subprocess
import sys

import pytest

from configs import base
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, check
from profit_jax.schedule import format_table, plan

CONFIGS = pathlib.Path(base.__file__).parent


def settings(**changes):
  config = base.get_config()
  config.update_from_flattened_dict(changes)
  return parse(config, ["mobilenet_v2"])


# SPEC section 4: kind, weight bits, act bits, epochs, frozen share; the command with a teacher,
# bits 8 5 4, PROFIT at 4.
THIRD, TWO_THIRDS = 1 / 3, 2 / 3
PUBLISHED = [("full_precision", None, None, 15, 0)]
for bits in (8, 5, 4):
  PUBLISHED += [("bn", None, bits, 5, 0), ("finetune", None, bits, 15, 0), ("bn", None, bits, 5, 0)]
for bits in (8, 5):
  PUBLISHED += [("bn", bits, 4, 5, 0), ("finetune", bits, 4, 15, 0), ("bn", bits, 4, 5, 0)]
PUBLISHED += [("bn", 4, 4, 5, 0), ("sampling", 4, 4, 5, 0)]
PUBLISHED += [("finetune", 4, 4, 15, share) for share in (0, THIRD, TWO_THIRDS)] + [
  ("bn", 4, 4, 5, 0)
]


@pytest.mark.parametrize(
  "name",
  sorted(
    path.stem
    for path in CONFIGS.glob("[!_]*.py")
    if path.stem != "base" and "ablation" not in path.stem
  ),
)
def test_every_configuration_is_valid_and_says_its_command_cost_and_result(name):
  module = importlib.import_module(f"configs.{name}")
  chosen = parse(module.get_config(), REGISTRY)
  check(chosen)
  assert plan(chosen)
  for word in ("Command:", f"--config configs/{name}.py", "Cost:", "Result:"):
    assert word in module.__doc__, word


def test_hours_follow_from_the_speed():
  phases = plan(settings())
  lines = format_table(phases, 5004, 1500 / 256).splitlines()
  # 15 epochs of 5004 steps of 256 images at 1500 images a second.
  assert lines[1].split()[-1] == f"{15 * 5004 * 256 / 1500 / 3600:.2f}"
  assert lines[-1].startswith(f"{200 * 5004 * 256 / 1500 / 3600:.1f} hours")
  assert "hours" not in format_table(phases, 5004)


def test_published_command_is_22_phases_and_200_epochs():
  phases = plan(settings())
  assert [
    (p.kind, p.weight_bits, p.act_bits, p.epochs, p.frozen_fraction) for p in phases
  ] == PUBLISHED
  assert len(phases) == 22
  assert sum(p.epochs for p in phases) == 200
  assert [p.index for p in phases] == list(range(1, 23))
  assert len({p.name for p in phases}) == 22
  assert {p.index: p.calibrate for p in phases if p.calibrate} == {2: "act", 11: "weight"}


def test_kernels_are_fitted_at_the_bits_that_say_so():
  phases = plan(
    settings(**{"plan.weight_bits": (8, 4, 2), "plan.profit_bits": (2,), "plan.refit_bits": (2,)})
  )
  assert [p.name for p in phases if p.calibrate == "fit"] == ["w2a4 bn1"]
  assert [p.name for p in phases if p.calibrate == "weight"] == ["w8a4 bn1"]


def test_profit_at_every_bit_width_is_270_epochs():
  assert sum(p.epochs for p in plan(settings(**{"plan.profit_bits": (8, 5, 4)}))) == 270


def test_warm_up_and_cosine_once_per_epoch():
  finetune = plan(settings())[2]
  rates = [finetune.learning_rate_at(epoch) / 0.005 for epoch in range(15)]
  assert rates[:4] == pytest.approx([0.1, 0.4, 0.7, 1.0])
  assert rates[9] == pytest.approx(0.001 + 0.999 / 2)
  assert rates == rates[:3] + sorted(rates[3:], reverse=True)
  bn, sampling = plan(settings())[1], plan(settings())[17]
  assert bn.learning_rate_at(0) == 0.005
  assert {sampling.learning_rate_at(epoch) for epoch in range(5)} == {0.005}


def test_phases_share_programs():
  phases = plan(settings())
  assert len({p.program for p in phases}) == 5
  # w8, w5, ft1, ft3, and BN before and after PROFIT: which kernels are frozen is a value.
  assert len({phases[i].program for i in (11, 14, 18, 20, 16, 21)}) == 1
  # Kernels that are not quantized need no gradient in a BN phase.
  assert not phases[1].program.train_kernels


@pytest.mark.parametrize(
  "remedy", [{"oscillation.dampening": 1e-4}, {"oscillation.freeze_thresholds": (0.04, 0.01)}]
)
def test_bn_phases_are_without_a_remedy(remedy):
  phases = plan(settings(**remedy))
  assert {p.program.train_kernels for p in phases if p.kind == "bn"} == {False}


@pytest.mark.parametrize(
  ("changes", "names"),
  [
    (
      {"plan.progressive": False},
      "fp|a4 bn1|a4 ft|a4 bn2|w4a4 bn1|w4a4 sampling|w4a4 ft1|w4a4 ft2|w4a4 ft3|w4a4 bn2",
    ),
    (
      {"plan.progressive": False, "plan.profit": False, "plan.stabilize": False},
      "fp|a4 ft|w4a4 ft",
    ),
    (
      {"plan.act_bits": (), "plan.weight_bits": (8,), "plan.profit": False},
      "fp|w8 bn1|w8 ft|w8 bn2",
    ),
    ({"plan.weight_bits": (), "plan.act_bits": (8,), "plan.stabilize": False}, "fp|a8 ft"),
    ({"plan.weight_bits": (), "plan.act_bits": ()}, "fp"),
    ({"plan.act_bits": (4,), "plan.weight_bits": (), "plan.bn_epochs": 0}, "fp|a4 ft"),
    (
      {
        "teacher.model": "none",
        "init.weights": "w.npz",
        "plan.act_bits": (8,),
        "plan.weight_bits": (),
      },
      "a8 bn1|a8 ft|a8 bn2",
    ),
    (
      {"plan.progressive": False, "plan.freeze_fractions": (0.0, 0.5), "plan.stabilize": False},
      "fp|a4 ft|w4a4 sampling|w4a4 ft1|w4a4 ft2",
    ),
  ],
)
def test_options(changes, names):
  assert "|".join(p.name for p in plan(settings(**changes))) == names


@pytest.mark.parametrize(
  ("changes", "first", "later"),
  [
    ({"teacher.model": "none"}, False, False),
    (
      {"teacher.model": "self"},
      False,
      True,
    ),  # from random weights it has no teacher before phase 1 ends
    ({"teacher.model": "self", "init.weights": "w.npz"}, True, True),
    ({"teacher.model": "mobilenet_v2", "teacher.weights": "t.npz"}, True, True),
  ],
)
def test_which_phases_distill(changes, first, later):
  phases = plan(settings(**changes))
  assert phases[0].distill == first
  assert {p.distill for p in phases[1:]} == {later}


def test_a_plan_without_phases_is_refused():
  with pytest.raises(ConfigError, match="no phase"):
    plan(
      settings(
        **{
          "teacher.model": "none",
          "init.weights": "w.npz",
          "plan.act_bits": (),
          "plan.weight_bits": (),
        }
      )
    )


def test_table_counts_steps_and_programs():
  lines = format_table(plan(settings()), 5004).split("\n")
  assert len(lines) == 24
  assert "75060" in lines[1]
  for count in ("22 phases", "200 epochs", "1000800 steps", "5 for training", "3 for evaluation"):
    assert count in lines[-1]


def test_the_plan_needs_no_jax():
  code = "import profit_jax.schedule, sys; assert 'jax' not in sys.modules"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
