"""Whether a configuration that is accepted can be trained, without compiling anything."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs import digits_w4
from profit_jax import schedule
from profit_jax.config import parse
from profit_jax.data.digits import INFO
from profit_jax.models import REGISTRY
from profit_jax.models.mobilenet_v3 import Block
from profit_jax.nn.layers import BatchNorm, Dropout, QuantAct, QuantConv, QuantDense
from profit_jax.quant.base import HSWISH_MINIMUM
from profit_jax.quant.bits import Bits
from profit_jax.train import start
from profit_jax.train.programs import Programs
from profit_jax.train.progress import Progress


class TwoBlocks(nn.Module):
  """The smallest net with the operations and options of all models: h-swish, squeeze-excite,
  negative padding, both strides. It has a registered model's attributes.
  """

  num_classes: int = 10
  width: float = 1.0
  dropout: float = 0.1
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  squeeze_excite: str = "before"
  pad_value: float = HSWISH_MINIMUM

  @nn.compact
  def __call__(self, x, bits=Bits(), train=False):
    dense = QuantDense
    norm = functools.partial(BatchNorm, momentum=self.bn_momentum, epsilon=self.bn_epsilon)
    block = functools.partial(
      Block,
      kernel_size=3,
      hidden=16,
      features=8,
      squeeze_excite=self.squeeze_excite,
      pad_value=self.pad_value,
      dense=dense,
      norm=norm,
    )
    first = block(stride=2, squeezed=8, hswish=True, input_kind="hswish", name="block00")
    second = block(stride=1, squeezed=0, hswish=False, input_kind="symmetric", name="block01")

    x = QuantConv(8, 3, 2, name="stem_conv")(x, bits)
    x = norm(fused=False, name="stem_norm")(x, train, "hard_swish")
    x = second(first(x, bits, train), bits, train)
    x = Dropout(self.dropout, name="dropout")(jnp.mean(x, axis=(1, 2)), train)
    x = QuantAct("symmetric", name="classifier_quant")(x, bits)
    return dense(self.num_classes, name="classifier")(x, bits)


def deep_check(model, changes):
  """Traces the step of the plan's last phase, as a run does before it compiles it.

  Args:
    model: that `configs/digits_w4.py` is asked for.
    changes: of fields, by their names, as `train.dtype`.
  """
  config = digits_w4.get_config(model)
  config.update_from_flattened_dict({**changes, "compilation_cache": ""})
  settings = parse(config, REGISTRY)
  student = start.load_student(settings, 10, Progress())
  teacher = start.load_teacher(settings, student, 10, Progress())
  mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
  programs = Programs(settings, INFO, student.spec, teacher.spec, mesh)
  programs.close()  # nothing is compiled
  programs.tracer.train_step(schedule.plan(settings)[-1].program)
