"""Trains, evaluates, plans, exports: python main.py --config configs/digits_w4.py --workdir RUN
[--mode MODE].
"""

import os
import sys
import traceback

# TensorFlow only writes events here, and greets in five lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file; fields: --config.train.batch_size=64."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Directory of the run, local or gs://; a run found there goes on."
)
_FORK = flags.DEFINE_string(
  "fork_from", "", "Directory of a run: a new one takes over its first phases, if alike."
)
_SPEED = flags.DEFINE_float(
  "images_per_second", None, "Training speed; mode plan then prints hours."
)
_ADDRESS = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT of the first of several processes, if needed."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_MODE = flags.DEFINE_string("mode", "train", "train, eval, plan, export.")
_FORMATS = flags.DEFINE_list(
  "formats", "onnx,jax,safetensors", "That mode export writes; also qonnx, litert."
)


def _parse(argv):
  """Flags, with every mistake as one message and exit code 2."""
  try:
    rest = flags.FLAGS(argv)
    # A file that could not be loaded says so only when it is used.
    getattr(_CONFIG.value, "keys", None)
    return rest
  except Exception as error:  # a configuration file is code: it can raise anything
    text = str(error)
    if isinstance(error, (KeyError, AttributeError)):
      text = "unknown name in the configuration: " + text.replace("\\n", " ").replace(
        "\\'", ""
      ).replace("'", "").strip('"')
    lines = [line.strip() for line in text.strip().splitlines()] or [type(error).__name__]
    # Where a traceback or a list of attempts stands inside, the last line says what is wrong.
    short = lines[-1] if "Traceback" in text or "Attempted" in text else " ".join(lines)
    sys.exit(_fail(f"Wrong command line or configuration file: {short}"))


def _fail(message):
  print(f"error: {message}", file=sys.stderr)
  return 2


def main(argv):
  """Runs the mode; returns the exit code."""
  if len(argv) > 1:
    return _fail(f"Wrong command line: unknown arguments {argv[1:]}; every option starts with --.")
  from profit_jax import app as profit
  from profit_jax.settings import Ending

  absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    cluster = profit.Cluster(_ADDRESS.value, _PROCESSES.value, _PROCESS.value)
    profit.main(
      _CONFIG.value, _WORKDIR.value, _MODE.value, _SPEED.value, cluster, _FORMATS.value, _FORK.value
    )
    return 0
  except Ending as ending:
    print(f"{ending.label}: {ending}", file=sys.stderr)
    return profit.distributed.leave(ending.code, ending.everywhere)
  except KeyboardInterrupt:
    _fail("stopped; the same command goes on from the last checkpoint.")
    return profit.distributed.leave(130)  # what shells give a program that was interrupted
  except Exception:
    traceback.print_exc()
    return profit.distributed.leave(1)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
