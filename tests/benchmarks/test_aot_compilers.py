"""The compilers for TPUs and NVIDIA GPUs accept the steps. They need requirements-accelerators.txt,
without which these tests fail.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.benchmarks.compile_tiny import PROGRAMS

ROOT = pathlib.Path(__file__).parent.parent.parent
TARGETS = ("v5e:2x2", "h100:4")  # four devices each


@functools.cache
def compiled(target):
  """A separate process, with one compiler that ends with it."""
  # The tests' XLA flags are the CPU's.
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return subprocess.run(
    [sys.executable, "-m", "tests.benchmarks.compile_tiny", target],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


def figures(target, net, stage, dtype):
  done = compiled(target)
  assert done.returncode == 0, done.stderr[-5000:]
  found = {(one["net"], one["stage"], one["dtype"]): one for one in json.loads(done.stdout)}
  return found[net.__name__, stage, dtype]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: f"{one[0].__name__}-{one[1]}")
@pytest.mark.parametrize("target", TARGETS)
def test_a_step_compiles_for_four_devices(target, program):
  found = figures(target, *program)
  assert found["gb"] > 0
  assert found["kernels"] >= found["small_kernels"] > 0
  assert found["all_reduces"] > 0


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: f"{one[0].__name__}-{one[1]}")
@pytest.mark.parametrize("target", TARGETS)
def test_devices_send_each_other_sums_only(target, program):
  # An all-gather would mean that every device computes the whole batch of an operation.
  assert figures(target, *program)["all_gathers"] == 0
