"""Any model made of our layers becomes a net that computes what it computes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from profit_jax.config import ConfigError, QuantSettings
from profit_jax.export import formats, quantizers, reference, verify
from profit_jax.export.build import build_net
from profit_jax.export.costs import costs
from profit_jax.export.net import Activation, Affine, Clip, Concat, Layer, Pool, Value
from profit_jax.models import build
from profit_jax.nn.layers import BatchNorm, QuantAct, QuantConv, QuantDense
from profit_jax.quant import bits as quant_bits
from profit_jax.quant.methods import METHODS
from profit_jax.quant.quantized import value_of
from tests.export import own_models
from tests.export.nets import (
  images,
  net_of,
  random_values,
  random_variables,
  raw,
  small_settings,
)

OWN = (own_models.Branches, own_models.Plain, own_models.Codes)


def variables_of(model, shape=own_models.IMAGE_SHAPE):
  image = np.zeros((1, *shape), np.float32)
  return random_values(jax.eval_shape(lambda key: model.init(key, image), jax.random.key(0)))


def own_net(model, bits=4, shape=own_models.IMAGE_SHAPE, variables=None):
  return build_net(
    model,
    variables_of(model, shape) if variables is None else variables,
    name="own",
    image_shape=shape,
    normalization=None,
    weight_bits=bits,
    act_bits=bits,
  )


def float_images(count=24):
  return np.float32(np.random.default_rng(0).normal(0.3, 1.0, (count, *own_models.IMAGE_SHAPE)))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("make", OWN)
def test_an_own_models_codes_are_the_nets(make, bits):
  model = make()
  variables = variables_of(model)
  net = own_net(model, bits, variables=variables)
  outputs = verify.trained_codes(net, model, variables, None)(float_images())
  compared = verify.compare(net, [float_images()], lambda _: outputs)
  assert compared.at_ties, [row for row in compared.rows if row.apart]
  assert compared.logits < 1e-5
  for name, codes in outputs[1].items():  # else they would be easy to agree on
    assert len(np.unique(codes)) >= 4, name


@pytest.mark.parametrize("name", formats.DEFAULT)
@pytest.mark.parametrize("make", OWN)
def test_a_file_computes_an_own_models_codes(tmp_path, name, make):
  net = own_net(make())
  path = tmp_path / f"net{formats.FORMATS[name].suffix}"
  module = formats.load(name)
  module.write(net, path)
  compared = verify.compare(net, [float_images()], verify.file_codes(module.open_file(path)))
  assert compared.exact, [row for row in compared.rows if row.differing]
  assert compared.logits < 1e-5


def kinds(net):
  return [type(node).__name__ for node in net.nodes]


def test_what_is_between_layers_becomes_few_nodes():
  net = own_net(own_models.Plain())
  assert kinds(net) == []
