"""`result.json` and `report.md`: what a finished run leaves for scripts and people."""

import contextlib
import json
import platform
from importlib import metadata
from typing import Any

import jax
from etils import epath

from profit_jax import optional
from profit_jax.config import ConfigError, Settings
from profit_jax.models import student_spec
from profit_jax.report import policy
from profit_jax.report.console import final_line, start_lines
from profit_jax.schedule import Phase, bits_name
from profit_jax.train.progress import Progress, initial_weights, summary
from profit_jax.train.run_directory import read_data, write_text

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "clu", "ml-collections", "numpy")


def environment() -> dict[str, Any]:
  """What a result depends on besides the settings."""
  return {
    "python": platform.python_version(),
    "platform": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "packages": _versions(),
    "commit": policy.commit(),
  }


def _versions() -> dict[str, str]:
  """The installed packages' versions; clu belongs to an extra."""
  found = {}
  for name in _PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  return found


def write_report(
  workdir: epath.Path,
  settings: Settings,
  phases: tuple[Phase, ...],
  progress: Progress,
  params: Any,
  plots: bool = True,
) -> dict[str, Any]:
  """Writes `result.json`, the plots (where they are asked for) and `report.md` of a finished run.

  Without matplotlib there are no plots, and `report.md` says why.

  Returns:
    The result.
  """
  result = {
    "model": settings.model.name,
    "dataset": settings.data.name,
    "seed": settings.seed,
    "environment": environment(),
    **summary(progress, phases),
  }
  if progress.forked_phases:
    result["forked_from"] = {"run": progress.forked_from, "phases": progress.forked_phases}
  weights = initial_weights(settings, progress)
  if weights:
    result["initial_weights"] = weights
  start = start_lines(progress.start) if progress.start else []
  if progress.forked_phases:
    start.append(
      f"Up to the end of phase {progress.forked_phases}, this is the run in {progress.forked_from}."
    )
  if progress.retries:
    start.append(
      "Losses or gradients that were not finite sent the run back to a checkpoint (retries: "
      f"{progress.retries}); since "
      f"then all learning rates are multiplied by {progress.learning_rate_scale:g}."
    )
  without = optional.missing("plots", "Drawing plots") if plots else ""
  if without:
    start.append(without)
  data = read_data(workdir)
  spec = student_spec(settings, data["num_classes"])
  result["layer_bits"] = policy.layer_bits(spec, phases[-1])
  try:
    captions = {}
    if plots and not without:
      from profit_jax.report.plots import write_plots  # here, because it needs matplotlib

      captions = write_plots(workdir / "plots", progress, phases, params, spec.bits)
    stated = policy.markdown(settings, phases, data, result["environment"], spec, weights)
    write_text(workdir / "report.md", _markdown(result, start, captions, stated))
    write_text(workdir / "result.json", json.dumps(result, indent=2) + "\n")
  except OSError as error:
    raise ConfigError(
      f"--workdir {workdir}: the report cannot be written: {error}. The run itself is finished "
      "and saved; make room, and "
      f"the same command writes the report."
    ) from error
  return result


def _markdown(
  result: dict[str, Any], start: list[str], captions: dict[str, str], stated: list[str]
) -> str:
  env = result["environment"]
  lines = [
    f"# {result['model']} on {result['dataset']}",
    "",
    final_line(result),
    *(part for line in start for part in ("", line)),
    "",
    f"Seed {result['seed']}; jax {env['packages']['jax']} on {env['devices']} x {env['device']}, "
    f"Python {env['python']}. "
    "The result is the best evaluation among the phases at the last bits, the better of raw "
    "weights and EMA; full "
    "precision is chosen the same way. Each phase's row is its last epoch.",
    "",
    "| # | phase | bits | frozen | top-1 raw | top-1 EMA | loss | seconds | compiling |",
    "|--:|:--|:--|--:|--:|--:|--:|--:|--:|",
  ]
  for p in result["phases"]:
    average = "-" if p["top1_ema"] is None else f"{p['top1_ema']:.2f}"
    lines.append(
      f"| {p['index']} | {p['name']} | {bits_name(p['weight_bits'], p['act_bits'])} | "
      f"{len(p['frozen'])} | {p['top1']:.2f} "
      f"| {average} | {p['loss']:.3f} | {p['seconds']:.1f} | {p['compile_seconds']:.1f} |"
    )
  for file, caption in captions.items():
    lines += ["", f"![{caption}](plots/{file})", "", caption]
  if result["aiwq"]:
    lines += ["", "| rank | layer | AIWQ |", "|--:|:--|--:|"]
    lines += [f"| {row['rank']} | {row['layer']} | {row['metric']:.3g} |" for row in result["aiwq"]]
  return "\n".join([*lines, *stated]) + "\n"
