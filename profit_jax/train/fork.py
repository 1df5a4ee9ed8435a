"""A run that begins with the phases that another run has trained: `--fork_from`.

Two plans that begin alike, as with another freezing or other last bits, train their common phases
to the same weights: on the same machine, to the bit. A run that forks copies the other's checkpoint
at the end of those phases, and is an ordinary run from there on.
"""

import itertools
from typing import Any

from etils import epath

from profit_jax import checkpoints, data, distributed, schedule
from profit_jax.config import ConfigError, Settings
from profit_jax.fields import listed
from profit_jax.train import run_directory
from profit_jax.train.run_state import SavedRun, number_at_end, opened


def shared_phases(settings: Settings, other: Settings) -> int:
  """How many phases at the beginning of two plans are the same, with the same settings around them;
  0 for none.
  """
  if _other_than_plan(settings) != _other_than_plan(other):
    return 0
  phases, theirs = schedule.plan(settings), schedule.plan(other)
  # The best weights are chosen among the phases at a plan's last bits.
  chosen = [{phase.index for phase in schedule.target_phases(of)} for of in (phases, theirs)]
  # A remedy's strength depends on how long each width of weights will be trained.
  annealed = settings.oscillation.in_training
  sampled_alike = settings.plan.sampling_every == other.plan.sampling_every
  count = 0
  for mine, its in zip(phases, theirs, strict=False):
    if mine != its or (mine.index in chosen[0]) != (its.index in chosen[1]):
      break
    if (annealed and mine.weight_bits is not None) or (
      mine.kind == "sampling" and not sampled_alike
    ):
      break
    count += 1
  return count


def _other_than_plan(settings: Settings) -> dict[str, Any]:
  return {
    name: value
    for name, value in run_directory.comparable(settings.to_dict()).items()
    if name != "plan"
  }


def ends(settings: Settings, count: int, train_examples: int) -> list[int]:
  """The numbers of the checkpoints at the ends of the first phases, of a run that was never sent
  back.
  """
  steps, epochs = (
    train_examples // settings.train.batch_size,
    (phase.epochs for phase in schedule.plan(settings)[:count]),
  )
  return [number_at_end(total, steps) for total in itertools.accumulate(epochs)]


def checkpoint(
  settings: Settings, source: data.Source, origin: epath.Path, warn: checkpoints.Warn
) -> SavedRun:
  """The latest checkpoint that the run in `origin` has of the end of a phase in common, as this
  run's.

  Args:
    settings: of the run that begins.
    source: its data.
    origin: the directory of the other run, which may still train.
    warn: told of checkpoints that cannot be read back.

  Raises:
    ConfigError: there is no such run, it has other settings or data, or kept no such checkpoint.
  """
  count = distributed.on_all_hosts(lambda: _allowed(settings, source, origin))
  wanted = ends(settings, count, source.info.train_examples)
  saved = checkpoints.saved_on_all_hosts(origin / "checkpoints")
  for number in reversed(saved):
    if number not in wanted:
      continue
    found, damaged = checkpoints.newest_of(origin / "checkpoints", [number])
    run = opened(found)
    if run is None:
      # Or deleted meanwhile, by a run that still trains.
      warn(f"checkpoint {origin / 'checkpoints' / str(number)} cannot be used: {damaged[number]}.")
    elif not run.progress.retries:  # where a run goes back to depends on when it had saved
      run.progress.forked_from, run.progress.forked_phases = str(origin), run.progress.phase
      return run
  if not count:
    raise ConfigError(
      f"--fork_from {origin}: that run's first phase is already another one than here "
      "(--mode=plan prints them). Begin "
      f"without --fork_from."
    )
  if not saved and run_directory.has_results(origin):
    raise run_directory.no_checkpoint(origin, "--fork_from")
  raise ConfigError(
    f"--fork_from {origin}: that run has {count} phases in common with this one, but no checkpoint "
    f"at the end of any of them that can be used: these would be {listed(wanted)}, and it has "
    f"{listed(saved) or 'none'}. Wait until it gets there, train it with a larger "
    "--config.checkpoint.keep, or begin without --fork_from."
  )


def _allowed(settings: Settings, source: data.Source, origin: epath.Path) -> int:
  """The number of phases in common."""
  other = run_directory.read_settings(origin, "--fork_from")
  run_directory.require_same_bfloat16(origin, "--fork_from")
  if found := run_directory.differences(_other_than_plan(other), _other_than_plan(settings)):
    listing = "\n  ".join(found)
    raise ConfigError(
      f"--fork_from {origin}: of that run's configuration only config.plan may be another here. "
      "The fields that differ:\n"
      f"  {listing}"
    )
  if found := run_directory.other_data(origin, run_directory.data_identity(source), "--fork_from"):
    raise ConfigError(
      f"--fork_from {origin}: that run has other data: {'; '.join(found)}. It must be the same."
    )
  return shared_phases(settings, other)
