"""Strict import."""

import numpy as np
import pytest

from profit_jax.models import REGISTRY, variable_shapes
from profit_jax.settings import ConfigError
from profit_jax.weights import authors
from profit_jax.weights.load import load_variables
from tests import golden_data


@pytest.fixture(scope="module")
def template():
  return variable_shapes(REGISTRY["mobilenet_v2"](num_classes=10, width=0.5), 64)


@pytest.fixture
def tensors():
  return golden_data.tensors(golden_data.load("mobilenet_v2.json"))


def test_names_are_a_bijection_onto_the_authors(template):
  names = list(authors.tensor_names("mobilenet_v2", template).values())
  assert sorted(names) == sorted(golden_data.load("mobilenet_v2.json"))


def test_a_full_precision_file_has_no_quantizers(template, tensors, tmp_path):
  plain = {name: value for name, value in tensors.items() if name.rsplit(".", 1)[-1] not in ("a", "c")}
  np.savez(tmp_path / "w.npz", **plain, **{"features.0.1.num_batches_tracked": np.array(3)})
  variables = load_variables(str(tmp_path / "w.npz"), "mobilenet_v2", template)
  kernel = variables["params"]["block03"]["depthwise_conv"]["kernel"]
  np.testing.assert_allclose(kernel[:, :, 0, 5], plain["features.4.conv.1.0.weight"][5, 0], rtol=1e-6)
  np.testing.assert_allclose(np.logaddexp(variables["params"]["stem_conv"]["quant_a"], 0), 1.0, rtol=1e-6)


def test_every_wrong_tensor_is_listed(template, tensors):
  del tensors["features.0.0.weight"]
  tensors["surprise"] = np.zeros(3)
  tensors["classifier.1.bias"] = np.zeros(7)
  with pytest.raises(ConfigError) as error:
    authors.import_variables("mobilenet_v2", template, tensors, "w.npz")
  message = str(error.value)
  assert "missing: features.0.0.weight (16, 3, 3, 3)" in message
  assert "unexpected: surprise (3,)" in message
  assert "wrong shape: classifier.1.bias is (7,), must be (10,)" in message


def test_quantizers_in_part_are_refused(template, tensors):
  del tensors["relu6.a"]
  with pytest.raises(ConfigError, match=r"missing: relu6\.a"):
    authors.import_variables("mobilenet_v2", template, tensors, "w.npz")


def test_files_that_are_no_weights(template, tmp_path):
  (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not an archive")
  np.savez(tmp_path / "pickled.npz", **{"features.0.0.weight": np.array([object()])})
  (tmp_path / "empty.npz").touch()
  with (tmp_path / "single.npz").open("wb") as file:
    np.save(file, np.zeros(3))
  np.savez(tmp_path / "text.npz", **{"features.0.0.weight": np.array(["a"])})
  reasons = dict.fromkeys(["broken.npz", "pickled.npz", "empty.npz", "single.npz"], "cannot be read")
  reasons |= {"absent.npz": "does not exist", "text.npz": "not numbers"}
  for name, reason in reasons.items():
    with pytest.raises(ConfigError, match=reason):
      load_variables(str(tmp_path / name), "mobilenet_v2", template)
  (tmp_path / "w.h5").touch()
  with pytest.raises(ConfigError, match="unknown format"):
    load_variables(str(tmp_path / "w.h5"), "mobilenet_v2", template)
