"""Weights files: `.npz` under the authors' names."""

import zipfile
import zlib
from typing import Any

import numpy as np
from etils import epath

from profit_jax.settings import ConfigError
from profit_jax.weights.authors import import_variables


def load_variables(path: str, model: str, template: Any) -> Any:
  """A model's variables from a file; strict, see `authors.import_variables`.

  Raises:
    ConfigError: no such file, another format, or tensors that are not this model's.
  """
  file_path = epath.Path(path)
  if not file_path.exists():
    raise ConfigError(f"The weights file {path!r} does not exist. Give the path of an .npz file.")
  if not path.endswith(".npz"):
    raise ConfigError(f"The weights file {path!r} has an unknown format: it must be .npz.")
  try:
    # No pickles: a weights file must not be able to run code.
    with file_path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
      tensors = {name: file[name] for name in file.files}
  except (OSError, ValueError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
    raise ConfigError(f"The weights file {path!r} cannot be read as .npz: {error}.") from error
  odd = [name for name, tensor in tensors.items() if not np.issubdtype(tensor.dtype, np.number)]
  if odd:
    raise ConfigError(f"The weights file {path!r} has tensors that are not numbers: {', '.join(odd)}.")
  variables, _ = import_variables(model, template, tensors, path)
  return variables
