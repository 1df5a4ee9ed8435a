"""What was done, in full, so that two runs can be compared at a glance: the part of `report.md`
below the results.
"""

import functools
import pathlib
import subprocess
import types
from collections.abc import Mapping
from typing import Any

from profit_jax.config import Settings
from profit_jax.nn.spec import ModelSpec
from profit_jax.schedule import Phase, bits_name, summary_line
from profit_jax.train.oscillation import Remedies
from profit_jax.train.progress import weights_text


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
  initial_weights: Mapping[str, Mapping[str, str | None]] = types.MappingProxyType({}),
) -> list[str]:
  """Lines of Markdown.

  Args:
    settings: of the run.
    phases: its plan.
    data: its `data.json`.
    environment: of its `result.json`.
    spec: of its model.
    initial_weights: of its `result.json`.
  """
  last, teacher, train, plan = phases[-1], settings.teacher, settings.train, settings.plan
  bits = bits_name(last.weight_bits, last.act_bits)
  schedule = [f"weights {_ladder(plan.weight_bits)}", f"activations {_ladder(plan.act_bits)}"]
  schedule.append("progressive" if plan.progressive else "straight to the last")
  schedule.append("BN phases" if plan.stabilize else "no BN phases")
  if plan.profit:
    shares = ", ".join(f"{share:.0%}" for share in plan.freeze_fractions)
    schedule.append(f"PROFIT at {', '.join(map(str, plan.profit_bits))} bits, freezing {shares}")
  else:
    schedule.append("no PROFIT")
  files = {who: weights_text(file) for who, file in initial_weights.items()}
  taught = {"none": "none", "self": "the student before quantization"}.get(
    teacher.model, f"{teacher.model}, {files.get('teacher', teacher.weights)}"
  )
  rows = {
    "quantizers": f"{settings.quant.method}, "
    f"{'each output channel of' if spec.bits.quantizer.per_channel else 'each'} kernel "
    "with scalars of its own",
    "bits": f"{bits}{_rules(settings.quant)}; the image as it is",
    "schedule": "; ".join(schedule),
    "remedies": Remedies(settings.oscillation).summary(),
    "plan": summary_line(phases),
    "teacher": taught,
    "first weights": files.get("student", settings.init.weights) or "random",
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
  widths = layer_bits(spec, last)
  weights, acts = widths["weights"], widths["activations"]
  lines += ["", f"{len(weights)} kernels, {len(acts)} quantizers of activations:", ""]
  lines += ["| layer | kernel | bits |", "|:--|:--|--:|"]
  lines += [
    f"| {layer} | {'x'.join(map(str, spec.all_kernels[layer]))} | {width or 'float'} |"
    for layer, width in sorted(weights.items())
  ]
  lines += [
    f"| {layer} | activations | {width or 'float'} |" for layer, width in sorted(acts.items())
  ]
  return lines


def layer_bits(spec: ModelSpec, phase: Phase) -> dict[str, dict[str, int | None]]:
  """The bit widths of every kernel and of every quantizer of activations in a phase, by `weights`
  and `activations`, then by path; None is full precision.
  """
  bits, found = spec.bits.at(phase.weight_bits, phase.act_bits), {"weights": {}, "activations": {}}
  for path, layer in spec.layers.items():
    if layer.kind != "norm":
      width = spec.width_of(path, bits)
      of = found["activations" if layer.kind == "act" else "weights"]
      of[path] = None if width is None else int(width)
  return found


def _rules(quant):
  """What single layers have."""
  if not quant.rules and quant.policy == "profit":
    return " in every layer, the first and the last too"
  policy = "" if quant.policy == "profit" else f", policy {quant.policy}"
  rules = "".join(f"; `{rule!r}`" for rule in quant.rules)
  return f"{policy}{rules}".replace("|", "\\|")


def _ladder(bits: tuple[int, ...]) -> str:
  return "-".join(map(str, bits)) or "in float"
