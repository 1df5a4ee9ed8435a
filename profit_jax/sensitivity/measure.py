"""What the loss and top-1 of a trained model lose where one layer alone has fewer bits."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from profit_jax.config import MAX_BITS, MIN_BITS, ConfigError, DataSettings, Settings
from profit_jax.data import Source
from profit_jax.data.base import Batch
from profit_jax.data.batches import BatchSource, Data
from profit_jax.data.normalize import Normalization
from profit_jax.nn import feeds
from profit_jax.nn.spec import KERNEL, ModelSpec, split_path
from profit_jax.quant.bits import Bits, LayerBits, Width, largest_code
from profit_jax.quant.duq import inverse_softplus
from profit_jax.sensitivity import refit
from profit_jax.train.evaluate import Scores, scores_of, summed
from profit_jax.train.mesh import make_mesh
from profit_jax.train.packing import pack_variables
from profit_jax.train.programs import Programs

if TYPE_CHECKING:
  from profit_jax.train.trainer import Result

IMAGES = 2000  # evaluated, if nothing else is asked for
Side = Literal["weights", "inputs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredModel:
  """A trained model and its data.

  Attributes:
    settings: of the run; batch sizes and data count.
    source: the data.
    spec: the model, with its quantizer and its rules.
    variables: its `params` and `batch_stats`, on the host.
    weight_bits: of the run's last phases; None is full precision.
    act_bits: likewise.
    normalization: of uint8 images; None where images are floats.
  """

  settings: Settings
  source: Source
  spec: ModelSpec
  variables: Any
  weight_bits: int | None
  act_bits: int | None
  normalization: Normalization | None


@dataclasses.dataclass(frozen=True)
class Reduction:
  """What fewer bits change.

  Attributes:
    bits: of the part.
    loss: change of the mean cross-entropy.
    top1: change of top-1, in percentage points.
  """

  bits: int
  loss: float
  top1: float


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
  """Weights or inputs that fall to fewer bits together.

  Attributes:
    side: the `weights` of a layer, or the `inputs` of layers that share quantizers.
    layers: whose weights or inputs they are.
    paths: the layer, or the quantizers.
    bits: as trained; 8 where the run has full precision.
    reductions: by the number of bits, rising; without those that are no reduction.
  """

  side: Side
  layers: tuple[str, ...]
  paths: tuple[str, ...]
  bits: int
  reductions: tuple[Reduction, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
  """What `measure` found.

  Attributes:
    model: the trained model.
    bits: widths that were asked for.
    scores: top1, top5 (percent), loss and the number of examples with no reduction.
    parts: weights and inputs of all layers, in the order of their calls.
  """

  model: MeasuredModel
  bits: tuple[int, ...]
  scores: Scores
  parts: tuple[LayerSensitivity, ...]

  def to_dict(self) -> dict[str, Any]:
    """Plain values, for JSON; a loss that is not finite is None."""
    parts = [dataclasses.asdict(part) for part in self.parts]
    for part in parts:
      for reduction in part["reductions"]:
        reduction["loss"] = reduction["loss"] if math.isfinite(reduction["loss"]) else None
    return {"bits": self.bits, "scores": self.scores, "parts": parts}


def measure_sensitivity(
  result: "Result", data: Data, bits: Sequence[int] = (2, 3, 4), images: int = IMAGES
) -> Sensitivity:
  """Measures where the bits of a trained model matter.

  Args:
    result: of `Trainer.fit`.
    data: the batches of that call.
    bits: widths that weights and inputs of each layer alone fall to, each 2 to 8.
    images: the most evaluation images, spread over the whole set.

  Raises:
    ConfigError: bits that are not allowed, or to which nothing can fall; batches that are not those
      of the model; one of several processes.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      "measure_sensitivity runs in one process only. Call it in a separate program, where "
      "Trainer.fit returns the finished run's Result at once."
    )
  if not isinstance(data, Data):
    raise ConfigError(f"data must be a profit_jax.Data, not {type(data).__name__}.")
  source = BatchSource(data)
  source.require_images_of(result.spec.input_shape, floats=result.normalization is None)
  source.num_classes = result.spec.outputs
  settings = Settings(seed=result.seed, data=DataSettings(name="Data.eval"))
  widths = (result.bits.weight, result.bits.act)
  weight_bits, act_bits = (None if width is None else int(width) for width in widths)
  model = MeasuredModel(
    settings=settings.with_batch_size(source.batch_size),
    source=source,
    spec=result.spec,
    variables=result.variables,
    weight_bits=weight_bits,
    act_bits=act_bits,
    normalization=result.normalization,
  )
  return measure(model, bits, images, source.image_dtype)


