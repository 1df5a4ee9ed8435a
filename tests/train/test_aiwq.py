"""Ranking and freezing."""

import numpy as np
import pytest

from profit_jax.train import aiwq


def test_rank_is_by_metric_not_by_network_order():
  metric = {"block00/a": 0.1, "block01/b": 0.5, "block02/c": 0.5, "block03/d": 0.9}
  assert aiwq.rank(metric) == ("block03/d", "block01/b", "block02/c", "block00/a")


@pytest.mark.parametrize(
  ("count", "fraction", "frozen"),
  [(52, 1 / 3, 17), (52, 2 / 3, 34), (51, 1 / 3, 17), (51, 2 / 3, 34)],
)
def test_the_top_of_the_ranking_freezes(count, fraction, frozen):
  ranking = [f"layer{i}" for i in range(count)]
  assert aiwq.frozen_layers(ranking, fraction) == set(ranking[:frozen])


def moments(mean, std):
  present, previous = np.array([[mean], [std]], np.float32), np.array([[0.0], [1.0]], np.float32)
  return {"layer": {"present": tuple(present), "previous": tuple(previous)}}


def test_running_metric_skips_large_values_and_the_first_step():
  kernel = {"layer": {"kernel": np.ones((1, 1, 1, 1), np.float32)}}
  state = aiwq.start({"layer": (1, 1, 1, 1)})
  state = aiwq.update(state, moments(0.5, 1.0), kernel)
  assert state.metric["layer"] == 0.0  # nothing to compare with
  state = aiwq.update(state, moments(0.5, 1.0), kernel)
  np.testing.assert_allclose(state.metric["layer"], 0.001 * 0.125, rtol=1e-6)
  for large in (moments(3.0, 1.0), moments(0.0, 0.0)):  # KL 4.5; no channel alive
    again = aiwq.update(state, large, kernel)
    assert again.metric["layer"] == state.metric["layer"]


def test_dead_channels_are_left_out():
  present = tuple(np.array([[0.5, 7.0, 1.0], [1.0, 0.0, 1.0]], np.float32))
  previous = tuple(np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]], np.float32))
  np.testing.assert_allclose(aiwq.kl_divergence(present, previous), 0.125, rtol=1e-6)


def test_moments_of_parts_pool_to_those_of_the_whole():
  outputs = np.random.default_rng(0).normal([3.0, -1.0], [0.5, 2.0], (4, 50, 2))
  parts = {"conv": {"present": (outputs.mean(1), outputs.std(1))}}
  mean, std = aiwq.pooled(parts)["conv"]["present"]
  np.testing.assert_allclose(mean, outputs.mean((0, 1)), rtol=1e-6)
  np.testing.assert_allclose(std, outputs.std((0, 1)), rtol=1e-6)
