r"""What a program needs on a TPU or an NVIDIA GPU, from that platform's own compiler, on a machine
that has neither: bytes, memory, kernels, copies, collectives. No times.

    pip install -r requirements.txt -r requirements-accelerators.txt
    python benchmarks/aot.py --target=v5e:2x2 [--model=mobilenet_v2] [--stage=wa] [--per_chip=128] \
      [--dtype=bfloat16] [--plain_dtype=bfloat16] [--kernels=xla] [--image_size=224] [--width=1] \
      [--only=ours|plain] [--json=FILE] [--text=FILE] [--markdown]

TARGET is a TPU topology that libtpu knows (v5e:2x2, v4:2x2x1, v6e:2x4, ...), or an NVIDIA GPU that
has a file in `benchmarks/targets/` (h100; h100:4 is four in one machine).

Ours is the program that a run of `configs/mbv2_w4.py` would compile, without a teacher, with the
average of the weights and the check that all is finite. Beside it stands a plain Flax net of the
same architecture in full precision, for models that have one (`benchmarks/plain_nets.py`), and ours
over plain.

All figures are of one device. GB accessed is, on a TPU, what XLA's analysis says, and the operands
and results of Pallas kernels; on a GPU the operands and results of all kernels. A TPU's kernels
include its prefetches into vector memory. Temporary memory and arguments have to fit into the
device's memory together. On a TPU of two cores per chip (v4), a device is a core.

MobileNet-v2 at 224 pixels takes 3 to 6 minutes and 6 GB for each of the two programs for a TPU, on
two free cores; 1 minute for a GPU.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import aot_targets
from profit_jax.config import ConfigError

_ROWS = (
  ("GB accessed", "gb", 1),
  ("arguments, GB", "arguments_gb", 3),
  ("temporary memory, GB", "temp_gb", 2),
  ("code, MB", "code_mb", 1),
  ("compile time, s", "compile_s", 1),
  ("kernels", "kernels", 0),
  ("kernels under 1 MB", "small_kernels", 0),
  ("fusions", "fusions", 0),
  ("copies", "copies", 0),
  ("all-reduces", "all_reduces", 0),
  ("all-gathers", "all_gathers", 0),
  ("other collectives", None, 0),
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
  """The command line; what depends on the platform is checked later."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", required=True, help="v5e:2x2, ..., or h100, h100:4, ...")
  parser.add_argument("--model", default="mobilenet_v2")
  parser.add_argument("--stage", default="wa", help="of benchmarks/train_step.py")
  parser.add_argument("--per_chip", type=int, default=128, help="images for each device")
  parser.add_argument("--image_size", type=int, default=224, help="pixels")
  parser.add_argument("--width", type=float, default=1.0)
  parser.add_argument("--dtype", help="train.dtype; without it the target's default")
  parser.add_argument(
    "--plain_dtype",
    choices=("float32", "bfloat16"),
    help="of the plain net; without it bfloat16 where ours is, else float32",
  )
  parser.add_argument("--kernels", help="train.kernels: tuned or xla")
  parser.add_argument("--only", choices=("ours", "plain"), help="compile one of the two")
  parser.add_argument("--json", metavar="FILE", help="where all figures go as well")
  parser.add_argument(
    "--markdown", action="store_true", help="print rows of the table in benchmarks/RESULTS.md"
  )
  parser.add_argument("--text", metavar="FILE", help="where our compiled program's text goes")
  return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """Compiles both programs; the figures of ours, and with `plain_` before their names the plain
  net's.

  Raises:
    ConfigError: wrong input.
  """
  target = aot_targets.find(options.target)
  # JAX reads its environment when it is imported.
  from benchmarks import aot_programs, plain_nets

  settings = aot_programs.settings_of(options, target)
  if options.only == "plain":
    aot_programs.one_of("--model", options.model, sorted(plain_nets.NETS))
  mesh = aot_programs.mesh_of(target)
  dtype = settings.train.dtype
  document: dict[str, Any] = {
    "target": target.name,
    "devices": len(target.devices),
    "device_kind": target.devices[0].device_kind,
    "versions": versions(target.platform),
    "options": vars(options),
    "dtype": dtype,
  }
  if options.only != "ours" and options.model in plain_nets.NETS:
    plain_dtype = options.plain_dtype or ("bfloat16" if dtype == "bfloat16" else "float32")
    plain, _ = aot_programs.measured(
      lambda: aot_programs.compile_plain(settings, options.stage, mesh, plain_dtype),
      target.platform,
    )
    document["plain_dtype"] = plain_dtype
    document |= {f"plain_{name}": value for name, value in plain.items()}
  if options.only != "plain":
    spec = aot_programs.spec_of(settings)
    ours, text = aot_programs.measured(
      lambda: aot_programs.compile_ours(settings, spec, options.stage, mesh), target.platform
    )
    document |= ours
    if options.text:
      pathlib.Path(options.text).write_text(text)
  return document


