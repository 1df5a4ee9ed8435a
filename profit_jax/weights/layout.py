"""The one place where a tensor's layout changes between torch's and ours."""

import numpy as np

# Our leaf names, and torch's; DuQ's scalars have the names of the authors' classes.
TORCH_LEAF = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
  "quant_a": "a",
  "quant_c": "c",
}


def from_torch(leaf: str, tensor: np.ndarray) -> np.ndarray:
  """A torch tensor as the leaf of that name: OIHW -> HWIO, OI -> IO, the scalars' `[1]` -> `[]`."""
  if leaf == "kernel":
    return np.transpose(tensor, (2, 3, 1, 0) if tensor.ndim == 4 else (1, 0))
  if leaf in ("quant_a", "quant_c"):
    return np.reshape(tensor, ())
  return tensor


def torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that torch's tensor has for a leaf of ours with `shape`."""
  if leaf == "kernel":
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else (shape[1], shape[0])
  return (1,) if leaf in ("quant_a", "quant_c") else tuple(shape)
