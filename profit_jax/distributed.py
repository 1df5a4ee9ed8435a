"""One run on several machines: how the processes find each other, what they must agree on, and who
writes.

Every process runs the same program on the same configuration, each with its own part of every
batch. The first one alone prints, writes TensorBoard events and reports; checkpoints are orbax's
business, which lets the first one write too.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from profit_jax.config import ConfigError, ProfitError

_T = TypeVar("_T")
# Without the first process, JAX aborts the others: it leaves with them, or some seconds after it
# has failed.
_LAST, _OUTLIVES = 20.0, 2.0
PATIENCE = 300.0  # seconds in which the processes must have started; JAX's own is the same


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int = 100,
  environment: Mapping[str, str] = os.environ,
) -> None:
  """Joins the other processes of the run; must come before anything that asks for devices.

  On a Cloud TPU, and under Slurm or Open MPI with several tasks, all is found without arguments; a
  process that is alone stays alone.

  Args:
    coordinator_address: `HOST:PORT` of the first process, or None.
    num_processes: in all, or None.
    process_id: this one's number, from 0, or None.
    heartbeat_seconds: after which JAX takes a silent process for lost; the default is JAX's own.
    environment: of this process; Slurm and Open MPI describe a job in it.

  Raises:
    ConfigError: an incomplete or impossible choice, or processes that did not meet.
  """
  if jax.distributed.is_initialized():
    return
  given = {
    "coordinator_address": coordinator_address,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise ConfigError(
      f"--{missing[0]} is missing: --{', --'.join(given)} belong together. Give all of them or "
      "none."
    )
  if not missing:
    if not 1 <= num_processes < 2**31:
      raise ConfigError(
        f"--num_processes={num_processes} is not allowed: it must be 1 or above, below 2^31."
      )
    if not 0 <= process_id < num_processes:
      raise ConfigError(
        f"--process_id={process_id} is not allowed: it must be 0 to {num_processes - 1} "
        "(--num_processes)."
      )
    host, port = _host_and_port(coordinator_address)
    if process_id:
      wait_for_coordinator(host, port)
  elif not (_on_tpu() or started_tasks(environment) > 1):
    return
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except (RuntimeError, ValueError) as error:
    told = (
      ", ".join(f"--{name}={value}" for name, value in given.items())
      if not missing
      else "automatically"
    )
    raise ConfigError(
      f"This process could not join the others ({told}): {' '.join(str(error).split())[:300]} "
      "Start the same command on "
      "every machine at the same time, and let them reach the first one's port; or give "
      f"--{', --'.join(given)}."
    ) from error


def _host_and_port(address: str) -> tuple[str, int]:
  host, _, port = address.rpartition(":")
  with contextlib.suppress(UnicodeError):
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
    if host.encode("idna") and re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) < 2**16:
      return host, int(port)
  raise ConfigError(
    f"--coordinator_address={address} is not allowed: it must be HOST:PORT, as 10.0.0.2:8476, "
    "with a port from 1 to 65535."
  )


def wait_for_coordinator(host: str, port: int, seconds: float = PATIENCE) -> None:
  """Waits until the first process answers. JAX itself would abort with a fatal error and a stack.

  Args:
    host: of the first process.
    port: where it listens.
    seconds: to wait at most.

  Raises:
    ConfigError: nothing answered in that time.
  """
  end = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host, port), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise ConfigError(
          f"--coordinator_address={host}:{port} did not answer for {seconds:.0f} seconds "
          f"({error}). Start process 0 with "
          f"the same address, its own, and let the others reach that port."
        ) from error
      time.sleep(1)


def started_tasks(environment: Mapping[str, str]) -> int:
  """How many processes Slurm or Open MPI has started of this program; 1 without them."""
  if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
    return int(environment.get("SLURM_NTASKS", "1"))
  return int(environment.get("OMPI_COMM_WORLD_SIZE", "1"))


def _on_tpu() -> bool:
  devices = pathlib.Path("/dev")
  there = any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
  return there and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
  """Whether this process prints and writes."""
  return jax.process_index() == 0


def on_all_hosts(action: Callable[[], _T]) -> _T:
  """Runs an action that may fail in one process and not in the others: they would wait for it in
  vain.

  Raises:
    ConfigError: where it did not fail, but elsewhere.
    Exception: what it raised here.
  """
  result, failure = None, None
  try:
    result = action()
  except Exception as error:  # whatever it is, the others must know
    failure = error
  failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(failure is not None)))
  if failure is not None:
    raise failure
  if len(failed):
    raise ConfigError(f"process {failed[0]} stopped; its message says why.")
  return result


def on_first_host(action: Callable[[], _T]) -> _T:
  """Runs an action in the first process while the others wait: they may see a directory as it was
  a second ago.

  Returns:
    What it gave, in all processes; JSON must hold it.

  Raises:
    ConfigError: as `on_all_hosts`.
  """
  if jax.process_count() == 1:  # 150 us sooner, of every step
    return action()
  content = on_all_hosts(lambda: json.dumps(action()).encode() if is_first() else b"")
  size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(content), np.int32)))
  padded = np.resize(np.frombuffer(content, np.uint8), size)
  return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def true_on_all_hosts(value: bool) -> bool:
  """Whether a value is true in every process."""
  return bool(multihost_utils.process_allgather(np.asarray(value)).all())


def require_equal(
  what: str,
  text: str,
  gather: Callable[[np.ndarray], np.ndarray] = multihost_utils.process_allgather,
) -> None:
  """Compares a text of all processes.

  Args:
    what: it is, as a message calls it.
    text: this process's.
    gather: stacks the arrays that all processes give it.

  Raises:
    ConfigError: they differ; the message names the processes that differ from process 0.
  """
  digests = gather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32))
  others = [i for i, theirs in enumerate(digests) if not np.array_equal(theirs, digests[0])]
  if others:
    raise ConfigError(
      f"processes {others} have other {what} than process 0. All processes must have the same."
    )


class PeerLost(ProfitError):
  """Another process of the run is gone."""


# What collectives and the coordination service say then: gloo (CPUs), NCCL (GPUs), JAX's own.
_PEER_LOST = re.compile(
  "gloo|nccl|connection|unavailable|heartbeat|deadline|peer|another task", re.IGNORECASE
)


@contextlib.contextmanager
def peers_needed() -> Iterator[None]:
  """Within, the loss of another process is told as such.

  Raises:
    PeerLost: a collective failed because of it. JAX itself notices after 100 s at the latest, by
      missing heartbeats.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    text = " ".join(str(error).split())
    if jax.process_count() == 1 or not _PEER_LOST.search(text):
      raise
    raise PeerLost(
      "Another process of this run has ended or cannot be reached; its own output may say why "
      f"({text[:200]}). Start the "
      f"same command on all machines again: the run goes on from its last checkpoint."
    ) from error


def leave(code: int, everywhere: bool = False) -> int:
  """The exit code. Where it is not 0 the process ends here: Python would wait for what is being
  compiled in the background, and JAX, of several processes, minutes for others that wait for this
  one.

  Args:
    code: to exit with.
    everywhere: all processes leave for the same reason, and wait for each other.
  """
  if code:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and everywhere:
      meeting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
      meeting.start()
      meeting.join(_LAST)
    elif jax.distributed.is_initialized() and is_first():
      time.sleep(_OUTLIVES)
    os._exit(code)
  return code
