"""The layers of a model, and the role of each parameter.

Which parameter is a quantized kernel, which belongs to a normalization and which to a quantizer is
known by the layer that made it. Names decide nothing, so that any model made of `profit_jax.nn` is
trained, calibrated and watched alike. Parameters of other layers are plain.
"""

import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core.scope import DenyList

from profit_jax.config import ConfigError
from profit_jax.quant.base import PREFIX
from profit_jax.quant.bits import Bits
from profit_jax.quant.quantized import value_of
from profit_jax.typing import Params, Variables

LayerKind = Literal["conv", "dense", "act", "norm"]
# Optimizer groups. Plain parameters with two axes or more are weights, all others norms.
WEIGHT, NORM, QUANT = "weight", "norm", "quant"
KERNEL = "kernel"
Path = tuple[str, ...]

_recorded: contextvars.ContextVar[list["Layer"] | None] = contextvars.ContextVar(
  "recorded", default=None
)


@dataclasses.dataclass(frozen=True)
class Layer:
  """A layer of `profit_jax.nn` in a model.

  Attributes:
    path: in the model, `block01/expand_conv`.
    kind: what it is.
    attributes: of its module, by name.
    has_weight_bits: whether it was told a width of kernels in this call.
    has_act_bits: likewise, of activations.
  """

  path: str
  kind: LayerKind
  attributes: Mapping[str, Any]
  has_weight_bits: bool = False
  has_act_bits: bool = False


def record(module: nn.Module, kind: LayerKind, bits: Bits) -> None:
  """Tells `describe` of a layer that is called; elsewhere does nothing."""
  layers = _recorded.get()
  if layers is not None:
    names = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
    attributes = {name: getattr(module, name) for name in names}
    told = bits.weight is not None, bits.act is not None
    layers.append(Layer("/".join(module.path), kind, attributes, *told))


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSpec:
  """A model and what its layers say of themselves.

  Attributes:
    model: the module.
    input_shape: of one image, `(H, W, C)`.
    bits: full precision, with the quantizer that the model's layers use, and what rules say of
      single ones.
    shapes: of its `params` and `batch_stats`.
    layers: those of `profit_jax.nn`, by path, in the order of their calls.
    outputs: how many numbers the model gives for an image.
  """

  model: nn.Module
  input_shape: tuple[int, ...]
  bits: Bits
  shapes: Variables
  layers: Mapping[str, Layer]
  outputs: int

  def init(self, key: jax.Array) -> Variables:
    """First `params` and `batch_stats`, drawn from `key`."""
    return {"batch_stats": {}, **_initializer(self.model, self.input_shape, self.bits)(key)}

  @functools.cached_property
  def float_layers(self) -> frozenset[str]:
    """Layers and quantizers that no phase quantizes, by rule."""
    return frozenset(own.path for own in self.bits.own if own.least is None)

  @functools.cached_property
  def kernels(self) -> dict[str, tuple[int, ...]]:
    """Shapes of the kernels that phases quantize, by layer."""
    return {path: s for path, s in self.all_kernels.items() if path not in self.float_layers}

  @functools.cached_property
  def all_kernels(self) -> dict[str, tuple[int, ...]]:
    """Those of all convolutions and dense layers, with `float_layers`."""
    flat = traverse_util.flatten_dict(self.shapes["params"])
    return {
      layer.path: flat[*split_path(layer.path), KERNEL].shape
      for layer in self.layers.values()
      if layer.kind in ("conv", "dense")
    }

  @functools.cached_property
  def convs(self) -> dict[str, tuple[int, ...]]:
    """Those of the convolutions, which AIWQ ranks."""
    return {path: s for path, s in self.kernels.items() if self.layers[path].kind == "conv"}

  @functools.cached_property
  def momenta(self) -> dict[str, float]:
    """The share of the old running statistics that an update keeps, by normalization."""
    norms = (layer for layer in self.layers.values() if layer.kind == "norm")
    return {layer.path: layer.attributes["momentum"] for layer in norms}

  @functools.cached_property
  def groups(self) -> dict[Path, str]:
    """The optimizer group of each parameter: `WEIGHT`, `NORM` or `QUANT`."""
    flat = traverse_util.flatten_dict(self.shapes["params"])
    return {path: self._group(path, leaf) for path, leaf in flat.items()}

  def _group(self, path: Path, leaf: Any) -> str:
    ours = "/".join(path[:-1]) in self.layers
    if ours and path[-1].startswith(PREFIX):
      return QUANT
    return WEIGHT if len(leaf.shape) >= 2 else NORM

  @functools.cached_property
  def quantizers(self) -> tuple[str, ...]:
    """The quantizers of activations that phases use."""
    acts = (path for path, layer in self.layers.items() if layer.kind == "act")
    return tuple(path for path in acts if path not in self.float_layers)

  def width_of(self, layer: str, bits: Bits) -> Any:
    """The bit width of a layer's kernel, or of what a quantizer gives; None in full precision."""
    of = bits.act_of if self.layers[layer].kind == "act" else bits.weight_of
    return of(layer)

  def kernel_scalars(self, flat: Mapping[Path, jax.Array], layer: str) -> dict[str, jax.Array]:
    """The raw scalars of a kernel's quantizer, out of flattened parameters."""
    path = split_path(layer)
    return {leaf: flat[*path, leaf] for leaf in self.bits.quantizer.kernel_scalars}

  def kernel_codes(self, params: Params, bits: Bits) -> dict[str, jax.Array]:
    """The integer codes of each kernel, int8 of its shape, by layer.

    Args:
      params: nested dictionaries.
      bits: with the bit width of the weights.
    """
    flat, quantizer = traverse_util.flatten_dict(params), self.bits.quantizer
    found = {}
    for layer in self.kernels:
      kernel, scalars = flat[*split_path(layer), KERNEL], self.kernel_scalars(flat, layer)
      qmax = bits.kernel_qmax(layer)
      codes = quantizer.of_kernel(quantizer.kernel_codes, kernel, scalars, qmax)
      found[layer] = codes.astype(np.int8)
    return found


