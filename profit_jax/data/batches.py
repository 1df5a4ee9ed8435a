"""A user's own batches as a data source.

    data = Data(train=train_batches, eval=eval_batches, steps_per_epoch=390)

A batch is a dictionary:

| key     | array                | meaning                                                       |
|---------|----------------------|---------------------------------------------------------------|
| `image` | `[N, H, W, C]`       | floats, used as they are; or uint8, see `Data.normalization`  |
| `label` | `[N]`, integers      | from 0, below the number of the model's outputs               |
| `mask`  | `[N]`, bool, optional | False in rows that the loss and the scores exclude           |

The first training batch says what N, H, W and C are.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from profit_jax import distributed
from profit_jax.config import ConfigError
from profit_jax.data.base import DatasetInfo, HostShard
from profit_jax.data.normalize import Normalization
from profit_jax.typing import Batch

# With several processes, each takes this many training batches before all agree that none has
# failed: else the others would wait minutes for its part of a step. Agreeing waits for the steps
# under way.
_AGREED = 4
UserBatch = Mapping[str, npt.ArrayLike]
TrainBatches = Callable[[int, int], Iterator[UserBatch]] | Iterable[UserBatch]
EvalBatches = Callable[[], Iterator[UserBatch]] | Iterable[UserBatch]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data:
  """Batches for `Trainer.fit`; see the table above.

  A smaller batch, as the last one of an epoch may be, is padded to N rows. The loss and the scores
  exclude the padding. In training it consists of copies of the batch's own rows, because it takes
  part in batch statistics; in evaluation, of copies of the first row.

  Of several processes, each gives its own rows: process `jax.process_index()` of
  `jax.process_count()` gives N rows of each batch, and the global batch is all processes' rows, in
  the order of the processes. N is the same in all processes, and an example comes from one process
  only. In training each process gives `steps_per_epoch` batches. In evaluation a process may have
  fewer batches than another. Runs of one and of several processes that give the same full global
  batches agree up to rounding; padding is made of each process's own rows.

  Attributes:
    train: `(epoch, first_step) -> iterator` over the batches of an epoch (from 0) from a step (from
      0) on, the same whenever it is called with the same numbers; or anything that can be iterated
      again, of which the first steps are passed over.
    eval: `() -> iterator`, or anything that can be iterated again; each example once.
    steps_per_epoch: batches of an epoch, the same in each process. More are left out.
    class_names: by label; empty without.
    normalization: of uint8 images, `(x / 255 - mean) / std`; None is `x / 255`.

  Raises:
    ConfigError: an iterator that can be used only once, or no step.
  """

  train: TrainBatches
  eval: EvalBatches
  steps_per_epoch: int
  class_names: Sequence[str] = ()
  normalization: Normalization | None = None

  def __post_init__(self):
    steps = self.steps_per_epoch
    if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 1:
      raise ConfigError(
        f"Data.steps_per_epoch = {steps!r} is not allowed: it must be a whole number, 1 or more."
      )
    for name in ("train", "eval"):
      given = getattr(self, name)
      if callable(given):
        continue
      if not isinstance(given, Iterable):
        raise ConfigError(
          f"Data.{name} is a {type(given).__name__}: it must be a function that returns an "
          "iterator, or something that can be iterated again, as a list."
        )
      if iter(given) is given:
        raise ConfigError(
          f"Data.{name} is an iterator that can be used only once, but each epoch needs the "
          "batches again. Give a function that makes a new iterator: "
          + ("(epoch, first_step) -> iterator." if name == "train" else "() -> iterator.")
        )


class BatchSource:
  """`Data` as a `Source`: checks every batch and pads the smaller ones.

  Attributes:
    num_classes: outputs of the model, which labels must lie below; set before batches are taken.
    batch_size: global.
    image_shape: `(H, W, C)`.
    image_dtype: uint8 or float32.
  """

  def __init__(self, data: Data, shard: HostShard = HostShard()):
    """Looks at the first training batch.

    Args:
      data: the user's.
      shard: which process this is.

    Raises:
      ConfigError: a batch that is not as it must be.
    """
    self._data = data
    self._shard = shard
    self.num_classes = 0
    first = next(self._epoch(0, 0), None)
    if first is None:
      raise ConfigError("Data.train has no batch in epoch 0. Give at least one.")
    image = _array(first, "image", "the first training batch")
    if image.ndim != 4 or not len(image):
      raise ConfigError(
        f"The images of the first training batch have the shape {image.shape}: it must be "
        "[N, H, W, C]."
      )
    self.image_shape = image.shape[1:]
    self.image_dtype = np.dtype(np.uint8 if image.dtype == np.uint8 else np.float32)
    given = data.normalization
    if given is not None and {len(given.mean), len(given.std)} != {self.image_shape[-1]}:
      raise ConfigError(
        f"Data.normalization has {len(given.mean)} means and {len(given.std)} deviations: the "
        f"images have {self.image_shape[-1]} channels, and it must have one of each for each."
      )
    self._rows = len(image)
    self.batch_size = self._rows * shard.count

  @classmethod
  def for_evaluation(
    cls, batches: EvalBatches, num_classes: int, class_names: Sequence[str] = ()
  ) -> "BatchSource":
    """The source of a program that does not train.

    Args:
      batches: as `Data.eval`. The only training batch is the first of them.
      num_classes: outputs of the model.
      class_names: by label; empty without.

    Raises:
      ConfigError: batches that are not as they must be.
    """
    opened = batches if callable(batches) else lambda: iter(batches)
    source = cls(
      Data(
        train=lambda epoch, step: opened(),
        eval=batches,
        steps_per_epoch=1,
        class_names=class_names,
      )
    )
    source.num_classes = num_classes
    return source

  def require_images_of(self, shape: tuple[int, ...], *, floats: bool) -> None:
    """Refuses images that are not those of a trained model.

    Args:
      shape: `(H, W, C)` of the model's images.
      floats: whether they are float32, not uint8.

    Raises:
      ConfigError: others.
    """
    if self.image_shape != shape or floats == (self.image_dtype == np.uint8):
      trained = "float32" if floats else "uint8"
      raise ConfigError(
        f"The images are {self.image_dtype.name} of the shape {self.image_shape}, but the model "
        f"was trained on {trained} of the shape {shape}. Give the same kind."
      )

  @property
  def info(self) -> DatasetInfo:
    """What is known of the data; the number of evaluation examples is not, and is 0."""
    channels = self.image_shape[-1]
    as_they_are = Normalization((0.0,) * channels, (1.0,) * channels)
    return DatasetInfo(
      train_examples=self.batch_size * self._data.steps_per_epoch,
      eval_examples=0,
      num_classes=self.num_classes,
      normalization=self._data.normalization or as_they_are,
      class_names=tuple(self._data.class_names),
    )

  def described(self) -> str:
    """In what the batches of all processes must agree."""
    shape = [self._rows, *self.image_shape]
    return f"{shape} {self.image_dtype} {self._data.steps_per_epoch}"

  def fingerprint(self) -> str:
    """A user's data has none."""
    return ""

  def train_batches(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """See `Source.train_batches`."""
    del batch_size
    own, left = self._own_train_batches(epoch, start), self._data.steps_per_epoch - start
    if self._shard.count == 1:
      yield from own
      return
    while left > 0:
      some = itertools.islice(own, min(left, _AGREED))
      yield from distributed.on_all_hosts(functools.partial(list, some))
      left -= _AGREED

  def _own_train_batches(self, epoch: int, start: int) -> Iterator[Batch]:
    count = start
    for batch in itertools.islice(self._epoch(epoch, start), self._data.steps_per_epoch - start):
      yield self._checked(batch, f"training batch {count} of epoch {epoch}", train=True)
      count += 1
    if count < self._data.steps_per_epoch:
      raise ConfigError(
        f"Data.train ended after {count} of {self._data.steps_per_epoch} batches in epoch {epoch}. "
        "Give as many as Data.steps_per_epoch says, in each epoch."
      )

  def eval_batches(self, batch_size: int) -> Iterator[Batch]:
    """See `Source.eval_batches`."""
    del batch_size
    alone, examples = self._shard.count == 1, 0
    for batch in self._own_eval_batches() if alone else self._shared_eval_batches():
      examples += int(batch["mask"].sum())
      yield batch
    # Of several processes, one may have none.
    if not examples if alone else distributed.true_on_all_hosts(not examples):
      raise ConfigError(
        "Data.eval has no example. Give at least one at each call, from a new iterator."
      )

  def _own_eval_batches(self) -> Iterator[Batch]:
    given = self._data.eval
    if callable(given):
      given = _iterator(given(), "eval()")
    for number, batch in enumerate(given):
      yield self._checked(batch, f"evaluation batch {number}", train=False)

  def _shared_eval_batches(self) -> Iterator[Batch]:
    """As many batches in each process, and an error in all of them where one has one."""
    own = self._own_eval_batches()
    empty = {
      "image": np.zeros((self._rows, *self.image_shape), self.image_dtype),
      "label": np.zeros(self._rows, np.int32),
      "mask": np.zeros(self._rows, bool),
    }
    while True:
      batch = distributed.on_all_hosts(lambda: next(own, None))
      if distributed.true_on_all_hosts(batch is None):
        return
      yield empty if batch is None else batch

  def _epoch(self, epoch: int, start: int) -> Iterator[UserBatch]:
    given = self._data.train
    if not callable(given):
      return itertools.islice(given, start, None)
    try:
      inspect.signature(given).bind(epoch, start)
    except TypeError as error:
      raise ConfigError(
        f"Data.train cannot be called as train(epoch, first_step) for an iterator: {error}."
      ) from error
    except ValueError:  # a function without a signature
      pass
    return _iterator(given(epoch, start), "train(epoch, first_step)")

  def _checked(self, batch: UserBatch, what: str, *, train: bool) -> Batch:
    image, label = _array(batch, "image", what), _array(batch, "label", what)
    what = what.capitalize()
    if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
      raise ConfigError(
        f"{what} has labels of the type {label.dtype} and shape {label.shape}: they must be "
        "integers [N]."
      )
    size = len(label)
    if image.shape[1:] != self.image_shape or not 1 <= size <= self._rows or len(image) != size:
      wanted = ", ".join(map(str, self.image_shape))
      raise ConfigError(
        f"{what} has images of the shape {image.shape} and {size} labels: each batch must have "
        f"the shapes [N, {wanted}] and [N], with N at most {self._rows}, as the first batch. "
        "Resize the images, or cut the batch."
      )
    mask = np.asarray(batch.get("mask", np.ones(size, bool)), bool)
    if mask.shape != (size,):
      raise ConfigError(f"{what} has a mask of the shape {mask.shape}: it must be ({size},).")
    label = self._checked_labels(np.where(mask, label, 0), what)
    image = self._checked_images(image, what)
    missing = self._rows - size
    rows = np.resize(np.arange(size), missing) if train else np.zeros(missing, np.int64)
    order = np.concatenate([np.arange(size), rows])
    return {
      "image": image[order],
      "label": label[order].astype(np.int32),
      "mask": np.concatenate([mask, np.zeros(missing, bool)]),
    }

  def _checked_labels(self, label: np.ndarray, what: str) -> np.ndarray:
    if label.min() < 0 or label.max() >= self.num_classes:
      raise ConfigError(
        f"{what} has labels from {label.min()} to {label.max()}: they must be 0 to "
        f"{self.num_classes - 1}, because the model has {self.num_classes} outputs."
      )
    return label

  def _checked_images(self, image: np.ndarray, what: str) -> np.ndarray:
    if self.image_dtype == np.uint8:
      allowed = image.dtype == np.uint8
    else:
      # ml_dtypes' bfloat16 is no subtype of NumPy's floating.
      allowed = image.dtype.kind not in "biuSUO" and image.dtype.kind != "c"
    if not allowed:
      raise ConfigError(
        f"{what} has {image.dtype} images: they must be {self.image_dtype.name}, as the first "
        "batch. Convert them, floats as the model should see them."
      )
    if self.image_dtype == np.uint8:
      return image
    image = image.astype(np.float32)
    if not np.isfinite(image).all():
      raise ConfigError(f"{what} has images with NaN or infinity. Remove them.")
    return image


def _iterator(given: Any, call: str) -> Iterator[UserBatch]:
  if not isinstance(given, Iterable):
    raise ConfigError(
      f"Data.{call} returned a {type(given).__name__}: it must return an iterator over batches. "
      "Write it with yield, or return iter(list)."
    )
  return iter(given)


def _array(batch: UserBatch, key: str, what: str) -> np.ndarray:
  if not isinstance(batch, Mapping) or key not in batch:
    found = f"the keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ConfigError(
      f"{what.capitalize()} is {found}: it must be a dictionary with image [N, H, W, C] and label "
      "[N]."
    )
  return np.asarray(batch[key])
