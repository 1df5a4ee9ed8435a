"""Weights by name: files of the Hugging Face hub and of torchvision, and what their publishers say
of them.

    hf:timm/mobilenetv3_large_100.ra4_e3600_r224_in1k     also hf:OWNER/NAME@REVISION
    torchvision:mobilenet_v2.IMAGENET1K_V2

Files stay in the caches of the libraries that they belong to: the hub's (`HF_HOME`) and torch's
(`TORCH_HOME`). A `model.safetensors` that lies beside its `config.json` is described by it too.
"""

import hashlib
import http.client
import json
import os
import pathlib
import re
import tempfile
import types
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from profit_jax import optional, paths
from profit_jax.config import ConfigError
from profit_jax.weights.claims import claim_of, is_nameless, is_own, net_named
from profit_jax.weights.formats import weights_in

HUGGING_FACE, TORCHVISION = "hf:", "torchvision:"
TORCHVISION_URL = "https://download.pytorch.org/models"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_DESCRIPTION = "config.json"
_TIMEOUT = 30  # seconds
_CHUNK = 1 << 20  # bytes

# torchvision's weights: file, and the pixels that the shorter side is scaled to before the centre
# of 224 is cut out (bilinear). From the `Weights` classes of torchvision 0.29.
_TORCHVISION_FILES = {
  "mnasnet0_5.IMAGENET1K_V1": ("mnasnet0.5_top1_67.823-3ffadce67e.pth", 256),
  "mnasnet0_75.IMAGENET1K_V1": ("mnasnet0_75-7090bc5f.pth", 232),
  "mnasnet1_0.IMAGENET1K_V1": ("mnasnet1.0_top1_73.512-f206786ef8.pth", 256),
  "mnasnet1_3.IMAGENET1K_V1": ("mnasnet1_3-a4c69d6f.pth", 232),
  "mobilenet_v2.IMAGENET1K_V1": ("mobilenet_v2-b0353104.pth", 256),
  "mobilenet_v2.IMAGENET1K_V2": ("mobilenet_v2-7ebf99e0.pth", 232),
  "mobilenet_v3_large.IMAGENET1K_V1": ("mobilenet_v3_large-8738ca79.pth", 256),
  "mobilenet_v3_large.IMAGENET1K_V2": ("mobilenet_v3_large-5c1a4163.pth", 232),
  "mobilenet_v3_small.IMAGENET1K_V1": ("mobilenet_v3_small-047dcff4.pth", 256),
  "resnet18.IMAGENET1K_V1": ("resnet18-f37072fd.pth", 256),
  "resnet34.IMAGENET1K_V1": ("resnet34-b627a593.pth", 256),
  "resnet50.IMAGENET1K_V1": ("resnet50-0676ba61.pth", 256),
  "resnet50.IMAGENET1K_V2": ("resnet50-11ad3fa6.pth", 232),
  "resnet101.IMAGENET1K_V1": ("resnet101-63fe2227.pth", 256),
  "resnet101.IMAGENET1K_V2": ("resnet101-cd907fc2.pth", 232),
}
_TORCHVISION_SIZE = 224
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Published(NamedTuple):
  """What is published of a weights file. Of the images, None where nothing is said.

  Attributes:
    architecture: what its codebase calls the net: `mobilenetv3_large_100`.
    image_size: height and width of training images, in pixels.
    crop_pct: share of the shorter side that evaluation keeps.
    interpolation: of scaling, by timm's name: `bicubic`.
    mean: of pixels in 0..1, for each channel.
    std: likewise.
    origin: what names the architecture; None where the user does.
    claimed: whether the file itself does, of which nothing is published then.
    settings: of `config.model`, with which the net was trained in place of its own.
  """

  architecture: str
  image_size: int | None = None
  crop_pct: float | None = None
  interpolation: str | None = None
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  origin: str | None = None
  claimed: bool = False
  settings: Mapping[str, Any] = types.MappingProxyType({})


def is_name(weights: str) -> bool:
  """Whether weights are given by name, not by a path."""
  return weights.startswith((HUGGING_FACE, TORCHVISION))


def locate(weights: str) -> str:
  """The path of a weights file on this machine, downloaded if it is given by name.

  Args:
    weights: a name (see the top of this file), or a path, which is returned.

  Raises:
    ConfigError: a name that is not known, no connection, a damaged file, a missing package.
  """
  if weights.startswith(TORCHVISION):
    return os.fspath(_torchvision_file(weights))
  if weights.startswith(HUGGING_FACE):
    path = _hub_weights(weights)
    _check_hub_file(weights, path)
    return path
  return weights


