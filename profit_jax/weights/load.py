"""From a weights file to a model's variables: strict, nothing is guessed and nothing left over."""

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY, options
from profit_jax.nn.spec import describe
from profit_jax.typing import Array, Variables
from profit_jax.weights import prefixes
from profit_jax.weights.files import Contents, read_contents
from profit_jax.weights.formats import RefusedError
from profit_jax.weights.hub import Published
from profit_jax.weights.naming import QUANTIZER_LEAVES, Names, OwnNames, Path, TorchNames

# Settings that change what a net computes without changing the shape of any tensor, or its channels
# at other widths.
_TELLING = frozenset(
  {
    "activation",
    "strides",
    "bn_epsilon",
    "squeeze_excite",
    "pad_value",
    "channel_rounding",
    "padding",
  }
)
_RAW_ONE = np.log(np.expm1(1.0))  # the raw value of a quantizer's scalar that is 1


def is_first_scalar(value: Array) -> bool:
  """Whether a quantizer's scalar is as no calibration or training has left it."""
  return bool(np.allclose(value, _RAW_ONE))


def namings(model: str) -> dict[str, Names]:
  """The names of a model's tensors by source; of equally good ones the first count."""
  known = [*map(TorchNames, REGISTRY[model].names), OwnNames()]
  return {names.source: names for names in known}


def head_of(model: str, variables: Variables) -> Variables:
  """Of a model's variables, those of the layer that depends on the number of classes.

  Raises:
    ConfigError: there is no such layer.
  """
  flat = traverse_util.flatten_dict(variables)
  found = {path: leaf for path, leaf in flat.items() if _is_of_head(model, path)}
  if not found:
    head = REGISTRY[model].head
    raise ConfigError(
      f"The model {model} has no layer {head!r}, which it should have for the classes. Register it "
      "with head=PATH, the path of its last layer."
    )
  return traverse_util.unflatten_dict(found)


def _is_of_head(model: str, path: Path) -> bool:
  head = tuple(REGISTRY[model].head.split("/"))
  return path[1 : 1 + len(head)] == head


class Loaded(NamedTuple):
  """What a file gave.

  Attributes:
    variables: `params` and `batch_stats`.
    source: whose names the file has.
    settings: of `config.model`, with which the source's own code, or the run that it comes from,
      computes.
    quantizers: whether its quantizer scalars came with it; they are 1 otherwise.
    notes: what the user should know of how it was read.
    sha256: of the file; None for a run.
    published: what is published of the file; None where nothing is.
    incomplete: whether other variables than the scalars are random.
  """

  variables: Variables
  source: str
  settings: Mapping[str, Any]
  quantizers: bool
  notes: tuple[str, ...] = ()
  sha256: str | None = None
  published: Published | None = None
  incomplete: bool = False


def load_variables(
  path: str,
  model: str,
  template: Variables,
  *,
  role: Literal["student", "teacher"] = "student",
  new_head: Variables | None = None,
  entry: str = "",
) -> Loaded:
  """Reads a model's variables from a file; see `files.read_contents` and `import_variables`.

  Raises:
    ConfigError: no such file, a damaged one, or tensors that are not this model's.
  """
  field = "config.teacher.entry" if role == "teacher" else "config.init.entry"
  contents = read_contents(path, entry, field)
  told = contents.published and published_settings(contents.published, model, path, role)
  contents = _fitted(contents, model, template, path, field)
  loaded = import_variables(model, template, contents.tensors, path, role=role, new_head=new_head)
  if contents.settings is not None:
    # Whatever names a file of ours has, it was trained with our code as it was configured then.
    own = {
      name: contents.settings[name] for name in _TELLING & options(model) & contents.settings.keys()
    }
    loaded = loaded._replace(settings=dict(sorted(own.items())))
  elif told and _has_variant(model, contents.published.architecture, loaded.source):
    loaded = loaded._replace(settings=told)
  return loaded._replace(
    notes=contents.notes + loaded.notes, sha256=contents.sha256, published=contents.published
  )


def _fitted(
  contents: Contents, model: str, template: Variables, source: str, field: str
) -> Contents:
  """The content with the names that the model has, where a prefix keeps them from it."""
  paths = traverse_util.flatten_dict(template)
  plain = [path for path in paths if path[-1] not in QUANTIZER_LEAVES]
  expected = [set(names.tensor_names(plain).values()) for names in namings(model).values()]
  whole = [set(names.tensor_names(paths).values()) for names in namings(model).values()]
  try:
    tensors, notes = prefixes.fitted(contents.tensors, [*expected, *whole], field)
  except RefusedError as error:
    raise ConfigError(f"The weights file {source!r} {error}") from error
  return contents._replace(tensors=tensors, notes=contents.notes + notes)


def _has_variant(model: str, architecture: str, source: str) -> bool:
  """Whether it is this source that calls a net so: the authors' files may have a name of
  torchvision's.
  """
  return any(
    naming.source == source and architecture in naming.variants for naming in REGISTRY[model].names
  )


