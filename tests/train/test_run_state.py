"""What a checkpoint of an earlier release gives."""

import jax
import numpy as np
import pytest

from profit_jax import checkpoints
from profit_jax.config import ConfigError
from profit_jax.train import aiwq, instability, run_state
from profit_jax.train.oscillation import freezing
from profit_jax.train.progress import Progress
from profit_jax.train.state import create_state, saved_form
from tests.specs import spec_of
from tests.train.tiny import TinyNet


def flat(name, tree):
  return {
    f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.full_like(leaf, 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def template_of(spec, **fields):
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spec.shapes)
  state = jax.device_get(create_state(variables, spec, ema=False)).replace(**fields)
  return run_state.Shapes(state, aiwq.start(spec.convs), variables, instability.start(spec.kernels))


def restored(arrays, template):
  checkpoint = checkpoints.Checkpoint(1, Progress().to_dict(), arrays)
  return run_state.restore(run_state.opened(checkpoint), template)


def test_aiwq_resumes_without_the_comparison_with_kernels_that_have_no_codes():
  spec = spec_of(TinyNet(), 16)
  template = template_of(spec)
  present = {
    **flat("state", saved_form(template.state)),
    **flat("sampling", template.sampling),
  }
  earlier = {path: leaf for path, leaf in present.items() if not path.startswith("sampling/scale/")}
  for arrays, compares in ((present, True), (earlier, False)):
    found = restored(arrays, template).sampling
    assert bool(found.has_previous) == compares
    assert set(map(float, found.metric.values())) == {1.0}
    assert jax.tree.structure(found) == jax.tree.structure(template.sampling)


def test_codes_stay_fixed_though_freezing_was_the_only_remedy_with_a_state():
  spec = spec_of(TinyNet(), 16)
  template = template_of(spec, oscillation={"freezing": freezing.start(spec.kernels)})
  present = flat("state", saved_form(template.state))
  earlier = {path.replace("/freezing/", "/"): leaf for path, leaf in present.items()}
  assert earlier.keys() != present.keys()
  for arrays in (present, earlier):
    found = restored(arrays, template).state
    assert jax.tree.structure(found) == jax.tree.structure(template.state)
    assert all(codes.all() for codes in found.oscillation["freezing"].fixed.values())


def test_codes_that_this_plan_does_not_fix_are_refused():
  spec = spec_of(TinyNet(), 16)
  freezes = template_of(spec, oscillation={"freezing": freezing.start(spec.kernels)})
  present = flat("state", saved_form(freezes.state))
  for arrays in (present, {path.replace("/freezing/", "/"): a for path, a in present.items()}):
    with pytest.raises(ConfigError, match="oscillation"):
      restored(arrays, template_of(spec))