def versions(platform: str) -> dict[str, str]:
  """Of JAX and of the packages that compile for a platform, as far as they are installed."""
  prefixes = {"tpu": ("libtpu",), "cuda": ("jax-cuda", "nvidia-")}[platform]
  installed = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
  return {
    name: version
    for name, version in sorted(installed.items())
    if name == "jax" or name.startswith(prefixes)
  }


def print_table(document: dict[str, Any]) -> None:
  """One line for each figure: ours, the plain net's, and the ratio."""
  options = document["options"]
  print(
    f"{options['model']}, width {options['width']:g}, {options['image_size']} pixels, stage "
    f"{options['stage']}, {options['per_chip']} images on each of {document['devices']} x "
    f"{document['device_kind']}"
  )
  print(", ".join(f"{name} {version}" for name, version in document["versions"].items()))
  if "plain_gb" not in document and not options["only"]:
    print(f"{options['model']} has no plain net in benchmarks/plain_nets.py.")
  print(f"\n{'':30} {'profit_jax':>12} {'plain Flax':>12} {'ratio':>8}")
  print(f"{'dtype':30} {_dtype(document, ''):>12} {_dtype(document, 'plain_'):>12}")
  for label, name, digits in _ROWS:
    ours, plain = _value(document, "", name), _value(document, "plain_", name)
    _print_row(label, ours, plain, digits)
  for title, name in (
    ("Kernels by kind:", "kernel_kinds"),
    ("Instructions anywhere in the program:", "kinds"),
  ):
    print(f"\n{title}")
    ours, plain = document.get(name, {}), document.get(f"plain_{name}", {})
    for kind in sorted(ours | plain, key=lambda kind: (-ours.get(kind, 0), kind)):
      _print_row(kind[:30], ours.get(kind, 0), plain.get(kind, 0), 0)


def print_rows(document: dict[str, Any]) -> None:
  """Rows of the table in `benchmarks/RESULTS.md`: ours and the plain net's."""
  options = document["options"]
  for prefix, code in (("", f"profit_jax, {options['stage']}"), ("plain_", "plain Flax")):
    if f"{prefix}gb" not in document:
      continue
    cells = [document["target"], code, document[f"{prefix}dtype"], str(options["per_chip"])]
    for _, name, digits in _ROWS:
      if name not in (None, "all_gathers"):
        value = document[prefix + name]
        # XLA gives no code size for GPUs.
        cells.append("-" if name == "code_mb" and not value else f"{value:,.{digits}f}")
    print(f"| {' | '.join(cells)} |")


def _dtype(document: dict[str, Any], prefix: str) -> str:
  return document[f"{prefix}dtype"] if f"{prefix}gb" in document else ""


def _value(document: dict[str, Any], prefix: str, name: str | None) -> float | None:
  if name is not None:
    return document.get(prefix + name)
  rest = ("reduce_scatters", "collective_permutes", "all_to_alls")
  return sum(document[prefix + part] for part in rest) if f"{prefix}gb" in document else None


def _print_row(label: str, ours: float | None, plain: float | None, digits: int) -> None:
  cells = ["" if value is None else f"{value:,.{digits}f}" for value in (ours, plain)]
  ratio = f"{ours / plain:.2f}" if ours is not None and plain else ""
  print(f"{label:30} {cells[0]:>12} {cells[1]:>12} {ratio:>8}".rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
  """Compiles, prints; returns the exit code."""
  options = parse_arguments(arguments)
  try:
    document = measure(options)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if options.markdown:
    print_rows(document)
  else:
    print_table(document)
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  os.environ.update(aot_targets.ENVIRONMENT)
  sys.exit(main())