def published(weights: str, entry: str = "") -> Published | None:
  """What is published of weights: from torchvision's table, or the `config.json` of a repository
  of the hub or beside a `model.safetensors`; else what the file says itself, or the repository's
  name. None where nothing names an architecture, and for files of ours.

  Args:
    weights: a name, or a path.
    entry: which of the weights in the file.

  Raises:
    ConfigError: as `locate`; or a `config.json` that cannot be understood.
  """
  if weights.startswith(TORCHVISION):
    _, resize = _torchvision_entry(weights)
    architecture = weights.removeprefix(TORCHVISION).partition(".")[0]
    share = _TORCHVISION_SIZE / resize
    return Published(
      architecture, _TORCHVISION_SIZE, share, "bilinear", _IMAGENET_MEAN, _IMAGENET_STD
    )
  if weights.startswith(HUGGING_FACE):
    place = epath.Path(_hub_weights(weights))
    described_by = _hub_file(weights, _DESCRIPTION)
    called = _repository(weights)[0].partition("/")[2]
    return _published_of(place, described_by and epath.Path(described_by), weights, entry, called)
  place = paths.opened("The weights", weights)
  if place.is_dir():
    # A run's config.json is another.
    found = None if (place / "checkpoints").exists() else weights_in(place)
    if found is None:
      return None
    place = found
  # Beside a file with a name of its own, it may be another file's.
  beside = place.parent / _DESCRIPTION
  description = beside if is_nameless(place) and beside.exists() else None
  return _published_of(place, description, weights, entry)


def _published_of(
  place: epath.Path,
  description: epath.Path | None,
  weights: str,
  entry: str,
  called: str | None = None,
) -> Published | None:
  """What is published of a file that is called `weights` in messages; others as in `claim_of`."""
  if is_own(place):  # the settings that it records count, whatever it is called
    return None
  described = description and _read_description(description, weights)
  if described or not place.exists():
    return described
  claim = claim_of(place, called, entry)
  return claim and Published(claim.net, origin=claim.origin, claimed=True, settings=claim.settings)


def _read_description(path: epath.Path, weights: str) -> Published | None:
  """What timm's `config.json` says, https://huggingface.co/docs/timm/hub."""
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(
      f"{path}, which describes {weights}, cannot be read: {error}. Fetch it again."
    ) from error
  architecture = content.get("architecture") if isinstance(content, dict) else None
  if not isinstance(architecture, str):
    return None
  architecture = net_named(architecture) or architecture
  if content.get("model_args"):
    raise ConfigError(
      f"{weights} is not a plain {architecture}: {path} changes the net by model_args = "
      f"{json.dumps(content['model_args'])[:200]}, which is not supported. Use other weights."
    )
  told = content.get("pretrained_cfg")
  told = told if isinstance(told, Mapping) else {}
  try:
    size = told.get("input_size")
    share, interpolation = told.get("crop_pct"), told.get("interpolation")
    return Published(
      architecture,
      None if size is None else _square(size),
      None if share is None else float(share),
      None if interpolation is None else str(interpolation),
      _channels(told.get("mean")),
      _channels(told.get("std")),
      str(path),
    )
  except (TypeError, ValueError, OverflowError) as error:
    raise ConfigError(
      f"{path}, which describes {weights}, has a pretrained_cfg that cannot be understood: {error}."
    ) from error


def _square(size: Any) -> int:
  channels, height, width = map(int, size)
  if channels != 3 or height != width:
    raise ValueError(f"input_size = {size} is no square of three channels")
  return height


def _channels(values: Any) -> tuple[float, ...] | None:
  return None if values is None else tuple(map(float, values))


def _hub_weights(weights: str) -> str:
  path = next(filter(None, (_hub_file(weights, name) for name in _HUB_FILES)), None)
  if path is None:
    raise ConfigError(
      f"{weights} has no weights that can be read: it has none of {', '.join(_HUB_FILES)}."
    )
  return path


def _repository(weights: str) -> tuple[str, str | None]:
  """Of a name of the hub, OWNER/NAME and the revision."""
  repository, _, revision = weights.removeprefix(HUGGING_FACE).partition("@")
  return repository, revision or None


