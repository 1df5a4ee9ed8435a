"""Installs old and new versions of the runtimes and tries which of them open exported files.

    python tools/oldest_runtimes.py DIR                   # writes profit_jax/export/runtimes.json
    python tools/oldest_runtimes.py DIR --formats=onnx    # only these formats; the others stay

Each version gets its own virtual environment in DIR, which must lie outside the repository; an
environment that is there is used again. Needs the packages of `requirements*.txt` and this
machine's package index; takes about ten minutes at first, and one without installing.

The files are small nets with every operation of the MobileNets, but without pooling, concatenation,
maximum and minimum. Their kernels have 2, 4 and 8 bits (3 bits are written as 4, and 5 to 7 as 8);
of one net, one kernel has float32 and the others 8 bits.
What a file needs depends on its kernels. Integer files hold all of these as int8; their ranges are
measured on the eight images. Each file is opened in its own process and classifies the eight
images. A version opens a file if its logits are those of the newest version, to 1e-5 of the
largest: one that computes others is as useless as one that fails.

`runtimes.json` holds `formats`: of each its `package`, when and where it was tried (`date`,
`system`, `machine`, `python`), the `versions` that were tried, and by kind of kernel (`int2`,
`int4`, `int8`, `float32`) `lowest`, from which on all versions that were tried open the file (null
if none does), and `fails`, why each of the others does not. Cards and `profit predict` read it
through `export/runtimes.py`. `predecessor` holds the same of the package that a runtime had before
it got its name, for integer files: devices still have it.

A new format is tried as soon as `export/formats.py` lists it with `opened_by` one of `VERSIONS`.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import venv

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, os.fspath(ROOT))

from profit_jax.config import ConfigError
from profit_jax.export import formats, runtimes
from profit_jax.export.integer import lower, ranges
from profit_jax.export.net import FLOAT_BITS, Net
from tests.export.nets import changed, every_operation, images

# By package, the oldest first and the pinned one last. onnxruntime 1.15.0 is the oldest for Python
# 3.11; of most later ones the last patch, and the first where files begin to open.
VERSIONS = {
  "onnxruntime": (
    *("1.15.0", "1.16.3", "1.17.3", "1.18.0", "1.19.2", "1.20.1", "1.21.0", "1.21.1", "1.22.0"),
    *("1.22.1", "1.23.0", "1.23.2", "1.24.1", "1.26.0", "1.28.0", "1.30.0", "1.32.0"),
  ),
  "ai-edge-litert": (
    *("1.0.1", "1.1.2", "1.2.0", "1.3.0", "1.4.0", "2.0.2", "2.0.3", "2.1.0", "2.1.6", "2.2.0"),
    "2.3.0",
  ),
  "jax": (
    *("0.4.38", "0.5.3", "0.6.2", "0.7.2", "0.8.0", "0.8.1", "0.8.2", "0.8.3", "0.9.2", "0.10.0"),
    "0.10.2",
  ),
}
# The name that a runtime had before, and its versions that this Python can install. Devices still
# have it, which is what integer files are for.
PREDECESSORS = {"ai-edge-litert": ("tflite-runtime", ("2.14.0",))}
# What a version needs beside itself and the newest numpy.
OTHERS = {"jax": ("jaxlib=={version}", "flatbuffers", "absl-py")}
# Below these, a runtime was built for numpy 1.
NUMPY_2 = {"onnxruntime": (1, 19), "ai-edge-litert": (1, 1), "tflite-runtime": (3,)}
LITERT = """
interpreter = Interpreter(file)
(image,) = interpreter.get_input_details()
interpreter.resize_tensor_input(image["index"], images.shape)
interpreter.allocate_tensors()
if image["dtype"] == np.int8:
  images = (images ^ np.uint8(128)).view(np.int8)
interpreter.set_tensor(image["index"], images)
interpreter.invoke()
(logits,) = interpreter.get_output_details()
(scale, zero), logits = logits["quantization"], interpreter.get_tensor(logits["index"])
if scale:
  logits = np.float32(scale) * (np.float32(logits) - zero)
"""
# Each prints nothing, reads FILE and IMAGES.npy, and writes LOGITS.npy.
PROGRAMS = {
  "onnxruntime": """
import onnxruntime
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {"image": images})[0]
""",
  "ai-edge-litert": f"from ai_edge_litert.interpreter import Interpreter{LITERT}",
  "tflite-runtime": f"from tflite_runtime.interpreter import Interpreter{LITERT}",
  "jax": """
import jax, jax.export
with open(file, "rb") as opened:
  logits = jax.export.deserialize(bytearray(opened.read())).call(images)
