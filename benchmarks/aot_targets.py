"""TPUs and GPUs that `benchmarks/aot.py` compiles for, on a machine that has none."""

import importlib.util
import pathlib
import re
from typing import Any, NamedTuple

from profit_jax.config import ConfigError

FOLDER = pathlib.Path(__file__).resolve().parent / "targets"
INSTALL = "pip install -r requirements.txt -r requirements-accelerators.txt"

# Set before JAX is imported. libtpu would otherwise ask Google Cloud what TPU this machine has; the
# accelerator and the host are any that it knows, whatever the topology. Its lock keeps a second
# process from a TPU, and no TPU is used here.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CUDA_PLUGIN = "jax_cuda13_plugin"


class Target(NamedTuple):
  """A compiler and the devices that it compiles for.

  Attributes:
    name: as `--target` takes it.
    platform: tpu or cuda.
    devices: they can be put into a mesh, and only be compiled for.
  """

  name: str
  platform: str
  devices: list[Any]


def gpus() -> list[str]:
  """The names of the GPUs, which have a file each."""
  return sorted(path.stem for path in FOLDER.glob("*.txtpb"))


def find(name: str) -> Target:
  """The target of a name.

  Args:
    name: a TPU topology (`v5e:2x2`), a GPU (`h100`), or several of them in one machine (`h100:4`).

  Raises:
    ConfigError: an unknown name, a compiler that is not installed, or libtpu in use elsewhere.
  """
  gpu, _, count = name.partition(":")
  if gpu in gpus():
    return _gpu(name, gpu, count or "1")
  if re.fullmatch(r"[a-z0-9]+:\d+(x\d+)*", name):
    return _tpu(name)
  raise ConfigError(
    f"--target={name} is not allowed: it must be a TPU topology, such as v5e:2x2 or v4:2x2x1, or "
    f"one of the GPUs {', '.join(gpus())}, with their number behind a colon, such as h100:4."
  )


def _need(module: str, name: str) -> None:
  if importlib.util.find_spec(module) is None:
    raise ConfigError(f"--target={name} needs {module}, which is not installed: {INSTALL}")


def _gpu(name: str, gpu: str, count: str) -> Target:
  if not re.fullmatch(r"[1-9]\d{0,2}", count):
    raise ConfigError(f"--target={name} is not allowed: {count!r} must be a number of GPUs.")
  _need(_CUDA_PLUGIN, name)
  from jax.experimental import topologies

  try:
    topology = topologies.get_topology_desc(
      platform="cuda",
      topology_name="",
      target_config=(FOLDER / f"{gpu}.txtpb").read_text(),
      topology=f"1x1x{count}",  # partitions, machines in each, GPUs in each
    )
  except (NotImplementedError, RuntimeError) as error:
    raise ConfigError(
      f"--target={name}: the CUDA compiler refused it: {error}. If packages of it are missing: "
      f"{INSTALL}"
    ) from error
  return Target(name, "cuda", topology.devices)


def _tpu(name: str) -> Target:
  _need("libtpu", name)
  from jax.experimental import topologies

  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
  except RuntimeError as error:
    if "lockfile" in str(error):
      raise ConfigError(
        f"--target={name}: another process is using libtpu. Wait until it ends. If none is, delete "
        "/tmp/libtpu_lockfile, which a killed process left."
      ) from error
    raise ConfigError(f"--target={name} is not allowed: libtpu says: {error}") from error
  return Target(name, "tpu", topology.devices)
