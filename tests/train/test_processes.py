"""Several processes and devices compute what one alone computes, and one of them writes."""

import itertools
import json
import os
import pathlib
import re
import signal
import socket

import jax
import numpy as np
import pytest

from profit_jax import distributed
from profit_jax.cli import app
from profit_jax.config import ConfigError
from tests.data import pictures
from tests.train import forked
from tests.train.processes import (
  config,
  fit,
  own_data,
  own_result,
  own_run,
  printed,
  run_main,
  summary_of,
  train,
)
from tests.train.runs import newest_of, number, result_of

ROOT = pathlib.Path(__file__).parent.parent.parent


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def ended(started):
  """Waits for processes; returns their exit codes."""
  for process in started:
    process.join(150)
    process.kill()
  return [process.exitcode for process in started]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
  """The directory of a run of two processes with two devices each. For each of its three starts,
  the exit codes and what the processes printed.
  """
  workdir = tmp_path_factory.mktemp("processes") / "run"

  def start(signals):
    address = f"localhost:{free_port()}"
    started = [forked.start(train, workdir, address, 2, i, signals) for i in range(2)]
    codes = ended(started)
    files = [printed(workdir, i) for i in range(2)]
    texts = [tuple(file.read_text() for file in each) for each in files]
    for file in itertools.chain(*files):
      file.unlink()
    return codes, texts

  # The second process is told that its machine goes away; at the next start it dies silently.
  return workdir, [
    start({number(0, 3): signal.SIGTERM}),
    start({number(1, 3): signal.SIGKILL}),
    start({}),
  ]


def test_two_processes_of_two_devices_compute_what_one_device_computes(
  tiny, two_processes, tmp_path
):
  hooks = app.Hooks(devices=jax.devices()[:1], plots=False)
  app.main(config(), str(tmp_path), "train", hooks=hooks)
  runs = [two_processes[0], tmp_path]
  results = [result_of(run) for run in runs]
  assert results[0]["environment"]["devices"] == 4
  # After 40 steps of float32 in two phases, whose sums have other orders. Measured: 5e-7 in the
  # losses, and in parameters 2e-4 of an array's largest value, in biases that are still next to 0.
  losses = [[phase["loss"] for phase in result["phases"]] for result in results]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  assert [result["final"]["examples"] for result in results] == [450, 450]
  for name in ("top1", "top1_ema"):
    top1 = [[phase[name] for phase in result["phases"]] for result in results]
    # An image of the 450 whose two best classes are as good as equal.
    np.testing.assert_allclose(*top1, atol=0.3)
  best = [newest_of(run).section("best") for run in runs]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *best)


def test_the_first_process_prints_and_writes(two_processes):
  workdir, (_, _, (codes, printed)) = two_processes
  assert codes == [0, 0], printed
  assert "A4: top-1" in printed[0][0]
  assert printed[1][0] == ""
  assert len(list(workdir.glob("events.out.tfevents.*"))) == 3  # a writer for every start
  assert {path.name for path in workdir.glob("*.json")} == {
    "config.json",
    "data.json",
    "result.json",
  }


def test_a_preemption_notice_to_one_process_stops_all_at_one_step(two_processes):
  codes, printed = two_processes[1][0]
  assert codes == [128 + signal.SIGTERM] * 2, printed
  told = [out.splitlines()[-1] for out, _ in printed]
  assert told[0] == told[1]
  # How far they had come depends on the machine.
  assert re.match(
    r"stopped: by SIGTERM in phase 1 of 2 \(fp\), after [01] of its 2 epochs", told[0]
  )
  assert "saved" in told[0]


def test_where_one_process_is_lost_the_others_end_and_say_so(two_processes):
  (first, second), printed = two_processes[1][1]
  assert second == -signal.SIGKILL
  # Either its collective fails, or (one of its own devices waits for another in vain) JAX misses
  # the other's heartbeats.
  if first == 1:
    assert "error: Another process of this run" in printed[0][0]
  else:
    assert first == -signal.SIGABRT, printed
    assert "another task died" in printed[0][1]
  # Both go on from where the first start was stopped: nothing was saved since.
  resumed = [re.search("in phase 1 of 2.*", two_processes[1][i][1][0][0])[0] for i in (1, 2)]
  assert resumed[0] == resumed[1]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("localhost:1", 2, None), "--process_id"),
    ((None, None, 0), "--coordinator_address"),
    (("localhost:1", 2, 2), "--process_id=2 .* 0 to 1"),
    (("localhost:1", 0, 0), "--num_processes=0"),
    (("localhost:1", 2**31, 0), "--num_processes=2147483648"),
    *(
      ((address, 2, 1), f"--coordinator_address={re.escape(address)} .*HOST:PORT")
      for address in (
        "localhost",
        "",
        ":1",
        "localhost:",
        "localhost:²",
        "localhost:0",
        "localhost:99999",
        "..:1",
        "[]:1",
      )
    ),
  ],
)
def test_incomplete_clusters_are_refused(arguments, message):
  with pytest.raises(ConfigError, match=message):
    distributed.initialize(*arguments)


