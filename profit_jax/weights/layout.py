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
_SCALARS = ("quant_a", "quant_c")


def torch_leaf(leaf: str) -> str:
  """The name in torch of a leaf of ours; other parameters keep theirs."""
  return TORCH_LEAF.get(leaf, leaf)


def torch_shape(leaf: str, shape: tuple[int, ...], pointwise: bool = False) -> tuple[int, ...]:
  """The shape that torch's tensor has for a leaf of ours with `shape`.

  Args:
    leaf: its name. Only kernels and quantizers' scalars have another layout.
    shape: ours.
    pointwise: our dense layer is a 1x1 convolution there.
  """
  if leaf in _SCALARS:
    return (1,)
  if leaf != "kernel":
    return tuple(shape)
  if len(shape) == 4:
    return shape[3], shape[2], shape[0], shape[1]
  return (shape[1], shape[0], 1, 1) if pointwise else (shape[1], shape[0])


def from_torch(leaf: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A torch tensor as our leaf of `shape`: OIHW -> HWIO, OI or OI11 -> IO, a scalar's `[1]` ->
  `[]`, or every channel's.
  """
  if leaf in _SCALARS:
    return np.broadcast_to(np.reshape(tensor, ()), shape)
  if leaf != "kernel":
    return tensor
  return (
    np.transpose(tensor, (2, 3, 1, 0))
    if len(shape) == 4
    else np.reshape(tensor, tensor.shape[:2]).T
  )


def to_torch(leaf: str, array: np.ndarray, pointwise: bool = False) -> np.ndarray:
  """The inverse of `from_torch`; `pointwise` as in `torch_shape`."""
  if leaf == "kernel":
    array = np.transpose(array, (3, 2, 0, 1)) if array.ndim == 4 else array.T
    return np.asarray(array[:, :, None, None] if pointwise else array, order="C")
  return np.reshape(array, (1,)) if leaf in _SCALARS else np.asarray(array, order="C")
