"""A whole run: its files, and that stopping it changes nothing."""

import errno
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from profit_jax import checkpoints
from profit_jax.cli import app
from profit_jax.config import ConfigError
from profit_jax.train.interrupt import Stopped
from profit_jax.train.nonfinite import NotFinite
from profit_jax.train.observer import Observer
from profit_jax.train.programs import Programs
from profit_jax.train.state import create_state, saved_form
from tests.specs import spec_of
from tests.train.runs import (
  WITHOUT_PLOTS,
  SaveAt,
  SignalAt,
  assert_same_run,
  damage,
  newest_of,
  number,
  result_of,
)
from tests.train.shared import PHASES, tiny_config
from tests.train.tiny import CONVS, TinyNet


def test_result_keeps_its_contract(finished_run):
  result = result_of(finished_run)
  assert set(result) == {
    *("model", "dataset", "seed", "environment", "phases", "aiwq", "final", "layer_bits")
  }
  assert [p["index"] for p in result["phases"]] == list(range(1, PHASES + 1))
  keys = (
    "index name kind weight_bits act_bits epochs steps top1 top1_ema loss seconds compile_seconds "
    "frozen"
  )
  assert all(set(p) == set(keys.split()) for p in result["phases"])
  assert (result["phases"][0]["weight_bits"], result["phases"][1]["weight_bits"]) == (None, None)
  assert result["phases"][-1]["weight_bits"] == result["phases"][-1]["act_bits"] == 4
  final = result["final"]
  assert set(final) == {
    "weight_bits",
    "act_bits",
    "top1",
    "top5",
    "weights",
    "full_precision_top1",
    "examples",
  }
  assert final["examples"] == 450
  assert final["weights"] in ("raw", "ema")
  target = [p for p in result["phases"] if p["weight_bits"] == 4]
  assert final["top1"] >= max(max(p["top1"], p["top1_ema"]) for p in target)
  assert final["full_precision_top1"] >= max(
    result["phases"][0]["top1"], result["phases"][0]["top1_ema"]
  )


def test_frozen_layers_are_the_top_of_the_ranking(finished_run):
  result = result_of(finished_run)
  ranking = [row["layer"] for row in result["aiwq"]]
  metrics = [row["metric"] for row in result["aiwq"]]
  assert sorted(ranking) == sorted(CONVS)
  assert [row["rank"] for row in result["aiwq"]] == [1, 2, 3]
  assert metrics == sorted(metrics, reverse=True)
  assert metrics[-1] > 0
  frozen = {p["name"]: p["frozen"] for p in result["phases"]}
  assert frozen["w4a4 sampling"] == []
  assert frozen["w4a4 ft1"] == ranking[:1]
  assert frozen["w4a4 ft2"] == sorted(ranking[:2])
  assert frozen["w4a4 bn2"] == []


