"""Where the weights are in a checkpoint, and under which names."""

import numpy as np
import pytest

from profit_jax.config import ConfigError
from profit_jax.weights.files import read_contents
from profit_jax.weights.formats import RefusedError
from profit_jax.weights.prefixes import fitted
from tests.weights.torch_writer import Global, Made, Tensor, torch_file


def weights(value, prefix=""):
  """A net's tensors, all with one value."""
  names = ("conv.weight", "conv.bias", "norm.weight", "norm.bias", "fc.weight", "fc.bias")
  return {f"{prefix}{name}": Tensor(np.full(3, value, np.float32)) for name in names}


RAW, EMA = weights(0), weights(1)
OPTIMIZER = {"state": {0: {"momentum_buffer": Tensor(np.zeros(3, np.float32))}}, "param_groups": []}


@pytest.fixture
def read(tmp_path):
  def read(tree, entry=""):
    path = tmp_path / "w.pth"
    path.write_bytes(torch_file(tree))
    contents = read_contents(str(path), entry)
    assert sorted(contents.tensors) == sorted(RAW)
    (value,) = {float(number) for each in contents.tensors.values() for number in each}
    return value, contents.notes

  return read


@pytest.mark.parametrize(
  "name",
  [
    *("model", "state_dict", "model_state_dict", "net", "network", "params", "weights"),
    *("checkpoint", "student", "teacher", "state_dict_ema", "model_ema", "params_ema", "ema"),
    "anything",
  ],
)
def test_known_entries_and_the_only_one(read, name):
  tree = {"epoch": 3, name: RAW, "optimizer": OPTIMIZER, "best": Tensor(np.array(71, np.float32))}
  value, (note,) = read(tree)
  assert value == 0
  assert all(part in note for part in (repr(name), "epoch", "optimizer", "best"))


@pytest.mark.parametrize(
  ("tree", "value", "told"),
  [
    # timm's, torchvision's (whose average counts its updates), BasicSR's.
    ({"state_dict": RAW, "state_dict_ema": EMA}, 1, "'state_dict_ema'*=state_dict takes the raw"),
    (
      {"model": RAW, "model_ema": {"n_averaged": Tensor(np.array(3)), **weights(1, "module.")}},
      1,
      "'model_ema'*averaged*config.init.entry=model takes",
    ),
    ({"params": RAW, "params_ema": EMA}, 1, "'params_ema'*config.init.entry=params takes"),
    ({"student": RAW, "teacher": EMA}, 0, "'student'*config.init.entry=teacher takes"),
    ({"checkpoint": {"model": {"state_dict": RAW}}}, 0, "'checkpoint/model/state_dict'"),
    # A whole module beside its state, and averages without names.
    (
      {"model": Made(Global("mine", "Net"), (), {"_parameters": {}, "_modules": {}}), "net": RAW},
      0,
      "'net'",
    ),
    ({"model": RAW, "ema": {"shadow_params": [*EMA.values()]}}, 0, "'model'"),
    # A dictionary of a class of its own.
    (Made(Global("mine", "Dict"), (), None, (("model", RAW), ("epoch", 3))), 0, "'model'"),
  ],
)
def test_the_first_of_several_is_taken_and_named(read, tree, value, told):
  got, (note,) = read(tree)
  assert got == value
  assert all(part in note for part in told.split("*")), note


def test_an_entry_can_be_chosen(read):
  tree = {"state_dict": RAW, "state_dict_ema": EMA, "other": {"model": weights(2)}}
  for entry, value in (("state_dict", 0), ("state_dict_ema", 1), ("other/model", 2), ("other", 2)):
    assert read(tree, entry)[0] == value
  assert "config.init.entry=state_dict_ema takes the averaged" in read(tree, "state_dict")[1][0]
  # What names begin with.
  names = {**weights(3, "student."), **weights(4, "teacher.module.")}
  assert read(names, "student")[0] == 3
  assert read({"state_dict": names}, "teacher.module")[0] == 4
  assert read({"a": names, "b": RAW}, "a/student.")[0] == 3


