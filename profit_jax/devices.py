"""The devices that JAX computes on: one message where it gives none, a warning where it leaves an
accelerator idle.
"""

import contextlib
import functools
import logging
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

import jax

from profit_jax.config import ConfigError

# XLA reads its flags when it compiles first, and ends the process over one that it does not know.
_READ_FLAGS = "from jaxlib import xla_client; xla_client.CompileOptions()"
_GOOGLE = "0x1ae0"  # as a PCI vendor
# JAX's settings with which its programs are not compiled, or arrays do not meet.
_REFUSED = {
  "jax_disable_jit": (True,),
  "jax_numpy_rank_promotion": ("raise",),
  "jax_transfer_guard": ("disallow", "disallow_explicit"),
}


def require() -> None:
  """Asks JAX for its devices; must come after `distributed.initialize`.

  Raises:
    ConfigError: JAX gives none, XLA does not know a flag in XLA_FLAGS, or JAX has a setting with
      which this package cannot compute.
  """
  _require_known_flags(os.environ.get("XLA_FLAGS", ""))
  for setting, refused in _REFUSED.items():
    if (value := getattr(jax.config, setting)) in refused:
      raise ConfigError(
        f"{setting.upper()}={value} is not allowed: training and evaluation need JAX's default. "
        "Unset it."
      )
  try:
    with _without_stacks():
      jax.devices()
  except (RuntimeError, AssertionError) as error:
    asked = jax.config.jax_platforms
    # JAX asserts, without a text, that one of these platforms is there. It ends others with advice.
    told = re.sub(r"\s*\((set|you may need)[^()]*\)$", "", " ".join(str(error).split()))
    reason = told[:300].rstrip(".") or "there is no such device on this machine"
    where = f"with JAX_PLATFORMS={asked}" if asked else "here"
    raise ConfigError(
      f"JAX has no devices {where}: {reason}. Set JAX_PLATFORMS=cpu to compute on the CPU. For "
      "accelerators, unset it and install JAX's build for them (docs/gpu.md, docs/cloud_tpu.md)."
    ) from error


@contextlib.contextmanager
def _without_stacks() -> Iterator[None]:
  """Inside, a build for accelerators that finds none says so in one line; JAX prints a stack."""

  def in_short(record: logging.LogRecord) -> bool:
    if record.exc_info and record.exc_info[1]:
      told = " ".join(str(record.exc_info[1]).split())[:300]
      record.msg, record.args = "JAX cannot use an accelerator: %s", (told,)
      record.levelno, record.levelname = logging.WARNING, "WARNING"
      record.exc_info = None
    return True

  logger = logging.getLogger("jax._src.xla_bridge")
  logger.addFilter(in_short)
  try:
    yield
  finally:
    logger.removeFilter(in_short)


@functools.cache
def _require_known_flags(xla_flags: str) -> None:
  """Raises ConfigError where XLA does not know one of its flags; takes 0.2 s if there are any."""
  if not xla_flags:
    return
  done = subprocess.run(
    [sys.executable, "-c", _READ_FLAGS], capture_output=True, text=True, check=False
  )
  # As in `F1128 17:49:54.726474    7652 parse_flags_from_env.cc:234] Unknown flag ...`.
  found = re.search(r"^[EF]\d{4} [^\]\n]*flags[^\]\n]*\] (.*)", done.stderr, re.MULTILINE)
  if done.returncode and found:
    reason = found[1].partition(" (")[0][:300].rstrip(".")
    raise ConfigError(
      f"XLA_FLAGS='{xla_flags}' is not allowed: {reason}. Correct it or unset it; the flags are "
      f"those of jaxlib {metadata.version('jaxlib')}."
    )


def warning(platforms: str | None = None, root: pathlib.Path = pathlib.Path("/")) -> str:
  """What to say where JAX computes on the CPU of a machine with an accelerator; "" elsewhere, and
  where the CPU was asked for.

  Args:
    platforms: as JAX_PLATFORMS; None is JAX's own setting.
    root: of the machine's file system.
  """
  asked = ((jax.config.jax_platforms or "") if platforms is None else platforms).split(",")[0]
  if jax.default_backend() != "cpu" or asked == "cpu":
    return ""
  found = accelerator(root)
  if found is None:
    return f"JAX finds no {asked} device here and computes on the CPU." if asked else ""
  kind, sign, extra = found
  return (
    f"This machine has {kind} ({sign}), but JAX does not see it and computes on the CPU. Install "
    f'JAX\'s build for it: pip install "jax[{extra}]=={jax.__version__}". JAX_PLATFORMS=cpu '
    "chooses the CPU without this warning."
  )


def accelerator(root: pathlib.Path) -> tuple[str, str, str] | None:
  """What accelerator a machine has, the file that shows it, and JAX's extra for it; None without
  one, or where CUDA_VISIBLE_DEVICES hides it.

  Args:
    root: of the machine's file system.
  """
  hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
  gpus = [*root.glob("dev/nvidia[0-9]*"), *root.glob("proc/driver/nvidia/gpus/*")]
  if gpus and not hidden:
    return "an NVIDIA GPU", str(gpus[0]), "cuda13"
  tpus = [*root.glob("dev/accel[0-9]*")]
  # Whatever a machine passes on to guests is in /dev/vfio.
  vendors = root.glob("sys/bus/pci/drivers/vfio-pci/*/vendor")
  if any(path.read_text().strip() == _GOOGLE for path in vendors):
    tpus += root.glob("dev/vfio/[0-9]*")
  return ("a TPU", str(tpus[0]), "tpu") if tpus else None
