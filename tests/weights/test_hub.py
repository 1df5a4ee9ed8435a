"""Weights by name, from a server on this machine: fetched, cached, described, refused."""

import hashlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from profit_jax import data
from profit_jax.cli import app
from profit_jax.config import ConfigError, parse
from profit_jax.models import REGISTRY, Naming, register, student_spec
from profit_jax.train import published, start
from profit_jax.weights import hub
from profit_jax.weights.files import read_contents
from profit_jax.weights.load import load_variables
from profit_jax.weights.save import named_tensors
from tests import golden_data
from tests.specs import init_variables
from tests.train.runs import WITHOUT_PLOTS, result_of
from tests.train.shared import tiny_config
from tests.train.tiny import TinyNet
from tests.weights.hub_server import HubServer
from tests.weights.test_files import crafted, tensor, text

NAME = "hf:timm/tinynet_100.a1_in1k"
CLOSED = "http://127.0.0.1:9"  # nothing listens there
CONFIG = {
  "architecture": "tinynet_100",
  "num_classes": 10,
  "pretrained_cfg": {
    "input_size": [3, 16, 16],
    "crop_pct": 0.95,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
  },
}
# As timm's names of its nets: a net of ours, and one that only looks like it.
NAMING = Naming(
  source="timm",
  layer_names=lambda layers: {path: "_".join(path) for path in layers if "quant" not in path[-1]},
  settings={"activation": "relu"},
  variants={"tinynet_100": {"width": 1.0}, "tinynet_wide": {"width": 2.0}},
  unsupported={"tf_tinynet_100": "it pads as TensorFlow"},
)


@pytest.fixture(scope="module")
def weights():
  """The bytes of a weights file under the names above."""
  register("tinynet", names=(NAMING,))(TinyNet)
  variables = jax.device_get(init_variables(TinyNet(), jax.random.key(0), 16))
  yield save(
    {name: np.asarray(x) for name, x in named_tensors("tinynet", variables, "timm").items()}
  )
  del REGISTRY["tinynet"]


@pytest.fixture
def server(weights, tmp_path, monkeypatch):
  """An open server with a repository, and empty caches."""
  with HubServer() as opened:
    opened.repositories["timm/tinynet_100.a1_in1k"] = {
      "model.safetensors": weights,
      "config.json": json.dumps(CONFIG).encode(),
    }
    monkeypatch.setenv("HF_ENDPOINT", opened.url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "TORCHVISION_URL", f"{opened.url}/models")
    yield opened


def files(server):
  return server.repositories["timm/tinynet_100.a1_in1k"]


def settings_of(**changes):
  return parse(tiny_config(**{"model.name": "tinynet", "init.weights": NAME, **changes}), REGISTRY)


def load(weights=NAME, model="tinynet"):
  return load_variables(weights, model, student_spec(settings_of(), 10).shapes)


def refusal(call, *arguments):
  with pytest.raises(ConfigError) as refused:
    call(*arguments)
  told = str(refused.value)
  assert "\n" not in told
  return told


def test_a_file_is_fetched_once_and_then_read_from_the_cache(server, weights, monkeypatch):
  loaded = load()
  assert loaded.sha256 == hashlib.sha256(weights).hexdigest()
  assert loaded.source == "timm"
  assert loaded.published.architecture == "tinynet_100"
  fetched = [request for request in server.requests if request.startswith("GET /lfs/")]
  assert len(fetched) == 1
  load()
  assert [request for request in server.requests if request.startswith("GET /lfs/")] == fetched
  # Without the network, too.
  monkeypatch.setenv("HF_ENDPOINT", CLOSED)
  jax.tree.map(np.testing.assert_array_equal, load().variables, loaded.variables)


def test_a_fresh_process_says_what_to_do_without_a_network(tmp_path):
  # Here the tests have imported more of huggingface_hub than the command does.
  code = f"from profit_jax.weights import hub; hub.locate({NAME!r})"
  ended = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "HF_ENDPOINT": CLOSED, "HF_HUB_CACHE": str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert "ConfigError: hf:timm/tinynet_100.a1_in1k cannot be fetched" in ended.stderr


