"""A file that says which net it is, in its name or in a training script's options, is no other."""

import argparse
import io
import pickle
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, Naming, register, student_spec
from profit_jax.train import published
from profit_jax.weights import hub
from profit_jax.weights.claims import claim_of
from profit_jax.weights.library import load_weights
from profit_jax.weights.load import load_variables
from profit_jax.weights.save import named_tensors, settings_metadata, write_safetensors
from profit_jax.weights.variants import published_settings
from tests.specs import init_variables
from tests.train.shared import tiny_config
from tests.train.tiny import TinyNet
from tests.weights.test_files import crafted, tensor, text
from tests.weights.torch_writer import Global, Made, Tensor, torch_file


class ClaimedNet(TinyNet):
  """A class with one registered name, whatever other tests in the process register."""


NAMING = Naming(
  source="timm",
  layer_names=lambda layers: {path: "_".join(path) for path in layers if "quant" not in path[-1]},
  settings={"activation": "relu"},
  variants={"tinynet_100": {"width": 1.0}},
  unsupported={"tf_tinynet_100": "it pads as TensorFlow"},
)


@pytest.fixture(scope="module")
def content():
  """The bytes of a file with the weights of a registered net."""
  register("tinynet", names=(NAMING,))(ClaimedNet)
  variables = jax.device_get(init_variables(ClaimedNet(), jax.random.key(0), 16))
  tensors = named_tensors("tinynet", variables, "timm")
  yield safetensors.numpy.save({name: np.asarray(value) for name, value in tensors.items()})
  del REGISTRY["tinynet"]


def settings_of(path, **changes):
  changes = {"model.name": "tinynet", "init.weights": str(path), **changes}
  return parse(tiny_config(**changes), REGISTRY)


def load(path):
  return load_variables(str(path), "tinynet", student_spec(settings_of(path), 10).shapes)


def assert_refused(path, *parts):
  """Before a run and where the file is read, in one line."""
  for call in (load, lambda path: published.apply(settings_of(path))):
    with pytest.raises(ConfigError) as refused:
      call(path)
    told = str(refused.value)
    assert "\n" not in told
    assert all(part in told for part in (str(path), *parts)), told


@pytest.mark.parametrize(
  ("path", "net"),
  [
    ("tf_efficientnet_lite0-0aa007d2.pth", "tf_efficientnet_lite0"),
    ("efficientnet-lite0-57934424.pth", "efficientnet-lite0"),
    ("mobilenetv3_large_100_ra-f55367f5.pth", "mobilenetv3_large_100"),
    ("mobilenetv4_conv_small.e2400_r224_in1k.safetensors", "mobilenetv4_conv_small"),
    ("mobilenetv4_conv_small_035.safetensors", "mobilenetv4_conv_small_035"),
    ("mobilenetv4_conv_aa_medium.npz", "mobilenetv4_conv_aa_medium"),
    ("mnasnet0.5_top1_67.823-3ffadce67e.pth", "mnasnet0_5"),
    ("mobilenetv1_100h.npz", "mobilenetv1_100h"),
    ("timm/mobilenetv1_100.ra4_e3600_r224_in1k/model.safetensors", "mobilenetv1_100"),
    # Names of nobody, or of our own.
    ("w.npz", None),
    ("mobilenet_v2_110d.npz", None),
    ("mobilenetv1_1000.npz", None),
    ("my_resnet50.npz", None),
    ("resnet50/w.npz", None),
  ],
)
def test_a_files_name_says_its_net(path, net):
  claim = claim_of(epath.Path(path))
  assert (claim and claim.net) == net


def test_a_name_of_another_net_is_refused_though_the_tensors_fit(content, tmp_path):
  for name, parts in {
    "mobilenetv2_100_ra.safetensors": ("mobilenetv2_100 by its name", "model.name=mobilenet_v2"),
    "tf_tinynet_100-1.safetensors": ("tf_tinynet_100 by its name", "it pads as TensorFlow"),
  }.items():
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, *parts, "another name if it is wrong")


def test_a_name_of_the_net_gives_its_settings(content, tmp_path):
  path = tmp_path / "tinynet_100.safetensors"
  path.write_bytes(content)
  assert load(path).settings == {"activation": "relu", "width": 1.0}
  applied, lines, _ = published.apply(settings_of(path))
  assert applied.model.activation == "relu"
  assert [line.partition(",")[0] for line in lines] == ["config.model.activation = relu"]


