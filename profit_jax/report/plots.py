"""The plots of a run, as PNG files.

Figures have their own canvas. `matplotlib.pyplot` would need a display, or another backend for the
whole process.
"""

import itertools
import logging
from typing import Any

from profit_jax import optional

optional.require("plots", "Drawing plots")

# Where the home directory cannot be written, matplotlib takes a temporary one, and says so twice.
_log = logging.getLogger("matplotlib")
_level = _log.level
_log.setLevel(logging.ERROR)

import numpy as np
from etils import epath
from flax import traverse_util
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import CenteredNorm, LogNorm
from matplotlib.figure import Figure

from profit_jax.quant import duq
from profit_jax.quant.base import PREFIX
from profit_jax.quant.bits import Bits
from profit_jax.schedule import Phase
from profit_jax.sensitivity import Sensitivity
from profit_jax.train import aiwq
from profit_jax.train.progress import EpochRecord, Progress

_log.setLevel(_level)

# Names of layers in the order of the network: around the blocks (1), and within one.
_OUTSIDE = {0: "stem", 2: "head", 3: "pre_classifier", 4: "classifier"}
_INSIDE = (
  "expand",
  "depthwise",
  "squeeze_excite/reduce",
  "squeeze_excite/expand",
  "pointwise",
  "project",
)
_DPI = 110
_RAW, _EMA, _FROZEN = "#1f5fa8", "#d1781f", ("#8c2d04", "#d98c3f", "#c9c9c9")


def write_plots(
  directory: epath.Path,
  progress: Progress,
  phases: tuple[Phase, ...],
  params: Any,
  given: Bits = Bits(),
) -> dict[str, str]:
  """Draws what the run has data for; `given` are the bits of the run's model, with its rules.

  Returns:
    File name -> caption.
  """
  directory.mkdir(parents=True, exist_ok=True)
  captions = {"accuracy.png": "Top-1 after every epoch, over the phases."}
  save(_accuracy(progress, phases), directory / "accuracy.png")
  if progress.ranking:
    save(_ranking(progress, phases), directory / "aiwq.png")
    captions["aiwq.png"] = (
      "AIWQ of every convolution, largest first; colours tell when its kernel freezes."
    )
  pictures = {
    "instability.png": (
      _instability,
      "What the last steps of every epoch did: the share of each kernel's codes that a step "
      "changed, and changed against "
      "their last change; how far the last step's batch statistics lie from the running ones; and "
      "AIWQ. Layers from input "
      "to output, epochs from left to right.",
    ),
    "quantizers.png": (
      _quantizers,
      "The quantizers over the epochs: what they clip, and how far their scalars have moved, in "
      "factors of two.",
    ),
  }
  for name, (draw, caption) in pictures.items():
    figure = draw(progress, phases)
    if figure is not None:
      save(figure, directory / name)
      captions[name] = caption
  bits = given.at(phases[-1].weight_bits, None)
  has_duq = any(path[-1] == "quant_c" for path in traverse_util.flatten_dict(params))
  shares = code_shares(params, bits) if has_duq and bits.weight is not None else {}
  if shares:
    save(_codes(shares), directory / "weight_codes.png")
    captions["weight_codes.png"] = (
      "How often each weight code occurs, in every layer of the best weights."
    )
  return captions


def instability_image(progress: Progress) -> np.ndarray | None:
  """The heat map of a run as uint8 `[H, W, 3]`; None where nothing was measured."""
  figure = _instability(progress, ())
  if figure is None:
    return None
  canvas = FigureCanvasAgg(figure)
  figure.set_dpi(_DPI)
  canvas.draw()
  return np.array(canvas.buffer_rgba())[..., :3]


def _instability(progress: Progress, phases: tuple[Phase, ...]) -> Figure | None:
  titles = {
    "flip_rate": "codes that a step changes (share)",
    "oscillation_rate": "codes that a step changes back (share)",
    "fixed": "codes that are fixed (share)",
    "bn_distance": "batch from running statistics (KL)",
    "aiwq": "AIWQ, in sampling phases",
  }
  maps = {
    title: layer_matrix([epoch.instability.get(name, {}) for epoch in progress.epochs])
    for name, title in titles.items()
  }
  return _heat_maps(
    {title: (found, LogNorm(), "viridis") for title, found in maps.items() if found}, phases
  )


