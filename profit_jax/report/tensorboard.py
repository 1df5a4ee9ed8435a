"""TensorBoard through clu: scalars per epoch, and the training loss per step."""

import contextlib
import os
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from profit_jax import distributed, optional
from profit_jax.schedule import Phase
from profit_jax.train.observer import EpochReport, Observer
from profit_jax.train.progress import Progress, Start
from profit_jax.typing import Params

if TYPE_CHECKING:
  from clu import metric_writers

# Summaries are written one by one: with all of the demo's quantizers an epoch's took 1.2 s and a
# step's loss 18 ms (under the profiler, beside compilation).
_STEPS_BETWEEN = 10
_EPOCHS_BETWEEN = 5


def _reason(error: Exception) -> str:
  """The beginning of one of TensorFlow's errors, without the names of its operations."""
  text = re.sub(r"\{\{.*?\}\}|\[Op:[^\]]*\].*", "", " ".join(str(error).split()))
  return text.strip()[:200].rstrip(".")


class TensorBoardObserver(Observer):
  """Writes event files into a directory.

  | tag                          | what                                            |
  |------------------------------|-------------------------------------------------|
  | train/step_loss              | loss of every tenth step                        |
  | train/{loss,ce,kd,top1}      | means over an epoch                             |
  | eval/{top1,top5,loss}        | raw weights                                     |
  | eval_ema/{top1,top5,loss}    | their average                                   |
  | learning_rate/{group}        | of each optimizer group                         |
  | eval/{top1,top5} at step 0   | of the first weights, where they came from a file |
  | phase/{index,weight_bits,act_bits} | where the run stands; 32 is full precision |
  | quant_a/{layer}, quant_c/{layer} | interval and output scale (after softplus)* |
  | clip_rate/{layer}            | share of a quantizer's input that it clips*     |
  | aiwq/{layer}                 | running AIWQ, in sampling phases                |
  | flip_rate/{layer}            | share of kernel codes a step changes, in an epoch's last steps* |
  | oscillation_rate/{layer}     | share that it changes against their last change*              |
  | bn_distance/{layer}          | KL of the last batch's statistics from the running ones*      |
  | fixed/{layer}                | share of its codes that are frozen*             |
  | flip_rate, ...               | histograms of these four over the layers        |
  | train/dampening              | the dampening loss, where that is on            |
  | instability                  | at the end, the heat map of report.md           |

  * at the first, every fifth and the last epoch of a phase.
  """

  def __init__(self, logdir: str, warn: Callable[[str], None], pictures: bool = True):
    """Args: logdir: any path that TensorFlow's file system opens; warn: told when nothing more can
    be written; pictures: whether the heat map is drawn, which needs matplotlib.

    Raises:
      ConfigError: clu, TensorFlow or TensorBoard is not installed.
    """
    optional.require("tensorboard", "Writing TensorBoard events")
    from clu import metric_writers

    self._writer: metric_writers.SummaryWriter | None = metric_writers.SummaryWriter(logdir)
    self._warn = warn
    self._pictures = pictures and not optional.missing("plots", "Drawing plots")
    self._step = 0

  def _write(self, step: int, scalars: dict[str, float], flush: bool = False) -> None:
    def write(writer):
      writer.write_scalars(step, scalars)
      if flush:
        writer.flush()

    self._attempt(write)

  def _attempt(self, write: Callable[["metric_writers.SummaryWriter"], None]) -> None:
    if self._writer is None:
      return
    try:
      write(self._writer)
    except Exception as error:  # TensorFlow's own; a full disk, mostly
      # Training is worth more than its curves, and a checkpoint that finds the same disk full says
      # so.
      self._writer = None
      self._warn(
        "TensorBoard's events can no longer be written; training continues without them: "
        f"{_reason(error)}."
      )

  def run_started(
    self, phases: tuple[Phase, ...], steps_per_epoch: int, progress: Progress
  ) -> None:
    """See `Observer`."""
    self._step = progress.total_epochs * steps_per_epoch + progress.step

  def start_evaluated(self, start: Start) -> None:
    """See `Observer`."""
    if start.top1 is not None and start.top5 is not None:
      self._write(0, {"eval/top1": start.top1, "eval/top5": start.top5})

  def step_done(self, phase: Phase, metrics: dict[str, float], images_per_second: float) -> None:
    """See `Observer`."""
    self._step += 1
    if self._step % _STEPS_BETWEEN:
      return
    self._write(
      self._step, {"train/step_loss": metrics["loss"], "train/images_per_second": images_per_second}
    )

  def epoch_done(self, report: EpochReport) -> None:
    """See `Observer`."""
    scalars = {f"train/{name}": value for name, value in report.train.items()}
    for prefix, scores in (("eval", report.evaluation), ("eval_ema", report.evaluation_ema)):
      if scores:
        scalars |= {f"{prefix}/{name}": scores[name] for name in ("top1", "top5", "loss")}
    for prefix, values in (
      ("learning_rate", report.learning_rates),
      ("aiwq", report.aiwq),
    ):
      scalars |= {f"{prefix}/{name}": value for name, value in values.items()}
    scalars["phase/index"] = report.phase.index
    scalars["phase/weight_bits"] = report.phase.weight_bits or 32
    scalars["phase/act_bits"] = report.phase.act_bits or 32
    if report.epoch in (1, report.phase.epochs) or report.epoch % _EPOCHS_BETWEEN == 0:
      scalars |= {f"clip_rate/{name}": value for name, value in report.clip_rate.items()}
      scalars |= report.quantizer_scalars
      for name, by_layer in report.instability.items():
        scalars |= {f"{name}/{layer}": value for layer, value in by_layer.items()}
    histograms = {
      name: np.array([*values.values()]) for name, values in report.instability.items() if values
    }
    self._attempt(lambda writer: writer.write_histograms(report.step, histograms))
    self._write(report.step, scalars, flush=True)

  def run_done(self, progress: Progress, params: Params) -> None:
    """See `Observer`."""
    del params
    if not self._pictures:
      return
    from profit_jax.report import plots

    image = plots.instability_image(progress)
    if image is not None:
      self._attempt(lambda writer: writer.write_images(self._step, {"instability": image[None]}))

  def close(self) -> None:
    """See `Observer`."""
    if self._writer is not None:
      with contextlib.suppress(Exception):  # what it still had to write, and could not
        self._writer.close()


class TensorBoard(TensorBoardObserver):
  """A callback of `Trainer`: writes what `TensorBoardObserver` lists, from the first process."""

  def __init__(self, logdir: str | None = None, pictures: bool = True):
    """Args:
    logdir: where to; None is the run's directory.
    pictures: whether the heat map is drawn at the end.
    """
    self._logdir, self._pictures = logdir, pictures
    self._writer, self._step = None, 0
    if not distributed.is_first():
      self._pictures = False

  def opened(self, workdir: epath.Path) -> None:
    """See `Observer`."""
    if distributed.is_first():
      super().__init__(self._logdir or os.fspath(workdir), warnings.warn, self._pictures)