def test_a_revision_can_be_named(server):
  assert load(f"{NAME}@main").sha256
  assert "has no revision v2" in refusal(load, f"{NAME}@v2")


def test_torch_files_are_found_where_there_are_no_safetensors(server):
  torch_files = golden_data.GOLDEN / "torch_files"
  files(server)["pytorch_model.bin"] = (torch_files / "nested.ckpt").read_bytes()
  del files(server)["model.safetensors"]
  with np.load(torch_files / "expected_net.npz") as expected:
    jax.tree.map(np.testing.assert_array_equal, read_contents(NAME).tensors, dict(expected))
  del files(server)["pytorch_model.bin"]
  assert "none of model.safetensors, pytorch_model.bin" in refusal(load)


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("hf:timm/tinynet_200", ["has no public repository timm/tinynet_200", "Check the name"]),
    ("hf:tinynet_100", ["is not a name of the hub", "hf:OWNER/NAME"]),
    ("hf:a/b/c", ["is not a name of the hub"]),
    ("hf:timm/../etc", ["is not a name of the hub"]),
    ("hf:", ["is not a name of the hub"]),
    ("torchvision:mobilenet_v9", ["is not known", "torchvision:mobilenet_v2.IMAGENET1K_V2"]),
    ("torchvision:", ["is not known"]),
  ],
)
def test_a_name_that_is_not_known_is_one_message(server, name, parts):
  for call in (hub.locate, hub.published):
    told = refusal(call, name)
    assert told.startswith(name)
    assert all(part in told for part in parts), told


def test_a_gated_repository_says_how_to_get_in(server):
  files(server)["GATED"] = b""
  assert "hf auth login" in refusal(load)


def test_without_a_network_the_message_says_where_to_put_the_file(server, monkeypatch, tmp_path):
  monkeypatch.setenv("HF_ENDPOINT", CLOSED)
  told = refusal(load)
  assert all(
    part in told
    for part in (
      f"{NAME} cannot be fetched from {CLOSED}",
      str(tmp_path / "hub"),
      f"{CLOSED}/timm/tinynet_100.a1_in1k/resolve/main/model.safetensors",
      f"give DIRECTORY/model.safetensors in place of {NAME}",
    )
  ), told


@pytest.mark.parametrize("given", ["model.safetensors", "pytorch_model.bin"])
def test_without_a_network_a_repository_has_what_is_in_the_cache(server, monkeypatch, given):
  del files(server)["config.json"]
  files(server)[given] = files(server).pop("model.safetensors")
  located, told = hub.locate(NAME), hub.published(NAME)
  assert pathlib.Path(located).name == given
  monkeypatch.setenv("HF_ENDPOINT", CLOSED)
  assert (hub.locate(NAME), hub.published(NAME)) == (located, told)
  assert "cannot be fetched" in refusal(hub.locate, f"{NAME}@v2")


def test_a_file_that_was_put_there_is_described_by_the_config_beside_it(server, tmp_path):
  for name, content in files(server).items():
    (tmp_path / name).write_bytes(content)
  path = str(tmp_path / "model.safetensors")
  assert hub.published(path)._replace(origin="") == hub.published(NAME)._replace(origin="")
  applied, *_ = published.apply(settings_of(**{"init.weights": path, "data.name": "imagenet2012"}))
  assert applied.data.crop_pct == 0.95
  (tmp_path / "config.json").unlink()
  assert hub.published(path) is None


@pytest.mark.parametrize("content", [json.dumps({"architecture": "resnet50"}), "<html>"])
def test_a_file_with_a_name_is_not_described_by_a_config_beside_it(weights, tmp_path, content):
  (tmp_path / "config.json").write_text(content)
  for name in ("tinynet_100-1", "mine"):
    (tmp_path / f"{name}.safetensors").write_bytes(weights)
  assert load(str(tmp_path / "mine.safetensors")).published is None
  assert load(str(tmp_path / "tinynet_100-1.safetensors")).published.architecture == "tinynet_100"
  (tmp_path / "tf_tinynet_100.safetensors").write_bytes(weights)
  assert "is tf_tinynet_100 by its name" in refusal(
    load, str(tmp_path / "tf_tinynet_100.safetensors")
  )


