"""`profit sensitivity`: the table, the files, and the options to train with."""

import ast
import contextlib
import dataclasses
import io
import json
import pathlib
import shlex

import pytest
from PIL import Image

from profit_jax import optional
from profit_jax.cli import sensitivity
from profit_jax.config import PlanSettings, default_config, parse
from profit_jax.models import REGISTRY
from profit_jax.sensitivity import Assignment
from tests.train import shared
from tests.train.tiny import CONVS
from tests.wrong_input import assert_refused, command

CONFIG = pathlib.Path(shared.__file__).with_name("tiny_run.py")


def run(*arguments):
  """Exit code, output and errors."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = sensitivity.main([*map(str, arguments)])
  return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def measured(finished_run):
  """The run, what was written, and what was printed."""
  asked = "--bits=2,3", "--images=100", "--budget_bytes=600"
  code, printed, err = run(f"--workdir={finished_run}", *asked)
  assert code == 0, err
  return finished_run, json.loads((finished_run / "sensitivity.json").read_text()), printed


def test_the_table_has_every_layer_the_most_sensitive_first(measured):
  _, content, printed = measured
  assert content["scores"]["examples"] == 100
  lines = [line.split() for line in printed.splitlines()]
  rows = [line for line in lines if line[:1] and line[0] in (*CONVS, "classifier")]
  assert {(row[0], row[1]) for row in rows} == {
    (part["layers"][0], part["side"]) for part in content["parts"]
  }
  assert len(rows) == 7
  at_2_bits = [float(row[3]) for row in rows]
  assert at_2_bits == sorted(at_2_bits, reverse=True)
  reductions = {(p["side"], p["layers"][0]): p["reductions"] for p in content["parts"]}
  for row in rows:
    two, three = reductions[row[1], row[0]]
    assert row[2:] == [
      "4",
      *(f"{reduction['loss']:+.4f}" for reduction in (two, three)),
      *(f"{reduction['top1']:+.2f}" for reduction in (two, three)),
    ]
  assert "14 evaluations of 100 images: 7 weights and inputs at 2, 3 bits" in printed


def test_its_options_train_a_run_within_the_budget(measured):
  _, content, printed = measured
  assigned = content["assignment"]
  assert assigned["budget"] == {"bytes": 600}
  assert assigned["bytes"] <= 600 < assigned["full_bytes"] == 800
  options = shlex.split(printed.partition("Train with:")[2].partition("Written")[0])
  assert options == [shlex.split(option)[0] for option in assigned["options"]]
  code, plan, err = command(f"--config={CONFIG}", "--mode=plan", *options)
  assert code == 0, err
  assert f"w{assigned['weight_bits']}a4 ft1" in plan


def test_it_draws_every_layer(measured):
  with Image.open(measured[0] / "plots" / "sensitivity.png") as picture:
    assert min(picture.size) > 200


def test_without_matplotlib_it_measures_and_says_so(measured, monkeypatch):
  missing = "Drawing plots needs matplotlib, which is not installed."
  monkeypatch.setattr(optional, "missing", lambda extra, *_: missing * (extra == "plots"))
  code, printed, err = run(f"--workdir={measured[0]}", "--bits=2", "--images=1")
  assert code == 0, err
  assert missing in printed
  assert json.loads((measured[0] / "sensitivity.json").read_text())["assignment"] is None


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--bits=1,2"], "bits has 1"),
    (["--bits=9"], "bits has 9"),
    (["--bits=two"], "--bits=two is not allowed"),
    (["--bits="], "--bits= is not allowed"),
    (["--bits=4,8"], "no layer has more than 4 bits"),
    (["--images=0"], "images=0"),
    (["--budget_bytes=0"], "--budget_bytes=0"),
    (["--budget_bytes=9", "--budget_bops=9"], "not allowed together"),
    (
      ["--bits=3", "--images=1", "--budget_bops=9"],
      "A budget of 9 bit operations an image cannot be met",
    ),
  ],
)
def test_wrong_input_is_one_message(finished_run, arguments, message):
  code, _, err = run(f"--workdir={finished_run}", *arguments)
  assert_refused(code, err, [message])


def test_a_directory_without_a_run(tmp_path):
  code, _, err = run(f"--workdir={tmp_path}", "--bits=2")
  assert_refused(code, err, [str(tmp_path)])


def assigned(weight_bits, act_bits, rules=()):
  return Assignment(
    rules=rules,
    weight_bits=weight_bits,
    act_bits=act_bits,
    bits={},
    bytes=1,
    bops=1,
    full_bytes=1,
    full_bops=1,
    loss=0.0,
  )


@pytest.mark.parametrize(
  ("plan", "bits", "expected"),
  [
    (
      PlanSettings(),
      (3, 4),
      {"plan.weight_bits": (8, 5, 4, 3), "plan.act_bits": (8, 5, 4), "plan.profit_bits": (3,)},
    ),
    (
      PlanSettings(weight_bits=(8, 2), refit_bits=(2,), profit_bits=(2,)),
      (4, 5),
      {
        "plan.weight_bits": (8, 4),
        "plan.act_bits": (8, 5),
        "plan.profit_bits": (4,),
        "plan.refit_bits": (),
      },
    ),
    (
      PlanSettings(
        progressive=False, weight_bits=(4,), act_bits=(4,), refit_bits=(4,), profit_bits=(4,)
      ),
      (3, 4),
      {
        "plan.weight_bits": (4, 3),
        "plan.act_bits": (4,),
        "plan.profit_bits": (3,),
        "plan.refit_bits": (),
      },
    ),
    (
      PlanSettings(profit=False, act_bits=()),
      (4, None),
      {"plan.weight_bits": (8, 5, 4), "plan.act_bits": ()},
    ),
  ],
)
def test_the_plan_ends_with_the_fewest_bits(plan, bits, expected):
  rules = (("a|b/c\\-d", 8, None), ("e", "float", 6))
  options = shlex.split(" ".join(sensitivity.options_of(assigned(*bits, rules), plan)))
  found = dict(option.removeprefix("--config.").split("=", 1) for option in options)
  read = {name: ast.literal_eval(text) for name, text in found.items()}
  assert read == {**expected, "quant.rules": rules}
  config = default_config()
  config.plan.update(dataclasses.asdict(plan))
  config.update_from_flattened_dict(read)
  assert parse(config, REGISTRY).plan.weight_bits == read["plan.weight_bits"]
