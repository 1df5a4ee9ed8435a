"""The platform that a program is traced for, which decides the form of its operations.

A program is traced for one platform. `lax.platform_dependent` would trace the forms of all of them,
and differentiate each.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
from jax.sharding import Mesh

Platform = Literal["cpu", "gpu", "tpu"]
Kernels = Literal["tuned", "xla"]

_NAMES: dict[str, Platform] = {
  "cpu": "cpu",
  "gpu": "gpu",
  "cuda": "gpu",
  "rocm": "gpu",
  "tpu": "tpu",
}


class Target(NamedTuple):
  """What a program is traced for.

  Attributes:
    platform: of the devices.
    kernels: `tuned` forms for the platform, or plain `xla` operations.
    mesh: over whose axis `data` batches are split; None is one device.
  """

  platform: Platform
  kernels: Kernels = "tuned"
  mesh: Mesh | None = None

  def is_tuned_for(self, platform: Platform) -> bool:
    """Whether operations should have their tuned form for this platform."""
    return self.kernels == "tuned" and self.platform == platform


# XLA on GPUs searches the fastest form of every fusion and product, which takes minutes. cuBLAS and
# cuDNN alone leave it the products and a few convolutions to tune.
_GPU_OPTIONS = {
  "xla_gpu_enable_triton_gemm": False,
  "xla_gpu_experimental_enable_fusion_autotuner": False,
}


def compiler_options(platform: Platform) -> dict[str, bool]:
  """XLA's options for a platform's programs, but for those that `XLA_FLAGS` sets."""
  options = _GPU_OPTIONS if platform == "gpu" else {}
  flags = os.environ.get("XLA_FLAGS", "")
  given = {flag.removeprefix("--").partition("=")[0] for flag in flags.split()}
  return {name: value for name, value in options.items() if name not in given}


_current: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def platform_of(name: str) -> Platform:
  """The platform of a device, given JAX's name; an unknown one is treated as a GPU's."""
  return _NAMES.get(name, "gpu")


def current() -> Target:
  """The target of the program that is being traced; JAX's default backend outside `tracing_for`."""
  return _current.get() or Target(platform_of(jax.default_backend()))


@contextlib.contextmanager
def tracing_for(target: Target) -> Iterator[None]:
  """Programs traced inside are for this target."""
  token = _current.set(target)
  try:
    yield
  finally:
    _current.reset(token)
