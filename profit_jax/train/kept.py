"""Compiled programs kept between runs: the next run neither traces nor compiles what it finds here.

JAX's own cache is asked with the traced and lowered program, and to trace and lower takes most of
what a run from that cache waits for. Here a program's name is a hash of all that makes it: this
package's source, the versions of JAX and what it runs on, the configuration, and what was asked
for.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import pickle
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu")  # and JAX's plugins
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_UNUSED_DAYS = 30
_SOURCE = pathlib.Path(__file__).parents[1]  # this package
# No part of any program: numbers that are arguments, where things lie, what the loop and the plan
# decide between steps. A setting that is not named here makes other programs, so that a new one is
# at worst compiled for in vain.
ELSEWHERE = {
  "seed",
  "compilation_cache",
  "init",
  "checkpoint",
  "recovery",
  "teacher.weights",
  *(
    f"data.{name}"
    for name in ("name", "data_dir", "train_split", "eval_split", "augment", "train_crop")
  ),
  *(f"data.{name}" for name in ("eval_share", "interpolation", "max_broken", "readers")),
  *(
    f"plan.{name}"
    for name in ("weight_bits", "act_bits", "progressive", "stabilize", "profit", "profit_bits")
  ),
  *(f"plan.{name}_epochs" for name in ("full_precision", "finetune", "bn", "sampling", "warmup")),
  "plan.freeze_fractions",
  "plan.fitted_bits",
  "remedy.bn_batches",
  "train.learning_rate",
  "train.full_precision_learning_rate",
}


class Kept:
  """The programs of one configuration, in a directory that only its user writes (they are pickled:
  code that is run).
  """

  def __init__(
    self,
    directory: epath.PathLike,
    config: dict[str, Any],
    devices: Sequence[jax.Device],
    source: pathlib.Path = _SOURCE,
    **more: Any,
  ):
    """Args: directory, local or remote, made when needed; config: `Settings.to_dict()`; devices:
    that the programs run on, in this order; source: the directory of the Python files that make
    the programs; more: what else decides.
    """
    self._directory, self._devices = epath.Path(directory), list(devices)
    surroundings = _surroundings(self._devices, source)
    self._common = repr((deciding(config), sorted(more.items()), surroundings))

  def get(self, name: Any, compile_it: Callable[[], Any]) -> Any:
    """The program of that name (its `repr` is what counts), kept or compiled now.

    The first that must be compiled turns JAX's own cache off, for all programs in this process from
    then on.
    """
    place = (
      self._directory / f"{hashlib.sha256(f'{self._common} {name!r}'.encode()).hexdigest()}.program"
    )
    try:
      content = pickle.loads(zlib.decompress(place.read_bytes()))
      loaded = serialize_executable.deserialize_and_load(*content, execution_devices=self._devices)
    except Exception:  # not there, cut off, of another machine after all: it is only a cache
      _turn_off_jax_cache()
      compiled = compile_it()
    else:
      with contextlib.suppress(OSError):  # remote, or not ours to touch
        os.utime(place)
      return loaded
    try:
      content = zlib.compress(pickle.dumps(serialize_executable.serialize(compiled)), level=1)
      self._directory.mkdir(parents=True, exist_ok=True)
      unfinished = self._directory / f"{place.name}.{platform.node()}.{os.getpid()}"
      unfinished.write_bytes(content)
      unfinished.rename(place)
      for file in self._directory.iterdir():
        if file.stat().mtime < time.time() - _UNUSED_DAYS * 24 * 3600:
          file.unlink()
    # No room, no permission, a platform that cannot serialize: the program runs all the same.
    except Exception:
      pass
    return compiled


def _turn_off_jax_cache() -> None:
  """A program that came from there can be serialized and loaded, but ends with "Function ... not
  found" when it runs (jaxlib 0.10.2, CPU). JAX decides once in a process whether it asks its cache,
  and has no switch for one thread.
  """
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # or what has been decided stays so


def deciding(config: dict[str, Any]) -> dict[str, Any]:
  """The settings that programs are made of, by their full names."""
  settings = {}
  for section, value in config.items():
    for name, item in value.items() if isinstance(value, dict) else [("", value)]:
      full = f"{section}.{name}".rstrip(".")
      if section not in ELSEWHERE and full not in ELSEWHERE:
        settings[full] = item
  return settings


def _surroundings(devices: Sequence[jax.Device], source: pathlib.Path) -> str:
  """The source, and what it may be compiled differently with."""
  hashed = hashlib.sha256()
  for file in sorted(source.rglob("*.py")):
    hashed.update(f"{file.relative_to(source)}\0".encode() + file.read_bytes() + b"\0")
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  processor = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  installed = {
    distribution.name: distribution.version
    for distribution in metadata.distributions()
    if distribution.name
  }
  versions = {
    name: v
    for name, v in installed.items()
    if name in _PACKAGES or name.startswith(("jax-", "jax_", "nvidia"))
  }
  options = {name: str(value) for name, value in jax.config.values.items() if "cache" not in name}
  return json.dumps(
    {
      "source": hashed.hexdigest(),
      "versions": [platform.python_version(), sorted(versions.items())],
      "devices": [
        [device.id for device in devices],
        devices[0].device_kind,
        devices[0].client.platform_version,
      ],
      "processor": [platform.machine(), cores, *sorted(processor)],
      "options": sorted(options.items()),
      "environment": [os.environ.get(name) for name in _ENVIRONMENT],
    }
  )
