"""Weights of modules: written, read back, and refused where they are another model's."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import profit_jax as pj
from profit_jax import checkpoints
from profit_jax.models import REGISTRY
from tests.specs import spec_of
from tests.train.tiny import TinyNet

SHAPE = (16, 16, 3)


class OwnNet(TinyNet):
  """A model that is not registered, whatever other tests in the process register."""


@pytest.fixture(scope="module")
def variables():
  return jax.device_get(spec_of(OwnNet(), 16).init(jax.random.key(0)))


def test_weights_come_back_to_the_bit(tmp_path, variables):
  pj.save_weights(variables, tmp_path / "tiny.safetensors")
  back = pj.load_weights(tmp_path / "tiny.safetensors", OwnNet(), SHAPE)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


class Low(nn.Module):
  """With a leaf that is not float32."""

  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    low = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    return nn.Dense(3, **low)(jnp.mean(x, (1, 2))).astype(x.dtype)


def test_weights_keep_their_dtypes(tmp_path):
  variables = jax.device_get(spec_of(Low(), 16).init(jax.random.key(0)))
  pj.save_weights(variables, tmp_path / "low.safetensors")
  back = pj.load_weights(tmp_path / "low.safetensors", Low(), SHAPE)
  kernels = [tree["params"]["Dense_0"]["kernel"] for tree in (back, variables)]
  assert kernels[0].dtype == kernels[1].dtype == jnp.bfloat16
  np.testing.assert_array_equal(*kernels)


def test_the_weights_of_a_run_of_the_library_are_read_from_its_directory(tmp_path, variables):
  (tmp_path / "config.json").write_text(json.dumps({"library": "0.2.0", "model": "TinyNet"}))
  writer = checkpoints.Writer(tmp_path / "checkpoints", keep=1)
  writer.save(1, {"best": variables}, {})
  writer.close()
  back = pj.load_weights(tmp_path, TinyNet(), SHAPE)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize(
  ("model", "quantizer", "message"),
  [
    (
      OwnNet(num_classes=3),
      pj.DuQ(),
      r"classifier/kernel is \(16, 10\), must be \(16, 3\)",
    ),
    (OwnNet(), pj.LSQ(), r"unexpected: params/.*/quant_c\b.*and \d+ more"),
    (OwnNet(), pj.QIL(), r"missing: \S+/quant_(width|center)"),
  ],
)
def test_the_weights_of_another_model_are_refused(tmp_path, variables, model, quantizer, message):
  file = tmp_path / "tiny.safetensors"
  pj.save_weights(variables, file)
  with pytest.raises(pj.ConfigError, match=message):
    pj.load_weights(file, model, SHAPE, quantizer=quantizer)


def test_a_registered_model_takes_every_name_that_it_has(tmp_path):
  model = REGISTRY["mobilenet_v2"](num_classes=3, width=0.1)
  drawn = jax.device_get(spec_of(model, 32).init(jax.random.key(0)))
  pj.save_weights(drawn, tmp_path / "v2.safetensors")
  back = pj.load_weights(tmp_path / "v2.safetensors", model, (32, 32, 3))
  for name in ("params", "batch_stats"):
    jax.tree.map(np.testing.assert_array_equal, back[name], drawn[name])