def test_report_and_plots_are_written(finished_run):
  report = (finished_run / "report.md").read_text()
  for name in ("accuracy", "aiwq", "weight_codes"):
    assert f"plots/{name}.png" in report
    assert (finished_run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert report.count("| w4a4 ft") == 2


def test_tensorboard_has_every_promised_tag(finished_run):
  events = EventAccumulator(str(finished_run), size_guidance={"tensors": 0}).Reload()
  tags = set(events.Tags()["tensors"])
  promised = "train/loss train/kd train/step_loss eval/top1 eval_ema/top1 learning_rate/weight"
  promised += " learning_rate/quant learning_rate/norm quant_a/conv1 quant_c/quant2"
  promised += " clip_rate/conv0 clip_rate/signed_quant aiwq/conv2"
  for tag in promised.split():
    assert tag in tags, tag
  steps = [event.step for event in events.Tensors("eval/top1")]
  result = result_of(finished_run)
  assert steps == sorted(steps)
  assert steps[-1] == sum(p["steps"] for p in result["phases"])
  rates = [float(make_ndarray(event.tensor_proto)) for event in events.Tensors("clip_rate/conv0")]
  assert all(0 <= rate < 0.5 for rate in rates)
  assert any(rate > 0 for rate in rates)  # a is 0.9 of the largest weight at first


def test_a_run_stopped_by_signals_ends_with_the_same_numbers(finished_run, tmp_path):
  # In the middle of full precision, in mid-sampling, and between the last step of a phase with
  # frozen layers and its evaluation.
  stops = {
    number(0, 4): (signal.SIGTERM, "phase 1 of 9", "4 of 10 steps"),
    number(5, 5): (signal.SIGINT, "phase 6 of 9", "5 of 10 steps"),
    number(7, 10): (signal.SIGTERM, "phase 8 of 9", "10 of 10 steps"),
  }
  signals = SignalAt({at: asked for at, (asked, *_) in stops.items()})
  for asked, *where in stops.values():
    with pytest.raises(Stopped) as stopped:
      app.main(tiny_config(), str(tmp_path), "train", hooks=signals.hooks)
    assert stopped.value.code == 128 + asked
    assert all(part in str(stopped.value) for part in (asked.name, *where))
  app.main(tiny_config(), str(tmp_path), "train", hooks=signals.hooks)
  assert signals.reached == list(stops)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert_same_run(tmp_path, finished_run)


class Untrained(Observer):
  """Fails when a phase begins."""

  def phase_started(self, phase, steps_done):
    pytest.fail(f"trained again: {phase.name}")


def test_a_finished_run_is_not_trained_again(finished_run, tmp_path):
  # A copy: it writes its report again, while other processes read the shared run.
  run = shutil.copytree(finished_run, tmp_path / "run")
  before = result_of(run)
  hooks = app.Hooks(callbacks=[Untrained()], plots=False)
  app.main(tiny_config(), str(run), "train", hooks=hooks)
  assert result_of(run) == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_ends_the_same(
  finished_run, tmp_path, capsys
):
  run = shutil.copytree(finished_run, tmp_path / "run")
  newest = checkpoints.saved_numbers(run / "checkpoints")[-1]
  damage(run / "checkpoints" / str(newest))
  app.main(tiny_config(), str(run), "train", hooks=WITHOUT_PLOTS)
  printed = capsys.readouterr().out
  assert f"{run}/checkpoints/{newest} is damaged" in printed
  assert "phase 8 of 9" in printed  # it resumes from the end of the phase before
  assert (run / "damaged_checkpoints" / str(newest)).exists()
  assert_same_run(run, finished_run)


def test_nothing_is_overwritten_where_all_checkpoints_are_damaged(finished_run, tmp_path):
  run = shutil.copytree(finished_run, tmp_path / "run")
  for number_ in checkpoints.saved_numbers(run / "checkpoints"):
    damage(run / "checkpoints" / str(number_))
  before = {
    path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"
  }
  for mode in ("train", "eval"):
    with pytest.raises(ConfigError, match=f"No checkpoint in {run}"):
      app.main(tiny_config(), str(run), mode)
  assert {path: path.read_bytes() for path in before} == before


# Weight decay that multiplies every kernel by 1 - 4 * 0.9 = -2.6 in each step, until it overflows;
# with half the rate, by -0.8; with a twentieth, by 0.82. Gradients overflow first, after some 25
# steps: the checkpoint lies well before.
DIVERGING = {
  "plan.weight_bits": (),
  "plan.act_bits": (),
  "plan.full_precision_epochs": 20,
  "train.full_precision_learning_rate": 4.0,
  "train.weight_decay": 0.9,
  "train.momentum": 0.0,
}


class InterruptAfterRetry(Observer):
  """Sends SIGINT once the run has gone back to its last checkpoint."""

  def __init__(self):
    self._retries = False

  def warned(self, text):
    self._retries = True

  def stop_point(self, number):
    if self._retries:
      self._retries = False
      os.kill(os.getpid(), signal.SIGINT)


def test_numbers_that_are_not_finite_stop_the_run_and_can_send_it_back(tiny, tmp_path, capsys):
  run = tmp_path / "run"
  with pytest.raises(NotFinite, match=r"phase 1 \(fp\)") as stopped:
    app.main(tiny_config(**DIVERGING), str(run), "train", hooks=SaveAt([number(1, 5)]).hooks)
  assert stopped.value.code == 3
  assert "--config.recovery.retries=1" in str(stopped.value)
  kept = newest_of(run)
  assert kept.number == number(1, 5)
  assert all(np.isfinite(array).all() for array in kept.arrays.values())
  # Whatever stops the run right after it has gone back, or on the way, changes nothing, and the
  # retry counts.
  config = tiny_config(
    **DIVERGING, **{"recovery.retries": 2, "recovery.learning_rate_factor": 0.05}
  )
  other = shutil.copytree(run, tmp_path / "other")
  app.main(config, str(other), "train", hooks=WITHOUT_PLOTS)
  assert "retry 1 of 2" in " ".join(capsys.readouterr().out.split())
  with pytest.raises(Stopped, match=r"after 1 of its 20 epochs and 5 of 10 steps"):
    app.main(config, str(run), "train", hooks=app.Hooks([InterruptAfterRetry()]))
  again = newest_of(run)
  assert (again.number, again.values["retries"]) == (number(1, 6), 1)
  assert again.values["learning_rate_scale"] == 0.05
  with pytest.raises(Stopped):
    app.main(config, str(run), "train", hooks=SignalAt({number(10, 3): signal.SIGTERM}).hooks)
  app.main(config, str(run), "train", hooks=WITHOUT_PLOTS)
  assert_same_run(run, other)
  end = newest_of(run)
  assert (end.values["retries"], end.values["learning_rate_scale"]) == (1, 0.05)
  assert "all learning rates are multiplied by 0.05" in (run / "report.md").read_text()


def test_eval_gives_the_result_of_the_best_checkpoint(finished_run, capsys):
  app.main(None, str(finished_run), "eval")
  final = result_of(finished_run)["final"]
  assert capsys.readouterr().out.startswith(
    f"w4a4: top-1 {final['top1']:.2f} %, top-5 {final['top5']:.2f} % on 450 images"
  )


def test_programs_are_cached_where_the_run_says_and_jax_keeps_its_own_directory(
  finished_run, tmp_path
):
  before = jax.config.jax_compilation_cache_dir
  for directory in (tmp_path / "one", tmp_path / "other"):
    app.main(tiny_config(compilation_cache=str(directory)), str(finished_run), "eval")
    assert list(directory.glob("jit_*-cache"))
    assert jax.config.jax_compilation_cache_dir == before


def test_a_checkpoint_that_cannot_be_written_stops_the_run_within_its_phase(
  tiny, tmp_path, monkeypatch
):
  def full(place):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  class Slowly(Observer):
    """Waits at every step, so that what is written in the background has ended."""

    last = 0

    def stop_point(self, number):
      self.last = number
      time.sleep(0.2)

  monkeypatch.setattr(checkpoints, "_digest", full)
  slowly, saves = Slowly(), SaveAt([number(0, 2)])
  hooks = saves.hooks._replace(callbacks=[saves, slowly])
  with pytest.raises(ConfigError, match=r"could not be written .* No space left on device"):
    app.main(tiny_config(), str(tmp_path / "run"), "train", hooks=hooks)
  assert number(0, 2) <= slowly.last < number(1)


def test_the_best_weights_have_the_bits_that_were_asked_for(tiny, tmp_path):
  # Activations of two bits, whose net hardly trains, after ten epochs of full precision.
  changes = {
    "plan.weight_bits": (),
    "plan.act_bits": (2,),
    "plan.stabilize": False,
    "plan.full_precision_epochs": 10,
    "train.learning_rate": 1e-6,
  }
  app.main(tiny_config(**changes), str(tmp_path), "train", hooks=WITHOUT_PLOTS)
  result = result_of(tmp_path)
  best = [max(phase["top1"], phase["top1_ema"]) for phase in result["phases"]]
  assert best[0] > best[1]
  assert result["final"]["top1"] == best[1]


def test_a_workdir_of_another_run_is_refused(finished_run):
  for mode in ("train", "eval"):
    with pytest.raises(ConfigError, match="seed: 0 there, 5 here"):
      app.main(tiny_config(seed=5), str(finished_run), mode)


def test_state_of_another_optimizer_is_refused(finished_run):
  spec = spec_of(TinyNet(), 16)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spec.shapes)
  with pytest.raises(ConfigError, match="opt_state"):
    newest_of(finished_run).restore("state", saved_form(create_state(zeros, spec, ema=True)))


