"""The command line of `benchmarks/aot.py` and its plain nets, without a compiler."""

import importlib.util
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.experimental import topologies

from benchmarks import aot, aot_programs, aot_targets, plain_nets, program_text
from profit_jax.models import REGISTRY
from profit_jax.nn.layers import QuantConv
from tests.wrong_input import assert_refused

RESULTS = pathlib.Path(aot.__file__).parent / "RESULTS.md"
INSTALL = "pip install -r requirements.txt -r requirements-accelerators.txt"


@pytest.fixture
def run(capsys):
  def call(*arguments):
    code = aot.main(arguments)
    return code, capsys.readouterr().err

  return call


@pytest.fixture
def compilers(monkeypatch):
  """Says which compilers are installed, whatever is."""

  def are(*installed):
    found = importlib.util.find_spec
    known = {"libtpu", "jax_cuda13_plugin"}
    monkeypatch.setattr(
      importlib.util,
      "find_spec",
      lambda name: (name in installed or None) if name in known else found(name),
    )

  return are


@pytest.mark.parametrize("target", ["v5e:2x2", "h100", "h100:4"])
def test_a_compiler_that_is_not_installed(run, compilers, target):
  compilers()
  code, err = run(f"--target={target}")
  assert_refused(code, err, [f"--target={target}"])
  assert INSTALL in err


@pytest.mark.parametrize("target", ["h200x", "v5e", "h100:0", "h100:four", "V5E:2x2", ""])
def test_an_unknown_target(run, compilers, target):
  compilers("libtpu", "jax_cuda13_plugin")
  code, err = run(f"--target={target}")
  assert_refused(code, err, [f"--target={target} is not allowed"])


@pytest.mark.parametrize(
  ("says", "expected"),
  [
    ("INVALID_ARGUMENT: Invalid topology layout", "v9:2x2 is not allowed: libtpu says: INVALID"),
    ("ABORTED: error when accessing libtpu multi-process lockfile", "another process is using"),
  ],
)
def test_what_libtpu_refuses(run, compilers, monkeypatch, says, expected):
  def refuse(**_):
    raise jax.errors.JaxRuntimeError(says)

  compilers("libtpu")
  monkeypatch.setattr(topologies, "get_topology_desc", refuse)
  code, err = run("--target=v9:2x2")
  assert_refused(code, err, [expected])


@pytest.mark.parametrize(
  ("flag", "expected"),
  [
    ("--model=resnet18", "--model=resnet18 is not allowed"),
    ("--stage=ft9", "--stage=ft9 is not allowed"),
    ("--dtype=float8", "config.train.dtype = 'float8' is not allowed"),
    ("--per_chip=0", "--per_chip=0 is not allowed"),
    ("--image_size=8", "data.image_size = 8"),
    ("--kernels=fast", "kernels"),
  ],
)
def test_what_the_settings_refuse(run, monkeypatch, flag, expected):
  target = aot_targets.Target("v5e:2x2", "tpu", jax.devices())
  monkeypatch.setattr(aot_targets, "find", lambda name: target)
  code, err = run("--target=v5e:2x2", "--dtype=float32", flag)
  assert_refused(code, err, [expected])


def test_a_model_without_a_plain_net_has_none_to_compile(run, monkeypatch):
  target = aot_targets.Target("v5e:2x2", "tpu", jax.devices())
  monkeypatch.setattr(aot_targets, "find", lambda name: target)
  code, err = run("--target=v5e:2x2", "--dtype=float32", "--model=resnet34", "--only=plain")
  assert_refused(code, err, ["--model=resnet34 is not allowed", "mobilenet_v1, mobilenet_v2"])