@pytest.mark.parametrize("name", ["tinynet_100", "tf_tinynet_100", "resnet50_taught"])
def test_the_settings_in_our_file_count_and_not_its_name(content, tmp_path, name):
  path = str(tmp_path / f"{name}.safetensors")
  settings = settings_of(path, **{"model.activation": "relu6"})
  write_safetensors(path, safetensors.numpy.load(content), settings_metadata(settings.model))
  assert published.apply(settings)[:2] == (settings, [])
  loaded = load(path)
  assert loaded.published is None
  assert loaded.settings["activation"] == "relu6"


def test_the_library_wants_a_model_with_these_settings(content, tmp_path):
  path = tmp_path / "tinynet_100.safetensors"
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=r"is tinynet_100, .* activation='relu' \(not 'relu6'\)"):
    load_weights(path, ClaimedNet(activation="relu6"), (16, 16, 3))
  variables = load_weights(path, ClaimedNet(activation="relu"), (16, 16, 3))
  jax.tree.map(np.testing.assert_array_equal, variables, load(path).variables)


def test_the_name_of_a_net_is_that_of_its_widths(content, tmp_path):
  path = tmp_path / "tinynet_100_0.25.safetensors"
  path.write_bytes(content)
  assert claim_of(epath.Path(path)).net == "tinynet_100"
  narrow = ClaimedNet(width=0.25)
  jax.tree.map(
    np.testing.assert_array_equal, load_weights(path, narrow, (16, 16, 3)), load(path).variables
  )


def test_the_library_knows_the_members_of_a_class(tmp_path):
  path = tmp_path / "mobilenetv2_110d.npz"
  np.savez(path, w=np.zeros(3))
  deep = REGISTRY["mobilenet_v2_110d"](num_classes=10)
  with pytest.raises(ConfigError, match="weights of mobilenet_v2_110d"):
    load_weights(path, deep, (32, 32, 3))


def test_a_teachers_file_is_asked_too(content, tmp_path):
  path = tmp_path / "mobilenetv2_100.safetensors"
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=r"config\.teacher\.model=mobilenet_v2"):
    load_variables(str(path), "tinynet", {}, role="teacher")


WEIGHTS = (text("state_dict"), b"}(" + text("w") + tensor((4,), (1,), 4) + b"u")


def test_a_checkpoint_that_names_another_net_is_refused(content, tmp_path):
  path = tmp_path / "checkpoint-12.pth"
  path.write_bytes(crafted(text("arch"), text("tf_tinynet_100"), *WEIGHTS))
  assert_refused(path, "tf_tinynet_100 by the options saved in it", "it pads as TensorFlow")
  path.write_bytes(crafted(text("arch"), text("mobilenetv4_conv_small_050"), *WEIGHTS))
  assert_refused(path, "model.name=mobilenet_v4_conv_small")


@pytest.mark.parametrize(
  ("tree", "net"),
  [
    # timm's, torchvision's, and PyTorch's example of ImageNet.
    ({"arch": "tinynet_100", "args": argparse.Namespace(model="tinynet_100")}, "tinynet_100"),
    ({"arch": "tinynet", "args": argparse.Namespace(model="tf_tinynet_100")}, "tf_tinynet_100"),
    ({"model": {}, "args": argparse.Namespace(lr=0.1, model="mobilenet_v2")}, "mobilenet_v2"),
    # torchvision's script for quantization-aware training: its MobileNet-v2 has ReLU, not ReLU6.
    (
      {"args": argparse.Namespace(model="mobilenet_v2", num_calibration_batches=32)},
      "quantization.mobilenet_v2",
    ),
    (
      {"args": argparse.Namespace(model="tinynet_100", num_calibration_batches=32)},
      "tinynet_100",
    ),
    ({"arch": "resnet50", "epoch": 3}, "resnet50"),
    # Classes, and names that nobody here knows.
    ({"arch": "efficientnet"}, None),
    ({"args": argparse.Namespace(model="mine", arch=3)}, None),
    ({"args": [1], "arch": None}, None),
    # With the tag of a training, and where it is fetched from.
    ({"args": argparse.Namespace(model="hf_hub:timm/tf_tinynet_100.in1k")}, "tf_tinynet_100"),
    ({"arch": "quantization.mobilenet_v2"}, "quantization.mobilenet_v2"),
    # Lightning's, and those of other scripts.
    ({"hyper_parameters": {"lr": 0.1, "model_name": "tf_tinynet_100"}}, "tf_tinynet_100"),
    ({"cfg": {"model": {"name": "tf_tinynet_100", "lr": 3}}}, "tf_tinynet_100"),
    ({"model_name": "tinynet_100"}, "tinynet_100"),
  ],
)
def test_options_say_the_net(content, tmp_path, tree, net):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as file:
    file.writestr("archive/data.pkl", pickle.dumps({"state_dict": {}, **tree}, protocol=2))
  (tmp_path / "w.pth").write_bytes(buffer.getvalue())
  claim = claim_of(epath.Path(tmp_path / "w.pth"))
  assert (claim and claim.net) == net


