"""Runs side by side, and the policy that a report states."""

import json
import shutil

from profit_jax.cli import compare
from profit_jax.report import policy


def test_runs_are_compared_by_result_and_by_the_settings_that_differ(
  finished_run, tmp_path, capsys, monkeypatch
):
  monkeypatch.setenv("COLUMNS", "200")
  other = tmp_path / "other"
  shutil.copytree(finished_run, other, ignore=shutil.ignore_patterns("checkpoints", "plots"))
  config = json.loads((other / "config.json").read_text())
  config["seed"], config["plan"]["freeze_fractions"] = 7, [0.0, 0.5]
  (other / "config.json").write_text(json.dumps(config))
  assert compare.main([str(finished_run), str(other)]) == 0
  rows = {
    line.split()[0]: line.split()[1:]
    for line in capsys.readouterr().out.splitlines()
    if line.split()
  }
  final = json.loads((finished_run / "result.json").read_text())["final"]
  assert rows["top-1"] == [f"{final['top1']:.2f}", "%"] * 2
  assert rows["plan.freeze_fractions"][-2:] == ["[0.0,", "0.5]"]
  assert "train.batch_size" not in rows


def test_a_run_beside_itself(finished_run, capsys):
  assert compare.main([str(finished_run), str(finished_run)]) == 0
  assert "All settings are the same." in capsys.readouterr().out


def test_runs_that_differ_in_their_seed_are_one_group_of_the_picture(
  finished_run, tmp_path, capsys
):
  runs = [str(finished_run)]
  for name, field, value in (("seed", "seed", 7), ("rate", "train.learning_rate", 0.5)):
    runs.append(str(tmp_path / name))
    shutil.copytree(finished_run, runs[-1])
    config = json.loads((tmp_path / name / "config.json").read_text())
    section, _, leaf = field.rpartition(".")
    (config[section] if section else config)[leaf] = value
    config["checkpoint"]["keep"] = 1000  # changes no number
    (tmp_path / name / "config.json").write_text(json.dumps(config))
  assert compare.groups(runs) == {
    "train.learning_rate=0.1": runs[:2],
    "train.learning_rate=0.5": runs[2:],
  }
  assert compare.groups(runs[:2]) == {"": runs[:2]}
  # What a legend shortens stays two groups.
  config["train"]["learning_rate"] = 0.100001
  (tmp_path / "rate" / "config.json").write_text(json.dumps(config))
  assert list(compare.groups(runs).values()) == [runs[:2], runs[2:]]
  assert compare.main([*runs, "--plot", str(tmp_path / "runs.png")]) == 0
  assert (tmp_path / "runs.png").read_bytes()[:4] == b"\x89PNG"
  assert compare.main([*runs, "--plot", str(tmp_path / "absent" / "runs.png")]) == 2
  assert "--plot=" in capsys.readouterr().err


def test_what_has_no_result(finished_run, tmp_path, capsys):
  unfinished = tmp_path / "unfinished"
  unfinished.mkdir()
  shutil.copy(finished_run / "config.json", unfinished)
  for run, message in ((unfinished, "has not ended"), (tmp_path / "absent", "holds no run")):
    assert compare.main([str(finished_run), str(run)]) == 2
    assert message in capsys.readouterr().err


def test_the_report_states_the_policy(finished_run):
  report = (finished_run / "report.md").read_text()
  config = json.loads((finished_run / "config.json").read_text())
  data = json.loads((finished_run / "data.json").read_text())
  stated = report[report.index("## Policy") :]
  assert data["fingerprint"] in stated
  assert f"| seed | {config['seed']} |" in stated
  assert "| teacher | the student before quantization |" in stated
  assert "PROFIT at 4 bits, freezing 33%, 67%" in stated
  assert (policy.commit() or "unknown") in stated