def test_a_message_names_the_config_that_describes_a_file(weights, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
  (tmp_path / "model.safetensors").write_bytes(weights)
  assert f"is resnet50 by {tmp_path / 'config.json'}, not" in refusal(
    load, str(tmp_path / "model.safetensors")
  )


def test_a_damaged_file_in_the_cache_is_refused(server):
  path = pathlib.Path(hub.locate(NAME)).resolve()
  path.write_bytes(path.read_bytes()[:-1] + b"!")
  assert f"{NAME} is damaged in the cache" in refusal(load)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"architecture": "mobilenetv2_100"},
      "Set config.model.name=mobilenet_v2, or use other weights.",
    ),
    ({"architecture": "tf_tinynet_100"}, "not supported: it pads as TensorFlow"),
    ({"architecture": "tinynet_050"}, "Of tinynet there are tinynet_100, tinynet_wide"),
    ({"model_args": {"act_layer": "silu"}}, '{"act_layer": "silu"}'),
    ({"pretrained_cfg": {"input_size": [3, 224]}}, "pretrained_cfg that cannot be understood"),
    ({"pretrained_cfg": {"input_size": [3, 224, 192]}}, "no square"),
    ({"pretrained_cfg": {"crop_pct": "wide"}}, "pretrained_cfg that cannot be understood"),
    ({"pretrained_cfg": {"mean": 0.5}}, "pretrained_cfg that cannot be understood"),
  ],
)
def test_weights_of_another_net_are_refused_though_their_tensors_fit(server, change, message):
  files(server)["config.json"] = json.dumps({**CONFIG, **change}).encode()
  for call in (load, lambda: published.apply(settings_of())):
    assert message in refusal(call)


def test_a_config_that_is_no_json_is_refused(server):
  files(server)["config.json"] = b"<html>"
  assert "cannot be read" in refusal(load)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"architectures": ["ViT"]}', None])
def test_a_config_that_names_no_architecture_leaves_the_repositorys_name(server, content):
  if content is None:
    del files(server)["config.json"]
  else:
    files(server)["config.json"] = content
  loaded = load()
  assert (loaded.published.architecture, loaded.published.claimed) == ("tinynet_100", True)
  assert loaded.settings["activation"] == "relu"
  server.repositories["me/net"] = files(server)
  assert load("hf:me/net").published is None
  server.repositories["me/tf_tinynet_100"] = files(server)
  assert "hf:me/tf_tinynet_100 is tf_tinynet_100 by its name" in refusal(
    load, "hf:me/tf_tinynet_100"
  )


def test_a_checkpoint_in_a_repository_names_its_net(server):
  state = b"}(" + text("w") + tensor((4,), (1,), 4) + b"u"
  checkpoint = crafted(text("arch"), text("tf_tinynet_100"), text("state_dict"), state)
  server.repositories["me/net"] = {"pytorch_model.bin": checkpoint}
  assert "tf_tinynet_100 by the options saved in it" in refusal(load, "hf:me/net")


def test_published_settings_are_taken_for_fields_with_defaults_and_said(server):
  given = settings_of(**{"data.name": "imagenet2012", "data.image_size": 224})
  applied, lines, fields = published.apply(given)
  assert (applied.data.image_size, applied.data.crop_pct) == (16, 0.95)
  assert (applied.data.interpolation, applied.data.normalization) == ("bilinear", "inception")
  assert applied.model.activation == "relu"
  fields = [re.match(r"config\.([\w.]+) = ", line)[1] for line in lines]
  assert sorted(fields) == [
    "data.crop_pct",
    "data.image_size",
    "data.interpolation",
    "data.normalization",
    "model.activation",
  ]
  assert all(NAME in line and "default: " in line for line in lines)
  # Nothing is left to apply or to name.
  assert published.apply(applied)[:2] == (applied, [])
  assert published.differences(applied, hub.published(NAME), "model") == []


