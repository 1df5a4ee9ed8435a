"""Seconds and memory until a folder of ImageNet's size is open.

python benchmarks/folder_scan.py [--images=1280000] [--classes=1000] [--symlinks] [--directory=DIR]

Makes an image folder of hard (or symbolic) links to empty files in a temporary directory of DIR,
with 25 times as many training images as evaluation images, and names as long as ImageNet's. Then a
fresh process imports the package, opens the folder as a run does, and computes its fingerprint.
Prints the seconds of each and the peak of the process's resident memory. The folder was just
written, so that its directories are in the system's cache. Exits with 1 above --limit_seconds or
--limit_gb.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
_EVAL_SHARE = 25  # ImageNet: 1,281,167 to 50,000


def make_folder(root, images, classes, link):
  """Writes the folder: a file per class and split, and links to it."""
  for split, count in (("train", images), ("val", images // _EVAL_SHARE)):
    for label in range(classes):
      directory = f"{root}/{split}/n{label:08d}"
      os.makedirs(directory)
      first = f"{directory}/n{label:08d}_0.JPEG"
      open(first, "w").close()
      for i in range(1, count // classes):
        link(first, f"{directory}/n{label:08d}_{split}{i}.JPEG")


def measure(root):
  """In a fresh process: opens the folder and prints a table."""
  start = time.perf_counter()
  import resource

  from profit_jax import data
  from profit_jax.config import default_config, parse
  from profit_jax.data import folder, images  # noqa: F401 TensorFlow, which only sources import
  from profit_jax.models import REGISTRY

  config = default_config()
  config.update_from_flattened_dict({"data.name": "folder", "data.data_dir": str(root)})
  seconds = {"import": time.perf_counter() - start}
  start = time.perf_counter()
  source = data.load(parse(config, REGISTRY))
  seconds["open"] = time.perf_counter() - start
  start = time.perf_counter()
  source.fingerprint()
  seconds["fingerprint"] = time.perf_counter() - start
  info = source.info
  print(f"{info.train_examples} + {info.eval_examples} images, {info.num_classes} classes")
  for name, value in seconds.items():
    print(f"{name:12} {value:6.1f} s")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
  print(f"{'peak memory':12} {peak:6.2f} GB")
  return sum(seconds.values()), peak


def main():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=1_280_000)
  parser.add_argument("--classes", type=int, default=1000)
  parser.add_argument("--symlinks", action="store_true", help="each costs a look at its target")
  parser.add_argument("--directory")
  parser.add_argument("--limit_seconds", type=float, default=60.0)
  parser.add_argument("--limit_gb", type=float, default=2.0)
  parser.add_argument("--open", help="measure this folder, in this process")
  options = parser.parse_args()
  if options.open:
    seconds, peak = measure(options.open)
    return int(seconds > options.limit_seconds or peak > options.limit_gb)
  with tempfile.TemporaryDirectory(dir=options.directory) as root:
    link = os.symlink if options.symlinks else os.link
    make_folder(root, options.images, options.classes, link)
    limits = [f"--limit_seconds={options.limit_seconds}", f"--limit_gb={options.limit_gb}"]
    command = [sys.executable, __file__, f"--open={root}", *limits]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
  sys.exit(main())
