"""Writes a trained model as verified files: `export` for the library, `Exporter` for both sides."""

import dataclasses
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from etils import epath

from profit_jax import paths
from profit_jax.config import ConfigError, DataSettings, ModelSettings, Settings
from profit_jax.data.batches import BatchSource, EvalBatches
from profit_jax.export import card, formats, verify
from profit_jax.export.build import build_net
from profit_jax.export.integer import difference, lower, ranges
from profit_jax.export.integer.difference import Difference, IntegerLimits
from profit_jax.export.integer.net import IntegerNet
from profit_jax.fields import ProfitError

if TYPE_CHECKING:
  from profit_jax.train.trainer import Result


# Images on which the ranges of integer files are measured, at least.
_RANGE_IMAGES = 256


class NotEqual(ProfitError):
  """An exported file is not what was trained.

  Attributes:
    comparison: of its codes, layer by layer; None where something else differs.
  """

  label = "export failed"
  comparison: verify.Comparison | Difference | None = None


@dataclasses.dataclass(frozen=True)
class Report:
  """A file that was written and verified; printed, it is one line.

  Attributes:
    path: of the file. Beside it are its cards, `.json` and `.md`.
    format: as `formats.FORMATS` names it.
    bytes: size of the file.
    float_bytes: of its kernels and biases, had they been float32.
    codes: of activations that were compared with the trained model's, on the first images.
    differing: how many of them differ, all of them at ties.
    top1: in percent, of the file.
    examples: evaluated.
    trained_top1: in percent, of the trained model.
    at_ties: images that the file puts into another class than the trained model, all because of
      values at ties; None where top-1 is equal to two decimals.
    largest: of an integer file, by how much two codes differ at most.
    agreement: of an integer file, in percent of the examples, how many get the trained model's
      class; None for files that are equal.
  """

  path: epath.Path
  format: str
  bytes: int
  float_bytes: int
  codes: int
  differing: int
  top1: float
  examples: int
  trained_top1: float
  at_ties: int | None = None
  largest: int = 0
  agreement: float | None = None

  def __str__(self) -> str:
    ratio = self.float_bytes / self.bytes
    # Small nets have more graph than weights.
    size = f"{ratio:.1f}x smaller" if ratio >= 1 else f"{1 / ratio:.1f}x larger"
    if self.agreement is not None:
      return (
        f"{self.path.name}  {self.bytes:,} bytes ({size} than float32)  "
        f"{100.0 * self.differing / max(1, self.codes):.2f} % of {self.codes:,} codes differ, by "
        f"{self.largest} at most  top-1 {self.top1:.2f} % of {self.examples} images, trained "
        f"{self.trained_top1:.2f} %: {self.agreement:.2f} % of predictions agree"
      )
    top1 = "top-1 equal"
    if self.at_ties is not None:
      top1 = f"trained {self.trained_top1:.2f} %, {self.at_ties} of them in another class, at ties"
    return (
      f"{self.path.name}  {self.bytes:,} bytes ({size} than float32)  {self.differing} of "
      f"{self.codes:,} codes differ  top-1 {self.top1:.2f} % of {self.examples} images: {top1}"
    )