def test_fields_that_the_user_has_set_are_compared(server):
  changes = {"data.crop_pct": 0.8, "data.normalization": "none", "data.image_size": 24}
  settings, *_ = published.apply(settings_of(**changes))
  assert (settings.data.crop_pct, settings.data.normalization) == (0.8, "none")
  student = start.load_student(settings, 10)
  doubts = start.weight_warnings(settings, student, start.Teacher(None, None, None))
  # Not the width, which the tensors prove.
  assert [doubt.partition(",")[0] for doubt in doubts] == [
    "config.data.image_size = 24",
    "config.data.crop_pct = 0.8",
    "config.data.normalization = none",
  ]
  # So are all, where the user wants it.
  settings = settings_of(**{"init.published_settings": "compare", "data.name": "imagenet2012"})
  student = start.load_student(settings, 10)
  doubts = start.weight_warnings(settings, student, start.Teacher(None, None, None))
  assert len([doubt for doubt in doubts if "config.data.normalization = dataset" in doubt]) == 1


def test_a_normalization_that_no_setting_stands_for_is_named(server):
  told = hub.published(NAME)._replace(mean=(0.1, 0.2, 0.3))
  (line,) = published.differences(settings_of(**_applied()), told, "model")
  assert "mean (0.1, 0.2, 0.3)" in line


def test_an_interpolation_that_no_setting_stands_for_is_named(server):
  told = hub.published(NAME)._replace(interpolation="lanczos")
  settings = settings_of(**_applied(), **{"data.normalization": "inception"})
  (line,) = published.differences(settings, told, "model")
  assert "interpolation lanczos" in line
  assert "bicubic or bilinear" in line


def _applied():
  return {"data.crop_pct": 0.95, "data.interpolation": "bilinear"}


def test_the_own_normalization_of_a_data_set_stands_for_equal_numbers(server):
  own = data.normalization_of("imagenet2012")
  files(server)["config.json"] = json.dumps(
    {**CONFIG, "pretrained_cfg": {"mean": own.mean, "std": own.std}}
  ).encode()
  applied, *_ = published.apply(settings_of(**{"data.name": "imagenet2012"}))
  assert applied.data.normalization == "dataset"
  applied, *_ = published.apply(settings_of(**{"data.name": "cifar10"}))
  assert applied.data.normalization == "imagenet"


def test_a_teacher_gets_its_own_normalization_and_settings(server):
  changes = {"init.weights": "", "teacher.model": "tinynet", "teacher.weights": NAME}
  applied, lines, _ = published.apply(settings_of(**changes, **{"data.image_size": 224}))
  assert (applied.teacher.normalization, applied.teacher.activation) == ("inception", "relu")
  assert applied.data.image_size == 224
  assert len(lines) == 2


@pytest.mark.parametrize("role", ["init", "teacher"])
def test_a_run_keeps_what_it_took_without_the_server(server, monkeypatch, role):
  changes = {"init.weights": "", f"{role}.weights": NAME, "data.name": "imagenet2012"}
  given = settings_of(**changes, **({"teacher.model": "tinynet"} if role == "teacher" else {}))
  applied, lines, fields = published.apply(given)
  assert lines
  monkeypatch.setenv("HF_ENDPOINT", CLOSED)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", "/absent")
  # Exactly the fields that it saved; of a run that saved none, those that it may have taken.
  for taken in (fields, None):
    assert published.as_begun(given, applied, taken) == applied
  assert published.as_begun(given, applied, []) == given


@pytest.fixture
def torchvision(server, weights, monkeypatch):
  """A file in torchvision's table, whose name has the first digits of its SHA-256."""
  digest = hashlib.sha256(weights).hexdigest()
  filename = f"tinynet-{digest[:8]}.safetensors"
  monkeypatch.setattr(hub, "_TORCHVISION_FILES", {"tinynet_100.IMAGENET1K_V1": (filename, 232)})
  server.plain[f"/models/{filename}"] = weights
  return filename