def _quantizers(progress: Progress, phases: tuple[Phase, ...]) -> Figure | None:
  measured = [epoch.instability for epoch in progress.epochs]
  maps = {}
  if clipped := layer_matrix([values.get("clip_rate", {}) for values in measured]):
    maps["share of its input that a quantizer clips"] = clipped, LogNorm(), "viridis"
  for name in sorted({name for values in measured for name in values if name.startswith(PREFIX)}):
    if found := layer_matrix([values.get(name, {}) for values in measured]):
      layers, values = found
      # What every layer's was when it was first measured.
      first = np.array([[row[np.isfinite(row)][0]] for row in values])
      drift = np.log2(np.maximum(values, 1e-30) / np.maximum(first, 1e-30))
      maps[f"{name.removeprefix(PREFIX)}, drift since its first epoch (log2)"] = (
        (layers, drift),
        CenteredNorm(),
        "RdBu_r",
      )
  return _heat_maps(maps, phases)


def plot_runs(groups: dict[str, list[Progress]], path: epath.Path) -> None:
  """Top-1 of the raw weights and what tells of instability, over the epochs: thin lines for runs, a
  thick one for the mean.

  Args:
    groups: runs that differ in their seed alone, by what the legend calls them.
    path: of the PNG file.
  """
  panels = {
    "top-1, raw weights (%)": lambda epoch: epoch.top1,
    "batch from running statistics (KL), geometric mean of the layers": lambda epoch: _geometric(
      epoch, "bn_distance"
    ),
    "codes that a step changes (share), mean of the layers": lambda epoch: _mean(
      epoch, "flip_rate"
    ),
    "codes that a step changes back (share), mean of the layers": lambda epoch: _mean(
      epoch, "oscillation_rate"
    ),
  }
  drawn = {
    title: {
      name: [[of(epoch) for epoch in run.epochs] for run in runs] for name, runs in groups.items()
    }
    for title, of in panels.items()
  }
  values = {
    title: np.concatenate([line for runs in lines.values() for line in runs])
    for title, lines in drawn.items()
  }
  drawn = {title: lines for title, lines in drawn.items() if np.isfinite(values[title]).any()}
  figure = Figure(figsize=(11, 2.5 * len(drawn)), layout="constrained")
  axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)
  for axis, (title, lines) in zip(axes.flat, drawn.items(), strict=True):
    for number, (name, runs) in enumerate(lines.items()):
      colour = f"C{number % 10}"
      axis.plot([], [], color=colour, linewidth=2, label=name)
      for line in runs:
        axis.plot(range(1, len(line) + 1), line, color=colour, linewidth=0.6, alpha=0.6)
      if len({len(line) for line in runs}) == 1:
        mean = np.ma.masked_invalid(runs).mean(axis=0).filled(np.nan)
        axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2)
    axis.set_title(title, fontsize=9)
    axis.grid(color="0.92")
    if axis is not axes[0, 0]:
      axis.set_yscale("log", nonpositive="mask")
  top1 = next(iter(values.values()))
  axes[0, 0].set_ylim(_low(top1), top1.max() + 2)
  phases = {tuple(epoch.phase for epoch in run.epochs) for runs in groups.values() for run in runs}
  if len(phases) == 1:
    (of_epochs,) = phases
    for epoch, (phase, following) in enumerate(itertools.pairwise(of_epochs), 1):
      for axis in axes.flat if phase != following else ():
        axis.axvline(epoch + 0.5, color="0.6", linewidth=0.5, linestyle=":")
  axes[0, 0].legend(fontsize=8, loc="lower left")
  axes[-1, 0].set_xlabel("epoch")
  save(figure, path)