def describe(model: nn.Module, input_shape: tuple[int, ...], bits: Bits = Bits()) -> ModelSpec:
  """Traces a model once, without computing anything.

  Args:
    model: `model(x, bits, train)`: float images `[N, H, W, C]` to one array `[N, outputs]`.
    input_shape: `(H, W, C)` of its images.
    bits: with its quantizer; the widths do not matter. `rules.with_rules` adds rules.

  Raises:
    ConfigError: not such a model; a layer that is called twice; variables other than `params` and
      `batch_stats`.
  """
  _check_module(model)
  try:
    hash(model)
  except TypeError as error:
    lists = [
      f.name for f in dataclasses.fields(model) if _has_no_hash(getattr(model, f.name, None))
    ]
    raise ConfigError(
      f"{type(model).__name__} cannot be used: the fields {', '.join(lists)} cannot be hashed. "
      "Give tuples instead of lists, and frozen dictionaries."
    ) from error
  return _describe(model, tuple(input_shape), bits.at(None, None))


def _has_no_hash(value: Any) -> bool:
  try:
    hash(value)
  except TypeError:
    return True
  return False


def never_quantized(spec: ModelSpec, weights: bool, acts: bool) -> list[str]:
  """The layers of a model that do not get the bits of a phase: they were called without `bits`.

  Args:
    spec: of the model.
    weights: whether some phase quantizes weights.
    acts: whether some phase quantizes activations.
  """
  bits = spec.bits.at(8 if weights else None, 8 if acts else None)
  recorded: list[Layer] = []
  token = _recorded.set(recorded)
  try:
    jax.eval_shape(_init(spec.model, spec.input_shape, bits), jax.random.key(0))
  finally:
    _recorded.reset(token)
  return [
    layer.path
    for layer in recorded
    if (weights and layer.kind in ("conv", "dense") and not layer.has_weight_bits)
    or (acts and layer.kind == "act" and not layer.has_act_bits)
  ]


