"""Accuracy and speed of an exported file in its own runtime."""

import dataclasses
import os
import time

import numpy as np

from profit_jax.config import ConfigError
from profit_jax.data.base import Source
from profit_jax.data.batches import BatchSource, EvalBatches
from profit_jax.export import exported, formats, runtimes

_TOP = 5


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What a file achieves on some images; printed, it is one line.

  Attributes:
    file: its path.
    format: as `--formats` names it.
    runtime: what executed it, with its version.
    top1: in percent.
    top5: in percent.
    examples: evaluated.
    images_per_second: of the runtime alone, without loading images and without the first batch,
      in which a runtime compiles and allocates.
    batch_size: of the batches that it was given.
    threads: of the runtime; None where it chose itself.
  """

  file: str
  format: str
  runtime: str
  top1: float
  top5: float
  examples: int
  images_per_second: float
  batch_size: int
  threads: int | None

  def __str__(self) -> str:
    threads = ""
    if self.threads is not None:
      threads = f", {self.threads} {'thread' if self.threads == 1 else 'threads'}"
    return (
      f"{os.path.basename(self.file)}: top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} % of "
      f"{self.examples} images; {self.images_per_second:,.1f} images/s in batches of "
      f"{self.batch_size} ({self.runtime}{threads})"
    )


def evaluate_file(
  file: str | os.PathLike[str], eval_batches: EvalBatches, *, threads: int | None = None
) -> Evaluation:
  """Evaluates an exported file in its own runtime, without the model that it was made of.

  Args:
    file: that `export` or the command wrote, its card beside it.
    eval_batches: images as the model takes them and labels, as `Data.eval`.
    threads: of the runtime, which can be set for onnx and litert; None leaves it to the runtime.

  Returns:
    Top-1, top-5 and images per second.

  Raises:
    ConfigError: a file that is none or not the one of its card, a runtime that is missing or too
      old, or batches that do not fit the file.
  """
  checked = exported.read(file)
  source = BatchSource.for_evaluation(eval_batches, checked.card["num_classes"])
  pixels = checked.card["input"]
  source.require_images_of(tuple(pixels["shape"]), floats=pixels["type"] != "uint8")
  return evaluate(checked, source, source.batch_size, threads)


def evaluate(
  file: exported.ExportedFile, source: Source, batch_size: int, threads: int | None = None
) -> Evaluation:
  """Evaluates a file on a source's evaluation images.

  Args:
    file: checked against its card.
    source: its images are as the file takes them.
    batch_size: of the batches that the runtime gets.
    threads: of the runtime; None leaves it to the runtime.

  Raises:
    ConfigError: as `evaluate_file`, or no image can be read.
  """
  if threads is not None and threads < 1:
    raise ConfigError(f"threads={threads} is not allowed: it must be 1 or more.")
  runner = exported.opened(file, threads)
  top1 = top5 = examples = rows = 0
  seconds = 0.0
  for index, batch in enumerate(source.eval_batches(batch_size)):
    if not index:
      runner.run(batch["image"])  # compiles and allocates
    start = time.perf_counter()
    logits, _ = runner.run(batch["image"])
    seconds += time.perf_counter() - start
    rows += len(logits)
    # The first of equal logits, as the evaluation while training.
    best = np.argsort(-logits, axis=1, kind="stable")[:, :_TOP]
    hits = (best == batch["label"][:, None]) & batch["mask"][:, None]
    top1, top5 = top1 + int(hits[:, 0].sum()), top5 + int(hits.sum())
    examples += int(batch["mask"].sum())
  if not examples:
    raise ConfigError(f"{file.path!r} cannot be evaluated: none of the images can be read.")
  return Evaluation(
    file=file.path,
    format=file.format,
    runtime=_runtime(file.format),
    top1=100.0 * top1 / examples,
    top5=100.0 * top5 / examples,
    examples=examples,
    images_per_second=rows / seconds,
    batch_size=batch_size,
    threads=threads,
  )


def _runtime(name: str) -> str:
  """What executes a format here, with its version."""
  # Data without a program is executed by JAX.
  package = formats.FORMATS[name].opened_by or "jax"
  return f"{package} {runtimes.installed(package) or ''}".strip()