@pytest.mark.parametrize(
  ("tree", "entry", "told"),
  [
    ({"state_dict": RAW, "epoch": 3}, "ema", "no entry 'ema'*init.entry*conv, norm, fc*state_dict"),
    ({"state_dict": RAW, "epoch": 3}, "epoch", "(int)*the entry 'epoch'"),
    ({"generator": RAW, "critic": EMA}, "", "generator, critic*config.init.entry=generator"),
    ({"optimizer": OPTIMIZER, "epoch": 3}, "", "no tensors*docs/weights.md"),
    (
      {"ema": Made(Global("mine", "Net"), (), {"_parameters": {}, "_modules": {}})},
      "",
      "whole pickled module (mine.Net)*state_dict*the entry 'ema'",
    ),
    ([RAW], "", "list"),
  ],
)
def test_refused_checkpoints(read, tree, entry, told):
  with pytest.raises(ConfigError) as refused:
    read(tree, entry)
  message = str(refused.value)
  assert message.count("\n") == 0
  assert all(part in message for part in told.split("*")), message


def test_an_entry_that_holds_itself(read):
  tree = {"epoch": 3}
  tree["model"] = tree
  with pytest.raises(ConfigError, match="no tensors"):
    read(tree)


# The names of wrappers and what else is put between a net's names and the file's.
@pytest.mark.parametrize(
  "name",
  [
    "_orig_mod.{}",
    "module._orig_mod.{}",
    "_orig_mod.module.module.{}",
    "{0}._orig_mod.{1}",
    "_fsdp_wrapped_module.{0}._checkpoint_wrapped_module.{1}",
  ],
)
def test_wrappers_anywhere_in_names(read, name):
  parts = {plain: plain.split(".") for plain in RAW}
  whole = "{}" in name
  tree = {name.format(*([n] if whole else parts[n])): tensor for n, tensor in RAW.items()}
  assert read(tree) == (0, ())


def test_entries_of_profilers(read):
  counters = {f"{name}.total_{kind}": Tensor(np.zeros(1)) for name in RAW for kind in COUNTED}
  value, (note,) = read({**RAW, **counters, "total_ops": Tensor(np.zeros(1))})
  assert value == 0
  assert "13 counters" in note


COUNTED = ("ops", "params")


def test_pruned_tensors_are_products(tmp_path):
  tree = {**RAW, "conv.weight_orig": Tensor(np.array([1, 2, 3], np.float32))}
  del tree["conv.weight"]
  tree["conv.weight_mask"] = Tensor(np.array([1, 0, 1], np.float32))
  tree["noise_orig"] = Tensor(np.zeros(3, np.float32))
  (tmp_path / "w.pth").write_bytes(torch_file(tree))
  contents = read_contents(str(tmp_path / "w.pth"))
  assert sorted(contents.tensors) == sorted([*RAW, "noise_orig"])
  np.testing.assert_array_equal(contents.tensors["conv.weight"], [1, 0, 3])
  assert contents.notes == ("1 pruned tensors are the products of their _orig and _mask.",)


def test_parametrized_tensors_are_refused(read):
  tree = {**RAW, "fc.parametrizations.weight.original0": Tensor(np.zeros(3, np.float32))}
  with pytest.raises(ConfigError, match=r"fc\.parametrizations.*remove_parametrizations"):
    read(tree)


def arrays(value, prefix=""):
  return {name: tensor.array for name, tensor in weights(value, prefix).items()}


EXPECTED = [set(RAW), {*RAW, "fc.a", "fc.c"}, {"stem/kernel"}]


