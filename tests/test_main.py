"""The command line: one clear message and exit code 2 for everything that the user can mend."""

import pathlib
import subprocess
import sys

import pytest

from tests.wrong_input import assert_refused, command, registered

ROOT = pathlib.Path(__file__).parent.parent
TORCH_FILES = ROOT / "tests" / "golden" / "torch_files"
# Without a cache of compiled programs, which would become that of this process.
DIGITS = ["--config=configs/digits_w4.py", "--config.compilation_cache="]
IMAGENET = ["--config=configs/mbv2_w4.py", "--config.compilation_cache=", "--workdir=r"]
# ml_collections' way to load a configuration file.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    ([*DIGITS, "--config.train.batch_size=many"], "batch_size"),
    (["--config=configs/absent.py"], "configs/absent.py"),
    ([*DIGITS, "--workdirs=x"], "workdirs"),
    ([*DIGITS, "train"], "['train']"),
    ([*DIGITS], "--workdir"),
    ([*DIGITS, "--mode=paint", "--workdir=x"], "--mode=paint"),
    ([*DIGITS, "--mode=plan", "--config.plan.weight_bits=(8,1)"], "plan.weight_bits = (8, 1)"),
    ([*DIGITS, "--mode=plan", "--config.teacher.model=mobilenet_v2"], "teacher.weights"),
    ([*DIGITS, "--mode=plan", "--config.train.batch_size=5000"], "train.batch_size = 5000"),
    ([*DIGITS, "--mode=eval", "--workdir=/nonexistent/run"], "--workdir /nonexistent/run"),
    (["--mode=export", "--workdir=/nonexistent/run"], "--workdir /nonexistent/run"),
    (["--mode=export"], "--workdir"),
    (["--mode=export", "--workdir=r", "--formats=onnx,tflite"], "'tflite'"),
    (["--config=configs/digits_w4.py:vgg", "--mode=plan"], "mobilenet_v3_small"),
    ([*DIGITS, "--mode=plan", "--images_per_second=0"], "--images_per_second=0"),
    ([*IMAGENET, "--config.data.data_dir=/absent"], "profit prepare imagenet2012"),
    ([*IMAGENET, "--config.data.name=imagenets"], "imagenets"),
    ([*DIGITS, "--workdir=r", "--num_processes=2"], "--coordinator_address"),
  ],
)
def test_wrong_input_ends_in_one_message_and_exit_code_2(monkeypatch, arguments, named):
  monkeypatch.chdir(ROOT)
  code, _, err = command(*arguments)
  assert_refused(code, err, [named])


@pytest.mark.parametrize(
  ("path", "reason"),
  [
    ("absent.pth", "does not exist"),
    (f"{TORCH_FILES}/whole_model.pth", "not run here"),
    (f"{TORCH_FILES}/zip.pth", "Nothing was loaded"),
  ],
  ids=["absent", "code", "another model"],
)
def test_wrong_weights_are_named_with_the_reason(monkeypatch, path, reason):
  monkeypatch.chdir(ROOT)
  with registered("mobilenet_v1"):
    code, _, err = command(
      "--config=configs/digits_w4.py:mobilenet_v1",
      "--config.compilation_cache=",
      "--mode=eval",
      f"--config.init.weights={path}",
    )
  assert_refused(code, err, [path])
  assert reason in err


def python_main(*arguments):
  return subprocess.run(
    [sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
  )


def test_a_process_leaves_with_one_message_and_exit_code_2():
  done = python_main("--config=configs/digits_w4.py", "--config.train.batchsize=3")
  assert_refused(done.returncode, done.stderr, ["batchsize"])


def test_plan_prints_the_published_table():
  done = python_main("--config", "configs/mbv2_w4.py", "--mode", "plan")
  assert done.returncode == 0, done.stderr
  assert "22 phases, 200 epochs, 1000800 steps" in done.stdout
