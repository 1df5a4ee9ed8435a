"""Where encoded images lie, and in which order they come: a table that is open at every place, or
streams of shards.

The order of a table's epoch is a permutation of all examples. Shards on a disk far away are read
from front to end, by a fixed number of readers: each owns an equal range of the examples and the
same rows of every global batch, and shuffles the order of its shards and, in a buffer, of its
examples. The hosts share the readers, so that their number changes nothing.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from profit_jax.config import ConfigError
from profit_jax.data.base import HostShard

Record = dict[str, tf.Tensor]

# Examples that wait, over all readers, to be drawn from: for ImageNet about 1 GB of JPEGs. TFDS has
# shuffled the examples once when it wrote the shards, and the readers stand in as many places of
# the data set.
SHUFFLE_BUFFER = 8192
_READ_AT_ONCE = 16  # of a host's readers
# What TensorFlow adds to a message: nodes and operations of its graphs.
_OF_GRAPHS = re.compile(
  r"Error in user-defined function passed to \S+ transformation with iterator: \S+: "
  r"|\[\[\{\{.*?\}\}\]\]|\{\{.*?\}\}|\[Op:\w+\]( name:( \S+)?)?"
)


def one_line(error: Exception) -> str:
  """What an error of TensorFlow or tensorflow-datasets says, for a message: one line of at most
  500 characters, without names of graphs' nodes and without a full stop.
  """
  text = error.message if isinstance(error, tf.errors.OpError) else str(error)
  return " ".join(_OF_GRAPHS.sub(" ", text).split())[:500].rstrip(". ")


class EpochRequest(NamedTuple):
  """One pass over the data, or the rest of one.

  Attributes:
    batch_size: of the global batch.
    shard: who asks.
    start: global batches that are passed over.
    shuffle: `(seed, epoch)`, and what fills no batch is left out; None keeps the order, and the
      last batch is padded.
  """

  batch_size: int
  shard: HostShard
  start: int = 0
  shuffle: tuple[int, int] | None = None


def table_rows(examples: int, wanted: EpochRequest) -> tuple[np.ndarray, np.ndarray]:
  """Which example stands in which row, where every example can be had at any time.

  Args:
    examples: their number.
    wanted: the pass.

  Returns:
    int64 vectors, for each of the host's rows: the example (-1 where the row only pads), and its
    place in the pass.
  """
  batch, shard = wanted.batch_size, wanted.shard
  if wanted.shuffle is None:
    steps = -(-examples // batch)
    order = np.concatenate([np.arange(examples), np.full(steps * batch - examples, -1)])
  else:
    steps = examples // batch
    order = np.random.default_rng(wanted.shuffle).permutation(examples)[: steps * batch]
  places = np.arange(steps * batch).reshape(steps, batch)[wanted.start :, shard.rows(batch)].ravel()
  return order[places].astype(np.int64), places.astype(np.int64)


class InMemoryRecords:
  """The encoded images of a split, which can be had in any order: the base of those that know how
  to read and name them.

  `read` gives the bytes of a record's image, and its label; it runs in a tf.data map. `name` gives
  what a log calls the record with a key.

  Attributes:
    examples: their number.
  """

  def __init__(self, columns: Record):
    """Args: columns: equally long vectors, `label` among them; a record has one value of each."""
    self._columns = columns
    self.examples = int(next(iter(columns.values())).shape[0])

  def rows(self, wanted: EpochRequest) -> tf.data.Dataset:
    """The host's rows of the pass, batch after batch, one record each.

    A record has `place` (int64, row number in the global order of the pass), `key` (int64 `[2]`,
    what `name` takes; -1 in a row that only pads), and what `read` needs.
    """
    examples, places = table_rows(self.examples, wanted)

    def record(example, place):
      found = {name: column[tf.maximum(example, 0)] for name, column in self._columns.items()}
      return {**found, "place": place, "key": tf.stack([example, tf.minimum(example, 0)])}

    return tf.data.Dataset.from_tensor_slices((examples, places)).map(record)

  def count(self, wanted: EpochRequest) -> int:
    """How many of the host's rows hold an example.

    Raises:
      ConfigError: a number of hosts that cannot share the pass.
    """
    return int((table_rows(self.examples, wanted)[0] >= 0).sum())

  def fingerprint(self) -> str:
    """The same wherever the same records are in the same order; where they lie does not matter."""
    digest = hashlib.sha256(self._columns["label"].numpy().tobytes())
    for name in self.names():
      digest.update(name)
    for content in self.sample():
      digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()

  def names(self) -> Iterable[bytes]:
    """Names of the records in their order, where they have any."""
    return ()

  def sample(self) -> Iterable[bytes]:
    """Contents of as many records as can be read in no time: names alone do not tell which images
    they are.
    """
    return ()


class Shard(NamedTuple):
  """A part of a TFRecord file: `take` records after the first `skip`."""

  path: str
  skip: int
  take: int


class Plan(NamedTuple):
  """What the readers of a pass do.

  Attributes:
    readers: of this host, by number.
    rows: of a global batch that each reader fills.
    steps: batches in the pass, those passed over included.
  """

  readers: range
  rows: int
  steps: int


def reader_plan(examples: int, readers: int, wanted: EpochRequest) -> Plan:
  """Shares the readers out.

  Args:
    examples: of the split.
    readers: `data.num_readers`; as many are used as divide the batch too, whatever the number of
      hosts.
    wanted: the pass.

  Raises:
    ConfigError: the hosts cannot share them equally.
  """
  count, shard = math.gcd(readers, wanted.batch_size), wanted.shard
  if count % shard.count:
    raise ConfigError(
      f"config.data.num_readers = {readers} is not allowed: with batches of {wanted.batch_size}, "
      f"{count} readers are used, and "
      f"{shard.count} processes cannot share them equally. Choose a multiple of {shard.count} that "
      "divides the batch sizes."
    )
  rows = wanted.batch_size // count
  longest = -(-examples // count)
  steps = -(-longest // rows) if wanted.shuffle is None else examples // wanted.batch_size
  share = count // shard.count
  return Plan(range(shard.index * share, (shard.index + 1) * share), rows, steps)


class ShardedRecords:
  """As `InMemoryRecords`, in TFRecord files that are read from front to end.

  Attributes:
    examples: of the split.
  """

  def __init__(self, examples: int, readers: int, shards_of: Callable[[int, int], list[Shard]]):
    """Args:
    examples: of the split.
    readers: `data.num_readers`.
    shards_of: gives the parts of shards that hold a range of examples, by its first and its end.
    """
    self.examples = examples
    self._readers, self._shards_of = readers, shards_of
    self._paths: list[str] = []

  def rows(self, wanted: EpochRequest) -> tf.data.Dataset:
    """See `InMemoryRecords.rows`."""
    plan = reader_plan(self.examples, self._readers, wanted)
    count = wanted.batch_size // plan.rows
    shards, first, seeds = [], [0], []
    for reader in plan.readers:
      own = self._shards_of(reader * self.examples // count, (reader + 1) * self.examples // count)
      if wanted.shuffle is not None:
        rng = np.random.default_rng((*wanted.shuffle, reader))
        own = [own[i] for i in rng.permutation(len(own))]
        seeds.append(rng.integers(2**62))
      shards += own
      first.append(len(shards))
    self._paths = sorted({*self._paths, *(shard.path for shard in shards)})
    number = {path: i for i, path in enumerate(self._paths)}
    paths = tf.constant([shard.path for shard in shards])
    files = tf.constant([number[shard.path] for shard in shards], tf.int64)
    skips, takes = (
      tf.constant([getattr(shard, name) for shard in shards], tf.int64) for name in ("skip", "take")
    )
    first, seeds = tf.constant(first, tf.int64), tf.constant(seeds or [0], tf.int64)

    def records_of(shard):
      found = (
        tf.data.TFRecordDataset(paths[shard]).enumerate().skip(skips[shard]).take(takes[shard])
      )
      return found.map(lambda i, data: {"data": data, "key": tf.stack([files[shard], i])})

    def reader_rows(own):
      found = tf.data.Dataset.range(first[own], first[own + 1]).flat_map(records_of)
      if wanted.shuffle is not None:
        buffer = max(SHUFFLE_BUFFER // count, 2 * plan.rows)
        found = found.shuffle(buffer, seed=seeds[own], reshuffle_each_iteration=False)
      padding = tf.data.Dataset.from_tensors(
        {"data": "", "key": tf.constant([-1, -1], tf.int64)}
      ).repeat()
      found = (
        found.concatenate(padding)
        .take(plan.steps * plan.rows)
        .enumerate()
        .skip(wanted.start * plan.rows)
      )

      def placed(i, record):
        row = (plan.readers.start + own) * plan.rows + i % plan.rows
        return {**record, "place": i // plan.rows * wanted.batch_size + row}

      return found.map(placed)

    return tf.data.Dataset.range(len(plan.readers)).interleave(
      reader_rows,
      cycle_length=len(plan.readers),
      block_length=plan.rows,
      num_parallel_calls=min(len(plan.readers), _READ_AT_ONCE),
      deterministic=True,
    )

  def name(self, key: np.ndarray) -> str:
    """What a log calls the record with this key."""
    return f"{self._paths[key[0]]}, record {key[1]}"

  def count(self, wanted: EpochRequest) -> int:
    """See `InMemoryRecords.count`."""
    plan = reader_plan(self.examples, self._readers, wanted)
    if wanted.shuffle is not None:
      return len(plan.readers) * plan.rows * (plan.steps - wanted.start)
    count = wanted.batch_size // plan.rows
    return plan.readers.stop * self.examples // count - plan.readers.start * self.examples // count

  def fingerprint(self) -> str:
    """See `InMemoryRecords.fingerprint`."""
    shards = [
      (os.path.basename(shard.path), shard.skip, shard.take)
      for shard in self._shards_of(0, self.examples)
    ]
    return hashlib.sha256(repr(shards).encode()).hexdigest()


Records = InMemoryRecords | ShardedRecords
