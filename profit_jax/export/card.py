"""The card beside an exported file, `FILE.json` for programs and `FILE.md` for people."""

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from profit_jax import __version__, paths
from profit_jax.config import ConfigError
from profit_jax.export import operators, runtimes, verify
from profit_jax.export.costs import costs, in_int8
from profit_jax.export.formats import FORMATS, load
from profit_jax.export.integer.difference import Difference
from profit_jax.export.net import FLOAT_BITS, Layer, Net, Quantizer
from profit_jax.fields import listed
from profit_jax.schedule import bits_name
from profit_jax.train.progress import weights_text

# What is said of what is no code, for exact files and for integer files.
_OTHERS = {
  False: {
    "float32": "batch normalization as multiplier and bias per channel, shortcuts, means, "
    "squeeze-excite's gates"
  },
  True: {
    "int8": "shortcuts, means, squeeze-excite's gates, what h-swish reads and gives; batch "
    "normalization is part of the kernels' scales and of the biases"
  },
}


def make(
  *,
  name: str,
  path: pathlib.Path,
  net: Net,
  trained: verify.TrainedModel,
  reference: verify.Comparison,
  check: verify.FileCheck | Difference,
) -> dict[str, Any]:
  """The content of a card.

  Args:
    name: of the format.
    path: of the file, which is read for its size and checksum.
    net: what the file holds.
    trained: the run's model, settings and data.
    reference: the trained model's codes beside the reference's.
    check: the verification of the file, which found no problem.
  """
  settings, info = trained.settings, trained.source.info
  content, rows, integer = path.read_bytes(), costs(net), FORMATS[name].integer
  if integer:
    rows = [in_int8(row) for row in rows]
  float_bytes, macs = (
    sum(getattr(row, field) for row in rows) for field in ("float_bytes", "macs")
  )
  before, after = (
    round(100.0 * count / check.examples, 4) for count in (check.trained_correct, check.correct)
  )
  return {
    "file": path.name,
    "format": name,
    "sha256": hashlib.sha256(content).hexdigest(),
    "model": net.model,
    "width": trained.width,
    "weight_bits": net.weight_bits,
    "act_bits": net.act_bits,
    "input": {
      "name": "image",
      "type": np.dtype(net.image_dtype).name,
      "layout": "NHWC, RGB" if net.image_shape[-1:] == (3,) else "NHWC",
      "shape": net.image_shape,
      "image_size": net.image_shape[0],
      **_preparation(trained),
    },
    **_interface(name, path, net),
    "num_classes": net.num_classes,
    "class_names": list(info.class_names),
    "size": {
      "bytes": len(content),
      "float_bytes": float_bytes,
      "ratio": round(float_bytes / len(content), 3),
    },
    "cost": {
      "macs": macs,
      "bops": sum(row.bops for row in rows),
      "float_bops": macs * FLOAT_BITS**2,
    },
    "top1": {
      "full_precision": trained.full_precision_top1,
      "trained": before,
      "file": after,
      "equal": verify.top1_equal(check.correct, check.trained_correct, check.examples),
      "examples": check.examples,
      **_agreement(check),
    },
    "verification": _verification(reference, check),
    "policy": {
      "weights": _int8_kernels(net) if integer else _kernels(net),
      "activations": f"the inputs of layers, {_bits(net.quantizers)} bits: unsigned after "
      "ReLU, symmetric where signed, hswish from -3/8 after h-swish; the image as it is",
      **_OTHERS[integer],
    },
    "layers": [row._asdict() for row in rows],
    "training": {
      "dataset": settings.data.name,
      "train_examples": trained.train_examples,
      "eval_examples": check.examples,
      "seed": settings.seed,
      "weights": trained.weights,
      "initial_weights": trained.initial_weights,
      "phases": [
        {
          field: phase[field]
          for field in ("index", "name", "weight_bits", "act_bits", "epochs", "top1", "top1_ema")
        }
        for phase in trained.phases
      ],
    },
    "versions": {
      "profit_jax": __version__,
      "python": platform.python_version(),
      **{
        package: metadata.version(package)
        for package in dict.fromkeys((*FORMATS[name].packages, "jax", "flax", "numpy"))
      },
    },
    "runtime": FORMATS[name].runtime,
    "runtime_check": _runtime_check(name, path, net),
  }


