"""A grid of runs: which cells, what their commands are, and what may be said of the results."""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import threading
import time

import numpy as np
import pytest
from etils import epath

from configs import digits_w4
from profit_jax.cli import ablate
from profit_jax.config import ConfigError
from profit_jax.models import check
from profit_jax.report import ablation
from profit_jax.schedule import plan
from profit_jax.train import fork

GRIDS = sorted(pathlib.Path(digits_w4.__file__).parent.glob("ablation*.py"))


def small_grid(**changes):
  grid = ablation.Grid(
    config="configs/digits_w4.py:{model}",
    fields={"data.image_size": 16},
    axes={
      "model": {"mobilenet_v1": {}, "mobilenet_v2": {}},
      "freezing": {"on": {}, "off": {"plan.freeze_fractions": (0.0, 0.0)}},
    },
    keep=lambda labels: labels["model"] == "mobilenet_v2" or labels["freezing"] == "on",
    seeds=3,
  )
  return dataclasses.replace(grid, **changes)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_every_grid_is_a_valid_run(path):
  grid = ablation.read_grid(str(path))
  assert grid.cells()
  for labels in grid.cells():
    settings = ablation.settings_of(grid, (labels, 3))
    check(settings)
    assert plan(settings)
    assert settings.seed == 3
    assert settings.model.name == labels[0]


def test_cells_and_their_commands():
  grid = small_grid()
  assert grid.cells() == [("mobilenet_v1", "on"), ("mobilenet_v2", "on"), ("mobilenet_v2", "off")]
  assert grid.arguments(("mobilenet_v2", "off"), 2) == [
    "--config=configs/digits_w4.py:mobilenet_v2",
    "--config.data.image_size=16",
    "--config.plan.freeze_fractions=(0.0, 0.0)",
    "--config.seed=2",
  ]


def test_a_part_of_a_grid():
  grid = ablation.narrowed(small_grid(), ["freezing=on"], 5)
  assert (grid.cells(), grid.seeds) == ([("mobilenet_v1", "on"), ("mobilenet_v2", "on")], 5)
  with pytest.raises(ConfigError, match=r"freezing=maybe .* freezing=on\|off"):
    ablation.narrowed(small_grid(), ["freezing=maybe"], None)
  with pytest.raises(ConfigError, match="seeds=0"):
    ablation.narrowed(small_grid(), [], 0)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1", "get_grid"),
    ("def get_config(): return {}", "profit train --config="),
    ("def get_grid(): return {}", "config, fields, axes, keep, seeds"),
    (
      "def get_grid(): return dict(config='{m}', fields={}, axes={'a': {'x': {}}}, keep=bool, "
      "seeds=1)",
      "'m'",
    ),
    (
      "def get_grid(): return dict(config='', fields={}, axes={'a': {}}, keep=bool, seeds=1)",
      "axis 'a'",
    ),
    ("def get_grid(): return dict(config='', fields={}, axes={}, keep=bool, seeds=0)", "seeds=0"),
  ],
)
def test_a_file_that_is_no_grid(tmp_path, text, message):
  (tmp_path / "grid.py").write_text(text)
  with pytest.raises(ConfigError, match=message):
    ablation.read_grid(str(tmp_path / "grid.py"))


def test_phases_in_common_are_trained_once():
  grid = ablation.read_grid(str(GRIDS[0].parent / "ablation_digits.py"))
  # A run of another seed comes first: it has no phase in common with any.
  runs = [(grid.cells()[0], 0), *((labels, 1) for labels in grid.cells())]
  parents = ablation.parents({run: ablation.settings_of(grid, run) for run in runs})

  def found(model, bits, freezing, progressive, padding="on"):
    parent = parents.get(((model, bits, freezing, progressive, padding), 1))
    return parent and (*parent.run[0][1:], parent.run[1], parent.phases)

  for model in ("mobilenet_v2", "mobilenet_v3_small"):
    assert found(model, "W3A3", "on", "on") is None
    # All but the last three phases; full precision; full precision and activations at 8 and 4 bits.
    assert found(model, "W3A3", "off", "on") == ("W3A3", "on", "on", "on", 1, 19)
    assert found(model, "W3A3", "on", "off") == ("W3A3", "on", "on", "on", 1, 1)
    assert found(model, "W2A2", "on", "on") == ("W3A3", "on", "on", "on", 1, 7)
    assert found(model, "W2A2", "off", "off") == ("W2A2", "on", "off", "on", 1, 7)
  # Another padding is another net.
  assert found("mobilenet_v3_small", "W3A3", "on", "on", "off") is None
  assert found("mobilenet_v3_small", "W2A2", "on", "on", "off") == ("W3A3", "on", "on", "off", 1, 7)


def write_results(root, grid, top1):
  for labels in grid.cells():
    for seed in range(grid.seeds):
      value = top1(labels, seed)
      if value is not None:
        directory = ablation.directory_of(root, labels, seed)
        directory.mkdir(parents=True)
        (directory / "result.json").write_text(
          json.dumps({"final": {"top1": value, "full_precision_top1": 99.0}})
        )