def measure(
  model: MeasuredModel,
  bits: Sequence[int],
  images: int = IMAGES,
  image_dtype: Any = np.uint8,
  tell: Callable[[str], None] = lambda text: None,
) -> Sensitivity:
  """Lets the weights or the inputs of each layer alone fall, with their intervals refitted.

  Widths are values: one compiled evaluation serves all. It runs on one device.

  Args:
    model: the trained model and its data.
    bits: widths to fall to, each 2 to 8.
    images: the most evaluation images, spread over the whole set.
    image_dtype: of the batches, uint8 or float32.
    tell: is told what is going to be measured.

  Raises:
    ConfigError: bits that are not allowed, or to which nothing can fall; no images.
  """
  widths = _checked(bits)
  if images < 1:
    raise ConfigError(f"images={images} is not allowed: it must be 1 or more.")
  parts = parts_of(model)
  count = sum(width < part.bits for part in parts for width in widths)
  if not count:
    most = max((part.bits for part in parts), default=None)
    has = f"no layer has more than {most} bits" if most else "the model quantizes no layer"
    raise ConfigError(
      f"bits={','.join(map(str, widths))} is not allowed: {has}, so that nothing can fall."
    )
  spec = _of_single_layers(model.spec)
  settings, source = model.settings, model.source
  mesh = make_mesh(settings, jax.local_devices()[:1])
  programs = Programs(settings, source.info, spec, None, mesh, image_dtype=image_dtype)
  try:
    evaluation = _Evaluation(model, programs, parts, images)
    tell(
      f"{count} evaluations of {evaluation.scores['examples']:.0f} images: {len(parts)} weights "
      f"and inputs at {', '.join(map(str, widths))} bits"
    )
    reductions = [
      tuple(evaluation.reduction(p, width) for width in widths if width < p.bits) for p in parts
    ]
  finally:
    programs.close()
  measured = [
    dataclasses.replace(p, reductions=each) for p, each in zip(parts, reductions, strict=True)
  ]
  return Sensitivity(model=model, bits=widths, scores=evaluation.scores, parts=tuple(measured))


def _checked(bits: Sequence[int]) -> tuple[int, ...]:
  if not isinstance(bits, Iterable):
    raise ConfigError(f"bits={bits!r} is not allowed: it must be widths, as (2, 3).")
  widths = [width.item() if isinstance(width, np.integer) else width for width in bits]
  for width in widths:
    if isinstance(width, bool) or not isinstance(width, int) or not MIN_BITS <= width <= MAX_BITS:
      raise ConfigError(
        f"bits has {width!r}, which is not allowed: each must be {MIN_BITS} to {MAX_BITS}."
      )
  if not widths:
    raise ConfigError(f"bits has no width. Give one or more of {MIN_BITS} to {MAX_BITS}.")
  return tuple(sorted(set(widths)))


def parts_of(model: MeasuredModel) -> list[LayerSensitivity]:
  """The weights of every layer, and the inputs of layers that share quantizers, with their bits.

  Layers that a rule keeps in full precision are left out, and quantizers that feed no layer.
  """
  spec = model.spec
  bits = _own_bits(model)
  parts = [
    LayerSensitivity("weights", (layer,), (layer,), _known(bits.weight_of(layer)))
    for layer in spec.kernels
  ]
  for layers, quantizers in _shared(spec):
    parts.append(LayerSensitivity("inputs", layers, quantizers, _known(bits.act_of(quantizers[0]))))
  places = {layer: place for place, layer in enumerate(spec.all_kernels)}
  return sorted(parts, key=lambda part: places[part.layers[0]])


def _known(width: Width) -> int:
  """A width of a trained model, which is no traced value."""
  if width is None:
    raise TypeError("a layer in full precision has no bits")
  return int(width)


def _shared(spec: ModelSpec) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
  """Layers and the quantizers that feed them; two groups have nothing in common."""
  groups: list[tuple[list[str], list[str]]] = []
  for layer, sources in feeds.quantizers_of(spec).items():
    found = ([layer], [path for path in sources if path not in spec.float_layers])
    if not found[1]:
      continue
    apart = []
    for group in groups:
      if set(group[1]) & set(found[1]):
        found = group[0] + found[0], list(dict.fromkeys(group[1] + found[1]))
      else:
        apart.append(group)
    groups = [*apart, found]
  return [(tuple(layers), tuple(quantizers)) for layers, quantizers in groups]


def _own_bits(model: MeasuredModel) -> Bits:
  """The bits of the run, 8 where it has full precision."""
  return model.spec.bits.at(model.weight_bits or MAX_BITS, model.act_bits or MAX_BITS)


def _of_single_layers(spec: ModelSpec) -> ModelSpec:
  """The model with a width for every layer, so that each can fall alone."""
  own = [LayerBits(layer, "weight", MIN_BITS) for layer in spec.kernels]
  own += [LayerBits(path, "act", MIN_BITS) for path in spec.quantizers]
  own += [each for each in spec.bits.own if each.least is None]
  bits = dataclasses.replace(spec.bits, own=tuple(sorted(own, key=lambda each: each.path)))
  return dataclasses.replace(spec, bits=bits)