def _agreement(check: verify.FileCheck | Difference) -> dict[str, Any]:
  if isinstance(check, verify.FileCheck):
    return {"images_at_ties": check.at_ties}
  return {"agreement": round(check.agreement, 4), "limits": dataclasses.asdict(check.limits)}


def _verification(
  reference: verify.Comparison, check: verify.FileCheck | Difference
) -> dict[str, Any]:
  trained = {"codes": reference.codes, "differing": reference.differing}
  if isinstance(check, Difference):
    return {
      "images": check.images,
      "trained": trained,
      "file": {
        "codes": check.codes,
        "differing": check.differing,
        "largest_difference": check.largest,
        "free_running_differing": check.free_differing,
      },
      "quantizers": [vars(row) for row in check.rows],
    }
  compared = check.comparison
  assert compared is not None
  return {
    "images": compared.images,
    "trained": trained,
    "file": {
      "codes": compared.codes,
      "differing": compared.differing,
      "largest_logit_difference": compared.logits,
    },
    "quantizers": [
      {**vars(row), "trained_differing": other.differing}
      for row, other in zip(compared.rows, reference.rows, strict=True)
    ],
  }


def _runtime_check(name: str, path: pathlib.Path, net: Net) -> dict[str, Any]:
  """Which versions open the file, and what the installed one does with it."""
  package = FORMATS[name].opened_by
  if package is None:
    return {}
  return {
    "package": package,
    "version": runtimes.installed(package),
    "lowest": runtimes.lowest(name, {layer.field_bits for layer in net.layers}),
    "tested": runtimes.tested(name),
    **operators.checked(package, path),
  }


def _interface(name: str, path: pathlib.Path, net: Net) -> dict[str, Any]:
  """What the file itself takes and gives, where that is not what `predict` does."""
  found = getattr(load(name), "interface", None)
  return {} if found is None else found(path, pixels=net.normalization is not None)


def _preparation(trained: verify.TrainedModel) -> dict[str, Any]:
  if trained.preparation is None:
    return {}
  share, interpolation = trained.preparation
  return {"crop_pct": share, "interpolation": interpolation}


def _int8_kernels(net: Net) -> str:
  """What is said of the kernels of an integer file."""
  return f"all kernels, {_bits(net.layers)} bits in training; int8 in the file"


def _kernels(net: Net) -> str:
  """What is said of the kernels."""
  quantized = [layer for layer in net.layers if layer.quantized]
  floats = [layer.name for layer in net.layers if not layer.quantized]
  if not quantized:
    return "all kernels in float32"
  which = "all kernels, the first and the last layer's too"
  if floats:
    which = f"float32 in {', '.join(floats)}; all others"
  return (
    f"{which}, {_bits(quantized)} bits symmetric; "
    f"{_range(layer.field_bits for layer in quantized)} bits of the file each"
  )


def _bits(nodes: Sequence[Layer | Quantizer]) -> str:
  """As `4`, or `4 to 8`."""
  return _range(node.bits for node in nodes)


def _range(numbers: Iterable[int]) -> str:
  found = sorted(set(numbers))
  return " to ".join(map(str, found[:: max(1, len(found) - 1)]))


def _top1_difference(top1: dict[str, Any]) -> str:
  if "agreement" in top1:
    return f"{top1['agreement']:.2f} % of the predictions are the trained model's"
  if top1["equal"]:
    return "equal"
  return f"{top1['images_at_ties']} images in another class, each with a value at a tie"


