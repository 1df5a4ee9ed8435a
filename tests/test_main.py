"""The command line: one clear message and exit code 2 for everything that the user can mend."""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TORCH_FILES = ROOT / "tests" / "golden" / "torch_files"
DIGITS = ["--config", "configs/digits_w4.py"]


def _command(arguments, out, err):
  """What a shell does: main.py in a process of its own, its output in files."""
  os.chdir(ROOT)
  sys.path.insert(0, str(ROOT))
  sys.argv = ["main.py", *arguments]
  for number, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
  runpy.run_path("main.py", run_name="__main__")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Runs `python main.py` with arguments."""
  # Each command is forked from a process that has imported JAX once: half a second instead of four.
  server = multiprocessing.get_context("forkserver")
  server.set_forkserver_preload(["absl.app", "ml_collections.config_flags", "profit_jax.app"])
  directory = tmp_path_factory.mktemp("output")

  def command(*arguments):
    out, err = directory / "out", directory / "err"
    out.unlink(missing_ok=True)
    err.unlink(missing_ok=True)
    process = server.Process(target=_command, args=(arguments, str(out), str(err)))
    process.start()
    process.join(120)
    return subprocess.CompletedProcess(
      arguments, process.exitcode, out.read_text(), err.read_text()
    )

  return command


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([*DIGITS, "--config.train.batchsize=3"], "batchsize"),
    ([*DIGITS, "--config.train.batch_size=many"], "batch_size"),
    (["--config", "configs/absent.py"], "configs/absent.py"),
    ([*DIGITS, "--workdirs=x"], "workdirs"),
    ([*DIGITS, "train"], "unknown arguments"),
    ([*DIGITS], "--workdir is missing"),
    ([*DIGITS, "--mode=paint", "--workdir=x"], "one of train, eval, plan, export"),
    ([*DIGITS, "--mode=plan", "--config.plan.weight_bits=(8,1)"], "from 2 to 8"),
    ([*DIGITS, "--mode=plan", "--config.teacher.model=mobilenet_v2"], "cannot teach without one"),
    ([*DIGITS, "--mode=plan", "--config.train.batch_size=5000"], "larger than the data"),
    ([*DIGITS, "--mode=eval", "--workdir=/nonexistent/run"], "holds no run"),
    (["--mode=export", "--workdir=/nonexistent/run"], "holds no run"),
    (["--mode=export"], "--workdir is missing"),
    (
      ["--mode=export", "--workdir=r", "--formats=onnx,tflite"],
      "'tflite' must be one of onnx, jax, safetensors",
    ),
    ([*DIGITS, "--mode=eval", "--config.init.weights=absent.pth"], "'absent.pth' does not exist"),
    (
      [*DIGITS, "--mode=eval", f"--config.init.weights={TORCH_FILES}/whole_model.pth"],
      "not run here",
    ),
    (
      [*DIGITS, "--mode=eval", f"--config.init.weights={TORCH_FILES}/zip.pth"],
      "Nothing was loaded",
    ),
    (["--config=configs/digits_w4.py:vgg", "--mode=plan"], "mobilenet_v3_small"),
    ([*DIGITS, "--mode=plan", "--images_per_second=0"], "above 0"),
    (
      ["--config=configs/mbv2_w4.py", "--workdir=r", "--config.data.data_dir=/absent"],
      "profit_jax.data.prepare imagenet2012 --data_dir=/absent",
    ),
    (
      ["--config=configs/mbv2_w4.py", "--workdir=r", "--config.data.name=imagenets"],
      "neither its catalogue",
    ),
    ([*DIGITS, "--workdir=r", "--num_processes=2"], "--coordinator_address is missing"),
  ],
)
def test_wrong_input_ends_in_one_message_and_exit_code_2(run, arguments, message):
  done = run(*arguments)
  errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert done.returncode == 2, done.stderr
  assert len(errors) == 1
  assert message in done.stderr
  assert "Traceback" not in done.stderr


def test_plan_prints_the_published_table(run):
  done = run("--config", "configs/mbv2_w4.py", "--mode", "plan")
  assert done.returncode == 0, done.stderr
  assert "22 phases, 200 epochs, 1000800 steps" in done.stdout