class _Evaluation:
  """Evaluates the model with and without a reduction.

  Attributes:
    scores: without one.
  """

  def __init__(
    self, model: MeasuredModel, programs: Programs, parts: Sequence[LayerSensitivity], images: int
  ):
    spec = programs.student
    self._model, self._programs, self._spec = model, programs, spec
    bits, own = spec.bits.at(MAX_BITS, MAX_BITS), _own_bits(model)
    widths: dict[str, Width] = {
      path: np.int32(spec.width_of(path, own)) for path in (*spec.kernels, *spec.quantizers)
    }
    self._bits = dataclasses.replace(bits, layers={**bits.layers, **widths})
    self._flat = traverse_util.flatten_dict(jax.device_get(model.variables["params"]))
    self._read = self._inputs()
    # What the run did not quantize begins with 8 bits.
    for part in parts:
      if self._trained_bits(part) is None:
        self._flat |= self._fitted(part, MAX_BITS)
    self._batches = list(map(programs.placement.split, _batches(model, images)))
    self._step = programs.eval_step(True, True)
    self.scores = self._scores(self._flat, self._bits)

  def reduction(self, part: LayerSensitivity, width: int) -> Reduction:
    """The changes where a part alone has this width."""
    alone: dict[str, Width] = dict.fromkeys(part.paths, np.int32(width))
    bits = {**self._bits.layers, **alone}
    found = self._scores(
      self._flat | self._fitted(part, width), dataclasses.replace(self._bits, layers=bits)
    )
    return Reduction(
      width, found["loss"] - self.scores["loss"], found["top1"] - self.scores["top1"]
    )

  def _inputs(self) -> dict[str, np.ndarray]:
    """What every quantizer of activations reads, in the first training batch."""
    model, train = self._model, self._model.settings.train
    batch = next(iter(model.source.train_batches(0, train.batch_size)))
    found = refit.inputs_of_quantizers(
      self._spec.model,
      model.normalization,
      model.variables,
      batch["image"][:: train.accumulation_steps],
      model.spec.bits.at(model.weight_bits, model.act_bits),
    )
    return jax.device_get(found)

  def _trained_bits(self, part: LayerSensitivity) -> int | None:
    model = self._model
    return model.weight_bits if part.side == "weights" else model.act_bits

  def _fitted(self, part: LayerSensitivity, width: int) -> dict[tuple[str, ...], Any]:
    """The scalars of a part's quantizers at a width, as leaves of the parameters."""
    trained = None if self._trained_bits(part) is None else part.bits
    of = self._kernel if part.side == "weights" else self._act
    return {
      (*split_path(path), leaf): value
      for path in part.paths
      for leaf, value in of(path, width, trained).items()
    }

  def _kernel(self, layer: str, width: int, trained: int | None) -> dict[str, Any]:
    return refit.kernel_scalars(
      self._spec.bits.quantizer,
      np.asarray(self._flat[*split_path(layer), KERNEL]),
      self._spec.kernel_scalars(self._flat, layer),
      largest_code(width, signed=True),
      None if trained is None else largest_code(trained, signed=True),
    )

  def _act(self, path: str, width: int, trained: int | None) -> dict[str, Any]:
    by, attributes = self._spec.bits.quantizer, self._spec.layers[path].attributes
    kind, values = attributes["kind"], self._read[path]
    signed = kind == "symmetric"
    qmax = largest_code(width, signed=signed)
    if trained is None:
      largest = attributes["largest_interval"]
      first = by.first_act(jnp.asarray(values), jnp.float32(qmax), kind, largest)
      return refit.act_scalars(by, kind, values, jax.tree.map(inverse_softplus, first), qmax, None)
    scalars = {leaf: self._flat[*split_path(path), leaf] for leaf in by.act_scalars}
    own = largest_code(trained, signed=signed)
    return refit.act_scalars(by, kind, values, scalars, qmax, own)

  def _scores(self, flat: dict[tuple[str, ...], Any], bits: Bits) -> Scores:
    variables = {**self._model.variables, "params": traverse_util.unflatten_dict(flat)}
    packed = self._programs.placement.replicate(pack_variables(variables, self._spec))
    total = summed(self._step, packed, self._batches, bits)
    return scores_of(total)


def _batches(model: MeasuredModel, wanted: int) -> Iterator[Batch]:
  """Batches of at most this many evaluation images, spread over the set, whose order may be that of
  the classes.
  """
  size = model.settings.train.eval_batch_size
  image, label = _spread(model.source.eval_batches(size), wanted)
  for start in range(0, len(label), size):
    part = slice(start, start + size)
    missing = size - len(label[part])
    yield {
      "image": np.pad(image[part], [(0, missing)] + [(0, 0)] * (image.ndim - 1)),
      "label": np.pad(label[part], (0, missing)),
      "mask": np.arange(size) < size - missing,
    }


def _spread(batches: Iterable[Batch], wanted: int) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels of evenly spread examples; keeps no more than twice as many at a time."""
  kept: list[tuple[np.ndarray, Any]] = []
  seen, stride = 0, 1
  for batch in batches:
    for row in np.flatnonzero(batch["mask"]):
      if seen % stride == 0:
        kept.append((batch["image"][row], batch["label"][row]))
        if len(kept) > 2 * wanted:
          kept, stride = kept[::2], 2 * stride
      seen += 1
  if not kept:
    raise ConfigError("None of the evaluation images can be decoded.")
  count = min(wanted, len(kept))
  chosen = [kept[place * len(kept) // count] for place in range(count)]
  return np.stack([image for image, _ in chosen]), np.array([label for _, label in chosen])