def test_a_first_process_that_does_not_answer_is_named():
  port = free_port()
  with pytest.raises(ConfigError, match=f"--coordinator_address=localhost:{port}"):
    distributed.wait_for_coordinator("localhost", port, seconds=0.1)


def test_slurm_and_open_mpi_tell_how_many_tasks_there_are():
  slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}
  assert distributed.started_tasks(slurm) == 4
  # Sbatch's own shell, without srun.
  assert distributed.started_tasks({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "3"}) == 1
  assert distributed.started_tasks({"OMPI_COMM_WORLD_SIZE": "8"}) == 8
  assert distributed.started_tasks({}) == 1


def test_processes_with_other_settings_are_named():
  distributed.require_equal("settings", "seed 1", lambda mine: np.stack([mine, mine, mine]))
  with pytest.raises(ConfigError, match=r"\[1\].* settings"):
    distributed.require_equal("settings", "seed 1", lambda mine: np.stack([mine, mine + 1, mine]))


def test_what_fails_in_one_process_ends_all_of_them_soon(tmp_path):
  # As Slurm would start them: JAX finds the rest in these variables. The second one has no data.
  pictures.write_folder(tmp_path / "data")
  job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
  shared = [
    "--config=configs/digits_w4.py",
    f"--workdir={tmp_path / 'run'}",
    "--config.data.name=folder",
    "--config.train.batch_size=8",
  ]
  started = [
    forked.start(
      run_main,
      [*shared, f"--config.data.data_dir={tmp_path / name}"],
      {**job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
      *(tmp_path / f"{i}.{stream}" for stream in ("out", "err")),
    )
    for i, name in enumerate(("data", "absent"))
  ]
  codes = ended(started)
  errors = [(tmp_path / f"{i}.err").read_text() for i in range(2)]
  assert codes == [2, 2], errors
  assert "error: process 1 stopped" in errors[0]
  assert "error: config.data.data_dir = " in errors[1]
  assert not (tmp_path / "run").exists()


def fit_in_two(workdir, faults=()):
  """The exit codes of two processes that train with the library, and what each printed."""
  address = f"localhost:{free_port()}"
  codes = ended([forked.start(fit, workdir, address, 2, i, faults) for i in range(2)])
  return codes, ["".join(file.read_text() for file in printed(workdir, i)) for i in range(2)]


def test_the_library_computes_in_two_processes_what_it_computes_in_one(tmp_path):
  codes, texts = fit_in_two(tmp_path / "run")
  assert codes == [0, 0], texts
  first, second = (json.loads(own_result(tmp_path / "run", i).read_text()) for i in range(2))
  assert first == second
  alone = summary_of(own_run(tmp_path / "alone", jax.devices()[:1]).fit(own_data()))
  assert len(first["frozen"]) == 1
  assert first["frozen"] == alone["frozen"]
  np.testing.assert_allclose(first["epochs"], alone["epochs"], rtol=1e-4)
  for name, value in alone["variables"].items():
    np.testing.assert_allclose(first["variables"][name], value, rtol=1e-3, atol=1e-4, err_msg=name)
  # The first process writes; it exports, and verifies with its own images.
  assert "of 8 images: top-1 equal" in texts[0]
  assert "export runs in the first process only" in texts[1]


@pytest.mark.parametrize(
  ("fault", "told", "others"),
  [
    ("rows", r"processes \[1\] have other batches", r"processes \[1\] have other batches"),
    ("eval", "labels from 4 to 5: they must be 0 to 2", "process 1 stopped; its message says why"),
    ("end", "ended after 2 of 4 batches in epoch 1", "process 1 stopped; its message says why"),
  ],
)
def test_a_fault_in_one_processs_batches_ends_both(tmp_path, fault, told, others):
  codes, texts = fit_in_two(tmp_path / "run", (fault,))
  assert codes == [1, 1], texts
  assert re.search(told, texts[1])
  assert re.search(others, texts[0])
