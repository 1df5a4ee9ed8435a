"""ImageNet in miniature: the published configuration from the command line, on data in the real
formats.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.data import pictures

ROOT = pathlib.Path(__file__).parent.parent
# All 22 phases, a step each. Narrow, because the tests have two cores; everything else is as
# published.
ONE_STEP = [
  "--config.model.width=0.35",
  "--config.train.batch_size=2",
  "--config.train.eval_batch_size=2",
  "--config.plan.full_precision_epochs=1",
  "--config.plan.finetune_epochs=1",
  "--config.plan.bn_epochs=1",
  "--config.plan.sampling_epochs=1",
  "--config.plan.warmup_epochs=0",
]


def large_cuttings(count, seed):
  return pictures.cuttings(count, seed, size=(300, 240))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Runs main.py with configs/mbv2_w4.py; compiled programs stay from one call to the next."""
  cache = tmp_path_factory.mktemp("cache")

  def run(*arguments):
    line = [
      sys.executable,
      "main.py",
      "--config",
      "configs/mbv2_w4.py",
      *ONE_STEP,
      f"--config.compilation_cache={cache}",
    ]
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run(
      [*line, *arguments],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=1800,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  return run


def test_the_published_configuration_runs_on_tfds_and_on_a_folder(command, tmp_path):
  tfds = pictures.write_tfds(tmp_path / "tfds", train=3, evaluation=3, make=large_cuttings)
  folder = pictures.write_folder(tmp_path / "folder", train=3, evaluation=3, make=large_cuttings)
  run = tmp_path / "run"
  printed = command(
    f"--workdir={run}", "--config.data.name=cuttings", f"--config.data.data_dir={tfds}"
  )
  assert "22 phases, 22 epochs, to w4a4" in printed
  result = json.loads((run / "result.json").read_text())
  assert (result["model"], result["dataset"]) == ("mobilenet_v2", "cuttings")
  assert [(phase["index"], phase["steps"]) for phase in result["phases"]] == [
    (i, 1) for i in range(1, 23)
  ]
  assert len(result["aiwq"]) == 52
  assert [len(phase["frozen"]) for phase in result["phases"][18:]] == [0, 17, 34, 0]
  assert result["final"]["examples"] == 3
  assert (result["final"]["weight_bits"], result["final"]["act_bits"]) == (4, 4)

  # From an image folder: the sources differ, the programs do not, and one is enough.
  other = tmp_path / "other"
  full_precision = ["--config.plan.weight_bits=()", "--config.plan.act_bits=()"]
  printed = command(
    f"--workdir={other}",
    "--config.data.name=folder",
    f"--config.data.data_dir={folder}",
    *full_precision,
  )
  assert "1 phase, 1 epochs, to fp" in printed
  # The run knows its data; a directory that has moved is named again.
  moved = folder.rename(tmp_path / "moved")
  again = ["--config.data.name=folder", f"--config.data.data_dir={moved}", *full_precision]
  printed = command(*again, "--mode=eval", f"--workdir={other}")
  top1 = json.loads((other / "result.json").read_text())["final"]["top1"]
  assert printed.startswith(f"fp: top-1 {top1:.2f} %, top-5 100.00 % on 3 images")
