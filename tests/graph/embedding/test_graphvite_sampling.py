"""Walks, alias tables and pools against enumerated probabilities."""

import hypothesis
import hypothesis.strategies as st
import networkx as nx
import numpy as np
import pytest
import scipy.stats

from jaxlab.graph.embedding import graphvite
from jaxlab.graph.embedding.graphvite import _kernels, partition

KARATE = nx.karate_club_graph()
EDGES = np.array(KARATE.edges).T
WEIGHTS = np.array([w for *_, w in KARATE.edges.data("weight")], float)
N, STEP, LENGTH = 34, 3, 5


def adjacency(weighted):
  return nx.to_numpy_array(KARATE, weight="weight" if weighted else None)


def pair_probability(weighted, step=STEP, length=LENGTH):
  """Of (v_j, v_{j+k}): d_u (P^k)_uv / 2m for each k, by how many pairs of that distance a walk has."""
  a = adjacency(weighted)
  start, move = a.sum(1) / a.sum(), a / a.sum(1, keepdims=True)
  share = np.array([length + 1 - k for k in range(1, step + 1)], float)
  return sum(
    s * start[:, None] * np.linalg.matrix_power(move, k + 1) for k, s in enumerate(share / share.sum())
  )  # fmt: skip


def p_value(counts, probability):
  """Of a chi-square test; cells that expect fewer than five are joined."""
  counts, expected = counts.ravel(), counts.sum() * probability.ravel()
  assert not counts[expected == 0].any()
  rare = expected < 5
  counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
  return scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue


@pytest.mark.parametrize("weighted", [False, True])
def test_pairs_of_walks_have_their_frequencies(weighted):
  """One pair of each walk, since those of the same walk depend on each other."""
  graph = graphvite.graph(EDGES, N, WEIGHTS if weighted else None)
  chains, lengths = graphvite.walks(graph, 200_000, 0, graphvite.Sampling(STEP, LENGTH))
  assert (lengths == LENGTH).all()
  j, k = np.array([(j, j + k) for k in range(1, STEP + 1) for j in range(LENGTH + 1 - k)]).T
  pick = np.random.default_rng(0).integers(0, len(j), len(chains))
  heads, tails = (chains[np.arange(len(chains)), i[pick]] for i in (j, k))
  counts = np.bincount(heads * N + tails, minlength=N * N)
  assert p_value(counts, pair_probability(weighted)) > 0.01
  assert p_value(counts, pair_probability(not weighted)) < 1e-6  # the test can tell


@pytest.mark.parametrize("parts", [1, 3])
def test_a_pool_holds_the_pairs_of_walks_in_their_blocks(parts):
  """Each block is full, and within it pairs have the frequencies that its nodes give them."""
  graph = graphvite.graph(EDGES, N)
  split = partition.zigzag(graph.degree, parts)
  sampling = graphvite.Sampling(STEP, LENGTH)
  pool = graphvite.pool(graph, split, 900_000, 1, sampling, threads=2)
  node = np.full((parts, split.sizes.max()), -1)
  node[split.place[:, 0], split.place[:, 1]] = np.arange(N)
  expected = pair_probability(False)
  for tail_part in range(parts):
    for head_part in range(parts):
      heads, tails = (
        node[head_part, pool[tail_part, head_part, :, 0]],
        node[tail_part, pool[tail_part, head_part, :, 1]],
      )
      assert heads.min() >= 0 and tails.min() >= 0
      counts = np.bincount(heads * N + tails, minlength=N * N).reshape(N, N) / len(heads)
      block = expected * (split.place[:, :1] == head_part) * (split.place[:, 0] == tail_part)
      assert np.abs(counts - block / block.sum()).sum() < 0.04  # 0.03 by chance alone
  np.testing.assert_array_equal(graphvite.pool(graph, split, 900_000, 1, sampling, threads=1), pool)
  assert not np.array_equal(graphvite.pool(graph, split, 900_000, 2, sampling), pool)


def test_edges_are_drawn_by_weight():
  graph = graphvite.graph(EDGES, N, WEIGHTS)
  pool = graphvite.pool(graph, partition.zigzag(graph.degree, 1), 100_000, 0, graphvite.Sampling(1))
  node = np.empty(N, int)
  node[partition.zigzag(graph.degree, 1).place[:, 1]] = np.arange(N)
  heads, tails = node[pool[0, 0]].T
  a = adjacency(True)
  assert p_value(np.bincount(heads * N + tails, minlength=N * N), a / a.sum()) > 0.01


@pytest.mark.parametrize("p, q", [(4.0, 2.0), (0.25, 0.5)])
def test_second_order_steps_have_their_frequencies(p, q):
  """Given the two nodes before, a step has weight w / p back, w to a neighbour of both, w / q elsewhere."""
  graph, a = graphvite.graph(EDGES, N, WEIGHTS), adjacency(True)
  chains, _ = graphvite.walks(graph, 100_000, 0, graphvite.Sampling(2, 3, p=p, q=q))
  before, node, after = np.concatenate([chains[:, 0:3], chains[:, 1:4]]).T
  tested, low = 0, 1.0
  for u, v in zip(*np.nonzero(a), strict=True):
    counts = np.bincount(after[(before == u) & (node == v)], minlength=N)
    weight = a[v] * np.where(np.arange(N) == u, 1 / p, np.where(a[u] > 0, 1, 1 / q))
    if counts.sum() > 400 and (a[v] > 0).sum() > 2:
      low, tested = min(low, p_value(counts, weight / weight.sum())), tested + 1
  assert tested > 100 and low * tested > 0.01  # the smallest of so many


