"""The training steps of another commit, in a process of their own; for `train_step.py --against`.

    python benchmarks/other_commit.py DIRECTORY OPTIONS

It prints a line of JSON for each stage, and then, for each line "stage count" that it reads, an
empty line when that many steps are done.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator


class Stages:
  """The compiled steps of a checkout of this project.

  Attributes:
    directory: the checkout.
  """

  def __init__(self, directory: str, options: argparse.Namespace) -> None:
    """Starts the process; it compiles while this one goes on."""
    self.directory = pathlib.Path(directory).resolve()
    self._process = subprocess.Popen(
      [sys.executable, __file__, str(self.directory), json.dumps(vars(options))],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def contenders(self) -> Iterator[tuple[str, Callable[[int], None], dict[str, float]]]:
    """Waits for the compiler, and gives every stage, what runs it, and the compiler's facts."""
    for stage, facts in json.loads(self._answer()):
      yield stage, self._runs(stage), facts

  def _runs(self, stage: str) -> Callable[[int], None]:
    def run(count: int) -> None:
      print(stage, count, file=self._process.stdin, flush=True)
      self._answer()

    return run

  def _answer(self) -> str:
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f"the process of {self.directory} ended; see above")
    return line


def main() -> None:
  """Serves the stages of the checkout that the command line names."""
  answers, sys.stdout = sys.stdout, sys.stderr  # whatever that commit prints
  sys.path.remove(str(pathlib.Path(__file__).resolve().parent))
  sys.path.insert(0, sys.argv[1])
  from benchmarks import train_step

  options = argparse.Namespace(**json.loads(sys.argv[2]))
  stages = {one.stage: one for one in train_step.ours(options, options.stages.split(","))}
  print(json.dumps([(name, one.facts) for name, one in stages.items()]), file=answers, flush=True)
  for line in sys.stdin:
    stage, count = line.split()
    stages[stage].run(int(count))
    print(file=answers, flush=True)


if __name__ == "__main__":
  main()