def markdown(card: dict[str, Any]) -> str:
  """The same for people."""
  size, cost, top1, proof, pixels = (
    card[key] for key in ("size", "cost", "top1", "verification", "input")
  )
  name = bits_name(card["weight_bits"], card["act_bits"])
  before = (
    ""
    if top1["full_precision"] is None
    else f" In full precision the run had {top1['full_precision']:.2f} %."
  )
  lines = [
    f"# {card['file']}",
    "",
    f"{card['model']}, {_width(card['width'])}{name}, {card['num_classes']} classes; format "
    f"{card['format']}.",
    "",
    "| | |",
    "|:--|:--|",
    f"| top-1 of the trained model | {top1['trained']:.2f} % ({top1['examples']} images) |",
    f"| top-1 of this file | {top1['file']:.2f} % ({_top1_difference(top1)}) |",
    f"| size | {size['bytes']:,} bytes; kernels and biases in float32 {size['float_bytes']:,}, "
    f"{size['ratio']:.1f}x |",
    f"| multiply-accumulates | {cost['macs']:,} an image |",
    f"| bit operations (BOPs) | {cost['bops']:,} an image; in float32 {cost['float_bops']:,} |",
    *_input_rows(pixels),
    *_interface_rows(card),
    *_opening_rows(card["runtime_check"]),
    f"| sha256 | `{card['sha256']}` |",
    "",
    f"Accuracy before and after are of the same images.{before}",
    "",
    "## Verification",
    "",
    f"On {proof['images']} evaluation images, every quantizer's codes compared layer by layer, "
    "each computed from the "
    f"codes of the side that is checked:",
    "",
    f"- trained model and code-domain net: {_differ(proof['trained'])};",
    "- this file, read back and run in its runtime, and code-domain net: "
    f"{_differ(proof['file'])}{_further(proof['file'])}.",
    *_difference_lines(card),
    "",
    "## What computes how",
    "",
    card["runtime"],
    "",
    *_operator_lines(card["runtime_check"]),
    *(f"- {what}: {text}." for what, text in card["policy"].items()),
    "",
    "No speed is claimed. In a checkout of profit_jax, `python benchmarks/inference.py --net "
    "FILE.safetensors` measures it on your machine.",
    "",
    "## Training",
    "",
    f"On {card['training']['dataset']} ({card['training']['train_examples']:,} images, seed "
    f"{card['training']['seed']}); "
    f"the weights are the {card['training']['weights']} ones of the best evaluation at the last "
    "bits.",
    *_initial_weights(card["training"]["initial_weights"]),
    "",
    "| # | phase | bits | epochs | top-1 raw | top-1 EMA |",
    "|--:|:--|:--|--:|--:|--:|",
  ]
  for phase in card["training"]["phases"]:
    average = "-" if phase["top1_ema"] is None else f"{phase['top1_ema']:.2f}"
    lines.append(
      f"| {phase['index']} | {phase['name']} | "
      f"{bits_name(phase['weight_bits'], phase['act_bits'])} | {phase['epochs']} "
      f"| {phase['top1']:.2f} | {average} |"
    )
  lines += [
    "",
    "## Layers",
    "",
    "| layer | kind | kernel | weight bits | input | input bits | bytes | float bytes | MACs | "
    "BOPs |",
    "|:--|:--|:--|--:|:--|--:|--:|--:|--:|--:|",
  ]
  for row in card["layers"]:
    lines.append(
      f"| {row['layer']} | {row['kind']} | {'x'.join(map(str, row['kernel']))} | "
      f"{row['weight_bits']} | {row['input']} | "
      f"{row['input_bits']} | {row['kernel_bytes']:,} | {row['float_bytes']:,} | {row['macs']:,} "
      f"| {row['bops']:,} |"
    )
  versions = ", ".join(f"{package} {version}" for package, version in card["versions"].items())
  return "\n".join([*lines, "", f"Versions: {versions}."]) + "\n"


def _initial_weights(files: dict[str, dict[str, str | None]]) -> list[str]:
  lines = []
  for who, file in files.items():
    lines += ["", f"Initial weights of the {who}: {weights_text(file)}."]
  return lines


def _width(width: float | None) -> str:
  return "" if width is None else f"width {width:g}, "


def _input_rows(pixels: dict[str, Any]) -> list[str]:
  """What is said of the images, in two rows at most."""
  sizes = ", ".join(map(str, pixels["shape"]))
  row = f"| input | `{pixels['name']}`, {pixels['type']} `[N, {sizes}]`, "
  if pixels["type"] != "uint8" or "crop_pct" not in pixels:
    return [f"{row}as the model was trained with |"]
  size, share = pixels["image_size"], pixels["crop_pct"]
  return [
    f"{row}RGB, 0 to 255; normalized by the file |",
    f"| preparing an image | shorter side to {size} / {share:g} pixels "
    f"({pixels['interpolation']}), centre cut out |",
  ]


def _interface_rows(card: dict[str, Any]) -> list[str]:
  """What is said to those who open the file without this package, where it takes other numbers."""
  rows = []
  for name, formula in (("file_input", "q"), ("file_output", "logit")):
    if name in card:
      found = card[name]
      rows.append(
        f"| the file's own {name.removeprefix('file_')} | `{found['name']}`, {found['type']} "
        f"`{found['shape']}`, {formula} = {found[formula]}; scale {found['scale']:.9g}, zero point "
        f"{found['zero_point']} |"
      )
  return rows