def plot_sensitivity(found: Sensitivity, path: epath.Path) -> None:
  """Draws the change of the loss of every part, the layers from input to output."""
  layers = list(dict.fromkeys(part.layers[0] for part in found.parts))
  sides = {"weights": "Weights", "inputs": "Inputs"}
  figure = Figure(figsize=(10, 1.6 + 0.17 * len(layers)), layout="constrained")
  axes = figure.subplots(1, 2, sharex=True, sharey=True)
  changes = [abs(reduction.loss) for part in found.parts for reduction in part.reductions]
  largest = max((c for c in changes if np.isfinite(c)), default=1.0)
  axes[0].set_xscale("symlog", linthresh=max(largest / 10.0, 1e-6), linscale=1.5)
  colours = colormaps["viridis_r"](np.linspace(0.25, 1.0, len(found.bits)))
  for axis, (side, title) in zip(axes, sides.items(), strict=True):
    for width, colour in zip(found.bits, colours, strict=True):
      points = [
        (reduction.loss, layers.index(part.layers[0]))
        for part in found.parts
        if part.side == side
        for reduction in part.reductions
        if reduction.bits == width and np.isfinite(reduction.loss)
      ]
      if points:
        axis.scatter(*zip(*points, strict=True), s=16, color=colour, label=f"{width} bits")
    axis.axvline(0.0, color="#888888", linewidth=0.8)
    axis.grid(axis="both", color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_title(f"{title} of one layer alone fall")
    axis.set_xlabel("change of the loss")
  axes[0].set_yticks(range(len(layers)), layers, fontsize=7)
  axes[0].set_ylim(len(layers) - 0.5, -0.5)
  handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
  handles |= dict(zip(*reversed(axes[1].get_legend_handles_labels()), strict=True))
  axes[1].legend(handles.values(), handles.keys(), loc="lower right", fontsize=8)
  path.parent.mkdir(parents=True, exist_ok=True)
  save(figure, path)


def _mean(epoch: EpochRecord, name: str) -> float:
  values = list(epoch.instability.get(name, {}).values())
  return float(np.mean(values)) if values else np.nan


def _geometric(epoch: EpochRecord, name: str) -> float:
  # Of values that differ by factors, from layer to layer.
  values = [value for value in epoch.instability.get(name, {}).values() if value > 0]
  return float(np.exp(np.mean(np.log(values)))) if values else np.nan


def _low(top1: Any) -> float:
  """Where an axis begins: the first epochs from random weights would flatten everything that
  follows.
  """
  return max(0.0, np.percentile(top1, 15) - 8)


def _heat_maps(maps: dict[str, Any], phases: tuple[Phase, ...]) -> Figure | None:
  """One panel below the other: by title, a `layer_matrix`, a norm, a colour map; None if empty."""
  if not maps:
    return None
  # Inches of a layer: of a hundred, less, so that a panel fits a screen.
  counts = [len(layers) for (layers, _), _, _ in maps.values()]
  inches = [min(0.11, 6.6 / count) for count in counts]
  rows = [count * inch for count, inch in zip(counts, inches, strict=True)]
  height = 1.2 + sum(row + 0.6 for row in rows)
  figure = Figure(figsize=(11, height), layout="constrained")
  axes = figure.subplots(len(maps), 1, squeeze=False, height_ratios=rows)
  for axis, inch, (title, ((layers, values), norm, colours)) in zip(
    axes.flat, inches, maps.items(), strict=True
  ):
    # What is 0 stays blank on a scale of factors, where it has no place, as what was not measured.
    blank = ~(values > 0) if isinstance(norm, LogNorm) else ~np.isfinite(values)
    shown, extent = (
      np.ma.masked_where(blank, values),
      (0.5, values.shape[1] + 0.5, len(layers) - 0.5, -0.5),
    )
    picture = axis.imshow(
      shown, aspect="auto", norm=norm, cmap=colours, interpolation="nearest", extent=extent
    )
    axis.set_yticks(range(len(layers)), layers, fontsize=min(5.0, 62 * inch))
    axis.set_title(title, fontsize=9)
    start = 0.5
    for phase in phases:
      start += phase.epochs
      axis.axvline(start, color="0.7", linewidth=0.4)
    figure.colorbar(picture, ax=axis, fraction=0.03, pad=0.01)
  axes.flat[-1].set_xlabel("epoch")
  return figure


def layer_matrix(rows: list[dict[str, float]]) -> tuple[list[str], np.ndarray] | None:
  """Layers, and their values `[layers, epochs]`, NaN where there is none; None where all are empty
  or 0.
  """
  layers = sorted({layer for row in rows for layer in row}, key=_place)
  values = np.array([[row.get(layer, np.nan) for row in rows] for layer in layers])
  return (layers, values) if np.any(values > 0) else None


def _place(layer: str) -> tuple[int, str, int, str]:
  """What sorts layers from the input to the output; by name alone the stem would stand last."""
  block, part = layer.split("/", 1) if "/" in layer else ("", layer)
  stage = (
    1 if block else next((index for index, name in _OUTSIDE.items() if part.startswith(name)), 1)
  )
  inside = next(
    (index for index, name in enumerate(_INSIDE) if part.startswith(name)), len(_INSIDE)
  )
  return stage, block, inside, part


def save(figure: Figure, path: epath.Path) -> None:
  """Writes a figure as a PNG file."""
  FigureCanvasAgg(figure)
  with path.open("wb") as file:
    figure.savefig(file, dpi=_DPI, format="png")


def _accuracy(progress: Progress, phases: tuple[Phase, ...]) -> Figure:
  figure = Figure(figsize=(11, 5), layout="constrained")
  axis = figure.subplots()
  epochs = np.arange(1, len(progress.epochs) + 1)
  axis.plot(epochs, [e.top1 for e in progress.epochs], color=_RAW, marker=".", label="raw weights")
  if any(e.top1_ema is not None for e in progress.epochs):
    axis.plot(epochs, [e.top1_ema for e in progress.epochs], color=_EMA, marker=".", label="EMA")
  start = 0
  for phase in phases:
    if phase.index % 2 == 0:
      axis.axvspan(start + 0.5, start + phase.epochs + 0.5, color="0.93", zorder=0)
    axis.annotate(
      phase.name,
      (start + 0.5 + phase.epochs / 2, 0.02),
      xycoords=("data", "axes fraction"),
      rotation=90,
      ha="center",
      va="bottom",
      fontsize=8,
      color="0.3",
    )
    start += phase.epochs
  low = _low(
    [value for e in progress.epochs for value in (e.top1, e.top1_ema) if value is not None]
  )
  axis.set(xlabel="epoch", ylabel="top-1 (%)", xlim=(0.5, len(epochs) + 0.5), ylim=(low, 100.5))
  axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.22))
  axis.set_title("Accuracy over the phases")
  return figure