@pytest.mark.parametrize(
  ("entry", "net"),
  [("", None), ("a", "tinynet_100"), ("b", "tf_tinynet_100"), ("c/teacher", "resnet50")],
)
def test_the_options_nearest_to_the_chosen_weights_say_the_net(content, tmp_path, entry, net):
  weights = {"w": Tensor(np.zeros(3, np.float32))}
  options = Made(Global("argparse", "Namespace"), (), {"model": "tinynet", "teacher": "resnet50"})
  tree = {
    "a": {"arch": "tinynet_100", "state_dict": weights},
    "b": {"arch": "tf_tinynet_100", "model": weights},
    "c": {"args": options, "arch": "tinynet_100", "student": weights, "teacher": weights},
  }
  path = epath.Path(tmp_path / "w.pth")
  path.write_bytes(torch_file(tree))
  claim = claim_of(path, entry=entry)
  assert (claim and claim.net) == net
  if net and entry != "b":
    assert hub.published(str(path), entry).architecture == net


def test_options_in_an_omegaconf_configuration(content, tmp_path):
  def node(value):
    return Made(Global("omegaconf.nodes", "AnyNode"), (), {"_val": value})

  def section(**nodes):
    state = {"_content": nodes, "_metadata": None}
    return Made(Global("omegaconf.dictconfig", "DictConfig"), (), state)

  path = epath.Path(tmp_path / "w.pth")
  options = section(model=section(name=node("tinynet_100"), bn_eps=node(0.01)))
  tree = {"state_dict": {"w": Tensor(np.zeros(3, np.float32))}, "cfg": options}
  path.write_bytes(torch_file(tree))
  assert claim_of(path)[::2] == ("tinynet_100", {"bn_epsilon": 0.01})
  changed = section(model=node("tinynet_100"), model_kwargs=section(pad_type=node("same")))
  path.write_bytes(torch_file({**tree, "args": changed}))
  with pytest.raises(ConfigError, match=r"tinynet_100: .* by \{'pad_type': 'same'\}"):
    claim_of(path)


def checkpoint(path, **options):
  """Writes a checkpoint that has only options; the weights do not matter."""
  with zipfile.ZipFile(path, "w") as file:
    tree = {"state_dict": {}, "args": {"model": "tinynet_100", **options}}
    file.writestr("archive/data.pkl", pickle.dumps(tree, protocol=2))
  return epath.Path(path)


def test_options_that_change_the_net_count_too(content, tmp_path):
  path = tmp_path / "w.pth"
  # As timm's script names them.
  assert claim_of(checkpoint(path, bn_eps=0.01)).settings == {"bn_epsilon": 0.01}
  assert claim_of(checkpoint(path, bn_eps=None)).settings == {}
  assert claim_of(checkpoint(path, model_kwargs={"drop_rate": 0.2})).settings == {}
  assert claim_of(checkpoint(path, model_kwargs={"bn_eps": 1e-3})).settings == {"bn_epsilon": 1e-3}
  assert claim_of(checkpoint(path, bn_tf=True, gp="avg")).settings == {"bn_epsilon": 1e-3}
  with pytest.raises(ConfigError, match="'gp': 'max'"):
    claim_of(checkpoint(path, gp="max"))
  with pytest.raises(ConfigError, match=r"not a plain tinynet_100.*'pad_type': 'same'"):
    claim_of(checkpoint(path, model_kwargs={"pad_type": "same", "num_classes": 10}))


def test_the_epsilon_of_a_training_is_that_of_the_net(tmp_path):
  path = checkpoint(tmp_path / "w.pth", model="mobilenetv3_large_100", bn_eps=0.01)
  told = hub.published(str(path))
  assert published_settings(told, "mobilenet_v3_large", str(path))["bn_epsilon"] == 0.01


def test_the_authors_files_may_have_torchvisions_names(tmp_path):
  path = tmp_path / "mobilenet_v3_large.npz"
  np.savez(path, w=np.zeros(3))
  settings = parse(
    tiny_config(**{"model.name": "mobilenet_v3_large", "init.weights": str(path)}), REGISTRY
  )
  assert published.apply(settings)[:2] == (settings, [])
