"""Memory of `make demo`, all its processes together, with an empty and with a warm program cache.

python benchmarks/demo_memory.py [--limit_gb=4] [--config=configs/digits_w4.py] [main.py's options]

Runs the demo twice in fresh directories: the first run compiles every program, the second finds
them. Every 50 ms the resident memory of the run and of its children is read from /proc and summed;
shared pages count once for every process that maps them, so the sum is never too low. Prints a row
a run: the highest sum, the second at which it was reached, the last line that the run had printed
by then, and the highest sum before each printed line. Exits with 1 if a run exceeds the limit.
Linux only.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
_INTERVAL = 0.05  # seconds


def family(pid):
  """A process and all its descendants."""
  found = [pid]
  for parent in found:
    for task in pathlib.Path(f"/proc/{parent}/task").glob("*/children"):
      try:
        found += map(int, task.read_text().split())
      except OSError:  # it has ended
        continue
  return found


def resident(pid):
  """Bytes of a process in memory; 0 if it has ended."""
  try:
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
  except OSError:
    return 0
  return pages * os.sysconf("SC_PAGE_SIZE")


def measure(command, environment):
  """Runs a command; returns its samples `(seconds, bytes, lines printed)` and its lines."""
  lines, samples, start = [], [], time.perf_counter()
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
  reader.start()
  while process.poll() is None:
    total = sum(map(resident, family(process.pid)))
    samples.append((time.perf_counter() - start, total, len(lines)))
    time.sleep(_INTERVAL)
  reader.join()
  if process.returncode:
    sys.exit("".join([*lines, f"the run ended with exit code {process.returncode}"]))
  return samples, lines


def report(name, samples, lines):
  """Prints a run's row and its highest sum by printed line; returns the highest in GB."""
  seconds, highest, printed = max(samples, key=lambda sample: sample[1])
  after = lines[printed - 1].strip() if printed else "before anything is printed"
  print(
    f"{name:12} {highest / 1e9:5.2f} GB at {seconds:4.0f} s of {samples[-1][0]:.0f} s "
    f"after: {after}",
    flush=True,
  )
  by_line = {}
  for _, total, count in samples:
    by_line[count] = max(by_line.get(count, 0), total)
  for count, total in sorted(by_line.items()):
    until = lines[count].strip()[:80] if count < len(lines) else "the end"
    print(f"  {total / 1e9:5.2f} GB  until: {until}", flush=True)
  return highest / 1e9


def main():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--limit_gb", type=float, default=4.0)
  parser.add_argument("--config", default="configs/digits_w4.py")
  options, more = parser.parse_known_args()
  # As the Makefile sets it.
  environment = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    **os.environ,
  }
  highest = {}
  with tempfile.TemporaryDirectory() as directory:
    for name in ("empty cache", "warm cache"):
      command = [
        sys.executable,
        "main.py",
        f"--config={options.config}",
        f"--workdir={directory}/{name.split()[0]}",
        f"--config.compilation_cache={directory}/cache",
        *more,
      ]
      highest[name] = report(name, *measure(command, environment))
  print(f"empty over warm: {highest['empty cache'] / highest['warm cache']:.2f}")
  exceeded = [name for name, value in highest.items() if value > options.limit_gb]
  if exceeded:
    print(f"exceeds {options.limit_gb} GB: {', '.join(exceeded)}")
  return 1 if exceeded else 0


if __name__ == "__main__":
  sys.exit(main())
