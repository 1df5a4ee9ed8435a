"""Which example stands in which row of which batch, on any number of hosts. Nothing is decoded."""

import functools

import numpy as np
import pytest

from profit_jax.config import ConfigError
from profit_jax.data import HostShard
from profit_jax.data.folder import Folder
from profit_jax.data.records import EpochRequest, Shard, reader_plan, table_rows
from profit_jax.data.tfds import Splits, cut
from tests.data.pictures import EVAL, TRAIN, settings

BATCH = 8
EPOCH = (0, 1)  # seed and number


@pytest.fixture(scope="module", params=["folder", "stream"])
def rows(request, written):
  """Gives `[place, *key]` of each row of a pass: of a table, which small TFDS sets are too, or of
  shards that are read from front to end.
  """
  if request.param == "folder":
    chosen = settings(**{"data.name": "folder", "data.data_dir": str(written / "folder")})
    splits = Folder(chosen.data)
  else:
    chosen = settings(**{"data.name": "cuttings", "data.data_dir": str(written / "tfds")})
    splits = Splits(chosen.data, memory_limit=0)

  @functools.cache
  def found(shard=HostShard(), start=0, shuffle=EPOCH, batch_size=BATCH):
    records = splits.eval if shuffle is None else splits.train
    wanted = EpochRequest(batch_size, shard, start, shuffle)
    rows = np.array([[r["place"], *r["key"]] for r in records.rows(wanted).as_numpy_iterator()])
    assert (rows[:, 1] >= 0).sum() == records.count(wanted)
    return rows

  return found


def keys(rows):
  """Of the rows that hold an example."""
  return [(first, second) for _, first, second in rows if first >= 0]


@pytest.mark.parametrize(("shuffle", "hosts"), [(EPOCH, 4), (None, 2)], ids=["train", "eval"])
def test_hosts_share_the_rows_that_one_alone_would_see(rows, shuffle, hosts):
  """The records are asked anew for each host: a pass is a function of the seed and the epoch."""
  whole = rows(shuffle=shuffle).reshape(-1, BATCH, 3)
  for i in range(hosts):
    shard = HostShard(i, hosts)
    own = rows(shard, shuffle=shuffle).reshape(len(whole), -1, 3)
    assert np.array_equal(own, whole[:, shard.rows(BATCH)])


def test_places_count_the_rows(rows):
  assert rows()[:, 0].tolist() == list(range(TRAIN))
  assert rows(shuffle=None)[:, 0].tolist() == list(range(2 * BATCH))


def test_a_pass_goes_on_where_it_was_left(rows):
  whole = rows().reshape(-1, BATCH, 3)
  assert np.array_equal(rows(start=2), whole[2])
  assert np.array_equal(rows(HostShard(1, 2), start=1), whole[1:, BATCH // 2 :].reshape(-1, 3))


def test_every_epoch_and_seed_has_every_example_once_in_another_order(rows):
  orders = [keys(rows(shuffle=shuffle)) for shuffle in (EPOCH, (0, 2), (1, 1))]
  for order in orders:
    assert len(order) == len(set(order)) == TRAIN
    assert set(order) == set(orders[0])
  assert len(set(map(tuple, orders))) == len(orders)


def test_examples_that_fill_no_batch_are_left_out(rows):
  found = keys(rows(batch_size=9))
  assert len(found) == len(set(found)) == 18  # two batches; six images fill no third one


def test_evaluation_counts_every_example_once(rows):
  found = rows(shuffle=None)
  assert len(found) == 2 * BATCH
  assert len(set(keys(found))) == len(keys(found)) == EVAL


# ImageNet's: 50,000 images in 64 readers of 781 or 782.
@pytest.mark.parametrize(("hosts", "batch"), [(1, 256), (2, 1000), (8, 1024), (64, 64), (64, 4096)])
def test_evaluation_of_imagenet_counts_50000_on_any_number_of_hosts(hosts, batch):
  rows = [table_rows(50_000, EpochRequest(batch, HostShard(i, hosts))) for i in range(hosts)]
  examples = np.concatenate([found for found, _ in rows])
  assert np.array_equal(np.sort(examples[examples >= 0]), np.arange(50_000))
  # As many batches on every host, or they would wait for each other.
  assert len({len(found) for found, _ in rows}) == 1
  plans = [reader_plan(50_000, 64, EpochRequest(batch, HostShard(i, hosts))) for i in range(hosts)]
  count = sum(len(plan.readers) for plan in plans)
  assert [reader for plan in plans for reader in plan.readers] == list(range(count))
  assert len({(plan.rows, plan.steps) for plan in plans}) == 1
  for reader in range(count):
    own = (reader + 1) * 50_000 // count - reader * 50_000 // count
    assert own <= plans[0].rows * plans[0].steps
  assert count * plans[0].rows == batch


def test_hosts_that_cannot_share_the_readers_are_refused():
  with pytest.raises(ConfigError, match=r"data.num_readers = 64 .* multiple of 3"):
    reader_plan(50_000, 64, EpochRequest(768, HostShard(0, 3)))
  assert len(reader_plan(50_000, 48, EpochRequest(768, HostShard(0, 3))).readers) == 16


def test_shards_are_cut_where_the_readers_meet():
  shards = [Shard("a", 0, 5), Shard("b", 2, 3), Shard("c", 0, 4)]
  assert cut(shards, 0, 12) == shards
  assert cut(shards, 3, 7) == [Shard("a", 3, 2), Shard("b", 2, 2)]
  assert cut(shards, 5, 8) == [Shard("b", 2, 3)]
  assert cut(shards, 11, 12) == [Shard("c", 3, 1)]