@pytest.mark.parametrize(
  "changes",
  [
    {
      "teacher.model": "none",
      "train.ema_rate": 0.0,
      "plan.weight_bits": (),
      "plan.act_bits": (4,),
      "train.accumulation_steps": 2,
    },
    {
      "plan.weight_bits": (2,),
      "plan.act_bits": (),
      "plan.profit_bits": (2,),
      "plan.stabilize": False,
    },
  ],
)
def test_partial_plans_run(tiny, tmp_path, monkeypatch, changes):
  asked, prefetch = [], Programs.prefetch

  def note(programs, phases, *more):
    asked.append([phase.index for phase in phases])
    prefetch(programs, phases, *more)

  monkeypatch.setattr(Programs, "prefetch", note)
  app.main(tiny_config(**changes), str(tmp_path), "train", hooks=WITHOUT_PLOTS)
  result = result_of(tmp_path)
  # At the beginning and after every phase: what no later phase needs is dropped.
  indices = [phase["index"] for phase in result["phases"]]
  assert asked == [indices[done:] for done in range(len(indices) + 1)]
  bits = changes["plan.weight_bits"], changes["plan.act_bits"]
  assert (result["final"]["weight_bits"], result["final"]["act_bits"]) == tuple(
    b[-1] if b else None for b in bits
  )
  if changes.get("train.ema_rate") == 0.0:
    assert {p["top1_ema"] for p in result["phases"]} == {None}
    assert result["final"]["weights"] == "raw"
