"""Packages that an installation may lack: one message names the package and the extra, and what
does not need the package works.
"""

import importlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from configs import digits_w4
from profit_jax import data, optional, report
from profit_jax.cli import ablate, compare
from profit_jax.config import ConfigError, parse
from profit_jax.data.prepare import prepare
from profit_jax.export import formats
from profit_jax.models import REGISTRY
from profit_jax.report.tensorboard import TensorBoardObserver
from profit_jax.weights import hub

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture
def without(monkeypatch):
  """Hides packages, as if they were not installed."""

  def hide(*names):
    # It imports matplotlib when it is imported, as another test may have done.
    monkeypatch.delitem(sys.modules, "profit_jax.report.plots", raising=False)
    monkeypatch.delattr(report, "plots", raising=False)
    for name in names:
      monkeypatch.setitem(sys.modules, name, None)
      # Of what was imported before the package was hidden.
      for module in [loaded for loaded in sys.modules if loaded.startswith(f"{name}.")]:
        monkeypatch.setitem(sys.modules, module, None)

  return hide


def refusal(call, *arguments):
  with pytest.raises(ConfigError) as refused:
    call(*arguments)
  return str(refused.value)


def settings_of(**changes):
  config = digits_w4.get_config()
  config.update_from_flattened_dict(changes)
  return parse(config, REGISTRY)


def normal(name):
  return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements):
  return {normal(re.match(r"[\w.-]+", requirement).group()) for requirement in requirements}


@pytest.mark.parametrize("extra", optional.PACKAGES)
def test_an_extra_installs_the_packages_that_a_message_names(extra):
  installed = names_of(EXTRAS[extra])
  if "profit-jax" in installed:
    installed |= names_of(EXTRAS["onnx"])
  distributions = metadata.packages_distributions()
  for package in optional.PACKAGES[extra]:
    # Several distributions have a part of some packages.
    known = {normal(name) for name in distributions.get(package, [])}
    assert known & installed or not known, package


def test_all_has_every_extra_of_a_feature():
  (requirement,) = EXTRAS["all"]
  (names,) = re.findall(r"\[(.*)\]", requirement)
  assert names.split(",") == sorted(optional.PACKAGES)


def test_a_message_names_what_is_missing_and_only_that(without):
  assert optional.missing("onnx", "Format onnx") == ""
  without("onnxruntime")
  expected = (
    "Format onnx needs onnxruntime, which is not installed. "
    'Install with: pip install "profit_jax[onnx]"'
  )
  assert optional.missing("onnx", "Format onnx") == expected
  assert optional.missing("onnx", "Format onnx", "onnx") == ""
  assert refusal(optional.require, "onnx", "Format onnx") == expected


def test_data_sources(without, tmp_path):
  without("sklearn")
  for name in ("digits", "digit_pairs"):
    text = refusal(data.load, settings_of(**{"data.name": name}))
    assert all(part in text for part in (name, "sklearn", "profit_jax[digits]"))
  without("tensorflow_datasets")
  text = refusal(data.load, settings_of(**{"data.name": "cifar10"}))
  assert all(part in text for part in ("cifar10", "tensorflow_datasets", "profit_jax[tfds]"))
  assert "tensorflow_datasets" in refusal(prepare, "cifar10", str(tmp_path), "")
  # Folders need TensorFlow only: what is refused here is the directory.
  folder = settings_of(**{"data.name": "folder", "data.data_dir": str(tmp_path / "absent")})
  assert "data.data_dir" in refusal(data.load, folder)
  without("tensorflow")
  assert "needs tensorflow, which is not installed" in refusal(data.load, folder)


@pytest.mark.parametrize(
  ("name", "package"),
  [("onnx", "onnxruntime"), ("qonnx", "qonnx"), ("litert", "ai_edge_litert")],
)
def test_formats(without, name, package):
  without(package)
  text = refusal(formats.load, name)
  assert f"Format {name} needs" in text
  assert package in text
  assert f'pip install "profit_jax[{name}]"' in text
  # In the library's base.
  assert formats.load("jax")
  assert formats.load("safetensors")


def test_weights_by_name(without):
  without("huggingface_hub")
  text = refusal(hub.locate, "hf:timm/mobilenetv2_100.ra_in1k")
  assert "hf:timm/mobilenetv2_100.ra_in1k needs huggingface_hub, which" in text
  assert "profit_jax[hub]" in text
  assert hub.locate("file.safetensors") == "file.safetensors"


def test_tensorboard_and_plots(without, tmp_path):
  without("clu", "matplotlib")
  text = refusal(TensorBoardObserver, str(tmp_path), pytest.fail)
  assert "needs clu, which" in text
  assert "profit_jax[tensorboard]" in text
  text = refusal(importlib.import_module, "profit_jax.report.plots")
  assert "needs matplotlib" in text
  assert "profit_jax[plots]" in text


def test_commands_that_draw(without, tmp_path, capsys):
  without("matplotlib")
  assert "profit_jax[plots]" in refusal(compare.plot, [], str(tmp_path / "runs.png"), Console())
  # Before anything is trained.
  grid = str(ROOT / "configs" / "ablation_digits.py")
  assert ablate.main(["--config", grid, "--workdir", str(tmp_path / "grid")]) == 2
  assert "profit_jax[plots]" in capsys.readouterr().err
  assert not (tmp_path / "grid").exists()
