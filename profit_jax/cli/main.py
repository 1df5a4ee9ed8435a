"""The command line: `profit COMMAND`, `python -m profit_jax COMMAND`, and `main.py`.

    profit train --config configs/digits_w4.py --workdir RUN
    profit compare RUN RUN

`main.py` takes the command as `--mode`, `train` by default, and is otherwise the same.
"""

import importlib
import logging
import os
import pathlib
import re
import sys
import traceback
import warnings

# TensorFlow only writes events and reads data here, and greets in five lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from profit_jax import paths
from profit_jax.cli import command
from profit_jax.config import (
  FIELDS_NOW_RULES,
  RENAMED_FIELDS,
  ConfigError,
  ProfitError,
  renamed_field,
  unknown_field,
)

# With a configuration file or a run; the others have a module each, with a `main`.
MODES = ("train", "eval", "plan", "export")
COMMANDS = {
  "compare": "print runs side by side",
  "ablate": "train a grid of runs and compare them",
  "predict": "classify pictures or arrays with an exported file",
  "prepare": "download and prepare a tensorflow-datasets set",
  "sensitivity": "measure where bits matter, and assign them within a budget",
  "to-torch": "write a run's best weights for PyTorch",
}
# Of a command line: a field's name, without the index of an element; and the configuration file,
# where arguments are separated by line ends.
_OVERRIDE = re.compile(r"--?config\.([^=\[]*)")
_CONFIG_FILE = re.compile(r"^--?config[=\n]([^:\n]*)", re.MULTILINE)
# What absl and ml_collections raise for wrong options and fields; a configuration file may, too.
_OF_OPTIONS = (flags.Error, AttributeError, LookupError, TypeError, ValueError)
_USAGE = "usage: profit COMMAND [OPTIONS]; profit COMMAND --help lists the options."


def define(values, argv=None):
  """Defines the options.

  Args:
    values: the `flags.FlagValues` that get them.
    argv: the command line with the overrides of single fields; None is that of this process.
  """
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file; fields: --config.train.batch_size=64.",
    flag_values=values,
    sys_argv=argv,
  )
  for define_flag, name, default, text in (
    (flags.DEFINE_string, "workdir", "", "Directory of the run, local or gs://; resumes its run."),
    (flags.DEFINE_string, "mode", "train", "train, eval, plan or export."),
    (
      flags.DEFINE_string,
      "fork_from",
      "",
      "Run whose first phases a new run takes over, if alike.",
    ),
    (flags.DEFINE_float, "images_per_second", None, "Training speed; mode plan then prints hours."),
    (
      flags.DEFINE_list,
      "formats",
      "onnx,jax,safetensors",
      "Of mode export; also qonnx, litert, litert_packed.",
    ),
    (flags.DEFINE_string, "coordinator_address", None, "HOST:PORT of the first of the processes."),
    (flags.DEFINE_integer, "num_processes", None, "Number of processes, if there are several."),
    (flags.DEFINE_integer, "process_id", None, "Number of this process, from 0."),
  ):
    define_flag(name, default, text, flag_values=values)


def run(argv):
  """Runs a command line in this process.

  Args:
    argv: the program's name, then the options.

  Returns:
    The exit code, and whether all processes of the run leave for the same reason.
  """
  values = flags.FlagValues()
  define(values, argv)
  try:
    return _execute(values, _parse(values, argv))
  except ConfigError as error:
    return _report(error)


def _parse(values, argv):
  """Reads the options and the configuration file; gives the arguments that are no options."""
  for argument in argv:
    if found := _OVERRIDE.match(argument):
      field = found[1]
      if told := renamed_field(field) or unknown_field(field):
        raise ConfigError(f"--config.{field} is not allowed: {told}")
  files = _CONFIG_FILE.findall("\n".join(argv))
  if files:
    paths.require_file(
      "--config=", files[-1], "Give a configuration file, as --config=configs/digits_w4.py."
    )
  # Python would load a file over the one before, which leaves that one's functions.
  sys.modules.pop("config_config", None)
  try:
    with warnings.catch_warnings():
      # ml_collections' way to load a file.
      warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
      rest = values(argv)
    # A file that could not be loaded says so only when it is used.
    getattr(values.config, "keys", None)
    return rest
  except Exception as error:  # a configuration file is code: it can raise anything
    if files:
      _require_get_config(error, files[-1])
    if files and not isinstance(error, _OF_OPTIONS):
      raise ConfigError(
        f"--config={files[-1]} cannot be used: {type(error).__name__}: {_in_short(error)}. Correct "
        "that file."
      ) from error
    raise ConfigError(f"Wrong command line or configuration file: {_in_short(error)}") from error


def _require_get_config(error, file):
  """Raises ConfigError where a file has no get_config, as those of `profit ablate`."""
  if not (isinstance(error, AttributeError) and error.name == "get_config"):
    return
  path = pathlib.Path(file)
  told = "has no function get_config, as configs/digits_w4.py has. Give a configuration file."
  if "get_grid" in path.read_text(errors="replace"):
    told = "is a grid of runs, not the configuration of one. Train it with: profit ablate "
    told += f"--config={path} --workdir=DIR"
  raise ConfigError(f"--config={path} {told}") from error