def _opening_rows(found: dict[str, Any]) -> list[str]:
  """What opens the file, in two rows at most."""
  rows = []
  if found.get("lowest"):
    rows.append(
      f"| opened by | {found['package']} {found['lowest']} or later (tested: "
      f"{listed(found['tested'])}) |"
    )
  if "ir_version" in found:
    opsets = listed(f"{domain} {version}" for domain, version in found["opsets"].items())
    rows.append(f"| ONNX | IR version {found['ir_version']}, opset {opsets} |")
  return rows


def _operator_lines(found: dict[str, Any]) -> list[str]:
  """Which part of the runtime takes which operators."""
  if "operators" not in found:
    return []
  runtime = f"{found['package']} {found['version']}"
  lines = [f"Operators of the file in {runtime}, on the CPU of the export:", ""]
  for who, kinds in found["operators"].items():
    counts = listed(f"{number} {kind}" for kind, number in kinds.items())
    lines.append(f"- {who} takes {sum(kinds.values())}: {counts}.")
  lines += ["", _operators_meaning(found), ""]
  return lines


def _operators_meaning(found: dict[str, Any]) -> str:
  if "partitions" in found:
    parts = found["partitions"]
    if "LiteRT" not in found["operators"]:
      return f"The delegate XNNPACK takes the whole file, in {parts} {_parts(parts)}."
    return (
      f"The delegate XNNPACK takes {parts} {_parts(parts)} of the file; the operators of LiteRT "
      "itself, which stand between them, fall back to its own kernels. A DEQUANTIZE of a kernel is "
      "computed once, before the first image."
    )
  integers = found["integer_operators"]
  if integers:
    return f"{integers} convolutions and products are of integers."
  return (
    "They are counted after onnxruntime's optimizations, which write multiplications by channel as "
    "Conv. All convolutions and products are of floats: none is ConvInteger or QLinearConv."
  )


def _parts(number: int) -> str:
  return "part" if number == 1 else "parts"


def _further(file: dict[str, Any]) -> str:
  if "largest_difference" in file:
    return f", by {file['largest_difference']} at most"
  return f"; its logits differ by at most {file['largest_logit_difference']:.1e} of the largest"


def _difference_lines(card: dict[str, Any]) -> list[str]:
  """How an integer file differs, layer by layer."""
  proof, top1 = card["verification"], card["top1"]
  if "agreement" not in top1:
    return []
  file, limits = proof["file"], top1["limits"]
  lines = [
    "",
    f"The file computes in integers and is not equal to the trained model. Free-running, "
    f"{100.0 * file['free_running_differing'] / max(1, file['codes']):.2f} % of the codes are not "
    "the trained model's: in a network of few bits, one code that differs changes many behind it. "
    f"Of {top1['examples']} predictions, {top1['agreement']:.2f} % are the trained model's; the "
    f"export asked for {limits['agreement']:g} %, and allowed a loss of {limits['top1_loss']:g} "
    "points in top-1.",
    "",
    "| quantizer | codes | differ | by at most | free-running | by at most |",
    "|:--|--:|--:|--:|--:|--:|",
  ]
  for row in proof["quantizers"]:
    lines.append(
      f"| {row['quantizer']} | {row['codes']:,} | {100.0 * row['differing'] / row['codes']:.2f} % "
      f"| {row['largest']} | {100.0 * row['free_differing'] / row['codes']:.2f} % "
      f"| {row['free_largest']} |"
    )
  return lines


def _differ(counts):
  return f"{counts['differing']:,} of {counts['codes']:,} codes differ"


def read(path: str | os.PathLike) -> dict[str, Any]:
  """The card of an exported file.

  Raises:
    ConfigError: there is none, or it is not a card.
  """
  place = f"{os.fspath(path)}.json"
  try:
    card = json.loads(paths.read_file(place))
    if "eval_share" in card["input"]:  # before version 0.2
      card["input"]["crop_pct"] = card["input"].pop("eval_share")
    for field in ("type", "shape", "image_size"):
      card["input"][field]
    card["class_names"], card["num_classes"], card["sha256"], card["versions"]
    return card
  except (ConfigError, ValueError, KeyError, TypeError) as error:
    told = str(error) if isinstance(error, ConfigError) else f"{place!r} is no card: {error!r}."
    raise ConfigError(
      f"{told} A card lies beside every exported file and says how images are prepared: put it "
      "back."
    ) from error