class Exporter:
  """Writes and verifies the files of one trained model, one after the other.

  Attributes:
    net: the code-domain net.
    reference: its codes beside the trained model's.
  """

  def __init__(self, trained: verify.TrainedModel, limits: IntegerLimits = IntegerLimits()):
    """Raises ConfigError where a file cannot hold the model.

    Args:
      trained: the model.
      limits: that integer files must reach.
    """
    self._trained, self._limits = trained, limits
    self.net = build_net(
      trained.spec,
      trained.variables,
      name=trained.settings.model.name,
      normalization=trained.normalization,
      weight_bits=trained.weight_bits,
      act_bits=trained.act_bits,
    )
    self._ranges: lower.Ranges | None = None
    batch_size = trained.settings.train.eval_batch_size
    self._images = verify.eval_images(self.net, trained.source, batch_size)
    codes = verify.trained_codes(self.net, trained.spec, trained.variables, trained.normalization)
    self.reference = verify.compare(self.net, self._images, codes)

  def require_equal(self) -> None:
    """Raises NotEqual where the net differs from the trained model other than by rounding."""
    if not self.reference.at_ties:
      error = NotEqual(
        "the code-domain net does not compute what the trained model does; nothing was written."
      )
      error.comparison = self.reference
      raise error

  def write(
    self, name: str, module: formats.Module, to: epath.Path
  ) -> tuple[verify.FileCheck | Difference, Report | None]:
    """Writes a file and verifies it.

    Args:
      name: of the format.
      module: of the format.
      to: where the file goes, and its cards. What an earlier export left there goes first.

    Returns:
      The check, and what was written; None if the file is not the trained model, or not near
      enough, and not kept.

    Raises:
      ConfigError: it cannot be written.
    """
    _clear(to)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / to.name
      check = self.check(name, module, path)
      if check.problem is not None:
        return check, None
      content = card.make(
        name=name,
        path=path,
        net=self.net,
        trained=self._trained,
        reference=self.reference,
        check=check,
      )
      _keep(path, to, content)
    size, compared = content["size"], content["verification"]["file"]
    return check, Report(
      path=to,
      format=name,
      bytes=size["bytes"],
      float_bytes=size["float_bytes"],
      codes=compared["codes"],
      differing=compared["differing"],
      top1=100.0 * check.correct / check.examples,
      examples=check.examples,
      trained_top1=100.0 * check.trained_correct / check.examples,
      at_ties=None if isinstance(check, Difference) else check.at_ties,
      largest=check.largest if isinstance(check, Difference) else 0,
      agreement=check.agreement if isinstance(check, Difference) else None,
    )

  def check(
    self, name: str, module: formats.Module, path: pathlib.Path
  ) -> verify.FileCheck | Difference:
    """Writes a file, reads it back and compares it.

    Args:
      name: of the format.
      module: of the format.
      path: of the file.

    Raises:
      ConfigError: it cannot be written.
    """
    if not formats.FORMATS[name].integer:
      module.write(self.net, path)
      return verify.check_file(self.net, self._images, module.open_file(path), self._trained)
    runtime = cast(formats.IntegerModule, module).RUNTIME
    module.write(self._integer_net(runtime), path)
    return difference.measure(
      self.net, self._images, module.open_file(path), self._trained, self._limits
    )

  def _integer_net(self, runtime: lower.Runtime) -> IntegerNet:
    if self._ranges is None:
      self._ranges = ranges.measure(self.net, self._range_images())
    return lower.lower(self.net, self._ranges, runtime)

  def _range_images(self) -> list[np.ndarray]:
    """Training images in whole batches, so that all are one program. Where they are too few, the
    first evaluation images follow: the library's `export` has but one batch, which is of these.
    """
    batches = self._trained.source.train_batches(0, self._trained.settings.train.batch_size)
    found: list[np.ndarray] = []
    for image in itertools.chain((batch["image"] for batch in batches), self._images):
      found.append(image)
      if sum(map(len, found)) >= _RANGE_IMAGES:
        break
    return found