TORCHVISION = "torchvision:tinynet_100.IMAGENET1K_V1"


def test_torchvisions_files_lie_where_torch_keeps_them(server, torchvision, tmp_path, monkeypatch):
  loaded = load(TORCHVISION)
  assert loaded.published.crop_pct == 224 / 232
  assert (tmp_path / "torch" / "hub" / "checkpoints" / torchvision).exists()
  monkeypatch.setattr(hub, "TORCHVISION_URL", CLOSED)
  assert load(TORCHVISION).sha256 == loaded.sha256


def test_a_torchvision_file_must_have_its_checksum(server, torchvision, tmp_path):
  server.plain[f"/models/{torchvision}"] = b"something else"
  told = refusal(load, TORCHVISION)
  assert "does not begin with" in told
  folder = tmp_path / "torch" / "hub" / "checkpoints"
  assert list(folder.iterdir()) == []
  (folder / torchvision).write_bytes(b"something else")
  assert "is damaged" in refusal(load, TORCHVISION)


def test_without_torchvisions_server_the_message_says_where_to_put_the_file(
  server, torchvision, tmp_path, monkeypatch
):
  monkeypatch.setattr(hub, "TORCHVISION_URL", CLOSED)
  told = refusal(load, TORCHVISION)
  assert f"{CLOSED}/{torchvision}" in told
  assert str(tmp_path / "torch" / "hub" / "checkpoints" / torchvision) in told


@pytest.mark.parametrize(
  ("answer", "error"),
  [
    (b"nonsense\r\n\r\n", "BadStatusLine"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc", "IncompleteRead"),
  ],
)
def test_an_answer_that_is_no_http_is_one_message(server, torchvision, monkeypatch, answer, error):
  with socket.create_server(("127.0.0.1", 0)) as listening:

    def serve():
      connection, _ = listening.accept()
      with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    monkeypatch.setattr(hub, "TORCHVISION_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
    assert error in refusal(load, TORCHVISION)
    thread.join()


def test_a_file_that_torchvision_no_longer_serves_is_said(server, torchvision):
  del server.plain[f"/models/{torchvision}"]
  assert "Not Found" in refusal(load, TORCHVISION)


def test_every_torchvision_name_has_digits_of_its_checksum():
  for filename, resize in hub._TORCHVISION_FILES.values():
    assert re.search(r"-[0-9a-f]{8,}\.pth$", filename)
    assert resize in (232, 256)


def test_a_run_from_a_name_keeps_its_settings_and_its_card_has_the_checksum(
  server, weights, tmp_path, monkeypatch, capsys
):
  changes = {"model.name": "tinynet", "init.weights": NAME}
  changes |= {"plan.weight_bits": (), "plan.act_bits": ()}
  run = tmp_path / "run"
  app.main(tiny_config(**changes), str(run), "train", hooks=WITHOUT_PLOTS)
  said = capsys.readouterr().out
  assert "config.data.normalization = inception, as published with hf:timm/" in said
  digest = hashlib.sha256(weights).hexdigest()
  told = {"variant": "tinynet_100", "variant_by": "its config.json"}
  assert result_of(run)["initial_weights"] == {"student": {"name": NAME, "sha256": digest, **told}}
  assert (
    f"{NAME}, SHA-256 `{digest}`, tinynet_100 by its config.json" in (run / "report.md").read_text()
  )
  config = json.loads((run / "config.json").read_text())
  assert (config["data"]["crop_pct"], config["model"]["activation"]) == (0.95, "relu")
  taken = json.loads((run / "published.json").read_text())
  assert sorted(taken) == [
    "data.crop_pct",
    "data.image_size",
    "data.interpolation",
    "data.normalization",
    "model.activation",
  ]
  # The same command needs neither the server nor the cache any more.
  monkeypatch.setenv("HF_ENDPOINT", CLOSED)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
  app.main(tiny_config(**changes), str(run), "train", hooks=WITHOUT_PLOTS)
  assert result_of(run)["initial_weights"]["student"]["sha256"] == digest
