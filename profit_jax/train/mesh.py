"""The devices of a run, and how arrays are placed on them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from profit_jax.config import ConfigError, Dtype, Settings
from profit_jax.kernels import target

_PLATFORM_DTYPES: dict[str, Dtype] = {"cpu": "float32", "gpu": "tfloat32", "tpu": "bfloat16"}


def default_dtype(platform: str) -> Dtype:
  """The `train.dtype` that auto stands for on devices of a platform, given JAX's name of it."""
  return _PLATFORM_DTYPES[target.platform_of(platform)]


def make_mesh(settings: Settings, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Devices on one axis, `data`.

  Args:
    settings: validated.
    devices: that the run uses; None is all, of every process.

  Raises:
    ConfigError: a batch that does not divide over them.
  """
  # Neighbours of one process side by side: its rows of a batch are its devices' rows. Their numbers
  # alone do not say so.
  devices = sorted(
    jax.devices() if devices is None else devices,
    key=lambda device: (device.process_index, device.id),
  )
  parts = settings.train.accumulation_steps
  if settings.train.batch_size % (parts * len(devices)):
    raise ConfigError(
      f"config.train.batch_size = {settings.train.batch_size} is not allowed: it must be a "
      "multiple of "
      f"{parts * len(devices)}: train.accumulation_steps = {parts} parts over {len(devices)} "
      "devices."
    )
  for name in ("batch_size", "eval_batch_size"):
    size = getattr(settings.train, name)
    if size % len(devices):
      raise ConfigError(
        f"config.train.{name} = {size} is not allowed: it must be a multiple of the number of "
        f"devices, {len(devices)}, "
        f"over which a batch is split."
      )
  return Mesh(np.asarray(devices), ("data",))


class Placement:
  """Places arrays on a mesh: batches are split, everything else is replicated.

  Attributes:
    replicated: the sharding of everything but batches.
    split_rows: the sharding of batches.
  """

  def __init__(self, mesh: Mesh):
    """Args: mesh: with the axis `data`."""
    self.replicated = NamedSharding(mesh, PartitionSpec())
    self.split_rows = NamedSharding(mesh, PartitionSpec("data"))

  def replicate(self, tree: Any) -> Any:
    """Puts a tree, the same on every process, on every device, as new arrays that a step may
    donate.
    """
    if jax.process_count() == 1:
      return jax.device_put(tree, self.replicated, may_alias=False)

    # There device_put would compare every array over the network first, with a program for each
    # shape.
    def put(leaf):
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
      value = np.array(leaf)
      return jax.make_array_from_callback(value.shape, self.replicated, lambda index: value[index])

    return jax.tree.map(put, tree)

  def split(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a batch on the devices, a part on each; every process gives its own rows."""
    return {
      name: jax.make_array_from_process_local_data(self.split_rows, value)
      for name, value in batch.items()
    }

  def split_part(self, batch: dict[str, np.ndarray], parts: int) -> jax.Array:
    """Puts every `parts`-th image of a batch on the devices: what a step computes at once."""
    return self.split({"image": batch["image"][::parts]})["image"]


def shapes_on(sharding: NamedSharding, tree: Any) -> Any:
  """The shapes and dtypes of a tree's leaves, with a sharding."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
  )
