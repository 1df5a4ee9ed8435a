"""From a weights file to a model's variables: strict, nothing is guessed and nothing left over."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY
from profit_jax.typing import Array, Variables
from profit_jax.weights import prefixes, variants
from profit_jax.weights.files import Contents, read_contents
from profit_jax.weights.formats import RefusedError
from profit_jax.weights.hub import Published
from profit_jax.weights.mismatch import Given, Problem, mismatch
from profit_jax.weights.naming import QUANTIZER_LEAVES, Names, Path, namings
from profit_jax.weights.variants import Role

_RAW_ONE = np.log(np.expm1(1.0))  # the raw value of a quantizer's scalar that is 1
# Raw values of trained scalars lie within; those of uninitialized memory mostly do not.
_TRAINED = (1e-20, 1e6)
VARIANCE = "var"
# What chooses among several weights in a file, by the role of the model.
_ENTRY_FIELD: dict[Role, str] = {
  "student": "config.init.entry",
  "teacher": "config.teacher.entry",
  "library": "entry",
}


def is_first_scalar(value: Array) -> bool:
  """Whether a quantizer's scalar is as no calibration or training has left it."""
  return bool(np.allclose(value, _RAW_ONE))


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
    sources: whose names explain the file equally well, `source` among them.
    variant: which net of another codebase it is; None where it is none, or one without a name.
    told_by: what says so, or what else gives the settings.
  """

  variables: Variables
  source: str
  settings: Mapping[str, Any]
  quantizers: bool
  notes: tuple[str, ...] = ()
  sha256: str | None = None
  published: Published | None = None
  incomplete: bool = False
  sources: tuple[str, ...] = ()
  variant: str | None = None
  told_by: str | None = None


def load_variables(
  path: str,
  model: str,
  template: Variables,
  *,
  role: Role = "student",
  new_head: Variables | None = None,
  entry: str = "",
  variant: str = "",
  settings: Any = None,
) -> Loaded:
  """Reads a model's variables from a file; see `files.read_contents` and `import_variables`.

  Args:
    path: of the file.
    model: a name of the registry.
    template: as in `import_variables`, like `new_head`.
    role: whose weights they are.
    new_head: variables whose head is taken.
    entry: which of the weights in the file; "" takes the first that `containers` knows.
    variant: which net of another codebase the file is; "" leaves it to the file.
    settings: of the model, as attributes, by which a file that may be several nets is taken as one;
      None takes what these have in common.

  Raises:
    ConfigError: no such file, a damaged one, tensors that are not this model's, or another net.
  """
  field = _ENTRY_FIELD[role]
  contents = read_contents(path, entry, field)
  if contents.settings is not None and variant:
    raise ConfigError(
      f"{variants.VARIANT_FIELD[role]} = {variant} is not allowed for {path}, which records the "
      "settings that it was trained with. Leave it empty."
    )
  told = variants.named(contents.published, variant, path, role)
  published = told and variants.published_settings(told, model, path, role)
  contents = _fitted(contents, model, template, path, field, new_head)
  recorded = contents.settings and contents.settings.get("name")
  loaded = import_variables(
    model, template, contents.tensors, path, role=role, new_head=new_head, recorded=recorded
  )
  loaded = loaded._replace(
    notes=contents.notes + loaded.notes, sha256=contents.sha256, published=told
  )
  if contents.settings is not None:
    # Whatever names a file of ours has, it was trained with our code as it was configured then.
    own = variants.recorded_settings(model, contents.settings)
    return loaded._replace(settings=own, told_by=variants.BY_RECORD)
  if told and published and variants.has_variant(model, told.architecture, loaded.source):
    by = variants.teller(told)
    return loaded._replace(settings=published, variant=told.architecture, told_by=by)
  if variant:
    raise ConfigError(
      f"{variants.VARIANT_FIELD[role]} = {variant}, but the names of the tensors in {path} are "
      f"those of {loaded.source}. Remove {variants.VARIANT_FIELD[role]}, or use other weights."
    )
  return loaded if settings is None else _told_by_tensors(loaded, model, path, settings, role)


def _fitted(
  contents: Contents,
  model: str,
  template: Variables,
  source: str,
  field: str,
  new_head: Variables | None,
) -> Contents:
  """The content with the names that the model has, where a prefix keeps them from it."""
  whole = traverse_util.flatten_dict(template)
  plain = [path for path in whole if path[-1] not in QUANTIZER_LEAVES]
  # With a new head, a net without one is complete.
  body = [path for path in plain if new_head is None or not _is_of_head(model, path)]
  expected = [
    set(names.tensor_names(paths).values())
    for paths in (plain, whole, body)
    for names in namings(model).values()
  ]
  try:
    tensors, notes = prefixes.fitted(contents.tensors, expected, field)
  except RefusedError as error:
    raise ConfigError(f"The weights file {source!r} {error}") from error
  return contents._replace(tensors=tensors, notes=contents.notes + notes)


def _told_by_tensors(loaded: Loaded, model: str, path: str, settings: Any, role: Role) -> Loaded:
  """Which net a file is that does not say it: of several, the one nearest to the configuration."""
  nets = variants.nets_of(model, loaded.sources, settings)
  taken = variants.nearest(model, nets, settings)
  if taken is None:
    return loaded
  doubt = variants.ambiguity(nets, taken, path, role)
  return loaded._replace(
    settings=taken.settings,
    variant=taken.name or None,
    told_by=variants.ASSUMED if doubt else variants.BY_TENSORS,
    notes=loaded.notes + ((doubt,) if doubt else ()),
  )


def import_variables(
  model: str,
  template: Variables,
  tensors: Mapping[str, np.ndarray],
  source: str,
  *,
  role: Role = "student",
  new_head: Variables | None = None,
  dtype: Any = np.float32,
  recorded: str | None = None,
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
    recorded: the model that the file says it was trained as, for the message.

  Raises:
    ConfigError: tensors that are missing, unexpected or misshapen, or that have values which no
      training leaves: it says what kind of difference it is, and shows the first ones.
  """
  shapes = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(template).items()}
  given = {
    name: np.asarray(value)
    for name, value in tensors.items()
    if not name.endswith("num_batches_tracked")
  }
  naming, names, sources = _recognise(model, shapes, given)

  scalars = {name for path, name in names.items() if path[-1] in QUANTIZER_LEAVES} & given.keys()
  quantizers = _are_set([given[name] for name in scalars], duq=naming.duq_only)
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
  problems = [
    Problem("unexpected", name, f" {given[name].shape}")
    for name in sorted(given.keys() - passed_over - set(expected.values()))
  ]
  for path, name in expected.items():
    shape = naming.tensor_shape(path, shapes[path])
    problem = problem_of(
      name, given.get(name), shape, variance=path[-1] == VARIANCE, any_value=name in unset
    )
    if problem:
      problems.append(problem)
    elif name not in unset:
      leaves[path] = naming.read(path, given[name], shapes[path]).astype(dtype)
  if problems:
    head_paths = [path for path in expected if _is_of_head(model, path)]
    wrong = Given(
      source,
      given,
      model,
      naming,
      {name: naming.tensor_shape(path, shapes[path]) for path, name in expected.items()},
      role,
      {expected[path] for path in head_paths},
      next((shapes[path][-1] for path in head_paths if shapes[path]), None),
      recorded,
    )
    raise mismatch(wrong, problems)
  ordered = {path: leaves[path] for path in shapes}
  notes = ()
  # Of scalars that are as they start, nothing is lost.
  if not all(is_first_scalar(given[name]) for name in unset):
    notes = (
      f"The quantizers' a and c in {source} are passed over: they are from before quantization "
      "(all equal, NaN, or values of uninitialized memory).",
    )
  return Loaded(
    traverse_util.unflatten_dict(ordered),
    naming.source,
    naming.settings,
    quantizers,
    notes,
    sources=sources,
  )


