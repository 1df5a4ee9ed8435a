"""Writes a run's best weights for PyTorch: profit to-torch RUN FILE.safetensors
[--names=authors].
"""

import dataclasses
from collections.abc import Sequence

from profit_jax import devices, paths, schedule
from profit_jax.cli import command
from profit_jax.config import ConfigError, QuantSettings
from profit_jax.models import student_spec
from profit_jax.train.run_directory import read_data, read_settings
from profit_jax.weights.load import load_variables
from profit_jax.weights.naming import namings
from profit_jax.weights.save import (
  leaves_quantizers_out,
  named_tensors,
  settings_metadata,
  write_safetensors,
)
from profit_jax.weights.variants import differing_settings, nearest, nets_of


def write(run: str, file: str, names: str | None) -> str:
  """Writes the file; returns what to tell the user.

  Args:
    run: the `--workdir` of a run that has reached its plan's last bits.
    file: where to, a `.safetensors`.
    names: `authors`, `torchvision`, `timm`, `profit_jax`, or other names that the model is
      registered with; None takes those that include the quantizers' scalars, or the model's first.

  Raises:
    ConfigError: anything that the user can mend.
  """
  devices.require()
  directory = paths.opened("The run", run)
  settings = read_settings(directory, "The run")
  model = settings.model.name
  known = namings(model)
  if names is None:
    names = next((source for source in known if known[source].duq_only), next(iter(known)))
  spec = student_spec(settings, read_data(directory)["num_classes"])
  if names in known and known[names].duq_only and settings.quant != QuantSettings():
    raise ConfigError(
      f"--names={names} is not allowed: their quantizers are DuQ's, and this run has config.quant "
      "= "
      f"{dataclasses.asdict(settings.quant)}. Use --names=profit_jax."
    )
  loaded = load_variables(run, model, spec.shapes)
  tensors = named_tensors(model, loaded.variables, names)
  last = schedule.plan(settings)[-1]
  bits = schedule.bits_name(last.weight_bits, last.act_bits)
  write_safetensors(file, tensors, {"bits": bits, **settings_metadata(settings.model)})
  told = [f"Wrote {file}: {model}, {len(tensors)} float32 tensors under {names} names."]
  if leaves_quantizers_out(tensors, loaded.variables) and bits != "fp":
    told.append(
      f"WARNING: {names} names have no place for the quantizers' a and c, so that they are not in "
      "the file; the weights "
      f"were trained for {bits} and lose accuracy without them."
    )
  net = nearest(model, nets_of(model, [names], settings.model), settings.model)
  if net and net.name:
    told.append(f"Its net there: {net.name}.")
  there = net.settings if net else known[names].settings
  for name, (theirs, ours) in differing_settings(model, there, settings.model).items():
    told.append(
      f"WARNING: {net.name if net and net.name else f'the code behind {names} names'} computes "
      f"with {name} = {theirs!r}, these weights were trained with "
      f"{ours!r}: change it there, or they lose accuracy although every tensor fits."
    )
  return "\n".join(told)


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = command.parser("to-torch", __doc__)
  parser.add_argument("run", help="the --workdir of a run")
  parser.add_argument("file", help="to be written: a .safetensors")
  parser.add_argument(
    "--names", help="authors, torchvision, timm or profit_jax; the first that the model has"
  )

  def execute(options):
    print(write(options.run, options.file, options.names))

  return command.run(parser, arguments, execute)