def _ranking(progress: Progress, phases: tuple[Phase, ...]) -> Figure:
  # The ranking is that of the last sampling phase.
  last = max(p.index for p in phases if p.kind == "sampling")
  frozen = [p for p in phases if p.frozen_fraction > 0 and p.index > last]
  count = len(progress.ranking)
  bounds = [len(aiwq.frozen_layers(progress.ranking, p.frozen_fraction)) for p in frozen]
  colours = [
    _FROZEN[min(sum(i >= bound for bound in bounds), len(_FROZEN) - 1)] for i in range(count)
  ]
  figure = Figure(figsize=(9, max(4.0, 0.19 * count + 1)), layout="constrained")
  axis = figure.subplots()
  axis.barh(range(count), [progress.metric[layer] for layer in progress.ranking], color=colours)
  for bound, phase in zip(bounds, frozen, strict=True):
    axis.axhline(bound - 0.5, color="0.2", linewidth=0.9, linestyle="--")
    axis.annotate(
      f"frozen from {phase.name} on",
      (0.99, bound - 0.6),
      xycoords=("axes fraction", "data"),
      ha="right",
    )
  axis.set_yticks(range(count), progress.ranking, fontsize=7)
  axis.set(xlabel="AIWQ (running KL divergence)", ylim=(count - 0.4, -0.6))
  if all(progress.metric[layer] > 0 for layer in progress.ranking):
    axis.set_xscale("log")
  axis.set_title("AIWQ ranking: the most unstable layers freeze first")
  return figure


def _codes(shares: dict[str, np.ndarray]) -> Figure:
  columns = 9
  rows = -(-len(shares) // columns)
  # Not the constrained layout of the others: with so many axes it takes seconds.
  alike = len({len(share) for share in shares.values()}) == 1
  figure = Figure(figsize=(1.9 * columns, 1.5 * rows))
  axes = figure.subplots(rows, columns, sharex=alike, squeeze=False)
  figure.subplots_adjust(left=0.03, right=0.99, bottom=0.04, top=0.92, hspace=0.55, wspace=0.3)
  for axis, (layer, share) in zip(axes.flat, shares.items(), strict=False):
    steps = len(share) // 2
    axis.bar(np.arange(-steps, steps + 1), share, width=0.9, color=_RAW)
    axis.set_title(layer, fontsize=7)
    axis.tick_params(labelsize=6)
  for axis in axes.flat[len(shares) :]:
    axis.set_visible(False)
  figure.suptitle("Share of each weight code")
  return figure


def code_shares(params: Any, bits: Bits) -> dict[str, np.ndarray]:
  """Per quantized layer of DuQ, the share of its kernel's elements on each code from -n to n."""
  flat = traverse_util.flatten_dict(params)
  kernels = {
    path[:-1]: np.ravel(leaf)
    for path, leaf in flat.items()
    if path[-1] == "kernel"
    and (*path[:-1], "quant_a") in flat
    and bits.weight_of("/".join(path[:-1])) is not None
  }
  if not kernels:
    return {}
  largest = [int(bits.kernel_qmax("/".join(layer))) for layer in kernels]
  sizes = [kernel.size for kernel in kernels.values()]
  # All layers in one array: a call per layer would compile for every shape.
  # An interval for every element, of the whole kernel or of its output channel.
  intervals = np.concatenate(
    [
      np.broadcast_to(flat[*layer, "quant_a"], flat[*layer, "kernel"].shape).ravel()
      for layer in kernels
    ]
  )
  qmax = np.repeat(np.int32(largest), sizes)
  elements = np.concatenate(list(kernels.values()))
  codes = np.asarray(duq.codes(elements, intervals, np.float32(qmax), "symmetric"))
  parts = np.split(codes + qmax, np.cumsum(sizes)[:-1])
  return {
    "/".join(layer): np.bincount(part, minlength=2 * most + 1) / part.size
    for layer, part, most in zip(kernels, parts, largest, strict=True)
  }