def problem_of(
  name: str,
  tensor: np.ndarray | None,
  shape: tuple[int, ...],
  *,
  variance: bool = False,
  any_value: bool = False,
) -> Problem | None:
  """What is wrong with a tensor that should have `shape`; None where nothing is.

  Args:
    name: of the tensor.
    tensor: None where it is missing.
    shape: that it should have.
    variance: it must not be below 0.
    any_value: its values do not matter.
  """
  if tensor is None:
    return Problem("missing", name, f" {shape}")
  if tensor.shape != shape:
    return Problem("wrong shape", name, f" is {tensor.shape}, must be {shape}")
  if any_value:
    return None
  if not _is_float(tensor):
    return Problem("wrong type", name, f" is {tensor.dtype}, must be floating point")
  if not _is_finite(tensor):
    return Problem("not finite", name, " has NaN, infinite or too large values")
  if variance and tensor.size and (least := float(tensor.min())) < 0:
    return Problem("impossible", name, f" has the value {least:g}, but a variance is 0 or above")
  return None


def _recognise(
  model: str, paths: Collection[Path], given: Mapping[str, Any]
) -> tuple[Names, dict[Path, str], tuple[str, ...]]:
  """The naming that explains most of a file's names, its names for a model's leaves, and the
  sources of all that explain as much.
  """
  candidates = [(naming, naming.tensor_names(paths)) for naming in namings(model).values()]
  explained = [len(given.keys() & set(names.values())) for _, names in candidates]
  most = max(explained)
  best = [each for each, count in zip(candidates, explained, strict=True) if count == most]
  return *best[0], tuple(naming.source for naming, _ in best)


def _are_set(scalars: Collection[np.ndarray], *, duq: bool) -> bool:
  """Whether quantizer scalars are there and somebody has set them.

  The authors' code saves uninitialized memory until the first quantized phase, zeros mostly; ours
  the value 1.

  Args:
    scalars: all of a file.
    duq: they are the authors', of which none is 0.
  """
  found = [np.ravel(value).astype(np.float64) for value in scalars if _is_float(value)]
  if not found:
    return False
  values = np.concatenate(found)
  if not np.isfinite(values).all() or np.ptp(values) == 0:
    return False
  least, most = _TRAINED
  return not duq or bool(((np.abs(values) > least) & (np.abs(values) < most)).all())


def _is_float(tensor: np.ndarray) -> bool:
  # ml_dtypes' bfloat16 is no subtype of numpy's floating.
  return np.issubdtype(tensor.dtype, np.floating) or tensor.dtype == ml_dtypes.bfloat16


def _is_finite(tensor: np.ndarray) -> bool:
  with np.errstate(over="ignore"):  # what float32 cannot have is infinite in it
    return _is_float(tensor) and bool(np.isfinite(tensor.astype(np.float32)).all())
