"""Processes that tests start, forked from one that has imported everything once."""

import multiprocessing
import os

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
  """Appends what this process prints to files."""
  for number, file in ((1, out), (2, err)):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
