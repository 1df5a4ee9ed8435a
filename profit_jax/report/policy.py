"""What was done, in full, so that two runs can be compared at a glance: the part of `report.md`
below the results.
"""

import functools
import pathlib
import subprocess
from typing import Any

from profit_jax.config import Settings
from profit_jax.nn.spec import ModelSpec
from profit_jax.schedule import Phase, bits_name, summary_line
from profit_jax.train.oscillation import Remedies


@functools.cache
def commit() -> str | None:
  """The commit of this code, with `+` where files differ from it; None outside of a repository of
  its own.
  """
  root = pathlib.Path(__file__).resolve().parent.parent.parent

  def git(*arguments):
    done = subprocess.run(
      ["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()

  try:
    # Not of a repository that this package only lies in, as an environment does.
    if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root:
      return None
    return git("rev-parse", "HEAD") + (
      "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )
  except (OSError, subprocess.SubprocessError):
    return None


def markdown(
  settings: Settings,
  phases: tuple[Phase, ...],
  data: dict[str, Any],
  environment: dict[str, Any],
  spec: ModelSpec,
) -> list[str]:
  """Lines of Markdown.

  Args:
    settings: of the run.
    phases: its plan.
    data: its `data.json`.
    environment: of its `result.json`.
    spec: of its model.
  """
  last, teacher, train, plan = phases[-1], settings.teacher, settings.train, settings.plan
  bits = bits_name(last.weight_bits, last.act_bits)
  quantizers = [path for path, layer in spec.layers.items() if layer.kind == "act"]
  schedule = [f"weights {_ladder(plan.weight_bits)}", f"activations {_ladder(plan.act_bits)}"]
  schedule.append("progressive" if plan.progressive else "straight to the last")
  schedule.append("BN phases" if plan.stabilize else "no BN phases")
  if plan.profit:
    shares = ", ".join(f"{share:.0%}" for share in plan.freeze_fractions)
    schedule.append(f"PROFIT at {', '.join(map(str, plan.profit_bits))} bits, freezing {shares}")
  else:
    schedule.append("no PROFIT")
  taught = {"none": "none", "self": "the student before quantization"}.get(
    teacher.model, f"{teacher.model}, {teacher.weights}"
  )
  rows = {
    "quantizers": f"{settings.quant.method}, "
    f"{'each output channel of' if settings.quant.per_channel else 'each'} kernel "
    "with scalars of its own",
    "bits of every layer": f"{bits}{_ends(settings.quant)}; the image as it is",
    "schedule": "; ".join(schedule),
    "remedies": Remedies(settings.oscillation).summary(),
    "plan": summary_line(phases),
    "teacher": taught,
    "first weights": settings.init.weights or "random",
    "padding of h-swish": f"{settings.model.pad_value:g}",
    "optimizer": f"SGD, Nesterov {train.momentum:g}, rate {train.learning_rate:g} (a and c "
    f"{train.quantizer_lr_scale:g} of "
    f"it, full precision {train.full_precision_learning_rate:g}), weight decay "
    f"{train.weight_decay:g}, batch "
    f"{train.batch_size}, EMA {train.ema_rate:g}",
    "data": f"{settings.data.name}, {data['train_examples']:,} to train on, "
    f"{data['eval_examples']:,} to evaluate on, "
    f"{data['num_classes']} classes, {settings.data.image_size} pixels, fingerprint "
    f"{data['fingerprint'] or '-'}",
    "seed": str(settings.seed),
    "precision": f"{train.dtype} on {environment['devices']} x {environment['device']}",
    "versions": ", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
    "commit": environment["commit"] or "unknown",
  }
  lines = [
    "",
    "## Policy",
    "",
    "| | |",
    "|:--|:--|",
    *(f"| {name} | {text} |" for name, text in rows.items()),
  ]
  lines += ["", f"{len(spec.kernels)} kernels, {len(quantizers)} quantizers of activations:", ""]
  lines += ["| layer | kernel | bits |", "|:--|:--|--:|"]
  lines += [
    f"| {layer} | {'x'.join(map(str, shape))} | {last.weight_bits or 'float'} |"
    for layer, shape in sorted(spec.kernels.items())
  ]
  lines += [
    f"| {layer} | activations | {last.act_bits or 'float'} |" for layer in sorted(quantizers)
  ]
  return lines


def _ends(quant):
  """What the first and the last layer have."""
  if not (quant.first_bits or quant.last_bits):
    return ", the first and the last too"
  first, last = quant.first_bits or "as many", quant.last_bits or "as many"
  return f"; at least {first} in the first, {last} in the last"


def _ladder(bits: tuple[int, ...]) -> str:
  return "-".join(map(str, bits)) or "in float"
