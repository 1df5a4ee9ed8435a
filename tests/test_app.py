"""Where the student's and the teacher's first weights come from."""

import jax
import numpy as np
import pytest

from configs import digits_w4
from profit_jax import app
from profit_jax.data import SOURCES
from profit_jax.models import REGISTRY, build
from profit_jax.settings import ConfigError, parse
from tests import golden_data


@pytest.fixture
def weights_file(tmp_path):
  path = tmp_path / "weights.npz"
  np.savez(path, **golden_data.tensors(golden_data.load("trajectory_mobilenet_v2.json")["shapes"]))
  return str(path)


def first(**changes):
  config = digits_w4.get_config()
  config.update_from_flattened_dict(changes)
  settings = parse(config, REGISTRY, SOURCES)
  model = build(settings.model.name, settings.model, 10)
  variables = app._first_variables(settings, model)
  return variables, *app._teacher(settings, model, 10, variables)


def test_from_random_weights_the_student_has_no_teacher_yet():
  _, module, teacher = first()
  assert module.dropout == 0.0
  assert teacher is None
  assert first(**{"teacher.model": "none"})[1:] == (None, None)


def test_from_a_file_the_student_teaches_itself_from_the_start(weights_file):
  variables, _, teacher = first(**{"init.weights": weights_file})
  jax.tree.map(np.testing.assert_array_equal, variables(), teacher)


def test_another_model_teaches_with_its_own_width(weights_file, tmp_path):
  changes = {"teacher.model": "mobilenet_v2", "teacher.weights": weights_file, "teacher.width": 0.25}
  _, module, teacher = first(**{**changes, "model.width": 0.5})
  assert module.width == 0.25
  assert teacher["params"]["stem_conv"]["kernel"].shape == (3, 3, 3, 8)
  with pytest.raises(ConfigError, match=r"wrong shape: features\.0\.0\.weight"):
    first(**{**changes, "teacher.width": 1.0})
