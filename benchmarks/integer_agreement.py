"""How far integer files of trained runs differ from the networks that they are made of.

python benchmarks/integer_agreement.py RUN [RUN ...] [--formats=onnx_int8,litert_int8]
                                       [--noise=0.0005,0.005,0.05] [--json FILE]

For each run and format: top-1 of the trained network and of the file, the share of predictions that
agree on the whole evaluation set, and the share of codes that differ, teacher-forced and
free-running. Limits are not applied. RUN is a finished run's directory; nothing is written there.

--noise says what a difference of a given size does to the run's network, whatever its cause: before
the quantizers that read shortcuts' sums round, uniform noise of that part of their step is added.
The share of codes that this changes is half of it. Agreement is with the same network without
noise.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from etils import epath

from profit_jax import schedule
from profit_jax.cli import app
from profit_jax.export import formats, reference
from profit_jax.export.integer import difference
from profit_jax.export.net import Quantizer, Sum
from profit_jax.export.write import Exporter
from profit_jax.train import run_directory


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", nargs="+", type=epath.Path)
  parser.add_argument("--formats", default="onnx_int8,litert_int8")
  parser.add_argument("--noise", default="")
  parser.add_argument("--json", type=pathlib.Path)
  options = parser.parse_args()
  print(f"{'net':27} {'file':12} images  trained    file   agree    forced    free")
  rows = []
  for run in options.runs:
    for row in measured(run, options.formats.split(","), options.noise):
      rows.append(row)
      print(shown(row), flush=True)
  if options.json:
    options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measured(run: epath.Path, names: list[str], noise: str) -> list[dict[str, Any]]:
  """The rows of a run."""
  settings = run_directory.read_settings(run)
  phases = schedule.plan(settings)
  with app.kept_programs(settings), app.trained_model(settings, phases, run) as trained:
    exporter = Exporter(trained)
    exporter.require_equal()
    net = exporter.net
    about = {"run": run.name, "net": f"{net.model} {net.bits_name}"}
    rows = []
    for name in names:
      found = written(exporter, name)
      rows.append(
        {
          **about,
          "what": name,
          "examples": found.examples,
          "trained_top1": 100.0 * found.trained_correct / found.examples,
          "top1": 100.0 * found.correct / found.examples,
          "agreement": found.agreement,
          "forced_percent": 100.0 * found.differing / found.codes,
          "forced_largest": found.largest,
          "free_percent": 100.0 * found.free_differing / found.codes,
        }
      )
    sizes = [float(size) for size in noise.split(",") if size]
    return rows + [{**about, **row} for row in noisy(net, trained, sizes)]


def written(exporter: Exporter, name: str) -> difference.Difference:
  """What a file differs in, which is removed again."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / f"net{formats.FORMATS[name].suffix}"
    found = exporter.check(name, formats.load(name), path)
  assert isinstance(found, difference.Difference)
  return found


def noisy(net, trained, sizes: list[float]) -> list[dict[str, Any]]:
  """Rows of the net with noise before the quantizers of sums."""
  sums = {node.name for node in net.nodes if isinstance(node, Sum)}
  fed = {node.name for node in net.nodes if isinstance(node, Quantizer) and node.input in sums}

  @jax.jit
  def run(key, size, image):
    def quantize(node, x):
      if node.name not in fed:
        return reference.codes(node, x)
      own = jax.random.fold_in(key, sorted(fed).index(node.name))
      noise = jax.random.uniform(own, x.shape, minval=-1.0, maxval=1.0) * size / node.inverse
      return reference.codes(node, x + noise)

    return reference.run(net, image, quantize=quantize)

  counts = np.zeros((len(sizes), 3))
  for index, batch in enumerate(
    trained.source.eval_batches(trained.settings.train.eval_batch_size)
  ):
    key, mask = jax.random.key(index), batch["mask"]
    own = np.argmax(run(key, 0.0, batch["image"]), axis=1)
    for row, size in zip(counts, sizes, strict=True):
      theirs = np.argmax(run(key, size, batch["image"]), axis=1)
      hits = [theirs == own, theirs == batch["label"], mask]
      row += [np.count_nonzero(hit & mask) for hit in hits]
  return [
    {
      "what": f"noise {size:g}",
      "examples": int(examples),
      "trained_top1": trained.top1,
      "top1": 100.0 * correct / examples,
      "agreement": 100.0 * agreeing / examples,
    }
    for size, (agreeing, correct, examples) in zip(sizes, counts, strict=True)
  ]


def shown(row: dict[str, Any]) -> str:
  """A line of the table."""
  codes = ""
  if "forced_percent" in row:
    codes = f"{row['forced_percent']:>6.2f} % {row['free_percent']:>5.1f} %"
  return (
    f"{row['net']:27} {row['what']:12} {row['examples']:>5} {row['trained_top1']:>8.2f} "
    f"{row['top1']:>7.2f} {row['agreement']:>7.2f}  {codes}"
  )


if __name__ == "__main__":
  main()
