"""Packed trees come back to the bit, and checkpoints hold every leaf under its own path."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from profit_jax.train import optimizer
from profit_jax.train.packing import pack, pack_variables, unpack
from profit_jax.train.state import create_state, from_saved, saved_form
from tests.specs import spec_of
from tests.train.runs import newest_of
from tests.train.tiny import CONVS, TinyNet

SPEC = spec_of(TinyNet(), 16)


def drawn():
  """The tiny net's variables, every value another one, on the host."""
  rng = np.random.default_rng(0)
  shapes = SPEC.shapes
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def assert_same(one, other):
  one, other = (traverse_util.flatten_dict(tree, sep="/") for tree in (one, other))
  assert one.keys() == other.keys()
  for path, value in one.items():
    np.testing.assert_array_equal(value, other[path], err_msg=path)


def test_everything_but_kernels_is_in_three_vectors():
  packed = pack_variables(drawn(), SPEC)
  kernels = {f"{layer}/kernel" for layer in (*CONVS, "classifier")}
  assert packed["params"].arrays.keys() == kernels | {"/norm/float32", "/quant/float32"}
  assert packed["batch_stats"].arrays.keys() == {"/statistics/float32"}


def test_a_packed_tree_comes_back_on_the_host_and_in_a_program():
  variables = drawn()
  assert_same(unpack(pack_variables(variables, SPEC)), variables)
  packed = jax.jit(lambda tree: pack_variables(tree, SPEC))(variables)
  assert_same(unpack(jax.device_get(packed)), variables)
  assert_same(jax.jit(unpack)(packed), variables)


def test_parameters_at_the_root_may_have_any_name_and_dtype():
  names = ("norm", "quant", "weight", "frozen", "statistics")
  tree = {name: np.full((2, 2), index, np.float32) for index, name in enumerate(names)}
  tree |= {"low": {"bias": np.ones(2, jnp.bfloat16)}, "high": {"bias": np.ones(3, np.float32)}}
  groups = {(name,): "weight" for name in names}
  groups |= {("low", "bias"): "norm", ("high", "bias"): "norm"}
  packed = pack(tree, groups)
  assert_same(unpack(packed), tree)
  assert {
    path: leaf.dtype for path, leaf in traverse_util.flatten_dict(unpack(packed)).items()
  } == {path: leaf.dtype for path, leaf in traverse_util.flatten_dict(tree).items()}
  labels = optimizer.label_params(packed, train_kernels=True).arrays
  assert {name: labels[name] for name in names} == dict.fromkeys(names, "weight")
  assert sorted(labels.values()) == ["norm"] * 2 + ["weight"] * len(names)


def test_leaves_that_are_filled_in_replace_whole_arrays():
  params = drawn()["params"]
  packed = pack(params, SPEC.groups)
  other = jax.tree.map(lambda leaf: leaf + 1, params)
  assert_same(unpack(packed.filled(other)), other)
  kernels = unpack(packed.with_kernels(other))
  expected = {
    path: (other if path[-1] == "kernel" else params) for path in traverse_util.flatten_dict(params)
  }
  expected = {path: traverse_util.flatten_dict(tree)[path] for path, tree in expected.items()}
  assert_same(kernels, traverse_util.unflatten_dict(expected))


def test_a_state_comes_back_from_its_saved_form():
  state = create_state(drawn(), SPEC, ema=True)
  labels = optimizer.label_params(state.params, train_kernels=True)
  sgd = optimizer.SgdSettings(weight_decay=0.1, momentum=0.9, quantizer_lr_scale=0.01)
  tx = optimizer.make_optimizer(labels, sgd, frozenset({"conv1/kernel"}))
  first = jax.device_get(state.replace(opt_state=tx.init(state.params)))
  # After a step that moves everything but the frozen kernel's momentum and the flags.
  _, opt_state = tx.update(
    jax.tree.map(np.ones_like, first.params),
    first.opt_state,
    first.params,
    learning_rate=np.float32(1),
  )
  state = jax.device_get(first.replace(opt_state=opt_state))
  saved = saved_form(state)
  trace = saved.opt_state.inner_states["weight"].inner_state[1].trace
  assert trace.keys() == {"conv0", "conv2", "classifier"}
  back = from_saved(saved, first)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, back, state)


def test_a_checkpoint_holds_every_leaf_under_its_path(finished_run):
  # As before the state was packed, so that a run of an earlier version resumes.
  saved = newest_of(finished_run).arrays
  variables = traverse_util.flatten_dict(drawn(), sep="/")
  expected = {f"state/{path}" for path in variables}
  expected |= {f"state/ema_{path}" for path in variables}
  # The last phase trains no kernel.
  for path in variables:
    name, leaf = path.removeprefix("params/"), path.rsplit("/", 1)[-1]
    if leaf.startswith("quant_"):
      expected.add(f"state/opt_state/inner_states/quant/inner_state/0/trace/{name}")
    elif leaf in ("scale", "bias"):
      expected.add(f"state/opt_state/inner_states/norm/inner_state/0/trace/{name}")
  assert {path for path in saved if path.startswith("state/")} == expected | {"state/step"}
