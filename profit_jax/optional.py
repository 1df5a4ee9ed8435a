"""Optional packages: each extra of pyproject.toml brings those that one feature needs.

The modules that import them are imported when the feature is used.
"""

import importlib.util

from profit_jax.config import ConfigError

# By extra, the names that `import` takes.
PACKAGES = {
  "tfds": ("tensorflow", "tensorflow_datasets"),
  "tensorboard": ("tensorflow", "tensorboard", "clu"),
  "plots": ("matplotlib",),
  "digits": ("sklearn",),
  "hub": ("huggingface_hub",),
  "onnx": ("onnx", "onnxruntime"),
  "qonnx": ("onnx", "onnxruntime", "qonnx"),
  "litert": ("ai_edge_litert",),
}


def missing(extra: str, feature: str, *packages: str) -> str:
  """Says which packages of an extra are not installed, and how to install them.

  Args:
    extra: a key of `PACKAGES`.
    feature: what needs the packages; the message begins with it.
    *packages: those of the extra that the feature needs; all, if none is given.

  Returns:
    The message; "" if all packages are installed.
  """
  absent = [name for name in packages or PACKAGES[extra] if not _is_installed(name)]
  if not absent:
    return ""
  are = "is" if len(absent) == 1 else "are"
  return (
    f"{feature} needs {' and '.join(absent)}, which {are} not installed. "
    f'Install with: pip install "profit_jax[{extra}]"'
  )


def require(extra: str, feature: str, *packages: str) -> None:
  """Raises a ConfigError with the message of `missing`, if there is one."""
  message = missing(extra, feature, *packages)
  if message:
    raise ConfigError(message)


def _is_installed(name: str) -> bool:
  return importlib.util.find_spec(name) is not None