@pytest.mark.parametrize(
  "prefix", ["", "model.", "backbone.", "encoder.", "my_net.", "model.backbone.net.", "1."]
)
def test_prefixes_that_all_names_have(prefix):
  tensors, notes = fitted(arrays(0, prefix), EXPECTED, "F")
  assert (sorted(tensors), notes) == (sorted(RAW), ())


@pytest.mark.parametrize("wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}"])
def test_the_choice_that_a_message_gives_can_be_made(read, wrapped):
  copies = {**weights(3, "online.module."), **weights(4, "target.module.")}
  tree = {wrapped.format(name): tensor for name, tensor in copies.items()}
  for entry, value in (("online", 3), ("target.module", 4), (wrapped.format("target."), 4)):
    assert read(tree, entry)[0] == value


def test_what_a_choice_would_not_leave_out_is_left_for_the_strict_import():
  tensors = {**arrays(0, "model."), "model.extra.weight": np.zeros(3)}
  assert "model.extra.weight" in fitted(tensors, EXPECTED, "F")[0]


def test_a_prefix_of_the_backbone_alone():
  tensors = arrays(0, "backbone.")
  head = {name: tensors.pop(f"backbone.{name}") for name in ("fc.weight", "fc.bias")}
  assert sorted(fitted({**tensors, **head}, EXPECTED, "F")[0]) == sorted(RAW)
  # Another head is left for the strict import to list.
  other, _ = fitted({**tensors, "head.weight": head["fc.weight"]}, EXPECTED, "F")
  assert sorted(RAW.keys() - other.keys()) == ["fc.bias", "fc.weight"]
  assert "head.weight" in other


def test_wrappers_of_parts():
  tensors = {name.replace("conv.", "conv.module."): each for name, each in arrays(0).items()}
  assert sorted(fitted(tensors, EXPECTED, "F")[0]) == sorted(RAW)
  # A net may have a module of that name.
  own = [{name.replace("conv.", "conv.module.") for name in RAW}]
  assert sorted(fitted(tensors, own, "F")[0]) == sorted(tensors)


@pytest.mark.parametrize(
  ("prefixes", "taken", "told"),
  [
    (("model.", "ema_model.module."), 1, "'ema_model.module.', averaged*F=model"),
    (("", "ema."), 1, "'ema.', averaged"),
    (("student.", "teacher."), 0, "'student.'*F=teacher"),
    (("teacher.", "student."), 1, "'student.'*F=teacher"),
    (("", "momentum_encoder."), 0, "no prefix*F=momentum_encoder"),
  ],
)
def test_one_of_several_copies_is_taken_and_named(prefixes, taken, told):
  given = {**arrays(0, prefixes[0]), **arrays(1, prefixes[1])}
  tensors, (note,) = fitted(given, EXPECTED, "F")
  assert sorted(tensors) == sorted(RAW)
  assert {float(number) for each in tensors.values() for number in each} == {taken}
  assert all(part in note for part in told.split("*")), note


def test_copies_without_an_order_are_refused():
  with pytest.raises(RefusedError, match=r"'left\.', 'right\.'.*F=left"):
    fitted({**arrays(0, "right."), **arrays(1, "left.")}, EXPECTED, "F")


def test_tensors_beside_a_whole_net_are_named():
  loss = {"loss.weight": np.zeros(3)}
  with pytest.raises(RefusedError, match=r"1 tensors beside.*'model\.': loss\.weight.*F=model"):
    fitted({**arrays(0, "model."), **loss}, EXPECTED, "F")
  # Without a prefix the strict import lists them.
  assert sorted(fitted({**arrays(0), **loss}, EXPECTED, "F")[0]) == sorted([*RAW, *loss])


def test_names_of_another_net_and_two_of_one_name_stay_as_they_are():
  other = {"layer1.conv.weight": np.zeros(3), "layer2.conv.weight": np.zeros(3)}
  twice = {**arrays(0, "model."), "fc.weight": np.ones(3)}
  for tensors in (other, twice):
    assert fitted(tensors, EXPECTED, "F")[0] is tensors