def layers(net, kind, *arguments):
  """Shapes of all kernels, norms' statistics and convolutions' outputs, sorted, for an
  image of 64 pixels.
  """

  def state(image):
    return net.init_with_output(
      jax.random.key(0),
      image,
      *arguments,
      mutable=True,
      capture_intermediates=lambda module, method: (
        isinstance(module, kind) and method == "__call__"
      ),
    )[1]

  made = jax.eval_shape(state, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))
  params = jax.tree_util.tree_leaves_with_path(made["params"])
  outputs = [leaf.shape for leaf in jax.tree.leaves(made["intermediates"]) if leaf.ndim == 4]
  return {
    "kernels": sorted(leaf.shape for path, leaf in params if path[-1].key == "kernel"),
    "statistics": sorted(leaf.shape for leaf in jax.tree.leaves(made["batch_stats"])),
    "outputs": sorted(outputs),
  }


@pytest.mark.parametrize("name", plain_nets.NETS)
def test_a_plain_net_has_the_layers_and_strides_of_ours(name):
  plain = layers(plain_nets.NETS[name](width=0.35), nn.Conv, False)
  assert plain == layers(REGISTRY[name](width=0.35), QuantConv)
  assert (1, 2, 2) in {shape[:3] for shape in plain["outputs"]}


def test_a_plain_step_gives_the_state_of_the_next():
  net = plain_nets.NETS["mobilenet_v2"](width=0.35, num_classes=10)
  batch = jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8), jax.ShapeDtypeStruct((2,), np.int32)
  state = jax.eval_shape(lambda: plain_nets.first_state(net, 32))
  after, loss = jax.eval_shape(lambda *given: plain_nets.train_step(net, *given), state, *batch)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert jax.tree.leaves(after) == jax.tree.leaves(state)
  assert loss.shape == ()
  total, right = jax.eval_shape(
    lambda *given: plain_nets.eval_step(net, *given), *state[:2], *batch
  )
  assert (total.shape, right.dtype) == ((), np.int32)


def test_the_table_has_both_programs_and_their_ratio(capsys):
  kernels = [program_text.Kernel("copy", "copy", 8)] * 3
  ours = {"gb": 3.0, "kernels": 3, "kernel_kinds": program_text.by_kind(kernels), "kinds": {}}
  document = {
    "options": {
      "model": "mobilenet_v2",
      "width": 1.0,
      "image_size": 224,
      "stage": "wa",
      "per_chip": 128,
      "only": None,
    },
    "devices": 4,
    "device_kind": "TPU v5 lite",
    "versions": {"jax": "0.10.2"},
    "dtype": "bfloat16",
    **aot_programs.collectives({"all-reduce": 5}),
    **ours,
  }
  aot.print_table(document)
  alone = capsys.readouterr().out
  assert "mobilenet_v2 has no plain net in benchmarks/plain_nets.py." in alone
  plain = {"plain_dtype": "float32", "plain_gb": 2.0, "plain_kernels": 4}
  plain |= {f"plain_{name}": 0 for name in aot_programs.collectives({})}
  aot.print_table(document | plain)
  rows = {tuple(line.split()) for line in capsys.readouterr().out.splitlines()}
  assert ("GB", "accessed", "3.0", "2.0", "1.50") in rows
  assert ("all-reduces", "5", "0") in rows
  assert ("copy", "3", "0") in rows


def test_rows_for_the_results_have_a_cell_for_every_column(capsys):
  names = [name for _, name, _ in aot._ROWS if name]
  options = {"stage": "wa", "per_chip": 128}
  document = {"options": options, "target": "h100", "dtype": "float32", "plain_dtype": "bfloat16"}
  aot.print_rows(document | dict.fromkeys(names, 2) | {f"plain_{name}": 1 for name in names})
  ours, plain = capsys.readouterr().out.splitlines()
  header = next(
    line for line in RESULTS.read_text().splitlines() if line.startswith("| target | code |")
  )
  assert ours.count("|") == plain.count("|") == header.count("|")
  assert ours.startswith("| h100 | profit_jax, wa | float32 | 128 | 2.0 |")
  assert plain.startswith("| h100 | plain Flax | bfloat16 | 128 | 1.0 |")