def published_settings(
  published: Published, model: str, weights: str, role: Literal["student", "teacher"] = "student"
) -> dict[str, Any]:
  """The settings of `config.model` with which a published net computes.

  Args:
    published: what is published of the weights.
    model: a name of the registry.
    weights: what to call them in a message.
    role: whose weights they are, for the message.

  Returns:
    The settings; empty for a model that does not say which published nets it is, where the names
    of the tensors must decide.

  Raises:
    ConfigError: the published net is another one than the model, though its tensors may look the
      same.
  """
  architecture = published.architecture
  for naming in REGISTRY[model].names:
    if architecture in naming.variants:
      return naming.variant_settings(architecture)
  section = "model.name" if role == "student" else "teacher.model"
  by = f" by {published.origin}" if published.origin else ""
  other = "use other weights"
  if published.claimed:
    other += ", or save their tensors alone under another name if it is wrong"
  for name, entry in REGISTRY.items():
    for naming in entry.names:
      if architecture in naming.unsupported:
        raise ConfigError(
          f"{weights} is {architecture}{by}, which is not supported: "
          f"{naming.unsupported[architecture]}. {other.capitalize()}."
        )
      if architecture in naming.variants:
        raise ConfigError(
          f"{weights} is {architecture}{by}, not {model} as configured. Set "
          f"config.{section}={name}, or {other}."
        )
  known = sorted(name for naming in REGISTRY[model].names for name in naming.variants)
  if known:
    raise ConfigError(
      f"{weights} is {architecture}{by}, which no model here computes. Of {model} there are "
      f"{', '.join(known)}. Use other weights."
    )
  return {}


def import_variables(
  model: str,
  template: Variables,
  tensors: Mapping[str, np.ndarray],
  source: str,
  *,
  role: Literal["student", "teacher"] = "student",
  new_head: Variables | None = None,
  dtype: Any = np.float32,
) -> Loaded:
  """Fills a model's variables from tensors under the names of any source that knows the model.

  Args:
    model: a name of the registry.
    template: the variables' shapes (arrays or `jax.ShapeDtypeStruct`), `params` and `batch_stats`.
    tensors: the file's content, floating point of any size. torch's `num_batches_tracked` counters
      are passed over; quantizer scalars may be absent all together (a full-precision file), never
      in part.
    source: what to call the file in a message.
    role: whose weights they are, for the message.
    new_head: variables whose head is taken; what the file has for it, of any shape, is passed over.
    dtype: of the result.

  Raises:
    ConfigError: listing every missing, unexpected or misshapen tensor and every one that is not
      finite floating point.
  """
  shapes = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(template).items()}
  given = {
    name: np.asarray(value)
    for name, value in tensors.items()
    if not name.endswith("num_batches_tracked")
  }
  naming, names = _recognise(model, shapes, given)

  scalars = {name for path, name in names.items() if path[-1] in QUANTIZER_LEAVES} & given.keys()
  quantizers = _are_set([given[name] for name in scalars])
  passed_over = set()
  expected = {
    path: name for path, name in names.items() if scalars or path[-1] not in QUANTIZER_LEAVES
  }
  leaves = {
    path: np.full(shape, _RAW_ONE, dtype)
    for path, shape in shapes.items()
    if path[-1] in QUANTIZER_LEAVES
  }
  if new_head is not None:
    head = traverse_util.flatten_dict(head_of(model, new_head))
    leaves |= {path: np.asarray(leaf, dtype) for path, leaf in head.items()}
    passed_over |= {expected.pop(path) for path in head if path in expected}

  unset = set() if quantizers else scalars
  problems = {
    name: f"unexpected: {name} {given[name].shape}"
    for name in sorted(given.keys() - passed_over - set(expected.values()))
  }
  for path, name in expected.items():
    problem = _problem(
      name, given.get(name), naming.tensor_shape(path, shapes[path]), any_value=name in unset
    )
    if problem:
      problems[name] = problem
    elif name not in unset:
      leaves[path] = naming.read(path, given[name], shapes[path]).astype(dtype)
  if problems:
    head_names = {name for path, name in expected.items() if _is_of_head(model, path)}
    only_head = all(
      name in head_names and told.startswith("wrong shape") for name, told in problems.items()
    )
    advice = _advice(model, template, given, role, only_head=only_head)
    listing = "\n  ".join(problems.values())
    raise ConfigError(
      f"{source} does not hold the weights of {model} as configured ({naming.source} names; "
      f"{len(problems)} of "
      f"{len(expected)} tensors differ). Nothing was loaded. {advice}\n  {listing}"
    )
  ordered = {path: leaves[path] for path in shapes}
  notes = ()
  if unset:
    notes = (
      f"The quantizers' a and c in {source} are passed over: they are from before quantization "
      "(all equal, or NaN).",
    )
  return Loaded(
    traverse_util.unflatten_dict(ordered), naming.source, naming.settings, quantizers, notes
  )


