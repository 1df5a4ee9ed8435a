"""The types that public signatures name."""

from typing import Any

import jax
import numpy as np

# On a device or on the host.
Array = jax.Array | np.ndarray
# Arrays under the names of modules and parameters: a nested dictionary.
Params = dict[str, Any]
# A model's collections, `params` and `batch_stats`, each nested as `Params`.
Variables = dict[str, Any]
# Arrays on the host by name: `image`, `label`, `mask`.
Batch = dict[str, np.ndarray]
