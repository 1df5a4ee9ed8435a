"""Processes that tests start, forked from one that has imported everything once."""

import multiprocessing
import os
import sys

# Each would import TensorFlow, which takes longer than what most of them do.
_IMPORTED = ["tensorflow", "main", "tests.train.killed", "tests.train.processes"]


def start(target, *arguments):
  """A process that has begun to call a function of a module among those imported."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(_IMPORTED)
  process = context.Process(target=target, args=arguments)
  process.start()
  return process


def redirect(out, err):
  """Appends what Python prints in this process to `out`, and to `err` its errors and whatever the
  libraries below it write, whose threads (Gloo's) break each other's lines on standard output.
  """
  for number in (1, 2):
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
  sys.stdout = open(out, "a", buffering=1)  # noqa: SIM115 - as long as the process
