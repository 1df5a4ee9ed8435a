"""Whatever is wrong with a configuration, a command line or a file: one message that names it, and
exit code 2.
"""

import json
import pathlib
import re

import hypothesis
import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from configs import base, digits_w4
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, ModelEntry, build
from profit_jax.weights.files import read_contents
from profit_jax.weights.load import load_variables
from profit_jax.weights.save import named_tensors
from tests.drawn import PROFILE, share_of_examples
from tests.specs import variable_shapes
from tests.traced import TwoBlocks, deep_check
from tests.wrong_input import (
  FIELDS,
  MODELS,
  NO_FOLDER,
  NO_RUN,
  NO_WEIGHTS,
  SCHEMES,
  TEXT,
  WORDS,
  assert_refused,
  clusters,
  command,
  damaged,
  registered,
  wrong_tensors,
)

DIGITS = "--config=configs/digits_w4.py:mobilenet_v1"
configs = st.sampled_from([f"--config=configs/digits_w4.py:{model}" for model in MODELS])


@pytest.fixture(scope="module", autouse=True)
def root_directory():
  """The current directory, from which configurations and some wrong places are named."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(pathlib.Path(__file__).parent.parent)
    yield


@pytest.fixture(scope="module")
def small():
  """Registers a small net as `small`."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(REGISTRY, "small", ModelEntry(TwoBlocks))
    yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A directory for the files of examples, and for runs that must not begin."""
  return tmp_path_factory.mktemp("examples")


def overrides(changes):
  return [
    f"--config.{field}={value!r}" if isinstance(value, tuple) else f"--config.{field}={value}"
    for field, value in changes.items()
  ]


def test_every_field_is_drawn_from():
  config = base.get_config()
  fields = {
    f"{section}.{name}"
    for section in config
    if hasattr(config[section], "keys")
    for name in config[section]
  }
  assert set(FIELDS) == fields | {name for name in config if not hasattr(config[name], "keys")}


def test_an_override_arrives():
  assert (
    "22 phases, 79 epochs"
    in command(DIGITS, "--mode=plan", "--config.plan.full_precision_epochs=33")[1]
  )
  assert "22 phases, 76 epochs" in command(DIGITS, "--mode=plan")[1]


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
@hypothesis.example("--config=configs/digits_w4.py:mobilenet_v1", {"data.name": "digits:x"})
@hypothesis.example("--config=configs/digits_w4.py:mobilenet_v1", {"data.name": "folder"})
def test_wrong_values_are_named(config, changes):
  code, _, err = command(config, "--mode=plan", *overrides(changes))
  # ml_collections refuses a wrong type with the field's last name only.
  assert_refused(
    code,
    err,
    [f"config.{field}" for field in changes] + [f"flag --config.{field}" for field in changes],
  )


def accepted(config, changes):
  """Whether mode plan takes the values; where it does not, it names a field."""
  code, out, err = command(config, "--mode=plan", *overrides(changes))
  if code == 2:
    assert_refused(code, err, [f"config.{field}" for field in FIELDS])
    return False
  assert (code, err) == (0, "")
  assert "phases, " in out
  return True


@hypothesis.given(config=configs, changes=right_changes)
def test_right_values_are_taken_or_a_field_is_named(config, changes):
  accepted(config, changes)


@share_of_examples(0.25)
@hypothesis.given(changes=right_changes)
def test_a_configuration_that_is_accepted_can_be_traced(small, changes):
  changes = {**changes, "model.name": "small", "model.strides": ()}  # whatever model is drawn
  hypothesis.assume(accepted(DIGITS, changes))
  deep_check("mobilenet_v1", changes)


@hypothesis.settings(max_examples=60 if PROFILE == "full" else 1)
@hypothesis.given(
  model=st.sampled_from(MODELS if PROFILE == "full" else MODELS[:1]), changes=right_changes
)
def test_a_configuration_of_a_published_net_that_is_accepted_can_be_traced(model, changes):
  hypothesis.assume(accepted(f"--config=configs/digits_w4.py:{model}", changes))
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
def test_wrong_command_lines_are_refused(arguments):
  code, _, err = command(DIGITS, "--mode=plan", *arguments)
  fields = [argument.lstrip("-").split("=")[0].split(".")[-1] for argument in arguments]
  assert_refused(code, err, [*fields, *map(repr, arguments)])


# Small. Without a cache of compiled programs, which would become that of this process.
START = [DIGITS, "--config.compilation_cache=", "--config.data.image_size=16"]


@hypothesis.given(arguments=clusters(), mode=st.sampled_from(["train", "eval"]))
def test_wrong_clusters_are_refused(directory, arguments, mode):
  workdir = directory / "never"
  code, _, err = command(*START, f"--mode={mode}", f"--workdir={workdir}", *arguments)
  assert_refused(code, err, ["coordinator_address", "num_processes", "process_id"])
  assert not workdir.exists()


@hypothesis.given(workdir=NO_RUN | st.just(""))
def test_wrong_workdirs_are_refused(workdir):
  code, _, err = command(*START, "--mode=eval", f"--workdir={workdir}")
  assert_refused(
    code,
    err,
    [f"--workdir {workdir}", f"--workdir {workdir!r}", f"/{workdir} holds no run", "--workdir is"],
  )


@hypothesis.given(origin=NO_RUN)
def test_wrong_places_to_fork_from_are_named(directory, origin):
  workdir = directory / "never"
  code, _, err = command(*START, f"--workdir={workdir}", f"--fork_from={origin}")
  assert_refused(code, err, ["--fork_from"])
  assert not workdir.exists()


@share_of_examples(0.25)
@hypothesis.given(
  workdir=SCHEMES | st.sampled_from(["", "README.md", "README.md/run", "/dev/null/run", "a" * 256])
)
def test_wrong_workdirs_to_train_in_are_refused(workdir):
  code, _, err = command(*START, f"--workdir={workdir}")
  assert_refused(code, err, ["--workdir "])


@share_of_examples(0.5)
@hypothesis.given(path=NO_WEIGHTS, teacher=st.booleans())
def test_wrong_weights_are_named(directory, path, teacher):
  workdir = directory / "never"
  chosen = [f"--config.init.weights={path}", "--mode=eval"]
  if teacher:
    chosen = [
      f"--config.teacher.weights={path}",
      "--config.teacher.model=mobilenet_v1",
      f"--workdir={workdir}",
    ]
    chosen.append("--config.teacher.strides=(1, 1, 2, 2, 2, 1)")
  with registered("mobilenet_v1"):
    code, _, err = command(*START, *chosen)
  assert_refused(code, err, [path])
  assert not workdir.exists()


@hypothesis.given(path=NO_FOLDER, mode=st.sampled_from(["plan", "eval"]))
def test_wrong_places_of_data_are_named(path, mode):
  chosen = [
    "--config.data.name=folder",
    f"--config.data.data_dir={path}",
    "--config.init.weights=absent.npz",
  ]
  code, _, err = command(*START, *chosen, f"--mode={mode}")
  assert_refused(code, err, ["config.data.data_dir = ", "config.data.eval_split is not there"])


@share_of_examples(0.25)
@hypothesis.given(path=SCHEMES, mode=st.sampled_from(["train", "eval"]))
def test_wrong_places_of_programs_are_named(directory, path, mode):
  workdir = directory / "never"
  code, _, err = command(
    DIGITS, f"--config.compilation_cache={path}", f"--mode={mode}", f"--workdir={workdir}"
  )
  assert_refused(code, err, [f"config.compilation_cache = '{path}'"])


@pytest.mark.parametrize("unlocked", [False, True])
@pytest.mark.parametrize(
  ("line", "word"),  # that the message must have
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
    ("config = {}", "ConfigDict"),
    ("config = 'text'", "ConfigDict"),
    ("raise RuntimeError('of the file')", "of the file"),
    ("raise KeyError('of the file')", "of the file"),
    ("import no_such_module", "no_such_module"),
    ("this is no python", "invalid syntax"),
    ("config.model.name = b'mobilenet_v1'", "name"),
    ("config.data.image_size = 32.5", "image_size"),
    ("config.train.batch_size = 10**30", "batch_size"),
    ("config.plan.freeze_fractions = ('a',)", "freeze_fractions"),
  ],
)
def test_wrong_configuration_files_are_refused(tmp_path, line, word, unlocked):
  path = tmp_path / "config.py"
  body = ["config = digits_w4.get_config()", *["config.unlock()"] * unlocked, line, "return config"]
  opening = "from configs import digits_w4\n\ndef get_config():\n"
  path.write_text(opening + "".join(f"  {line}\n" for line in body))
  code, _, err = command(f"--config={path}", "--mode=plan")
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
def test_damaged_weights_files_are_named(weights, directory, data, suffix):
  path = directory / f"damaged{suffix}"
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


@share_of_examples(0.5)
@hypothesis.given(data=st.data())
def test_wrong_tensors_are_named(model, directory, data):
  shapes, tensors = model
  changed, name = data.draw(wrong_tensors(tensors))
  path = directory / "tensors.npz"
  np.savez(path, **changed)
  with registered("mobilenet_v1"), pytest.raises(ConfigError, match=re.escape(name)):
    load_variables(str(path), "mobilenet_v1", shapes)


@share_of_examples(0.5)
@hypothesis.given(data=st.data(), name=st.sampled_from(["config.json", "data.json"]))
def test_damaged_files_of_a_run_are_refused(directory, data, name):
  workdir = directory / "run"
  workdir.mkdir(exist_ok=True)
  config = digits_w4.get_config("mobilenet_v1")
  config.data.image_size, config.compilation_cache = 16, ""
  (workdir / "config.json").write_text(json.dumps(parse(config, REGISTRY).to_dict(), indent=2))
  (workdir / "data.json").write_text(
    json.dumps({"train_examples": 1347, "eval_examples": 450, "num_classes": 10})
  )
  (workdir / name).write_bytes(data.draw(damaged((workdir / name).read_bytes())))
  code, _, err = command("--mode=eval", f"--workdir={workdir}")
  # Also where the damage cannot be seen: the run has no checkpoint.
  fields = [f"config.{field}" for field in config]
  assert_refused(code, err, [f"{workdir}/{name}", f"{workdir}: {name}", f"{workdir} ", *fields])
