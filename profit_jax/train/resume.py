"""The run state with which training begins or resumes."""

import jax

from profit_jax.train import aiwq, instability, phases, run_state
from profit_jax.train.programs import Programs
from profit_jax.train.progress import Progress
from profit_jax.train.run import Run
from profit_jax.train.run_state import RunState, SavedRun
from profit_jax.train.state import create_state


def begun(run: Run, programs: Programs, progress: Progress) -> RunState:
  """The beginning of a run.

  Args:
    run: what is trained.
    programs: of the run.
    progress: empty.
  """
  ema = run.settings.train.ema_rate > 0
  state = programs.placement.replicate(create_state(run.student.make(), programs.student, ema=ema))
  # A teacher that is the student goes into every checkpoint: resuming does not read the file again.
  own = run.teacher.variables if run.teacher.is_student else None
  return RunState(progress, state, teacher=own)


def resumed(run: Run, programs: Programs, saved: SavedRun) -> RunState:
  """The run state of a checkpoint, on the devices; raises as `run_state.restore`.

  Args:
    run: what is trained.
    programs: of the run.
    saved: the checkpoint; its `progress` becomes the run's.
  """
  progress, spec = saved.progress, programs.student
  phase = run.phases[progress.phase - 1]
  untrained = phases.untrained(phase, progress, spec)
  shapes = run_state.Shapes(
    jax.device_get(programs.states.first(phase.program, untrained)),
    aiwq.start(spec.convs) if phase.kind == "sampling" else None,
    spec.shapes,
    instability.start(spec.kernels),
  )
  current = run_state.restore(saved, shapes)
  arrays = programs.placement.replicate((current.state, current.sampling, current.window))
  current.state, current.sampling, current.window = arrays
  return current
