"""Reads the tensors of a weights file, by format. No format can run code."""

import io
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
from etils import epath
from flax import traverse_util

from profit_jax.settings import ConfigError
from profit_jax.weights import torch_file

Tensors = dict[str, np.ndarray]

_TORCH = (".pth", ".pt", ".ckpt", ".bin", ".pth.tar")
_FORMATS = f".safetensors, .npz, {', '.join(_TORCH)}, or the --workdir of a run"
_SAFETENSORS_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Where training scripts put the weights among other things: the authors', timm's, torchvision's, lightning's.
_STATE_KEYS = ("model", "state_dict", "model_state_dict")
# What wrappers put before every name: DataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")


def read_tensors(path: str) -> Tensors:
  """The tensors of a file or of a run's best checkpoint, by the names that they have there.

  Raises:
    ConfigError: nothing there, an unknown format, a damaged file, one that carries code, or one without tensors.
  """
  place = epath.Path(path)
  if not place.exists():
    raise ConfigError(f"The weights file {path!r} does not exist. Give the path of one of {_FORMATS}.")
  if place.is_dir():
    return _read_run(place)
  readers = {".safetensors": _read_safetensors, ".npz": _read_npz, **dict.fromkeys(_TORCH, _read_torch)}
  suffix = next((suffix for suffix in readers if path.endswith(suffix)), None)
  if suffix is None:
    raise ConfigError(f"The weights file {path!r} has an unknown format: it must be one of {_FORMATS}.")
  try:
    tensors = readers[suffix](place.read_bytes())
  # Damaged files raise whatever their parsers stumble over.
  except Exception as error:
    raise ConfigError(
      f"The weights file {path!r} cannot be read as {suffix}: {str(error) or type(error).__name__}."
    ) from error
  if not tensors:
    raise ConfigError(f"The weights file {path!r} holds no tensors.")
  for prefix in _WRAPPERS:
    if all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
  return tensors


def run_settings(workdir: str) -> dict[str, Any]:
  """Section `model` of a run's configuration.

  Raises:
    ConfigError: it cannot be read.
  """
  path = epath.Path(workdir) / "config.json"
  try:
    return dict(json.loads(path.read_text())["model"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"{path} cannot be read as a run's configuration: {error}.") from error


def _read_npz(content: bytes) -> Tensors:
  # No pickles: a weights file must not be able to run code.
  file = np.load(io.BytesIO(content), allow_pickle=False)
  if not isinstance(file, np.lib.npyio.NpzFile):
    raise ValueError("it holds a single array without a name")
  with file:
    return {name: file[name] for name in file.files}


def _read_safetensors(content: bytes) -> Tensors:
  tensors = {}
  for name, entry in safetensors.deserialize(content):
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
    # Of a tensor in integers only the shape matters: it will be refused, or is a counter that nobody reads.
    data = np.zeros(entry["shape"], np.int8) if dtype is None else np.frombuffer(entry["data"], dtype)
    tensors[name] = data.reshape(entry["shape"])
  return tensors


def _read_torch(content: bytes) -> Tensors:
  tree = torch_file.read(content)
  if not isinstance(tree, Mapping):
    raise ValueError(f"it holds a {type(tree).__name__}, not a dictionary of tensors")
  for key in _STATE_KEYS:
    if isinstance(tree.get(key), Mapping):
      tree = tree[key]
      break
  odd = [f"{name!r} ({type(value).__name__})" for name, value in tree.items() if not isinstance(value, np.ndarray)]
  if odd:
    raise ValueError(f"it holds more than tensors: {', '.join(odd)}; known places of tensors are {', '.join(_STATE_KEYS)}")
  return {str(name): value for name, value in tree.items()}


def _read_run(workdir: epath.Path) -> Tensors:
  """The best weights of a run of ours, as `train/checkpoint.py` writes them."""
  best = workdir / "checkpoints" / "best"
  steps = sorted(int(step.name) for step in best.iterdir() if step.name.isdigit()) if best.exists() else []
  if not steps:
    raise ConfigError(
      f"The directory {str(workdir)!r} holds no weights: it must be the --workdir of a run that has reached its plan's "
      f"last bits, or give a file, one of {_FORMATS}."
    )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree: Any = checkpointer.restore(best / str(steps[-1]) / "variables")
  # Of a damaged checkpoint orbax raises what its parts raise.
  except Exception as error:
    raise ConfigError(f"The checkpoint {best / str(steps[-1])} cannot be read: {error}") from error
  return {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree).items()}
