"""What plots and reports say of layers."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np

from configs import base
from profit_jax.config import parse
from profit_jax.nn.layers import QuantAct, QuantDense
from profit_jax.nn.spec import describe
from profit_jax.quant import PACT, Bits
from profit_jax.quant.bits import LayerBits
from profit_jax.report import plots, policy
from profit_jax.schedule import plan


def test_layers_stand_from_input_to_output():
  layers = [
    *(
      "stem_conv",
      "block00/depthwise_conv",
      "block00/squeeze_excite/reduce",
      "block00/squeeze_excite/expand",
    ),
    *(
      "block00/project_conv",
      "block01/expand_conv",
      "block01/depthwise_conv",
      "block01/project_conv",
    ),
    *("head_conv", "pre_classifier", "classifier"),
  ]
  names, values = plots.layer_matrix(
    [{layer: float(index) for index, layer in enumerate(sorted(layers))}]
  )
  assert names == layers
  assert list(values[:, 0]) == [sorted(layers).index(layer) for layer in layers]
  assert plots.layer_matrix([{"stem_norm": 0.0}]) is None


class Mixed(nn.Module):
  """A quantized layer and a plain one."""

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    x = QuantAct("symmetric", name="input")(nn.Dense(6, name="plain")(x), bits)
    return QuantDense(5, name="quantized")(x, bits)


def test_plain_kernels_have_no_codes():
  params = describe(Mixed(), (4,)).init(jax.random.key(0))["params"]
  shares = plots.code_shares(params, Bits(4))
  assert list(shares) == ["quantized"]
  in_float = Bits(4, own=(LayerBits("quantized", "weight", None),)).at(4, None)
  assert plots.code_shares(params, in_float) == {}
  np.testing.assert_allclose(shares["quantized"].sum(), 1.0)


def test_the_policy_lists_what_is_quantized():
  settings = parse(base.get_config(), ["mobilenet_v2"])
  data = {"train_examples": 10, "eval_examples": 5, "num_classes": 5, "fingerprint": ""}
  environment = {"devices": 1, "device": "cpu", "packages": {}, "commit": None}
  # PACT's kernels have no scalars.
  spec = describe(Mixed(), (4,), Bits(quantizer=PACT()))
  lines = policy.markdown(settings, plan(settings), data, environment, spec)
  assert "1 kernels, 1 quantizers of activations:" in lines
  assert "| quantized | 6x5 | 4 |" in lines
  assert "| input | activations | 4 |" in lines
  assert not any("plain" in line for line in lines)


def test_a_home_that_cannot_be_written_is_not_spoken_of():
  environment = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
  environment |= {"HOME": "/dev/null", "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": ""}
  done = subprocess.run(
    [sys.executable, "-c", "import profit_jax.report.plots"],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  assert (done.stdout, done.stderr) == ("", "")
