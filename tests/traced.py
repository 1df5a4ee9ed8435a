"""Whether a configuration that is accepted can be trained, without compiling anything."""

import jax
import numpy as np
from jax.sharding import Mesh

from configs import digits_w4
from profit_jax import plan
from profit_jax.data.digits import FACTS
from profit_jax.models import REGISTRY, build, variable_shapes
from profit_jax.settings import parse
from profit_jax.train import aiwq, remedies, start, steps
from profit_jax.train.programs import Programs
from profit_jax.train.progress import Progress


def deep_check(model, changes):
  """Traces the training step with everything quantized, as a run would before it compiles it."""
  config = digits_w4.get_config(model)
  config.update_from_flattened_dict({**changes, "compilation_cache": ""})
  settings = parse(config, REGISTRY)
  phases = plan.plan(settings)
  model = build(settings.model, 10, settings.quant)
  teacher = start.load_teacher(
    settings, start.load_student(settings, 10, Progress()), 10, Progress()
  ).model
  programs = Programs(
    settings, FACTS, model, teacher, Mesh(np.asarray(jax.devices()[:1]), ("data",))
  )
  last = phases[-1].program
  programs.close()
  step = steps.make_train_step(
    programs._in_training(model),
    programs.optimizer(last.train_kernels, frozenset()),
    normalization=programs._normalization,
    ema_rate=settings.train.ema_rate,
    teacher_model=teacher,
    accumulation_steps=settings.train.accumulation_steps,
    quant=settings.quant,
    remedy=settings.remedy,
  )
  sampling = aiwq.start(programs._params) if last.sampling else None
  jax.eval_shape(
    step,
    programs.state_shapes(last, frozenset()),
    programs._batch_shapes(settings.train.batch_size),
    programs._levels_shapes(last.quantized_weights, last.quantized_acts),
    jax.ShapeDtypeStruct((), np.float32),
    jax.eval_shape(lambda: jax.random.key(0)),
    variable_shapes(teacher, settings.data.image_size) if last.distill else None,
    sampling,
    remedies.strengths(settings.remedy, phases, phases[-1], 0, 1),
  )
