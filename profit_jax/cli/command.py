"""What the commands with a parser have in common: `compare`, `ablate`, `predict`, `prepare`,
`sensitivity` and `to-torch`.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence

from profit_jax.config import ProfitError


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
  """The parser of `profit NAME`, which prints the description as it stands."""
  return argparse.ArgumentParser(
    prog=f"profit {name}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def run(
  options: argparse.ArgumentParser,
  arguments: Sequence[str] | None,
  action: Callable[[argparse.Namespace], int | None],
) -> int:
  """Runs a command.

  Args:
    options: that the command has.
    arguments: without the program's name; None is those of this process.
    action: does what the options say; returns an exit code, or None for 0.

  Returns:
    The exit code: that of the action, or of the error that it raised, whose message is printed.
  """
  parsed = options.parse_args(arguments)
  try:
    return action(parsed) or 0
  except ProfitError as error:
    return report(error)
  except KeyboardInterrupt:
    return interrupted()


class _Unbroken(io.FileIO):
  """Standard output or errors, of which whatever nobody takes is dropped: a run is worth more than
  what it prints.
  """

  _told = False

  def write(self, data) -> int:
    try:
      return super().write(data) or 0
    except OSError as error:
      # A pipe whose reader has gone (`| head -2`) says nothing of the run; a full disk may.
      if not isinstance(error, BrokenPipeError) and not self._told:
        self._told = True
        if self.fileno() != 2 and sys.stderr is not None:
          print(f"WARNING: output is lost: {error.strerror}.", file=sys.stderr)
      return len(data)


def keep_running_without_output() -> None:
  """From here on, this process does not fail over what it prints."""
  for name in ("stdout", "stderr"):
    before = getattr(sys, name)
    if before is None:  # closed before the process began
      continue
    before.flush()
    raw = _Unbroken(before.fileno(), "wb", closefd=False)
    after = io.TextIOWrapper(
      io.BufferedWriter(raw),
      encoding=before.encoding,
      errors=before.errors,
      line_buffering=before.line_buffering,
      write_through=before.write_through,
    )
    setattr(sys, name, after)


def interrupted(then: str = "") -> int:
  """Says that Ctrl-C ended a command, and what then; returns the exit code that shells give."""
  print(f"stopped: by SIGINT{then}.", file=sys.stderr)
  return 130


def report(error: ProfitError) -> int:
  """Prints the message of an error; returns its exit code."""
  print(f"{error.label}: {error}", file=sys.stderr)
  return error.code