def _problem(
  name: str, tensor: np.ndarray | None, shape: tuple[int, ...], *, any_value: bool
) -> str | None:
  """What is wrong with a tensor that should have `shape`; None where nothing is."""
  if tensor is None:
    return f"missing: {name} {shape}"
  if tensor.shape != shape:
    return f"wrong shape: {name} is {tensor.shape}, must be {shape}"
  if any_value:
    return None
  if not _is_float(tensor):
    return f"wrong type: {name} is {tensor.dtype}, must be floating point"
  return None if _is_finite(tensor) else f"not finite: {name} has NaN or infinite values"


def differing_settings(told: Mapping[str, Any], settings: Any) -> dict[str, tuple[Any, Any]]:
  """Where settings differ from those that weights were made for: name -> (theirs, ours). Not the
  width: tensors of another one do not fit, and a name may be that of all widths.

  Args:
    told: theirs.
    settings: ours, as attributes: of `ModelSettings`, or of a model.
  """
  found = {}
  for name, theirs in told.items():
    if name == "width":
      continue
    ours = getattr(settings, name)
    if name == "strides":
      theirs, ours = (
        tuple(strides) or REGISTRY[settings.name].strides for strides in (theirs, ours)
      )
    if ours != theirs and not (name == "channel_rounding" and settings.width == 1):
      found[name] = theirs, ours
  return found


def _recognise(
  model: str, paths: Collection[Path], given: Mapping[str, Any]
) -> tuple[Names, dict[Path, str]]:
  """The naming that explains most of a file's names, and its names for a model's leaves."""
  candidates = [(naming, naming.tensor_names(paths)) for naming in namings(model).values()]
  return max(candidates, key=lambda candidate: len(given.keys() & set(candidate[1].values())))


def _advice(
  model: str, template: Variables, given: Mapping[str, Any], role: str, *, only_head: bool
) -> str:
  """What to do about a file that does not fit."""
  if only_head and role == "teacher":
    head = traverse_util.flatten_dict(head_of(model, template)).values()
    classes = next(leaf.shape[-1] for leaf in head if leaf.shape)
    return f"Only its number of classes differs: a teacher needs those of the data, {classes}."
  if only_head:
    return (
      "Only its number of classes differs: config.init.reset_head=True starts with a new "
      "classifier."
    )
  other = _looks_like(given, model, template)
  if other is not None and other != model:
    section = "model.name" if role == "student" else "teacher.model"
    return (
      f"Its names are those of {other}: use that file's model (config.{section}={other}), "
      "or another file."
    )
  section = "model" if role == "student" else "teacher"
  return f"Use the matching file, config.{section}.width and number of classes."


def _looks_like(given: Mapping[str, Any], model: str, template: Variables) -> str | None:
  """The registered model whose names a file has most in common with, `model` where it has nearly
  all in common with that; None where there is nothing in common.
  """
  # Otherwise all models are traced, which takes ten seconds or more.
  if _common_share(given, model, template) > 0.9:
    return model
  scores = {other: _likeness(given, other) for other in REGISTRY}
  best = max(scores, key=scores.get)
  return best if scores[best] > 0 else None


def _likeness(given: Mapping[str, Any], model: str) -> float:
  """`_common_share` of any registered model; 0 where it does not take ImageNet's images."""
  try:
    shapes = describe(REGISTRY[model](num_classes=1000), (224, 224, 3)).shapes
    return _common_share(given, model, shapes)
  except Exception:  # a model of a user is code that can raise anything
    return 0.0


def _common_share(given: Mapping[str, Any], model: str, template: Variables) -> float:
  """The share of names that a file and a model have in common, under the best of the namings."""
  paths = list(traverse_util.flatten_dict(template))
  kernels_and_norms = [path for path in paths if path[-1] not in QUANTIZER_LEAVES]
  candidates = [
    set(naming.tensor_names(some).values())
    for naming in namings(model).values()
    for some in (paths, kernels_and_norms)  # a full-precision file has no quantizers
  ]
  return max(len(names & given.keys()) / len(names | given.keys()) for names in candidates)


def _are_set(scalars: Collection[np.ndarray]) -> bool:
  """Whether quantizer scalars are there and somebody has set them.

  The authors' code saves uninitialized memory until the first quantized phase, zeros mostly; ours
  the value 1.
  """
  values = [np.ravel(value).astype(np.float64) for value in scalars if _is_float(value)]
  return (
    bool(values)
    and bool(np.isfinite(np.concatenate(values)).all())
    and bool(np.ptp(np.concatenate(values)) > 0)
  )


def _is_float(tensor: np.ndarray) -> bool:
  # ml_dtypes' bfloat16 is no subtype of numpy's floating.
  return np.issubdtype(tensor.dtype, np.floating) or tensor.dtype == ml_dtypes.bfloat16


def _is_finite(tensor: np.ndarray) -> bool:
  return _is_float(tensor) and bool(np.isfinite(tensor.astype(np.float64)).all())