def export(
  result: "Result",
  path: str | os.PathLike[str],
  eval_batches: EvalBatches,
  limits: IntegerLimits = IntegerLimits(),
  load: Callable[[str], formats.Module] = formats.load,
) -> Report:
  """Writes a trained model as an integer model file, and verifies it.

  The file is read back and run in its own runtime: each quantizer's codes are compared with the
  trained model's on the first images, and top-1 on all of them. Files of the suffixes `.int8.onnx`
  and `.int8.tflite` compute on 8-bit integers and may differ, within the limits.

  Args:
    result: of `Trainer.fit`.
    path: of the file; its suffix is the format: `.onnx`, `.jax`, `.safetensors`, `.qonnx.onnx`,
      `.tflite`, `.int8.onnx`, `.int8.tflite` and more. Cards are written beside it.
    eval_batches: images and labels, as `Data.eval`. The ranges of files that compute in integers
      are measured on the first 256 images or more.
    limits: that a file which computes in integers must reach.
    load: returns the module of a format, given its name.

  Returns:
    What was written.

  Raises:
    ConfigError: a model that files cannot hold, an unknown suffix, a runtime that is not installed,
      or a process other than the first.
    NotEqual: the file is not what was trained, or misses a limit; it is not kept.
  """
  if jax.process_index():
    raise ConfigError(
      "profit_jax.export runs in the first process only, which writes the file. Call it where "
      "jax.process_index() is 0."
    )
  bits = _quantized_bits(result)
  name = formats.of_file(path)
  module = load(name)
  to = paths.opened("The file", os.fspath(path))
  source = BatchSource.for_evaluation(eval_batches, result.spec.outputs, result.class_names)
  source.require_images_of(result.spec.input_shape, floats=result.normalization is None)
  trained = _trained(result, source, bits)
  exporter = Exporter(trained, limits)
  exporter.require_equal()
  check, report = exporter.write(name, module, to)
  if report is None:
    error = NotEqual(f"{to.name}: {check.problem}; the file was not kept.")
    error.comparison = check if isinstance(check, Difference) else check.comparison
    raise error
  return report


def _quantized_bits(result: "Result") -> tuple[int, int]:
  bits = result.bits
  for what, width in (("weights", bits.weight), ("activations", bits.act)):
    if width is None:
      raise ConfigError(
        f"The result's {what} are in full precision, and only a model whose weights and "
        "activations are both quantized can be exported. Give the schedule bits for both."
      )
  assert bits.weight is not None
  assert bits.act is not None
  return int(bits.weight), int(bits.act)


def _trained(result: "Result", source: BatchSource, bits: tuple[int, int]) -> verify.TrainedModel:
  """A result with its top-1 on these batches."""
  trained = verify.TrainedModel(
    settings=dataclasses.replace(
      Settings(
        seed=result.seed,
        model=ModelSettings(name=type(result.spec.model).__name__),
        data=DataSettings(name="own batches"),
      ),
    ).with_batch_size(source.batch_size),
    width=None,
    train_examples=result.train_examples,
    source=source,
    spec=result.spec,
    variables=result.variables,
    normalization=result.normalization,
    weight_bits=bits[0],
    act_bits=bits[1],
    preparation=None,
    phases=[dataclasses.asdict(phase) for phase in result.phases],
    weights=result.weights,
    full_precision_top1=result.full_precision_top1,
    top1=0.0,
  )
  logits = verify.trained_logits(result.spec, result.variables, result.normalization, result.bits)
  correct, examples = verify.count_correct(
    lambda image: np.asarray(jax.device_get(logits(image))), source, source.batch_size
  )
  return dataclasses.replace(trained, top1=100.0 * correct / examples)


def _clear(path: epath.Path) -> None:
  """What an earlier export left must not stand for this one, should it fail."""
  try:
    for suffix in ("", ".json", ".md"):
      (path.parent / f"{path.name}{suffix}").unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(
      f"{path.parent} cannot be written: {error}. Give a place that can."
    ) from error


def _keep(path: pathlib.Path, to: epath.Path, content: dict[str, Any]) -> None:
  """Puts a verified file and its cards where they belong; the file last, by renaming it."""
  unfinished = to.parent / f"{to.name}.unfinished"
  try:
    (to.parent / f"{to.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (to.parent / f"{to.name}.md").write_text(card.markdown(content))
    unfinished.write_bytes(path.read_bytes())
    unfinished.replace(to)
  except OSError as error:
    raise ConfigError(
      f"{to} cannot be written: {error}. Make room, and export it again."
    ) from error
