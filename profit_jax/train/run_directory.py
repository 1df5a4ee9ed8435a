"""A run's directory: which run it belongs to, and who holds it.

`config.json` has the settings, `published.json` the fields that were taken from what is published
of the first weights, `data.json` the identity of the data, `lock` the process.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from profit_jax import checkpoints
from profit_jax.config import ConfigError, Settings, parse, with_new_names
from profit_jax.data import Source
from profit_jax.fields import listed
from profit_jax.models import REGISTRY

_PUBLISHED = "published.json"
_RESULTS = ("result.json", "report.md")  # written at the end of a run


class Identity(NamedTuple):
  """Which run a directory belongs to.

  Attributes:
    config: what `config.json` holds, plain values. Runs of the library say so under `library`.
    data: what `data.json` holds: the numbers in `_COUNTS`, and `fingerprint`.
    published: what `published.json` holds; None without first weights that something is published
      of.
  """

  config: dict[str, Any]
  data: dict[str, Any]
  published: tuple[str, ...] | None = None


def identity_of(
  settings: Settings, source: Source, published: tuple[str, ...] | None = None
) -> Identity:
  """That of a configured run; `published` as in `Identity`."""
  return Identity(settings.to_dict(), data_identity(source), published)


def claim_workdir(workdir: epath.Path, identity: Identity) -> None:
  """Writes `config.json` and `data.json`, or checks that those that are there are this run's; for
  who holds the directory.

  Raises:
    ConfigError: the directory belongs to another configuration or to nobody knows which, the data
      has changed, it holds results without checkpoints, or it cannot be written.
  """
  path = workdir / "config.json"
  if has_results(workdir) and not checkpoints.saved_numbers(workdir / "checkpoints"):
    raise ConfigError(
      f"{_without_checkpoints('--workdir', workdir)} Put them back, or give another --workdir. To "
      f"train anew here, first move away what that run left: {listed(_left(workdir))}."
    )
  if path.exists():
    require_same_run(workdir, identity)
    return
  if checkpoints.saved_numbers(workdir / "checkpoints"):
    raise ConfigError(
      f"--workdir {workdir} has checkpoints, but {path}, which says what run they belong to, does "
      "not exist. Restore it "
      f"(that run's command in an empty directory writes the same file), or use an empty directory."
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {"data.json": identity.data, "config.json": identity.config}
    if identity.published is not None:
      files = {_PUBLISHED: identity.published, **files}
    for name, content in files.items():  # config.json last: with it, the directory is a run's
      write_text(workdir / name, json.dumps(content, indent=2) + "\n")
  except OSError as error:
    raise ConfigError(
      f"--workdir {workdir} cannot be written: {error}. Give a directory that can."
    ) from error


def require_same_run(workdir: epath.Path, identity: Identity) -> None:
  """Checks that the run in a directory is this one.

  Raises:
    ConfigError: it has another configuration, or its data was other.
  """
  saved = read_config(workdir)
  if "library" not in saved and "library" not in identity.config:
    saved = read_settings(workdir).to_dict()
  found = differences(comparable(saved), comparable(identity.config))
  if found:
    listing = "\n  ".join(found)
    raise ConfigError(
      f"--workdir {workdir} holds another run's configuration and checkpoint. "
      f"Use an empty directory, or that run's configuration. "
      f"The fields that differ:\n  {listing}"
    )
  if "library" not in saved:
    require_same_bfloat16(workdir)
  # An epoch's order is a function of the number of examples: with another one, a run would not go
  # on but begin anew.
  if found := other_data(workdir, identity.data):
    raise ConfigError(
      f"--workdir {workdir} belongs to a run on other data: {'; '.join(found)}. Give the data "
      "back as it was, or use an "
      f"empty directory."
    )


def require_same_bfloat16(workdir: epath.Path, flag: str = "--workdir") -> None:
  """Checks that a run's `train.dtype=bfloat16` is the arithmetic of this release.

  Args:
    workdir: of a run whose settings are valid.
    flag: that named it, for messages.

  Raises:
    ConfigError: an earlier release began it.
  """
  train = read_config(workdir, flag)["train"]
  # All configurations have `kernels` since bfloat16 is what it is.
  if train.get("dtype") == "bfloat16" and "kernels" not in train:
    raise ConfigError(
      f"{flag} {workdir} was begun by an earlier release, whose train.dtype=bfloat16 stored "
      "activations in float32. Finish it with that release, or begin another run."
    )


_COUNTS = ("train_examples", "eval_examples", "num_classes")


def other_data(workdir: epath.Path, present: dict[str, Any], flag: str = "--workdir") -> list[str]:
  """In what the data of the run in a directory differs from `present`, of `data_identity`; other
  arguments and errors as `read_data`.
  """
  saved = read_data(workdir, flag)
  found = differences(
    *({name: count for name, count in info.items() if name in _COUNTS} for info in (saved, present))
  )
  if not found and saved["fingerprint"] not in (None, present["fingerprint"]):
    found = ["as many images, but others or of other classes (another fingerprint)"]
  return found


def data_identity(source: Source) -> dict[str, Any]:
  """What `data.json` holds."""
  return {
    **{name: getattr(source.info, name) for name in _COUNTS},
    "fingerprint": source.fingerprint(),
  }


def read_data(workdir: epath.Path, flag: str = "--workdir") -> dict[str, Any]:
  """The `data.json` of a run: train_examples, eval_examples, num_classes, fingerprint (None where
  an older release ran).

  `flag` named its directory, for messages.

  Raises:
    ConfigError: it is not there or cannot be read.
  """
  path = workdir / "data.json"
  try:
    saved = json.loads(path.read_text())
    counts = {name: int(saved[name]) for name in _COUNTS}
    # The library does not count evaluation examples beforehand.
    if min(counts["train_examples"], counts["num_classes"], counts["eval_examples"] + 1) < 1:
      raise ValueError(f"every count must be 1 or above: {counts}")
    return {**counts, "fingerprint": saved.get("fingerprint")}
  except Exception as error:  # a damaged file raises whatever its parts stumble over
    raise ConfigError(
      f"{path} cannot be read: {error!r}. Use another {flag}, or restore the file."
    ) from error


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Keeps other runs out of a directory until the end of this process, however it ends: the lock is
  the kernel's.

  Not in remote file systems (`gs://`), which have none. Not by `filelock`: where a file system has
  no locks, it leaves a file in their place, which outlives a killed run and would keep it from
  being resumed on another machine.

  Raises:
    ConfigError: a run that lives holds it, or it cannot be written.
  """
  if "://" in os.fspath(workdir):
    yield
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / "lock", "a+")  # noqa: SIM115  held open by the caller's `with`
  except OSError as error:
    raise ConfigError(
      f"--workdir {workdir} cannot be written: {error}. Make room, or give a directory that can."
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      lock.seek(0)
      raise ConfigError(
        f"--workdir {workdir} is in use by a run that is still going on: "
        f"{lock.read().strip() or 'it has not said which'}. "
        f"Wait for its end, stop it, or use another directory."
      ) from error
    except OSError:  # a file system without locks, as `gs://`
      yield
      return
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
      lock.truncate(0)
      lock.write(
        f"process {os.getpid()} on {socket.gethostname()}, since "
        f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n"
      )
      lock.flush()
    yield


def is_begun(workdir: epath.Path) -> bool:
  """Whether there is a run to go on with, or one that has ended and lost its checkpoints."""
  begun = (workdir / "checkpoints").exists() or has_results(workdir)
  return begun and (workdir / "config.json").exists()


def has_results(workdir: epath.Path) -> bool:
  """Whether a run has ended here."""
  return any((workdir / name).exists() for name in _RESULTS)


def no_checkpoint(workdir: epath.Path, flag: str = "--workdir") -> ConfigError:
  """The error of a run that has no checkpoint to read; `flag` named its directory."""
  if has_results(workdir):
    return ConfigError(
      f"{_without_checkpoints(flag, workdir)} Put them back, or train the run again in another "
      "directory."
    )
  return ConfigError(
    f"{flag} {workdir} has no checkpoint at the plan's last bits yet. Go on training first."
  )


def _without_checkpoints(flag: str, workdir: epath.Path) -> str:
  return (
    f"{flag} {workdir} holds the results of a run that has ended, but its checkpoints "
    f"({workdir / 'checkpoints'}) are gone."
  )


def _left(workdir: epath.Path) -> list[str]:
  """What a run leaves in its directory, as far as it is there."""
  return sorted({path.name for path in workdir.iterdir()} - {"lock", "checkpoints"})


def read_config(workdir: epath.Path, flag: str = "--workdir") -> dict[str, Any]:
  """The `config.json` of a run; flag: that named its directory, for messages.

  Raises:
    ConfigError: there is none, or it cannot be read.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise ConfigError(
      f"{flag} {workdir} holds no run: {path} does not exist. Train first, or give the right "
      "directory."
    )
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(
      f"{path} cannot be read: {error}. Use another {flag}, or restore the file."
    ) from error
  # Sections of fields, of which some are lists, or lists of rules.
  if not isinstance(config, dict) or not _is_at_most(config, 4):
    raise ConfigError(
      f"{path} does not hold a configuration. Use another {flag}, or restore the file."
    )
  return config


def _is_at_most(tree: Any, depth: int) -> bool:
  """Whether lists and dictionaries stand in each other no deeper."""
  if not isinstance(tree, (dict, list)):
    return True
  return depth > 0 and all(
    _is_at_most(item, depth - 1) for item in (tree.values() if isinstance(tree, dict) else tree)
  )


def read_settings(workdir: epath.Path, flag: str = "--workdir") -> Settings:
  """The settings of a run; arguments and errors as `read_config`'s, and an error where they are not
  allowed values.
  """
  config = read_config(workdir, flag)
  if "library" in config:
    raise ConfigError(
      f"{flag} {workdir} is a run of the library (profit_jax.Trainer), whose model and "
      "data are in a program that this command does not know. Give another directory. In that "
      "program, the same Trainer.fit returns the finished run's Result at once, for "
      "profit_jax.export; profit_jax.load_weights reads the weights from the directory."
    )
  try:
    return parse(ml_collections.ConfigDict(with_new_names(config)), REGISTRY)
  # ConfigDict refuses dots, and names of its methods.
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
  ) as error:
    model = config.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and name not in REGISTRY:
      raise ConfigError(
        f"{flag} {workdir}: config.json names the model {name!r}, which is not registered; "
        f"{listed(REGISTRY)} are. Give the configuration file that registers it as --config, or "
        "run the command from a script that imports that file."
      ) from error
    raise ConfigError(
      f"{flag} {workdir}: config.json is damaged, or of another release: {error}"
    ) from error


def read_published(workdir: epath.Path, flag: str = "--workdir") -> tuple[str, ...] | None:
  """The fields that a run took from what is published of its weights, `data.crop_pct`; None where
  no file says it. Arguments as `read_config`'s.

  Raises:
    ConfigError: the file cannot be read.
  """
  path = workdir / _PUBLISHED
  if not path.exists():
    return None
  allowed = {
    f"{section}.{name}"
    for section, fields in Settings().to_dict().items()
    for name in (fields if isinstance(fields, dict) else ())
  }
  try:
    fields = json.loads(path.read_text())
    if not isinstance(fields, list) or not all(field in allowed for field in fields):
      raise ValueError("it is no list of fields")
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise ConfigError(
      f"{path} cannot be read: {error}. Use another {flag}, restore the file, or delete it."
    ) from error
  return tuple(fields)


def comparable(config: dict[str, Any]) -> dict[str, Any]:
  """The part of a `config.json` that must stay as it is while a run goes on.

  Where the data lies and where programs are cached may change with the machine; how often is saved,
  and what is done about numbers that are not finite, whenever somebody likes.
  """
  return {
    name: value
    for name, value in of_all_processes(config).items()
    if name not in ("checkpoint", "recovery")
  }


def of_all_processes(config: dict[str, Any]) -> dict[str, Any]:
  """The part of a configuration in which the processes of a run must agree: all but where data and
  programs lie.
  """
  config = {name: value for name, value in config.items() if name != "compilation_cache"}
  if isinstance(config.get("data"), dict):
    config["data"] = {name: value for name, value in config["data"].items() if name != "data_dir"}
  return config


def differences(saved: Any, present: Any, prefix: str = "") -> list[str]:
  """The fields in which two `to_dict()` results differ, as lines
  `model.width: 0.25 there, 0.5 here`.
  """
  if isinstance(saved, dict) and isinstance(present, dict):
    found = []
    for key in sorted({*saved, *present}):
      found += differences(
        saved.get(key, "absent"), present.get(key, "absent"), f"{prefix}.{key}" if prefix else key
      )
    return found
  return [] if saved == present else [f"{prefix}: {saved!r} there, {present!r} here"]


def write_text(path: epath.Path, text: str) -> None:
  """Renamed into place: a run that is killed while writing leaves no half of it."""
  unfinished = path.parent / f"{path.name}.tmp"
  unfinished.write_text(text)
  unfinished.replace(path)
