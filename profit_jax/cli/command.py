"""What the commands with a parser have in common: `compare`, `ablate`, `predict`, `prepare`,
`sensitivity` and `to-torch`.
"""

import argparse
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


def report(error: ProfitError) -> int:
  """Prints the message of an error; returns its exit code."""
  print(f"{error.label}: {error}", file=sys.stderr)
  return error.code