""",
}
READ = "import sys, numpy as np\nfile, images = sys.argv[1], np.load(sys.argv[2])\n"
WRITE = "np.save(sys.argv[3], np.asarray(logits))\n"
TOLERANCE = 1e-5


def nets():
  """Nets by the kind of their kernels."""
  found = {runtimes.kernels_of(bits): every_operation(bits, bits) for bits in (2, 4, 8)}
  net = found["int8"]
  stem = net.layers[0]
  found["float32"] = changed(net, stem.name, kernel=np.float32(stem.kernel), bits=FLOAT_BITS)
  return found


def environment(folder: pathlib.Path, package: str, version: str) -> pathlib.Path | str:
  """The Python of an environment with a version, or why it cannot be installed."""
  place = folder / f"{package}-{version}"
  python, complete = place / "bin" / "python", place / "complete"
  if complete.exists():
    return python
  venv.create(place, with_pip=True, clear=True)
  old = runtimes.number(version) < NUMPY_2.get(package, ())
  others = [text.format(version=version) for text in OTHERS.get(package, ())]
  command = [os.fspath(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
  done = subprocess.run(
    [*command, f"{package}=={version}", "numpy<2" if old else "numpy", *others],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    return f"cannot be installed: {_last_line(done.stderr)}"
  complete.touch()
  return python


def logits_of(python: pathlib.Path, package: str, file: pathlib.Path, given: pathlib.Path):
  """The logits of a file in an environment, or why there are none."""
  result = file.parent / "logits.npy"
  result.unlink(missing_ok=True)
  variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  done = subprocess.run(
    [python, "-c", READ + PROGRAMS[package] + WRITE, file, given, result],
    capture_output=True,
    text=True,
    env=variables | {"JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off"},
    check=False,
  )
  if done.returncode or not result.exists():
    return _last_line(done.stderr) or f"ends with exit code {done.returncode}"
  return np.load(result)


def _last_line(text: str) -> str:
  """The error in a traceback, without onnxruntime's own name for it and where it was raised."""
  line = (text.strip().splitlines() or [""])[-1]
  line = re.sub(r"^.*\[ONNXRuntimeError\] : \d+ : ", "", line)
  line = re.sub(r"Load model from .*\) ", "", line)
  return line[:200]


def tried(folder: pathlib.Path, name: str, package: str) -> dict:
  """The facts of a format."""
  versions = VERSIONS[package]
  runtimes_of = {package: versions}
  before, older = PREDECESSORS.get(package, ("", ()))
  if formats.FORMATS[name].integer and before:
    runtimes_of = {before: older, package: versions}
  pythons = {
    (each, version): environment(folder, each, version)
    for each, of_it in runtimes_of.items()
    for version in of_it
  }
  kernels: dict[str, dict[str, dict]] = {each: {} for each in runtimes_of}
  with tempfile.TemporaryDirectory() as made:
    given = pathlib.Path(made) / "images.npy"
    np.save(given, images(8))
    for kind, net in nets().items():
      file = pathlib.Path(made) / f"{kind}{formats.FORMATS[name].suffix}"
      try:
        _write_net(name, net, file)
      except ConfigError as error:  # a format that cannot hold this net
        print(f"{name} {kind}: {error}")
        continue
      logits = {
        (each, version): python if isinstance(python, str) else logits_of(python, each, file, given)
        for (each, version), python in pythons.items()
      }
      pinned = logits[package, versions[-1]]
      for each, of_it in runtimes_of.items():
        kernels[each][kind] = _facts({version: logits[each, version] for version in of_it}, pinned)
        print(name, each, kind, json.dumps(kernels[each][kind], indent=1), flush=True)
  found = {
    "package": package,
    "date": datetime.date.today().isoformat(),
    "system": f"{platform.system()}, glibc {platform.libc_ver()[1]}",
    "machine": platform.machine(),
    "python": platform.python_version(),
    "versions": list(versions),
    "kernels": kernels[package],
  }
  if before in kernels:
    found["predecessor"] = {"package": before, "versions": list(older), "kernels": kernels[before]}
  return found


def _write_net(name: str, net: Net, file: pathlib.Path) -> None:
  """Writes a net in a format."""
  module = formats.load(name)
  if formats.FORMATS[name].integer:
    found = ranges.measure(net, [images(8)])
    module.write(lower.lower(net, found, module.RUNTIME), file)
  else:
    module.write(net, file)


def _facts(logits: dict, pinned: np.ndarray | str) -> dict:
  """`lowest` and `fails`, from the logits or messages by version, and the pinned version's."""
  if isinstance(pinned, str):
    return {"lowest": None, "fails": {v: m for v, m in logits.items() if isinstance(m, str)}}
  fails, lowest, largest = {}, None, np.abs(pinned).max()
  for version, found in reversed(logits.items()):
    if isinstance(found, str):
      fails[version] = found
    elif np.abs(found - pinned).max() > TOLERANCE * largest:
      apart = np.abs(found - pinned).max() / largest
      fails[version] = f"computes other logits, by up to {apart:.1e} of the largest"
    elif not fails:
      lowest = version
  return {"lowest": lowest, "fails": dict(reversed(fails.items()))}


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", type=pathlib.Path, metavar="DIR")
  parser.add_argument("--formats", help="separated by commas; all by default")
  options = parser.parse_args()
  folder = options.folder.resolve()
  if folder.is_relative_to(ROOT):
    parser.error(f"{folder} lies in the repository: give another directory")
  wanted = options.formats.split(",") if options.formats else list(formats.FORMATS)
  found = runtimes.facts()["formats"] if runtimes.PATH.exists() else {}
  for name in formats.named(wanted):
    package = formats.FORMATS[name].opened_by
    if package in VERSIONS:
      found[name] = tried(folder, name, package)
      _write(found)


def _write(found: dict[str, dict]) -> None:
  """Writes the facts; at once, because the next format may take minutes."""
  content = {"formats": {name: found[name] for name in formats.FORMATS if name in found}}
  runtimes.PATH.write_text(json.dumps(content, indent=1) + "\n")
  print(f"Written: {runtimes.PATH}", flush=True)


if __name__ == "__main__":
  main()
