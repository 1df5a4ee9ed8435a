"""The programs that `benchmarks/aot.py` compiles for a target, and what they need there."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import plain_nets, program_text
from benchmarks.aot_targets import Target
from benchmarks.train_step import PROGRAMS
from configs import mbv2_w4
from profit_jax import data
from profit_jax.config import ConfigError, Settings, parse
from profit_jax.models import REGISTRY, check, student_spec
from profit_jax.nn.spec import ModelSpec
from profit_jax.train.mesh import default_dtype
from profit_jax.train.programs import Programs

MODELS = sorted(name for name, entry in REGISTRY.items() if entry.quantized)
INFO = data.KNOWN["imagenet2012"]


def one_of(flag: str, value: str, allowed: list[str]) -> None:
  """Raises ConfigError unless a flag's value is allowed."""
  if value not in allowed:
    raise ConfigError(f"{flag}={value} is not allowed: it must be one of {', '.join(allowed)}.")


def settings_of(options: argparse.Namespace, target: Target) -> Settings:
  """`configs/mbv2_w4.py` with the command line's values, no teacher, and a batch for all devices.

  Raises:
    ConfigError: a value that the command line or the settings refuse.
  """
  one_of("--model", options.model, MODELS)
  one_of("--stage", options.stage, list(PROGRAMS))
  if options.per_chip < 1:
    raise ConfigError(f"--per_chip={options.per_chip} is not allowed: it must be 1 or above.")
  config = mbv2_w4.get_config()
  config.teacher.model = "none"
  config.model.name, config.model.width = options.model, options.width
  config.data.image_size = options.image_size
  batch_size = options.per_chip * len(target.devices)
  config.train.batch_size = config.train.eval_batch_size = batch_size
  config.train.dtype = options.dtype or default_dtype(target.platform)
  if options.kernels is not None:
    config.train.kernels = options.kernels
  settings = parse(config, REGISTRY)
  check(settings)
  return settings


def spec_of(settings: Settings) -> ModelSpec:
  """The model of a run."""
  return student_spec(settings, INFO.num_classes)


def mesh_of(target: Target) -> Mesh:
  """All devices of a target on one axis."""
  return Mesh(np.asarray(target.devices), ("data",))


def compile_ours(settings: Settings, spec: ModelSpec, stage: str, mesh: Mesh) -> Any:
  """The program of a run, compiled.

  Args:
    settings: validated.
    spec: of a model, which need not be the settings'.
    stage: a key of `PROGRAMS`.
    mesh: of a target's devices.
  """
  programs = Programs(settings, INFO, spec, None, mesh)
  try:
    program = PROGRAMS[stage]
    if program is None:
      return programs.eval_step(quantized_weights=True, quantized_acts=True)
    return programs.train_step(program)
  finally:
    programs.close()


def compile_plain(settings: Settings, stage: str, mesh: Mesh, dtype: str) -> Any:
  """The plain net's training step, or its evaluation for the stage forward, compiled.

  Args:
    settings: whose model, width, image size and batch it takes.
    stage: a key of `PROGRAMS`.
    mesh: of a target's devices.
    dtype: of products and outputs, at JAX's default precision.
  """
  net = plain_nets.NETS[settings.model.name](
    width=settings.model.width, num_classes=INFO.num_classes, dtype=np.dtype(dtype)
  )
  size, batch_size = settings.data.image_size, settings.train.batch_size
  replicated = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec("data"))
  state = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
    jax.eval_shape(lambda: plain_nets.first_state(net, size)),
  )
  batch = (
    jax.ShapeDtypeStruct((batch_size, size, size, 3), np.uint8, sharding=split),
    jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=split),
  )
  if PROGRAMS[stage] is None:
    step = jax.jit(lambda *given: plain_nets.eval_step(net, *given))
    return step.lower(*state[:2], *batch).compile()
  step = jax.jit(lambda *given: plain_nets.train_step(net, *given), donate_argnums=0)
  return step.lower(state, *batch).compile()


def measured(make: Callable[[], Any], platform: str) -> tuple[dict[str, Any], str]:
  """What a program needs, and its text.

  Args:
    make: traces and compiles it.
    platform: tpu or cuda.
  """
  start = time.perf_counter()
  compiled = make()
  seconds = time.perf_counter() - start
  text, memory = compiled.as_text(), compiled.memory_analysis()
  kernels, kinds = program_text.kernels(text), program_text.kinds(text)
  figures = {
    "gb": _bytes_accessed(compiled, kernels, platform) / 1e9,
    "arguments_gb": memory.argument_size_in_bytes / 1e9,
    "temp_gb": memory.temp_size_in_bytes / 1e9,
    "code_mb": memory.generated_code_size_in_bytes / 1e6,
    "compile_s": seconds,
    "kernels": len(kernels),
    "small_kernels": sum(kernel.size < program_text.SMALL for kernel in kernels),
    "fusions": kinds.get("fusion", 0),
    "copies": kinds.get("copy", 0),
    **collectives(kinds),
    "kinds": kinds,
    "kernel_kinds": program_text.by_kind(kernels),
  }
  return figures, text


def collectives(kinds: dict[str, int]) -> dict[str, int]:
  """The numbers of collectives under the names of a JSON file (`all_reduces`, ...)."""
  return {f"{name.replace('-', '_')}s": kinds.get(name, 0) for name in program_text.COLLECTIVES}


def _bytes_accessed(compiled: Any, kernels: list[program_text.Kernel], platform: str) -> float:
  if platform == "cuda":  # where XLA gives no analysis
    return sum(kernel.size for kernel in kernels)
  # XLA does not know what a Pallas kernel reads and writes: it counts the kernel's own estimate, or
  # nothing.
  pallas = [kernel for kernel in kernels if kernel.kind == "tpu_custom_call"]
  analysed = compiled.cost_analysis().get("bytes accessed", 0.0)
  return analysed + sum(kernel.size - kernel.estimate for kernel in pallas)
