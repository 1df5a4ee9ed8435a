"""Writes `profit_jax/weights/kernels.json`, by which a weights file of another net is recognised:
python tools/write_kernels.py

To be run where a model of the package is new or has other layers.
"""

import json
import pathlib

from profit_jax.models import REGISTRY
from profit_jax.weights import mismatch

models = {
  name: entry
  for name, entry in sorted(REGISTRY.items())
  if entry.module.__module__.startswith("profit_jax.models.")
}
lines = [
  f"{json.dumps(name)}: {json.dumps(mismatch.kernels_of(name), separators=(',', ':'))}"
  for name in models
]
path = pathlib.Path(mismatch.__file__).with_name("kernels.json")
path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
print(f"{path}: {len(models)} models, {path.stat().st_size} bytes")
