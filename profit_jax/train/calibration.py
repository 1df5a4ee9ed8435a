"""First values of the quantizers' scalars, where a phase begins with new ones."""

from typing import Any

import jax

from profit_jax.config import Settings
from profit_jax.data import Source
from profit_jax.schedule import Phase
from profit_jax.train.programs import Programs
from profit_jax.train.state import TrainState


def calibrate(
  phase: Phase,
  state: TrainState,
  programs: Programs,
  source: Source,
  settings: Settings,
  key: jax.Array,
) -> TrainState:
  """The state with new values of a and c, of the student and of its average.

  Args:
    phase: that begins; its `calibrate` says which values are new.
    state: before it.
    programs: compiled.
    source: the data.
    settings: validated.
    key: for dropout.
  """
  if phase.calibrate is None:
    return state
  program = programs.calibration(phase.calibrate)
  if phase.calibrate == "act":
    bits = programs.student.bits.at(None, phase.act_bits)
    # The same batch whenever it is asked for: epoch 0's first.
    batch = next(iter(source.train_batches(0, settings.train.batch_size)))
    image = programs.placement.split_part(batch, settings.train.accumulation_steps)

    def calibrated(variables: dict[str, Any]) -> Any:
      return program(variables, image, key, bits)
  else:
    bits = programs.student.bits.at(phase.weight_bits, None)

    def calibrated(variables: dict[str, Any]) -> Any:
      return program(variables["params"], bits)

  state = state.replace(params=calibrated(state.variables))
  if state.ema_params is None:
    return state
  return state.replace(ema_params=calibrated(state.ema_variables))
