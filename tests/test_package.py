"""The wheel: what it holds, and that it works in an empty directory, without the packages that only
extras install.
"""

import json
import pathlib
import re
import shutil
import tomllib
import zipfile
from email.parser import Parser

import profit_jax
from profit_jax import optional
from tests.train.shared import tiny_config
from tests.wheel import installed, python, wheel

__all__ = ["installed", "python", "wheel"]

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = sorted({name for names in optional.PACKAGES.values() for name in names})


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
  files = zipfile.ZipFile(wheel).namelist()
  assert "profit_jax/py.typed" in files
  assert "profit_jax/export/runtimes.json" in files
  top = {name.split("/")[0] for name in files}
  info = f"profit_jax-{profit_jax.__version__}.dist-info"
  assert top == {"profit_jax", info}
  sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("profit_jax/**/*.py")}
  assert {name for name in files if name.endswith(".py")} == sources
  assert f"{info}/licenses/LICENSE" in files


def test_its_metadata(wheel):
  archive = zipfile.ZipFile(wheel)
  info = f"profit_jax-{profit_jax.__version__}.dist-info"
  metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
  assert metadata["Version"] == profit_jax.__version__
  assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
  base = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
  # Bounds from below only, and nothing that an extra is for.
  assert [text for text in base if not re.fullmatch(r"[\w.\[\]-]+>=[\d.]+", text)] == []
  extras = [text for text in metadata.get_all("Requires-Dist") if "extra ==" in text]
  names = {re.match(r"[\w.-]+", text).group() for text in base}
  assert {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors"} <= names
  of_extras = {re.match(r"[\w.-]+", text).group() for text in extras} - {"jax"}
  assert names & of_extras == set()
  assert archive.read(f"{info}/entry_points.txt").decode().split() == [
    "[console_scripts]",
    "profit=profit_jax.cli.main:profit",
  ]


def test_every_release_file_names_this_version():
  version = profit_jax.__version__.split(".dev")[0]
  assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
  assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_pins_are_not_below_the_lower_bounds():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  required = sum(project["optional-dependencies"].values(), project["dependencies"])
  bounds = dict(re.findall(r"^([\w.-]+)(?:\[\w+\])?>=([\d.]+)", "\n".join(required), flags=re.M))
  pins = {}
  for file in ROOT.glob("requirements*.txt"):
    pins |= dict(re.findall(r"^([\w.-]+)==([\w.]+)", file.read_text(), flags=re.M))

  def number(version):
    return tuple(int(part) for part in version.split("."))

  # Of absl-py, which others require too, any version was tested.
  assert bounds.keys() - pins.keys() == {"absl-py"}
  assert [name for name in bounds.keys() & pins if number(pins[name]) < number(bounds[name])] == []


def test_it_starts_without_the_packages_of_extras(python, installed, tmp_path):
  code = (
    "import json, sys, profit_jax, profit_jax.cli.app, profit_jax.cli.predict\n"
    "import profit_jax.cli.compare, profit_jax.cli.ablate, profit_jax.cli.prepare\n"
    f"found = [name for name in {HEAVY} if name in sys.modules]\n"
    "print(json.dumps([profit_jax.__file__, found]))"
  )
  done = python("-c", code)
  assert done.returncode == 0, done.stderr
  file, found = json.loads(done.stdout)
  assert pathlib.Path(file).is_relative_to(installed)
  assert found == []


def test_the_command_starts(python, installed):
  done = python("-m", "profit_jax", "--help")
  assert done.returncode == 0, done.stderr
  assert "usage: profit COMMAND" in done.stdout
  assert python("-m", "profit_jax", "--version").stdout.strip() == profit_jax.__version__
  script = installed / "bin" / "profit"
  assert python(script, "--version").stdout.strip() == profit_jax.__version__
  refused = python(script, "trian")
  assert refused.returncode == 2
  assert "'trian' is not a command" in refused.stderr


def test_a_run_without_the_packages_of_other_features(python, tmp_path):
  # The tiny net, and a configuration that registers it, as a user's own files.
  shutil.copy(ROOT / "tests" / "train" / "tiny.py", tmp_path / "tiny.py")
  values = tiny_config(**{"compilation_cache": ""}).to_dict()
  (tmp_path / "own.py").write_text(
    "import ml_collections\n"
    "from profit_jax.models import register\n"
    "from tiny import TinyNet\n"
    "register('tiny')(TinyNet)\n"
    f"def get_config():\n  return ml_collections.ConfigDict({values!r})\n"
  )
  hidden = [name for name in HEAVY if name != "sklearn"]
  code = (
    "import sys\n"
    f"sys.modules.update(dict.fromkeys({hidden}))\n"
    "from profit_jax.cli.main import profit\n"
    "sys.argv = ['profit', 'train', '--config=own.py', '--workdir=run']\n"
    "sys.exit(profit())"
  )
  done = python("-c", code)
  assert done.returncode == 0, done.stderr
  assert 'pip install "profit_jax[plots]"' in done.stdout
  assert 'pip install "profit_jax[tensorboard]"' in done.stdout
  assert "tensorboard --logdir" not in done.stdout
  assert json.loads((tmp_path / "run" / "result.json").read_text())["final"]["examples"] == 450
  assert "needs matplotlib" in (tmp_path / "run" / "report.md").read_text()
  assert not (tmp_path / "run" / "plots").exists()
  assert not list((tmp_path / "run").glob("events.*"))
