"""Whatever is wrong with a configuration, a command line or a file: one message that names it, and
exit code 2.
"""

import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import sys

import hypothesis
import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from hypothesis import strategies as st

from configs import base, digits_w4
from profit_jax import distributed
from profit_jax.models import REGISTRY, build, variable_shapes
from profit_jax.settings import ConfigError, parse
from profit_jax.weights.files import read_contents
from profit_jax.weights.load import load_variables
from profit_jax.weights.save import named_tensors
from tests.traced import deep_check
from tests.wrong_input import (
  FIELDS,
  MODELS,
  NO_FOLDER,
  NO_RUN,
  NO_WEIGHTS,
  SCHEMES,
  TEXT,
  WORDS,
  clusters,
  damaged,
  wrong_tensors,
)

# `HYPOTHESIS_PROFILE=full pytest tests/test_wrong_input.py` draws 500 of each kind.
hypothesis.settings.register_profile(
  "ci", max_examples=120, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("full", max_examples=500, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
FULL = os.environ.get("HYPOTHESIS_PROFILE") == "full"
FLAGS = ("config", "workdir", "mode", "images_per_second", "fork_from")
FLAGS += ("coordinator_address", "num_processes", "process_id")
# ml_collections' way to load a configuration file.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")
DIGITS = "--config=configs/digits_w4.py:mobilenet_v1"
configs = st.sampled_from([f"--config=configs/digits_w4.py:{model}" for model in MODELS])


@pytest.fixture(scope="module")
def main():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(distributed, "leave", lambda code, *_: code)
    patch.setattr(sys, "argv", sys.argv)
    patch.chdir(os.path.dirname(os.path.dirname(__file__)))
    yield importlib.import_module("main")


def command(main, arguments):
  """What `python main.py` does with arguments, in this process; returns exit code, output and
  errors.
  """
  for name in [name for name in flags.FLAGS if name.startswith("config.")]:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()
  for name in FLAGS:
    flags.FLAGS[name].unparse()
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      sys.argv = ["main.py", *arguments]  # where ml_collections looks for overrides
      code = main.main(main._parse(sys.argv))
    except SystemExit as left:
      code = left.code
  return code, out.getvalue(), err.getvalue()


def overrides(changes):
  return [
    f"--config.{field}={value!r}" if isinstance(value, tuple) else f"--config.{field}={value}"
    for field, value in changes.items()
  ]


def assert_refused(code, err, names):
  assert code == 2, err
  errors = [line for line in err.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1, err
  assert "Traceback" not in err
  assert any(name in err for name in names), err


def test_every_field_is_drawn_from():
  config = base.get_config()
  fields = {
    f"{section}.{name}"
    for section in config
    if hasattr(config[section], "keys")
    for name in config[section]
  }
  assert set(FIELDS) == fields | {name for name in config if not hasattr(config[name], "keys")}


def test_an_override_arrives(main):
  assert (
    "22 phases, 79 epochs"
    in command(main, [DIGITS, "--mode=plan", "--config.plan.full_precision_epochs=33"])[1]
  )
  assert "22 phases, 76 epochs" in command(main, [DIGITS, "--mode=plan"])[1]


wrong_changes = st.lists(
  st.sampled_from([field for field, (wrong, _) in FIELDS.items() if not wrong.is_empty]),
  min_size=1,
  max_size=3,
  unique=True,
).flatmap(lambda fields: st.fixed_dictionaries({field: FIELDS[field][0] for field in fields}))
right_changes = st.lists(
  st.sampled_from(sorted(FIELDS)), min_size=1, max_size=6, unique=True
).flatmap(lambda fields: st.fixed_dictionaries({field: FIELDS[field][1] for field in fields}))


@hypothesis.given(config=configs, changes=wrong_changes)
def test_wrong_values_are_named(main, config, changes):
  code, _, err = command(main, [config, "--mode=plan", *overrides(changes)])
  # ml_collections refuses a wrong type with the field's last name only.
  assert_refused(
    code,
    err,
    [f"config.{field}" for field in changes] + [f"flag --config.{field}" for field in changes],
  )


def accepted(main, config, changes):
  """Whether mode plan takes the values; where it does not, it names a field."""
  code, out, err = command(main, [config, "--mode=plan", *overrides(changes)])
  if code == 2:
    assert_refused(code, err, [f"config.{field}" for field in FIELDS])
    return False
  assert (code, err) == (0, "")
  assert "phases, " in out
  return True


@hypothesis.given(config=configs, changes=right_changes)
def test_right_values_are_taken_or_a_field_is_named(main, config, changes):
  accepted(main, config, changes)


@hypothesis.settings(max_examples=60 if FULL else 5)
@hypothesis.given(model=st.sampled_from(MODELS if FULL else MODELS[:1]), changes=right_changes)
def test_what_is_accepted_does_not_fail_later(main, model, changes):
  hypothesis.assume(accepted(main, f"--config=configs/digits_w4.py:{model}", changes))
  deep_check(model, changes)


wrong_arguments = st.one_of(
  st.builds("--{}={}".format, WORDS, TEXT),
  st.builds("--{}".format, WORDS),
  TEXT.filter(lambda text: not text.startswith("-")),
  st.builds("--mode={}".format, TEXT.filter(lambda text: text not in ("train", "eval", "plan"))),
  st.builds(
    "--images_per_second={}".format, WORDS | st.sampled_from(["0", "-1", "nan", "inf", ""])
  ),
  st.builds("--num_processes={}".format, WORDS | st.sampled_from(["1.5", ""])),
  st.builds("--config=configs/{}.py".format, WORDS),
  st.builds("--config.{}=1".format, WORDS),
  st.builds("--config.train.{}=1".format, WORDS),
  st.builds(
    "--config.train.batch_size={}".format, WORDS | st.sampled_from(["", "1.5", "(1,)", "True"])
  ),
)


@hypothesis.given(arguments=st.lists(wrong_arguments, min_size=1, max_size=3))
def test_wrong_command_lines_are_refused(main, arguments):
  code, _, err = command(main, [DIGITS, "--mode=plan", *arguments])
  fields = [argument.lstrip("-").split("=")[0].split(".")[-1] for argument in arguments]
  assert_refused(code, err, [*fields, *map(repr, arguments)])


# Small, without the cache of compiled programs, which would be that of this process too.
START = [DIGITS, "--config.compilation_cache=", "--config.data.image_size=16"]


@hypothesis.given(arguments=clusters(), mode=st.sampled_from(["train", "eval"]))
def test_wrong_clusters_are_refused(main, tmp_path_factory, arguments, mode):
  workdir = tmp_path_factory.getbasetemp() / "never"
  code, _, err = command(main, [*START, f"--mode={mode}", f"--workdir={workdir}", *arguments])
  assert_refused(code, err, ["coordinator_address", "num_processes", "process_id"])
  assert not workdir.exists()


@hypothesis.given(workdir=NO_RUN | st.just(""))
def test_wrong_workdirs_are_refused(main, workdir):
  code, _, err = command(main, [*START, "--mode=eval", f"--workdir={workdir}"])
  assert_refused(
    code,
    err,
    [f"--workdir {workdir}", f"--workdir {workdir!r}", f"/{workdir} holds no run", "--workdir is"],
  )


@hypothesis.given(origin=NO_RUN)
def test_wrong_places_to_fork_from_are_named(main, tmp_path_factory, origin):
  workdir = tmp_path_factory.getbasetemp() / "never"
  code, _, err = command(main, [*START, f"--workdir={workdir}", f"--fork_from={origin}"])
  assert_refused(code, err, ["--fork_from"])
  assert not workdir.exists()


@hypothesis.settings(max_examples=40 if FULL else 10)
@hypothesis.given(
  workdir=SCHEMES | st.sampled_from(["", "README.md", "README.md/run", "/dev/null/run", "a" * 256])
)
def test_wrong_workdirs_to_train_in_are_refused(main, workdir):
  code, _, err = command(main, [*START, f"--workdir={workdir}"])
  assert_refused(code, err, ["--workdir "])


@hypothesis.settings(max_examples=200 if FULL else 30)
@hypothesis.given(path=NO_WEIGHTS, teacher=st.booleans())
def test_wrong_weights_are_named(main, tmp_path_factory, path, teacher):
  workdir = tmp_path_factory.getbasetemp() / "never"
  chosen = [f"--config.init.weights={path}", "--mode=eval"]
  if teacher:
    chosen = [
      f"--config.teacher.weights={path}",
      "--config.teacher.model=mobilenet_v1",
      f"--workdir={workdir}",
    ]
    chosen.append("--config.teacher.strides=(1, 1, 2, 2, 2, 1)")
  code, _, err = command(main, [*START, *chosen])
  assert_refused(code, err, [path])
  assert not workdir.exists()


@hypothesis.given(path=NO_FOLDER, mode=st.sampled_from(["plan", "eval"]))
def test_wrong_places_of_data_are_named(main, path, mode):
  chosen = [
    "--config.data.name=folder",
    f"--config.data.data_dir={path}",
    "--config.init.weights=absent.npz",
  ]
  code, _, err = command(main, [*START, *chosen, f"--mode={mode}"])
  assert_refused(code, err, ["config.data.data_dir = ", "config.data.eval_split is not there"])


@hypothesis.settings(max_examples=40 if FULL else 10)
@hypothesis.given(path=SCHEMES, mode=st.sampled_from(["train", "eval"]))
def test_wrong_places_of_programs_are_named(main, tmp_path_factory, path, mode):
  workdir = tmp_path_factory.getbasetemp() / "never"
  code, _, err = command(
    main, [DIGITS, f"--config.compilation_cache={path}", f"--mode={mode}", f"--workdir={workdir}"]
  )
  assert_refused(code, err, [f"config.compilation_cache = '{path}'"])


# With a word that the message must have.
wrong_lines = st.sampled_from(
  [
    ("config.unlock(); del config.train", "train"),
    ("config.train = 3", "train"),
    ("config.train = None", "train"),
    ("config.extra = 1", "extra"),
    ("config.train.extra = 1", "extra"),
    ("config.plan.weight_bits = None", "weight_bits"),
    ("config.plan.weight_bits = 4", "weight_bits"),
    ("config.train.momentum = [0.9]", "momentum"),
    ("config = None", "config"),
    ("config = {}", "a dict: its get_config() must return a ConfigDict"),
    ("config = 'text'", "a str: its get_config() must return a ConfigDict"),
    ("raise RuntimeError('of the file')", "of the file"),
    ("raise KeyError('of the file')", "of the file"),
    ("import no_such_module", "no_such_module"),
    ("this is no python", "invalid syntax"),
    ("config.model.name = b'mobilenet_v1'", "name"),
    ("config.data.image_size = 32.5", "image_size"),
    ("config.train.batch_size = 10**30", "batch_size"),
    ("config.plan.freeze_fractions = ('a',)", "freeze_fractions"),
  ]
)


@hypothesis.given(line=wrong_lines, unlocked=st.booleans())
def test_wrong_configuration_files_are_refused(main, tmp_path_factory, line, unlocked):
  path = tmp_path_factory.mktemp("config") / "config.py"
  line, word = line
  opening = "  config.unlock()\n" if unlocked else ""
  opening = (
    "from configs import digits_w4\n\n"
    f"def get_config():\n  config = digits_w4.get_config()\n{opening}"
  )
  path.write_text(f"{opening}  {line}\n  return config\n")
  code, _, err = command(main, [f"--config={path}", "--mode=plan"])
  assert_refused(code, err, [word])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """Contents of small weights files, by suffix."""
  directory = tmp_path_factory.mktemp("weights")
  tensors = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}
  np.savez(directory / "w.npz", **tensors)
  torch = pathlib.Path("tests/golden/torch_files/zip.pth").read_bytes()
  return {
    ".npz": (directory / "w.npz").read_bytes(),
    ".safetensors": safetensors.numpy.save(tensors),
    ".pth": torch,
  }


@hypothesis.given(data=st.data(), suffix=st.sampled_from([".npz", ".safetensors", ".pth"]))
def test_damaged_weights_files_are_named(weights, tmp_path_factory, data, suffix):
  path = tmp_path_factory.mktemp("damaged") / f"w{suffix}"
  path.write_bytes(data.draw(damaged(weights[suffix])))
  try:
    contents, told = read_contents(str(path)), ""
  except ConfigError as error:
    contents, told = None, str(error)
  # What was changed may be no more than a number, which cannot be seen.
  assert told.startswith(f"The weights file '{path}' ") if contents is None else contents.tensors


@pytest.fixture(scope="module")
def model():
  """A model's shapes, and tensors of it under its own names."""
  shapes = variable_shapes(
    build(parse(digits_w4.get_config("mobilenet_v1"), REGISTRY).model, 10), 16
  )
  ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
  return shapes, named_tensors("mobilenet_v1", ones, "timm")


@hypothesis.settings(max_examples=200 if FULL else 40)
@hypothesis.given(data=st.data())
def test_wrong_tensors_are_named(model, tmp_path_factory, data):
  shapes, tensors = model
  changed, name = data.draw(wrong_tensors(tensors))
  path = tmp_path_factory.getbasetemp() / "tensors.npz"
  np.savez(path, **changed)
  with pytest.raises(ConfigError, match=re.escape(name)):
    load_variables(str(path), "mobilenet_v1", shapes)


@hypothesis.settings(max_examples=200 if FULL else 30)
@hypothesis.given(data=st.data(), name=st.sampled_from(["config.json", "data.json"]))
def test_damaged_files_of_a_run_are_refused(main, tmp_path_factory, data, name):
  workdir = tmp_path_factory.mktemp("run")
  config = digits_w4.get_config("mobilenet_v1")
  config.data.image_size, config.compilation_cache = 16, ""
  (workdir / "config.json").write_text(json.dumps(parse(config, REGISTRY).to_dict(), indent=2))
  (workdir / "data.json").write_text(
    json.dumps({"train_examples": 1347, "eval_examples": 450, "num_classes": 10})
  )
  (workdir / name).write_bytes(data.draw(damaged((workdir / name).read_bytes())))
  code, _, err = command(main, ["--mode=eval", f"--workdir={workdir}"])
  # As there is no checkpoint either, nothing can come of it.
  assert_refused(code, err, [f"{workdir}/{name}", f"{workdir}: {name}", f"{workdir} ", "config."])