def check_training_pass(spec: ModelSpec) -> None:
  """Traces a model on two images, in training and in evaluation, without computing anything.

  Raises:
    ConfigError: its output is not one array `[N, classes]` of the same shape in both; a parameter
      or a random key that training needs and evaluation does not have.
  """
  name = type(spec.model).__name__

  def run(train):
    def forward(variables, image, key):
      mutable = ["batch_stats"] if train else []
      rngs = {"dropout": key} if train else {}
      output, _ = spec.model.apply(variables, image, spec.bits, train, mutable=mutable, rngs=rngs)
      return value_of(output)

    image = jax.ShapeDtypeStruct((2, *spec.input_shape), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(forward, spec.shapes, image, key)

  try:
    outputs = [run(train=True), run(train=False)]
  except flax.errors.InvalidRngError as error:
    raise ConfigError(
      f"{name} needs a random key that it is not given: {_first_sentence(error)} In training there "
      "is the key 'dropout', in evaluation none."
    ) from error
  except flax.errors.ScopeParamNotFoundError as error:
    raise ConfigError(
      f"{name} calls a layer in training that it does not call in evaluation, so that the layer "
      f"has no parameters: {_first_sentence(error)} Call it in both."
    ) from error
  except flax.errors.ModifyScopeVariableError as error:
    raise ConfigError(
      f"{name} changes a variable in evaluation: {_first_sentence(error)} Give nn.BatchNorm "
      "use_running_average=not train."
    ) from error
  for what, output in zip(("training", "evaluation"), outputs, strict=True):
    shapes = [leaf.shape for leaf in jax.tree.leaves(output)]
    if shapes != [(2, spec.outputs)]:
      raise ConfigError(
        f"{name} returns {_listed_shapes(shapes)} for two images in {what}: it must return one "
        f"array [N, classes], here (2, {spec.outputs})."
      )


def _listed_shapes(shapes: Sequence[tuple[int, ...]]) -> str:
  of = f" of the shape {', '.join(map(str, shapes))}" if shapes else ""
  return f"{len(shapes)} array{'s' * (len(shapes) != 1)}{of}"


def _first_sentence(error: Exception) -> str:
  """What Flax says, without its address."""
  text = " ".join(str(error).partition("(https")[0].split())
  return text.partition(". ")[0].rstrip(".") + "."


def _check_module(model: Any) -> None:
  kind = model if isinstance(model, type) else type(model)
  if any(base.__module__.startswith("flax.nnx") for base in kind.__mro__):
    raise ConfigError(
      f"The model {kind.__name__} is a module of flax.nnx, but profit_jax takes Flax linen "
      f"modules. Call flax.nnx.bridge.to_linen({kind.__name__}, ...) (or ToLinen) inside a linen "
      "module that has QuantConv or QuantDense too: layers of nnx are trained, not quantized."
    )
  if not isinstance(model, nn.Module):
    raise ConfigError(
      f"The model is a {type(model).__name__}: it must be an instance of flax.linen.Module."
      + (" Give Net(), not Net." if isinstance(model, type) else "")
    )
  try:
    inspect.signature(type(model).__call__).bind(model, None, None, False)
  except TypeError as error:
    raise ConfigError(
      f"{kind.__name__}.__call__ cannot be called as model(x, bits, train): {error}. It takes one "
      "array of images, the bits, and whether it trains, and returns one array."
    ) from None


def split_path(path: str) -> Path:
  """`block01/expand_conv` as a tuple; of the model itself, none."""
  return tuple(path.split("/")) if path else ()


@functools.lru_cache(maxsize=32)
def _describe(model: nn.Module, input_shape: tuple[int, ...], bits: Bits) -> ModelSpec:
  recorded: list[Layer] = []
  token = _recorded.set(recorded)
  try:
    # Not the cached program of `_initializer`: it would not call the layers again.
    output, shapes = jax.eval_shape(_init(model, input_shape, bits), jax.random.key(0))
  except jax.errors.ConcretizationTypeError as error:
    raise ConfigError(
      f"{type(model).__name__} branches on values of an array, which a compiled program cannot: "
      f"{_first_sentence(error)} Use jnp.where, or a field of the module."
    ) from error
  finally:
    _recorded.reset(token)
  layers: dict[str, Layer] = {}
  for layer in recorded:
    if layer.path in layers:
      raise ConfigError(
        f"The layer {layer.path} is called twice in one forward pass. Each layer has its own "
        "quantizer and can be called once: make another layer, with another name."
      )
    layers[layer.path] = layer
  leaves = jax.tree.leaves(output)
  if len(leaves) != 1 or leaves[0].ndim != 2 or leaves[0].shape[0] != 1:
    found = _listed_shapes([leaf.shape for leaf in leaves])
    raise ConfigError(
      f"{type(model).__name__} returns {found} for one image: it must return one array "
      "[N, classes], here (1, classes)."
    )
  if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
    raise ConfigError(
      f"{type(model).__name__} returns {leaves[0].dtype}: it must return floats, one number for "
      "each class."
    )
  if others := sorted(shapes.keys() - {"params", "batch_stats"}):
    raise ConfigError(
      f"{type(model).__name__} has variables in the collections {', '.join(others)}: only params "
      "and batch_stats are trained and saved."
    )
  shapes = {"params": {}, "batch_stats": {}, **shapes}
  _check_params(shapes["params"], layers)
  return ModelSpec(model, input_shape, bits, shapes, layers, leaves[0].shape[-1])


def _init(model, input_shape, bits):
  def init(key):
    zeros = np.zeros((1, *input_shape), np.float32)
    output, variables = model.init_with_output(key, zeros, bits, False, mutable=_collections())
    return value_of(output), nn.unbox(variables)

  return init


def _check_params(params: Params, layers: Mapping[str, Layer]) -> None:
  axes = {"conv": 4, "dense": 2}
  for path, leaf in traverse_util.flatten_dict(params).items():
    name, layer = "/".join(path), layers.get("/".join(path[:-1]))
    if any("/" in part for part in path):
      raise ConfigError(
        f"The model has the parameter {path}: the names of modules and parameters must not contain "
        "'/', which separates them in files."
      )
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ConfigError(
        f"The parameter {name} is {getattr(leaf, 'dtype', type(leaf).__name__)}: parameters must "
        "be arrays of floats. Make constants in __call__, not by self.param."
      )
    if layer is not None and path[-1] == KERNEL and leaf.ndim != axes.get(layer.kind, leaf.ndim):
      raise ConfigError(
        f"The layer {layer.path} is called inside nn.scan or nn.vmap, which gave its kernel the "
        f"shape {leaf.shape}: a quantizer belongs to one kernel. Call each layer by itself."
      )


def _collections() -> DenyList:
  # What layers write only when they are asked to; see `nn/layers.py`.
  return DenyList(["intermediates", "moments", "quantized", "calibration", "clip_rate"])


@functools.cache
def _initializer(model, input_shape, bits):
  # Kept, so that a process compiles it once: 11 s of CPU time for MobileNet-v2 (720 small kernels).
  return jax.jit(lambda key: _init(model, input_shape, bits)(key)[1])