def _hub_file(weights: str, filename: str) -> str | None:
  """A file of a repository of the hub, from its cache or downloaded; None where it has no such
  file. Without a network, a repository has the files that are in the cache.
  """
  optional.require("hub", f"The name {weights}")
  from huggingface_hub import constants, errors

  repository, revision = _repository(weights)
  endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
  try:
    if not re.fullmatch(r"[^/@]+/[^/@]+", repository):
      raise errors.HFValidationError("a repository is OWNER/NAME")
    return _from_hub(repository, filename, revision, endpoint)
  except errors.HFValidationError as error:
    raise ConfigError(
      f"{weights} is not a name of the hub: {error}. It must be hf:OWNER/NAME or "
      "hf:OWNER/NAME@REVISION, as hf:timm/mobilenetv2_100.ra_in1k."
    ) from error
  except errors.GatedRepoError as error:
    raise ConfigError(
      f"{weights} is only given to those who accept its conditions: accept them at "
      f"{endpoint}/{repository}, and log in with `hf auth login`."
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise ConfigError(
      f"{weights} is not known: {endpoint} has no public repository {repository}. Check the name "
      "(timm's: https://huggingface.co/timm); for a private one, log in with `hf auth login`."
    ) from error
  except errors.RevisionNotFoundError as error:
    raise ConfigError(
      f"{weights} is not known: {endpoint}/{repository} has no revision {revision}."
    ) from error
  except _UnreachableError as error:
    wanted = filename if filename in _HUB_FILES else _HUB_FILES[0]
    url = f"{endpoint}/{repository}/resolve/{revision or 'main'}"
    raise ConfigError(
      f"{weights} cannot be fetched from {endpoint}, and is not in the cache "
      f"{constants.HF_HUB_CACHE}: {_first_cause(error)}. Without a network: fetch "
      f"{url}/{wanted} and {url}/{_DESCRIPTION} elsewhere, put both files into one directory of "
      f"this machine, and give DIRECTORY/{wanted} in place of {weights}."
    ) from error
  except errors.EntryNotFoundError:
    return None


class _UnreachableError(Exception):
  """A file could not be fetched, and no weights of its repository are in the cache."""


def _from_hub(repository: str, filename: str, revision: str | None, endpoint: str) -> str | None:
  """The path of a file in the hub's cache; raises as `hf_hub_download`, and _UnreachableError
  whatever keeps the file from being fetched.

  None where the file cannot be fetched and only weights of its repository are in the cache.
  """
  import huggingface_hub
  from huggingface_hub import errors

  options = {"revision": revision, "endpoint": endpoint}
  try:
    # `hf_hub_download` alone asks again for half a minute where nothing answers.
    huggingface_hub.get_hf_file_metadata(
      huggingface_hub.hf_hub_url(repository, filename, **options)
    )
    return huggingface_hub.hf_hub_download(repository, filename, **options)
  except (
    errors.HFValidationError,
    errors.RepositoryNotFoundError,
    errors.RevisionNotFoundError,
  ):
    raise
  # Connections, proxies and full disks raise what their libraries like, another one in each
  # version.
  except Exception as error:
    absent = isinstance(error, errors.EntryNotFoundError)
    if absent and not isinstance(error, errors.LocalEntryNotFoundError):
      raise
    cached = {
      name: huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
      for name in (*_HUB_FILES, filename)
    }
    found = {name: path for name, path in cached.items() if isinstance(path, str)}
    if not found.keys() & {*_HUB_FILES}:
      raise _UnreachableError from error
    return found.get(filename)


def _first_cause(error: BaseException) -> str:
  while cause := error.__cause__ or error.__context__:
    error = cause
  return " ".join(str(error).split())[:200] or type(error).__name__


def _check_hub_file(weights: str, path: str) -> None:
  """Large files are named in the hub's cache by their SHA-256."""
  expected = os.path.basename(os.path.realpath(path))
  if re.fullmatch(r"[0-9a-f]{64}", expected) and _sha256(pathlib.Path(path)) != expected:
    raise ConfigError(
      f"{weights} is damaged in the cache: the SHA-256 of {path} is not {expected}. Delete the "
      "file and run the same command."
    )


def _torchvision_entry(weights: str) -> tuple[str, int]:
  name = weights.removeprefix(TORCHVISION)
  if name not in _TORCHVISION_FILES:
    known = ", ".join(f"{TORCHVISION}{known}" for known in _TORCHVISION_FILES)
    raise ConfigError(f"{weights} is not known: it must be one of {known}.")
  return _TORCHVISION_FILES[name]


def _torchvision_file(weights: str) -> pathlib.Path:
  """Where torch keeps the file too, downloaded if it is not there yet."""
  filename, _ = _torchvision_entry(weights)
  digits = pathlib.PurePath(filename).stem.rpartition("-")[2]  # the first ones of its SHA-256
  cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
  home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
  path = pathlib.Path(home).expanduser() / "hub" / "checkpoints" / filename
  if not path.exists():
    _download(f"{TORCHVISION_URL}/{filename}", path, digits, weights)
  elif not _sha256(path).startswith(digits):
    raise ConfigError(
      f"{weights}: {path} is damaged; its SHA-256 does not begin with {digits}. Delete the file "
      "and run the same command."
    )
  return path


def _download(url: str, path: pathlib.Path, digits: str, weights: str) -> None:
  """Downloads a file whose SHA-256 begins with `digits`; it appears whole or not at all."""
  unfinished = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
      urllib.request.urlopen(url, timeout=_TIMEOUT) as answer,
      tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file,
    ):
      unfinished = pathlib.Path(file.name)
      while part := answer.read(_CHUNK):
        file.write(part)
    if not _sha256(unfinished).startswith(digits):
      raise OSError(f"what came has a SHA-256 that does not begin with {digits}")
    unfinished.replace(path)
  # urllib's errors are some of the first; answers that are no HTTP or end too early the second.
  except (OSError, http.client.HTTPException) as error:
    if isinstance(error, urllib.error.HTTPError):
      error.close()  # or its socket stays open
    reason = getattr(error, "reason", None) or error
    if isinstance(error, http.client.HTTPException):
      reason = repr(error)
    raise ConfigError(
      f"{weights} cannot be fetched from {url}: {reason}. Without a network: fetch this address "
      f"elsewhere, and put the file at {path}."
    ) from error
  finally:
    if unfinished is not None:
      unfinished.unlink(missing_ok=True)


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