def test_mean_deviation_and_what_exceeds_the_spread(tmp_path):
  root, grid = epath.Path(tmp_path), small_grid(seeds=4)
  # The seeds differ by more than the cells, but every seed says the same of the cells: pairs show
  # it.
  levels = {
    ("mobilenet_v1", "on"): 80.0,
    ("mobilenet_v2", "on"): 90.0,
    ("mobilenet_v2", "off"): 89.0,
  }
  write_results(
    root,
    grid,
    lambda labels, seed: levels[labels] + 3.0 * seed + 0.1 * (seed % 2) * (labels[1] == "off"),
  )
  cells = ablation.read_cells(grid, root)
  assert [(cell.runs, round(cell.mean, 6)) for cell in cells] == [(4, 84.5), (4, 94.5), (4, 93.55)]
  assert cells[1].deviation == pytest.approx(np.std([90, 93, 96, 99], ddof=1))
  model, freezing = ablation.differences(grid, cells)
  assert (model.axis, model.base, model.other, model.mean) == (
    "model",
    ("mobilenet_v1", "on"),
    ("mobilenet_v2", "on"),
    10.0,
  )
  assert freezing.mean == pytest.approx(-0.95)
  assert freezing.error == pytest.approx(np.std([-1, -0.9, -1, -0.9], ddof=1) / 2)
  assert freezing.exceeds
  text = ablation.markdown(grid, cells, [model, freezing])
  assert "| mobilenet_v2 | off | 93.55 |" in text
  assert "- freezing off instead of on (mobilenet_v2): -0.95 ± 0.03 (4 seeds)" in text


def test_a_difference_within_the_spread_is_none(tmp_path):
  root, grid = epath.Path(tmp_path), small_grid()
  values = {"on": [90.0, 91.0, 92.0], "off": [90.5, 89.0, 92.5]}
  write_results(root, grid, lambda labels, seed: values[labels[1]][seed])
  row = ablation.differences(grid, ablation.read_cells(grid, root))[-1]
  assert not row.exceeds
  assert abs(row.mean) < 4.303 * row.error


def test_two_seeds_say_nothing(tmp_path):
  # Both differ by the same two images: the error is 0.
  root, grid = epath.Path(tmp_path), small_grid(seeds=2)
  write_results(root, grid, lambda labels, seed: 90.0 + seed - 0.5 * (labels[1] == "off"))
  row = ablation.differences(grid, ablation.read_cells(grid, root))[-1]
  assert (row.mean, row.error, row.exceeds) == (-0.5, 0.0, False)


def test_runs_that_are_missing_are_counted(tmp_path):
  root, grid = epath.Path(tmp_path), small_grid()
  write_results(root, grid, lambda labels, seed: 90.0 if seed == 1 and labels[1] == "on" else None)
  cells = ablation.read_cells(grid, root)
  assert [cell.runs for cell in cells] == [1, 1, 0]
  assert math.isnan(cells[0].deviation)
  rows = ablation.differences(grid, cells)
  assert not any(row.exceeds for row in rows)
  text = ablation.markdown(grid, cells, rows)
  assert "\n2 pairs of cells" in text
  assert "| mobilenet_v2 | on | 90.00 | - | 1 of 3 |" in text
  assert "| mobilenet_v2 | off | - | - | 0 of 3 | - |" in text
  json.dumps(ablation.to_json(grid, cells, rows), allow_nan=False)


GRID = """
def get_grid():
  return {"config": "configs/digits_w4.py:mobilenet_v2", "fields": {},
          "axes": {"a": {"x": {}, "y": {}}}, "keep": lambda labels: True, "seeds": 2}
"""


def ablate_with(directory, code, *arguments):
  """Runs the grid with a script in the place of `profit train`, two runs at once; returns the exit
  code.
  """
  (directory / "grid.py").write_text(GRID)
  (directory / "run.py").write_text(code)
  launcher = ablate.Launcher(
    command=(sys.executable, "-S", str(directory / "run.py")),
    environments=lambda jobs: [{"SLOT": str(number)} for number in range(jobs)],
    poll=0.05,
  )
  config, workdir = directory / "grid.py", directory / "runs"
  return ablate.main(
    [f"--config={config}", f"--workdir={workdir}", "--jobs=2", *arguments], launcher
  )


# Stands for a run: writes a result, or fails.
RUN = """
import json, os, pathlib, sys, time
directory = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir")).split("=")[1])
if "y-seed1" in directory.name and not (directory.parent / "mended").exists():
  sys.exit("broken")
# y begins with what x has trained.
if directory.name.startswith("x"):
  time.sleep(0.3)
elif not (directory.parent / directory.name.replace("y", "x", 1) / "result.json").exists():
  sys.exit("too early")
directory.mkdir()
result = {"final": {"top1": 90.0, "full_precision_top1": None}, "slot": os.environ["SLOT"]}
(directory / "result.json").write_text(json.dumps(result))
"""


