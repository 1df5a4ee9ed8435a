"""What a checkpoint of an earlier release gives."""

import jax
import numpy as np

from profit_jax import checkpoints
from profit_jax.train import aiwq, instability, run_state
from profit_jax.train.progress import Progress
from profit_jax.train.state import create_state, saved_form
from tests.specs import spec_of
from tests.train.tiny import TinyNet


def flat(name, tree):
  return {
    f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.full_like(leaf, 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_aiwq_goes_on_without_the_comparison_with_kernels_that_have_no_codes():
  spec = spec_of(TinyNet(), 16)
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spec.shapes)
  state = jax.device_get(create_state(variables, spec, ema=False))
  sampling = aiwq.start(spec.convs)
  window = instability.start(spec.kernels)
  template = run_state.Shapes(state, sampling, variables, window)
  present = {**flat("state", saved_form(state)), **flat("sampling", sampling)}
  earlier = {path: leaf for path, leaf in present.items() if not path.startswith("sampling/scale/")}
  for arrays, compares in ((present, True), (earlier, False)):
    checkpoint = checkpoints.Checkpoint(1, Progress().to_dict(), arrays)
    found = run_state.restore(run_state.opened(checkpoint), template).sampling
    assert bool(found.has_previous) == compares
    assert set(map(float, found.metric.values())) == {1.0}
    assert jax.tree.structure(found) == jax.tree.structure(sampling)
