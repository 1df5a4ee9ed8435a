"""Writes a run's best weights for PyTorch: python -m profit_jax.to_torch RUN FILE.safetensors [--names=authors]."""

import argparse
import sys
from collections.abc import Sequence

import ml_collections
from etils import epath

from profit_jax import data, plan
from profit_jax.models import REGISTRY, build, variable_shapes
from profit_jax.report.files import read_config
from profit_jax.settings import ConfigError, Settings, parse
from profit_jax.weights.load import load_variables, namings
from profit_jax.weights.save import leaves_quantizers_out, named_tensors, write_safetensors


def write(run: str, file: str, names: str | None) -> str:
  """Writes the file; returns what to tell the user.

  Args:
    run: the `--workdir` of a run that has reached its plan's last bits.
    file: where to, a `.safetensors`.
    names: `authors`, `torchvision`, `timm` or `profit_jax`; None takes the first of these that the model has.

  Raises:
    ConfigError: anything that the user can mend.
  """
  settings = parse(ml_collections.ConfigDict(read_config(epath.Path(run))), REGISTRY, data.SOURCES)
  model = settings.model.name
  if names is None:
    names = next(source for source in ("authors", "torchvision", "timm", "profit_jax") if source in namings(model))
  module = build(settings.model, data.check_sizes(settings).num_classes)
  loaded = load_variables(run, model, variable_shapes(module, settings.data.image_size))
  tensors = named_tensors(model, loaded.variables, names)
  last = plan.plan(settings)[-1]
  bits = plan.bits_name(last.weight_bits, last.act_bits)
  write_safetensors(file, tensors, {"bits": bits, **_metadata(settings)})
  told = f"Wrote {file}: {model}, {len(tensors)} float32 tensors under {names} names."
  if leaves_quantizers_out(tensors, loaded.variables):
    told += f" WARNING: {names} names have no place for the quantizers' a and c, so that they are not in the file"
    told += f"; the weights were trained for {bits} and lose accuracy without them." if bits != "fp" else "."
  return told


def _metadata(settings: Settings) -> dict[str, str]:
  """What someone who rebuilds the net has to know, as text."""
  return {field: str(value) for field, value in settings.to_dict()["model"].items()}


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m profit_jax.to_torch", description=__doc__)
  parser.add_argument("run", help="the --workdir of a run")
  parser.add_argument("file", help="to be written: a .safetensors")
  parser.add_argument("--names", help="authors, torchvision, timm or profit_jax; the first that the model has")
  options = parser.parse_args(arguments)
  try:
    print(write(options.run, options.file, options.names))
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