def _in_short(error):
  """An error of absl or ml_collections in one line."""
  text = str(error)
  if isinstance(error, IndexError):  # as of --config.plan.weight_bits[0]=8
    return f'{text}. Give a tuple as a whole, as --config.plan.weight_bits="(8, 4)".'
  if isinstance(error, (KeyError, AttributeError)):
    text = text.replace("\\n", " ").replace("\\'", "").replace("'", "").strip('"')
    absent = re.match(r'Key "(\w+)" does not exist', text)  # and then all fields that do
    text = absent[1] if absent else text
    fields = ("remedy", *RENAMED_FIELDS, *FIELDS_NOW_RULES)
    words = set(re.findall(r"\w+", text))
    old = [field for field in fields if field.rpartition(".")[2] in words]
    hint = f" {renamed_field(old[0])}" if old else ""
    if absent and not old:
      hint = f": {unknown_field(text) or 'there is no such field.'}"
    return f"unknown name in the configuration: {' '.join(text.split())}{hint}"
  # Where a traceback or a list of attempts is inside, the last line says what is wrong.
  lines = [line.strip() for line in text.strip().splitlines()] or [type(error).__name__]
  return lines[-1] if "Traceback" in text or "Attempted" in text else " ".join(lines)


def _imported(name):
  """A module of this package. JAX refuses wrong values of its variables when it is imported."""
  try:
    return importlib.import_module(f"profit_jax.cli.{name}")
  except ValueError as error:
    raise ConfigError(
      f"JAX does not start with this environment: {error}. Correct that variable or unset it."
    ) from error


def _execute(values, rest):
  """Runs the mode; returns what `run` does."""
  absl_logging.set_verbosity(absl_logging.ERROR)
  # As the run's own lines, without time, thread and source file.
  absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
  try:
    if len(rest) > 1:
      raise ConfigError(
        f"Wrong command line: unknown arguments {rest[1:]}; every option starts with --."
      )
    profit = _imported("app")
    profit.main(
      values.config,
      values.workdir,
      values.mode,
      values.images_per_second,
      profit.Cluster(values.coordinator_address, values.num_processes, values.process_id),
      values.formats,
      values.fork_from,
    )
    return 0, False
  except ProfitError as error:
    return _report(error)
  except KeyboardInterrupt:
    return command.interrupted("; the same command resumes from the last checkpoint"), False
  except Exception:
    traceback.print_exc()
    return 1, False


def _report(ending):
  return command.report(ending), ending.everywhere


def _parse_or_exit(argv):
  if {"--help", "-help", "-h"} & {*argv}:  # absl's lists no options, and ends with 1
    print(_options())
    sys.exit(0)
  try:
    return _parse(flags.FLAGS, argv)
  except ConfigError as error:
    sys.exit(_report(error)[0])


def _options() -> str:
  """The help of the commands with a configuration file or a run."""
  known = flags.FLAGS
  here = {known.find_module_defining_flag(name) for name in ("config", "workdir")}
  names = sorted(name for name in known if known.find_module_defining_flag(name) in here)
  lines = [f"  --{name:20} {known[name].help}" for name in names]
  return "\n".join([__doc__ or "", "Options:", *lines])


def _run_and_leave(rest):
  code, everywhere = _execute(flags.FLAGS, rest)
  if "jax" not in sys.modules:  # it could not be imported
    return code
  from profit_jax import distributed

  return distributed.leave(code, everywhere)


def main() -> None:
  """Runs `main.py`'s command line, and ends the process."""
  command.keep_running_without_output()
  define(flags.FLAGS)
  app.run(_run_and_leave, flags_parser=_parse_or_exit)


def profit() -> int | None:
  """Runs a command line that begins with a command; returns its exit code."""
  command.keep_running_without_output()
  program, *rest = sys.argv
  # Configuration files import others beside them, as `configs/base.py`; so does `python -m`.
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  name = rest[0] if rest else "--help"
  if name in MODES:
    sys.argv = [program, f"--mode={name}", *rest[1:]]
    return main()
  if name in COMMANDS:
    try:
      module = _imported(name.replace("-", "_"))
    except ConfigError as error:
      return command.report(error)
    except KeyboardInterrupt:
      return command.interrupted()
    return module.main(rest[1:])
  if name in ("--help", "-h", "help"):
    print(_help())
    return 0
  if name == "--version":
    from profit_jax import __version__

    print(__version__)
    return 0
  allowed = ", ".join((*MODES, *COMMANDS))
  return command.report(ConfigError(f"{name!r} is not a command: it must be one of {allowed}."))


def _help() -> str:
  modes = {
    "train": "train or resume a run",
    "eval": "evaluate a run's best checkpoint, or a weights file",
    "plan": "print the phases of a configuration",
    "export": "write a run's best checkpoint as verified integer model files",
  }
  lines = [f"  {name:11} {text}" for name, text in (modes | COMMANDS).items()]
  return "\n".join([_USAGE, "", *lines])