def test_a_grid_goes_on_where_it_stopped_and_tells_which_runs_failed(tmp_path, capsys):
  root = tmp_path / "runs"
  assert ablate_with(tmp_path, RUN) == 1
  printed = capsys.readouterr()
  assert "4 runs, 4 of them" in printed.out
  assert "FAILED: y, seed 1" in printed.err
  assert "broken" in (root / "logs" / "y-seed1.log").read_text()
  # The two that began first had a slot each.
  slots = {
    json.loads((root / f"x-seed{seed}" / "result.json").read_text())["slot"] for seed in (0, 1)
  }
  assert slots == {"0", "1"}
  (root / "mended").touch()
  assert ablate_with(tmp_path, RUN) == 0
  assert "4 runs, 1 of them" in capsys.readouterr().out
  assert (root / "ablation.png").read_bytes()[:4] == b"\x89PNG"
  assert json.loads((root / "ablation.json").read_text())["cells"][1]["runs"] == 2


# Stands for two runs that go on at the same time: x has saved what y may begin with, and waits for
# it.
LIVE = """
import json, pathlib, sys, time
directory = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir")).split("=")[1])
x, y = directory.parent / "x-seed0", directory.parent / "y-seed0"
result = {"final": {"top1": 90.0, "full_precision_top1": None}}
if directory == x:
  (directory / "checkpoints" / "NUMBER").mkdir(parents=True)
  data = {"train_examples": 1347, "eval_examples": 450, "num_classes": 10}
  (directory / "data.json").write_text(json.dumps(data))
  for _ in range(600):
    if (y / "result.json").exists():
      break
    time.sleep(0.05)
else:
  directory.mkdir(parents=True)
  result["given"] = [a for a in sys.argv if a.startswith("--fork_from")]
  result["x goes on"] = not (x / "result.json").exists()
(directory / "result.json.tmp").write_text(json.dumps(result))
(directory / "result.json.tmp").rename(directory / "result.json")
"""


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_begins_while_its_parent_goes_on(tmp_path, alone):
  (tmp_path / "grid.py").write_text(GRID)
  settings = ablation.settings_of(ablation.read_grid(str(tmp_path / "grid.py")), (("x",), 0))
  end = fork.ends(settings, len(plan(settings)), 1347)[-1]
  code = LIVE.replace("NUMBER", str(end))
  assert ablate_with(tmp_path, code, "--seeds=1", *["--alone"] * alone) == 0
  root = tmp_path / "runs"
  got = json.loads((root / "y-seed0" / "result.json").read_text())
  assert got["given"] == ([] if alone else [f"--fork_from={root}/x-seed0"])
  assert got["x goes on"]


# Stands for a run that saves where it is asked to stop.
ENDLESS = """
import pathlib, signal, sys, time
directory = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir")).split("=")[1])
def save(*_):
  time.sleep(0.2)
  (directory / "saved").touch()
  sys.exit(143)
signal.signal(signal.SIGTERM, save)
directory.mkdir(parents=True)
time.sleep(60)
"""


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_runs_which_save(tmp_path, capsys, asked):
  runs = [tmp_path / "runs" / f"{cell}-seed0" for cell in ("x", "y")]

  def stop():
    for _ in range(1000):
      if all(run.exists() for run in runs):
        break
      time.sleep(0.02)
    os.kill(os.getpid(), asked)

  thread = threading.Thread(target=stop)
  thread.start()
  assert ablate_with(tmp_path, ENDLESS, "--alone") == 128 + asked
  thread.join()
  assert capsys.readouterr().err.startswith(f"stopped: by {asked.name} with runs under way")
  assert all((run / "saved").exists() for run in runs)
  assert {run.name for run in (tmp_path / "runs").iterdir()} == {"x-seed0", "y-seed0", "logs"}


def test_without_gpus_the_runs_at_once_share_the_devices(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert ablate.one_per_gpu(3) == [{}] * 3


def test_plan_prints_commands_and_trains_nothing(tmp_path, capsys):
  (tmp_path / "grid.py").write_text(GRID)
  assert (
    ablate.main(
      ["--config", str(tmp_path / "grid.py"), "--workdir", str(tmp_path / "runs"), "--plan"]
    )
    == 0
  )
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 4
  x, y = shlex.split(lines[0])[1:], shlex.split(lines[1])[1:]
  assert x[:6] == [
    "-m",
    "profit_jax",
    "train",
    "--config=configs/digits_w4.py:mobilenet_v2",
    "--config.seed=0",
    f"--workdir={tmp_path}/runs/x-seed0",
  ]
  # Both have the same plan: y begins with what x has trained, which must still be there.
  assert x[6:] == ["--config.checkpoint.keep=1000"]
  assert y[6:] == [f"--fork_from={tmp_path}/runs/x-seed0"]
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--jobs=0"], "--jobs=0"),
    (["--seeds=-1"], "seeds=-1"),
    (["--only=b=x"], "b=x"),
    (["--config=absent.py"], "absent.py"),
  ],
)
def test_wrong_input(tmp_path, capsys, more, message):
  (tmp_path / "grid.py").write_text(GRID)
  assert ablate.main([f"--config={tmp_path / 'grid.py'}", f"--workdir={tmp_path}", *more]) == 2
  assert message in capsys.readouterr().err
