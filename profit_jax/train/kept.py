"""Compiled programs kept between runs: the next run neither traces nor compiles what it finds here.

JAX's own cache is asked with the traced and lowered program, which for a training step of MobileNet-v2 takes 4.6 s of the
7.2 s that it then still needs (2 cores). Here a program's name is a hash of all that makes it: this package's source, the
versions of JAX and what it runs on, the configuration, and what was asked for.
"""

import hashlib
import json
import os
import pathlib
import pickle
import platform
import zlib
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
# No part of any program: numbers that are arguments, where things lie, what the loop does between steps.
_ELSEWHERE = ("seed", "compilation_cache", "checkpoint", "recovery", "init")


class Kept:
  """The programs of one configuration, in a directory that only its user writes (they are pickled: code that is run)."""

  def __init__(self, directory: epath.PathLike, config: dict[str, Any], devices: Sequence[jax.Device], **more: Any):
    """Args: directory, local or remote, made when needed; config: `Settings.to_dict()`; devices: that the programs run on,
    in this order; more: what else decides.
    """
    self._directory, self._devices = epath.Path(directory), list(devices)
    config = {name: value for name, value in config.items() if name not in _ELSEWHERE}
    self._common = repr((config, sorted(more.items()), _surroundings(self._devices)))

  def get(self, name: Any, compile_it: Callable[[], Any]) -> Any:
    """The program of that name (its `repr` is what counts), kept or compiled now."""
    place = self._directory / f"{hashlib.sha256(f'{self._common} {name!r}'.encode()).hexdigest()}.program"
    try:
      content = pickle.loads(zlib.decompress(place.read_bytes()))
      return serialize_executable.deserialize_and_load(*content, execution_devices=self._devices)
    except Exception:  # not there, cut off, of another machine after all: it is only a cache
      compiled = compile_it()
    try:
      content = zlib.compress(pickle.dumps(serialize_executable.serialize(compiled)), level=1)
      self._directory.mkdir(parents=True, exist_ok=True)
      unfinished = self._directory / f"{place.name}.{platform.node()}.{os.getpid()}"
      unfinished.write_bytes(content)
      unfinished.rename(place)
    except Exception:  # no room, no permission, a platform that cannot serialize: the program runs all the same
      pass
    return compiled


def _surroundings(devices: Sequence[jax.Device]) -> str:
  """What the same source may be compiled differently with."""
  source = hashlib.sha256()
  root = pathlib.Path(__file__).parents[1]
  for file in sorted(root.rglob("*.py")):
    source.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  processor = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
  return json.dumps(
    {
      "source": source.hexdigest(),
      "versions": [platform.python_version(), *map(metadata.version, _PACKAGES)],
      "devices": [[device.id for device in devices], devices[0].device_kind, devices[0].client.platform_version],
      "processor": [platform.machine(), os.cpu_count(), *sorted(processor)],
      "options": [str(getattr(jax.config, name)) for name in _OPTIONS],
      "environment": [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
    }
  )
