"""Which published net the tensors of a file are, and with which settings it computes.

Nets of the same tensors may compute different things. The table of a model's file (`Naming`) says
which there are; the user, the file's description, the file itself or its tensors say which one it
is, in this order.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from profit_jax.config import ConfigError
from profit_jax.models import REGISTRY, options, published_net
from profit_jax.weights.hub import Published

Role = Literal["student", "teacher", "library"]
# What a caller sets to say which net a file is.
VARIANT_FIELD: Mapping[Role, str] = {
  "student": "config.init.variant",
  "teacher": "config.teacher.variant",
  "library": "variant",
}
_MODEL_FIELD: Mapping[Role, str] = {
  "student": "config.model.name",
  "teacher": "config.teacher.model",
  "library": "the model",
}
BY_RECORD, BY_TENSORS = "the settings that it records", "its tensors"
ASSUMED = "assumption: nothing names it"
# Fields of `config.model` that change neither what a net computes in evaluation nor, the width
# apart, its tensors.
_INDIFFERENT = frozenset({"width", "dropout", "bn_momentum"})
# A width says nothing but which tensors there are, and a name may be that of all widths.
_OF_TENSORS = frozenset({"width", "channel_rounding"})


class Net(NamedTuple):
  """A net that tensors may be.

  Attributes:
    name: in its codebase; "" where it has none.
    source: whose.
    settings: of `config.model`, with which it computes.
    unsupported: why no model here is it; "" where one is.
  """

  name: str
  source: str
  settings: Mapping[str, Any]
  unsupported: str = ""

  @property
  def label(self) -> str:
    """What to call it in a message."""
    if self.unsupported:
      return self.name
    return f"{self.name} of {self.source}" if self.name else f"the net of {self.source}"


def computing_settings(model: str) -> frozenset[str]:
  """The settings of a model that change what it computes from the same tensors."""
  return options(model) - _INDIFFERENT


def recorded_settings(model: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
  """Of the settings that a run recorded, those that change what the model computes."""
  return {name: recorded[name] for name in sorted(computing_settings(model) & recorded.keys())}


def differing_settings(
  model: str, told: Mapping[str, Any], settings: Any
) -> dict[str, tuple[Any, Any]]:
  """Where settings differ from those that weights were made for: name -> (theirs, ours). Not the
  width: tensors of another one do not fit, and a name may be that of all widths.

  Args:
    model: a name of the registry.
    told: theirs.
    settings: ours, as attributes: of `ModelSettings`, or of a model.
  """
  found = {}
  for name in [name for name in told if name in computing_settings(model)]:
    theirs, ours = told[name], getattr(settings, name)
    if name == "strides":
      published = REGISTRY[model].strides
      theirs, ours = (tuple(strides) or published for strides in (theirs, ours))
    if ours != theirs and not (name == "channel_rounding" and settings.width == 1):
      found[name] = theirs, ours
  return found


def named(told: Published | None, variant: str, weights: str, role: Role) -> Published | None:
  """What is published of weights, with the net that the user says they are.

  Args:
    told: what is published, or what the file says.
    variant: what the user says; "" for nothing.
    weights: what to call them in a message.
    role: whose weights they are.

  Raises:
    ConfigError: the user names a net that nobody knows, or another than the weights do.
  """
  if not variant:
    return told
  field, name = VARIANT_FIELD[role], published_net(variant, VARIANT_FIELD[role])
  # torchvision's names are our own models' too, and say less than the user.
  if told is None or (told.claimed and told.architecture in REGISTRY and told.architecture != name):
    return Published(name, origin=field)
  if told.architecture != name:
    by = f" by {told.origin}" if told.origin else ""
    raise ConfigError(
      f"{field} = {variant}, but {weights} is {told.architecture}{by}. Remove {field}, or, if "
      f"{told.architecture} is wrong, save the tensors alone under another name."
    )
  return told._replace(origin=field, claimed=False)


def teller(told: Published) -> str:
  """What says which net a file is, for the record, without the directories of this machine."""
  if told.origin is None:
    return "its publisher"
  says_itself = told.claimed or told.origin in VARIANT_FIELD.values()
  return told.origin if says_itself else "its config.json"


def has_variant(model: str, architecture: str, source: str) -> bool:
  """Whether it is this source that calls a net so: the authors' files may have a name of
  torchvision's.
  """
  return any(
    naming.source == source and architecture in naming.variants for naming in REGISTRY[model].names
  )


def published_settings(
  published: Published, model: str, weights: str, role: Role = "student"
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
  architecture, ours = published.architecture, REGISTRY[model]
  for naming in ours.names:
    if architecture in naming.variants:
      trained = {k: v for k, v in published.settings.items() if k in options(model)}
      return {**ours.settings_of(naming, architecture), **trained}
  by = f" by {published.origin}" if published.origin else ""
  other = "use other weights"
  if published.claimed:
    other += ", or save their tensors alone under another name if it is wrong"
  for name, entry in REGISTRY.items():
    for naming in entry.names:
      if architecture in naming.refused:
        raise ConfigError(
          f"{weights} is {architecture}{by}, which is not supported: "
          f"{naming.refused[architecture]}. {other.capitalize()}."
        )
      if architecture in naming.variants:
        raise ConfigError(
          f"{weights} is {architecture}{by}, not {model} as configured. Set "
          f"{_MODEL_FIELD[role]}={name}, or {other}."
        )
  known = sorted(name for naming in ours.names for name in naming.variants)
  if known:
    raise ConfigError(
      f"{weights} is {architecture}{by}, which no model here computes. Of {model} there are "
      f"{', '.join(known)}. Use other weights."
    )
  return {}


def nets_of(model: str, sources: Collection[str], settings: Any) -> list[Net]:
  """The published nets that tensors may be which fit a model.

  Args:
    model: a name of the registry.
    sources: whose names explain them.
    settings: of the model, as attributes; its width counts.
  """
  entry = REGISTRY[model]
  width = settings.width if "width" in entry.options else 1.0
  found = []
  for naming in entry.names:
    if naming.source not in sources:
      continue
    for name in naming.variants:
      told = entry.settings_of(naming, name)
      if told.get("width", 1.0) == width or "width" not in entry.options:
        found.append(Net(name, naming.source, told))
    if not naming.variants:
      found.append(Net("", naming.source, entry.settings_of(naming)))
    elif width == 1:
      found += [Net(name, naming.source, {}, why) for name, why in naming.unsupported.items()]
  return found


def nearest(model: str, nets: Sequence[Net], settings: Any) -> Net | None:
  """Of nets that a model can be, the one whose settings differ least from given ones; of equals the
  first.
  """
  return min(
    (net for net in nets if not net.unsupported),
    key=lambda net: len(differing_settings(model, net.settings, settings)),
    default=None,
  )


def ambiguity(nets: Sequence[Net], taken: Net, weights: str, role: Role) -> str:
  """A line on nets that compute different things from the same tensors; "" where all of them
  compute the same.

  Args:
    nets: that the tensors may be.
    taken: the one that is assumed.
    weights: what to call them.
    role: whose they are.
  """
  groups: dict[Any, list[Net]] = {}
  for net in nets:
    told = {name: value for name, value in net.settings.items() if name not in _OF_TENSORS}
    groups.setdefault((net.unsupported, repr(sorted(told.items()))), []).append(net)
  if len(groups) < 2:
    return ""
  firsts = [taken if taken in group else group[0] for group in groups.values()]
  supported = [net.settings for net in firsts if not net.unsupported]
  telling = [
    name
    for name in (supported[0] if len(supported) > 1 else ())
    if name not in _OF_TENSORS and len({repr(told.get(name)) for told in supported}) > 1
  ]
  parts = []
  for net in firsts:
    own = net.unsupported or ", ".join(f"{name}={net.settings.get(name)!r}" for name in telling)
    parts.append(f"{net.label} ({own})" if own else net.label)
  return (
    f"Nothing says which net {weights} is. Its tensors fit {', '.join(parts[:-1])} and "
    f"{parts[-1]}. Taken as {taken.label}; set {VARIANT_FIELD[role]} to choose."
  )
