"""The command line: one clear message and exit code 2 for everything that the user can mend."""

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import pytest

from profit_jax.cli import app
from profit_jax.cli import command as commands
from profit_jax.config import ConfigError, Settings
from profit_jax.report import ablation
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
    ([*DIGITS, "--config.plan.batch_size=8"], "config.plan.batch_size is not allowed: there is no"),
    ([*DIGITS, "--config.plan.batch_size=8"], "Did you mean train.batch_size?"),
    ([*DIGITS, "--config.learning_rate=1"], "Did you mean train.learning_rate?"),
    ([*DIGITS, "--config.train.lr=1"], "Did you mean train.learning_rate or"),
    ([*DIGITS, "--config.trian.momentum=0"], "Did you mean train.momentum?"),
    ([*DIGITS, "--config.weights=w.npz"], "Did you mean init.weights or teacher.weights?"),
    ([*DIGITS, "--config.model.foo=1"], "there are model.name, model.width, "),
    ([*DIGITS, "--config.plan.weight_bits[0]=8"], 'as --config.plan.weight_bits="(8, 4)".'),
    (["--config=configs/ablation_digits.py"], "profit ablate --config=configs/ablation_digits.py"),
    (["--config=configs/__init__.py"], "has no function get_config"),
  ],
)
def test_wrong_input_ends_in_one_message_and_exit_code_2(monkeypatch, arguments, named):
  monkeypatch.chdir(ROOT)
  code, _, err = command(*arguments)
  assert_refused(code, err, [named])


@pytest.mark.parametrize(
  ("name", "content", "told"),
  [
    ("absent.py", None, "does not exist. Give a configuration file"),
    (".", None, "is a directory, not a file. Give a configuration file"),
    ("a.py", "def get_config(:", "cannot be used: SyntaxError: invalid syntax (a.py, line 1)"),
    ("a.py", "import no_such_module", "cannot be used: ModuleNotFoundError: No module named "),
    ("a.txt", "some words", "cannot be used: SyntaxError: "),
    ("a.py", "", "has no function get_config"),
  ],
)
def test_a_configuration_file_that_cannot_be_used_is_named(tmp_path, name, content, told):
  path = tmp_path / name
  if content is not None:
    path.write_text(content)
  code, _, err = command(f"--config={path}", "--mode=plan")
  assert_refused(code, err, [f"--config={path} {told}"])
  with pytest.raises(ConfigError, match=f"^--config={path} .* get_grid .*, seeds.$"):
    ablation.read_grid(str(path))


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


def python_main(*arguments, **options):
  return subprocess.run(
    [sys.executable, "main.py", *arguments],
    **{"cwd": ROOT, "capture_output": True, "text": True, "check": False, **options},
  )


def test_a_process_leaves_with_one_message_and_exit_code_2():
  done = python_main("--config=configs/digits_w4.py", "--config.train.batchsize=3")
  assert_refused(done.returncode, done.stderr, ["batchsize"])


def test_help_is_not_a_failure():
  done = python_main("--help")
  assert (done.returncode, done.stderr) == (0, "")
  assert "--fork_from" in done.stdout


def test_plan_prints_the_published_table():
  done = python_main("--config", "configs/mbv2_w4.py", "--mode", "plan")
  assert done.returncode == 0, done.stderr
  assert "22 phases, 200 epochs, 1000800 steps" in done.stdout


def test_output_that_nobody_reads_and_warnings_as_errors_do_not_end_a_run():
  reader, writer = os.pipe()
  os.close(reader)
  done = python_main(
    "--config=configs/digits_w4.py",
    "--mode=plan",
    capture_output=False,
    stdout=writer,
    stderr=subprocess.PIPE,
    env={**os.environ, "PYTHONWARNINGS": "error"},
  )
  os.close(writer)
  assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_ends_every_command_in_one_line(capsys):
  def interrupted(options):
    raise KeyboardInterrupt

  assert commands.run(commands.parser("compare", None), [], interrupted) == 130
  assert capsys.readouterr().err == "stopped: by SIGINT.\n"


OUTPUT = """
import sys
from profit_jax.cli import command
command.keep_running_without_output()
for number in range(3):
  print(number, flush=True)
print("done", file=sys.stderr)
"""


def test_output_that_finds_a_full_disk_is_told_once():
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      [sys.executable, "-c", OUTPUT], stdout=full, stderr=subprocess.PIPE, text=True, check=True
    )
  assert done.stderr == "WARNING: output is lost: No space left on device.\ndone\n"


def test_output_that_is_read_arrives():
  done = subprocess.run([sys.executable, "-c", OUTPUT], capture_output=True, text=True, check=True)
  assert (done.stdout, done.stderr) == ("0\n1\n2\n", "done\n")


def test_a_wrong_variable_of_jax_is_named():
  done = python_main(
    "--config=configs/digits_w4.py",
    "--workdir=r",
    "--mode=eval",
    env={**os.environ, "JAX_ENABLE_X64": "maybe"},
  )
  assert_refused(done.returncode, done.stderr, ["JAX_ENABLE_X64"])


def test_a_cache_of_programs_that_cannot_be_written_is_told(capsys):
  before = jax.config.jax_compilation_cache_dir
  with app.kept_programs(Settings(compilation_cache="/dev/null/programs")):
    assert jax.config.jax_compilation_cache_dir == before
  told = capsys.readouterr().out
  assert told.startswith("WARNING: config.compilation_cache = '/dev/null/programs' cannot be ")


def test_a_read_only_cache_of_programs_is_used_and_told_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  with app.kept_programs(Settings(compilation_cache=str(tmp_path))):
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    warnings.warn("Error writing persistent compilation cache entry for 'step'", stacklevel=1)
  assert "is read-only: compiled programs in it are used" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["writing", "reading"])
def test_a_full_disk_of_the_cache_of_programs_is_no_error(tmp_path, what):
  caching = app.kept_programs(Settings(compilation_cache=str(tmp_path)))
  with caching, warnings.catch_warnings(record=True) as told:
    warnings.warn(f"Error {what} persistent compilation cache entry for 'step'", stacklevel=1)
  assert len(told) == 1