def test_walks_follow_edges_and_stop_at_dead_ends():
  edges = np.array([[0, 1, 2, 0], [1, 2, 3, 4]])
  graph = graphvite.graph(edges, 5, directed=True)
  chains, lengths = graphvite.walks(graph, 500, 0, graphvite.Sampling(1, 4))
  assert {tuple(c) for c in chains} == {(0, 1, 2, 3, -1), (1, 2, 3, -1, -1), (2, 3, -1, -1, -1), (0, 4, -1, -1, -1)}
  assert ((chains >= 0).sum(1) == lengths + 1).all()
  pool = graphvite.pool(graph, partition.zigzag(graph.degree, 1), 300, 0, graphvite.Sampling(2, 4))
  node = np.argsort(partition.zigzag(graph.degree, 1).place[:, 1])
  assert {tuple(x) for x in node[pool[0, 0]]} == {(0, 1), (1, 2), (2, 3), (0, 4), (0, 2), (1, 3)}


# --------------------------------------------------------------------------------------------------------------- pool


def test_the_pseudo_shuffle_is_a_permutation_that_parts_equal_heads():
  graph = graphvite.graph(np.array(nx.barabasi_albert_graph(500, 3, seed=0).edges).T, 500)
  split, base = partition.zigzag(graph.degree, 1), 4
  plain, shuffled = (
    graphvite.pool(graph, split, 20_000, 5, graphvite.Sampling(4, 40, shuffle_base=b))[0, 0] for b in (1, base)
  )
  number = np.arange(len(plain))
  np.testing.assert_array_equal(shuffled[number % base * (len(plain) // base) + number // base], plain)
  repeated = [np.mean(x[1:, 0] == x[:-1, 0]) for x in (plain, shuffled)]
  assert abs(repeated[0] - (base - 1) / base) < 0.03  # walk ends have fewer than s
  assert repeated[1] < 0.02


def test_blocks_that_no_walk_reaches_are_refused():
  graph = graphvite.graph(np.array([[0], [1]]), 2)
  with pytest.raises(ValueError, match="^num_parts: got 2"):
    graphvite.pool(graph, partition.zigzag(graph.degree, 2), 4, 0, graphvite.Sampling(1))
  pool = graphvite.pool(graph, partition.zigzag(graph.degree, 2), 4, 0, graphvite.Sampling(2, 4))
  assert not pool.any()  # each part has one row


# -------------------------------------------------------------------------------------------------------- preparation


@hypothesis.given(
  st.lists(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=12), min_size=1, max_size=4)
)
def test_alias_tables_have_the_probabilities(segments):
  segments = [np.array(s) + (sum(s) == 0) for s in segments]
  starts = np.cumsum([0, *map(len, segments)])
  accept, alias = _kernels.alias_tables(np.concatenate(segments), starts)
  for s, first in zip(segments, starts, strict=False):
    mine = np.zeros(len(s))
    for i in range(len(s)):
      mine[i] += accept[first + i]
      mine[alias[first + i]] += 1 - accept[first + i]
    np.testing.assert_allclose(mine / len(s), s / s.sum(), atol=1e-6)
    assert not mine[s == 0].any()


def test_negatives_are_drawn_by_degree_within_the_part():
  degree = np.r_[np.arange(1, 40), 0.0]
  split = partition.zigzag(degree, 3)
  accept, alias = partition.negatives(degree, split)
  for part in range(3):
    mine = np.zeros(accept.shape[1])
    np.add.at(mine, np.arange(len(mine)), accept[part])
    np.add.at(mine, alias[part], 1 - accept[part])
    expected = np.zeros(len(mine))
    members = split.place[:, 0] == part
    expected[split.place[members, 1]] = degree[members] ** 0.75
    np.testing.assert_allclose(mine / len(mine), expected / expected.sum(), atol=1e-6)
  with pytest.raises(ValueError, match="^num_parts: got 2"):
    partition.negatives(np.array([1.0, 0, 0, 0]), partition.zigzag(np.array([1.0, 0, 0, 0]), 2))


def test_graph_stores_both_directions_loops_once_and_normalizes():
  graph = graphvite.graph(np.array([[0, 1, 2, 1], [1, 2, 2, 0]]), 4, np.array([1.0, 2.0, 4.0, 0.5]))
  assert graph.num_edges == 4
  w = graph.walkable
  assert w.starts.tolist() == [0, 1, 3, 5, 5] and w.receivers.tolist() == [1, 0, 2, 1, 2]
  assert w.senders.tolist() == [0, 1, 1, 2, 2]
  np.testing.assert_allclose(graph.degree, [1.5, 3.5, 6, 0])
  scaled = graphvite.graph(
    np.array([[0, 1, 2, 1], [1, 2, 2, 0]]), 4, np.array([1.0, 2.0, 4.0, 0.5]), normalize=True
  ).degree
  np.testing.assert_allclose(scaled[0], 1.5 / np.sqrt(1.5 * 3.5))
  np.testing.assert_allclose(scaled[2], 2 / np.sqrt(3.5 * 6) + 4 / 6)


def test_default_augmentation():
  """The published graphs: Youtube 5; dense graphs 1."""
  assert graphvite.Sampling().resolve(1_138_499, 4_945_382).augmentation_step == 5
  assert graphvite.Sampling().resolve(1000, 2_000_000).augmentation_step == 1
  assert graphvite.LINE.resolve(1_138_499, 4_945_382).shuffle_base == 5
  assert graphvite.DEEPWALK.resolve(1_138_499, 4_945_382).shuffle_base == 1
