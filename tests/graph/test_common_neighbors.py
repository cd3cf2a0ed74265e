import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
import scipy.sparse

from jaxlab.graph import common_neighbors, sparse

graphs = st.tuples(st.integers(2, 12), st.integers(0, 40), st.integers(0, 2**16))


def directed(num_nodes, num_edges, seed):
  """An adjacency that need not be symmetric, as after dropping directions, and pairs with repetition and loops."""
  rng = np.random.default_rng(seed)
  dense = np.zeros((num_nodes, num_nodes), "float32")
  dense[tuple(rng.integers(0, num_nodes, (2, num_edges)))] = 1
  return dense, rng.integers(0, num_nodes, (2, 9))


def dense_operator(op):
  """The matrix that `propagate` multiplies by, forward and in the gradient."""
  eye = jnp.eye(op.shape[1])
  return np.asarray(sparse.propagate(op, eye))


@hypothesis.given(graphs)
@hypothesis.settings(deadline=None, max_examples=50)
def test_sets_are_those_of_dense_rows(arguments):
  a, ends = directed(*arguments)
  b, _ = directed(arguments[0], arguments[1], arguments[2] + 1)
  sets = common_neighbors.neighbor_sets(scipy.sparse.csr_array(a), ends, scipy.sparse.csr_array(b))
  x, y = a[ends[0]] > 0, b[ends[1]] > 0
  for got, want in zip(sets, (x & y, x & ~y, ~x & y), strict=True):
    np.testing.assert_array_equal(got.toarray() > 0, want)
    assert got.data.tolist() == [1] * int(want.sum())
  only = common_neighbors.common_neighbors(scipy.sparse.csr_array(a), ends, scipy.sparse.csr_array(b))
  np.testing.assert_array_equal(only.toarray() > 0, x & y)


def test_a_hub_is_searched_not_merged():
  star = common_neighbors.adjacency(np.stack([np.zeros(300, int), np.arange(1, 301)]), 400)
  ring = common_neighbors.adjacency(np.stack([np.arange(350, 360), np.arange(10, 110, 10)]), 400)
  both = scipy.sparse.csr_array(star + ring)
  ends = np.array([[0, 0, 350, 5], [350, 399, 0, 7]])
  dense = both.toarray() > 0
  got = common_neighbors.common_neighbors(both, ends)
  np.testing.assert_array_equal(got.toarray() > 0, dense[ends[0]] & dense[ends[1]])
  assert got.sum(axis=1).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
  ("weight", "oracle"),
  [
    (np.ones_like, lambda g, e: ((u, v, len(list(nx.common_neighbors(g, u, v)))) for u, v in e)),
    (lambda d: 1 / np.log(d), nx.adamic_adar_index),
    (np.reciprocal, nx.resource_allocation_index),
  ],
)
def test_heuristics_are_networkx(weight, oracle):
  graph = nx.karate_club_graph()
  adjacency = common_neighbors.adjacency(np.array(graph.edges).T, len(graph))
  ends = np.array([(u, v) for u in graph for v in graph if u != v][::7]).T
  want = [score for _, _, score in oracle(graph, ends.T.tolist())]
  np.testing.assert_allclose(common_neighbors.heuristic(adjacency, ends, weight), want, rtol=1e-6)
  # The same from pooled node features, as a network sees them.
  degree = np.maximum(np.diff(adjacency.indptr), 2).astype("float64")
  pooled = sparse.propagate(common_neighbors.pairs(adjacency, ends).common, jnp.asarray(weight(degree), "float32"))
  np.testing.assert_allclose(pooled[: ends.shape[1]], want, rtol=1e-5)


@hypothesis.given(graphs)
@hypothesis.settings(deadline=None, max_examples=12)
def test_pairs_hold_the_sets_and_their_candidates(arguments):
  a, ends = directed(*arguments)
  made = common_neighbors.pairs(scipy.sparse.csr_array(a), ends, depth=2, two_hop=True)
  assert made.depth == 2 and made.mask.sum() == ends.shape[1]
  level, inner_ends = made, ends
  for _ in range(2):
    count = inner_ends.shape[1]
    x, y = a[inner_ends[0]] > 0, a[inner_ends[1]] > 0
    np.testing.assert_array_equal(dense_operator(level.common)[:count], x & y)
    np.testing.assert_array_equal(dense_operator(level.exclusive)[:count], x ^ y)
    assert not dense_operator(level.exclusive)[count:].any()
    # Entry (p, u) is about u and the end of p that does not have it; each such pair is there once.
    real = level.exclusive.values > 0
    p, u = level.exclusive.rows[real], level.exclusive.columns[real]
    other = np.where(x[p, u], inner_ends[1][p], inner_ends[0][p])
    got = np.stack([level.inner.left, level.inner.right])[:, level.candidates[real]]
    np.testing.assert_array_equal(np.sort(got, axis=0), np.sort([u, other], axis=0))
    level, inner_ends = level.inner, np.stack([level.inner.left, level.inner.right])[:, level.inner.mask]
    assert np.unique(np.sort(inner_ends, axis=0), axis=1).shape[1] == inner_ends.shape[1]
  # At the last level rows without common neighbours are left out, and come last.
  count = inner_ends.shape[1]
  want = (a[inner_ends[0]] > 0) & (a[inner_ends[1]] > 0)
  rows = level.common.shape[0]
  np.testing.assert_array_equal(dense_operator(level.common)[:count], want[:rows])
  assert not want[rows:].any()
  square = a @ a > 0
  for op, (one, two) in zip(made.two_hop, [(a > 0, square), (square, a > 0), (square, square)], strict=True):
    np.testing.assert_array_equal(dense_operator(op)[: ends.shape[1]], one[ends[0]] & two[ends[1]])


def test_the_stored_transpose_is_the_transpose():
  a, ends = directed(10, 30, 3)
  op = common_neighbors.pairs(scipy.sparse.csr_array(a), ends, exclusive=True).exclusive
  back = np.asarray(sparse.propagate(sparse.transpose(op), jnp.eye(op.shape[0])))
  np.testing.assert_array_equal(back.T, dense_operator(op))


@hypothesis.given(st.integers(0, 10**7))
def test_buckets_hold_and_waste_at_most_a_quarter(count):
  size = common_neighbors.bucket(count)
  assert size >= count and (size <= 1.25 * count + 1 or size <= 16)
  assert common_neighbors.bucket(size) == size


def test_sizes_are_kept_where_they_suffice_and_grow_where_not():
  a, ends = directed(12, 60, 1)
  graph = scipy.sparse.csr_array(a)
  small = common_neighbors.sizes(common_neighbors.pairs(graph, ends[:, :3], depth=1))
  large = common_neighbors.sizes(common_neighbors.pairs(graph, np.tile(ends, 30), depth=1))
  both = common_neighbors.largest([small, large])
  for some in (ends[:, :3], np.tile(ends, 30)):
    assert common_neighbors.sizes(common_neighbors.pairs(graph, some, depth=1, at_least=both)) == both
  grown = common_neighbors.sizes(common_neighbors.pairs(graph, np.tile(ends, 30), depth=1, at_least=small))
  assert grown.pairs == large.pairs and grown.exclusive == large.exclusive
  more = common_neighbors.grown(small)
  assert more.pairs == small.pairs and more.exclusive > small.exclusive and more.inner.pairs > small.inner.pairs


def test_drawn_neighbors_keep_the_sum():
  rng = np.random.default_rng(0)
  hub = common_neighbors.adjacency(np.stack([np.zeros(99, int), np.arange(1, 100)]), 103)
  ends = np.array([[0, 0, 1], [100, 101, 2]])
  totals = []
  for _ in range(300):
    made = common_neighbors.pairs(hub, ends, exclusive=True, max_exclusive=8, rng=rng)
    dense = dense_operator(made.exclusive)[:3]
    np.testing.assert_allclose(dense.sum(axis=1), [99, 99, 0], rtol=1e-6)
    assert (dense[:2] > 0).sum(axis=1).max() <= 8
    totals.append(dense[0, 1:100])
  np.testing.assert_allclose(np.mean(totals, axis=0), 1, atol=1.0)  # six standard deviations of the least likely node
  every = common_neighbors.pairs(hub, ends, exclusive=True, max_exclusive=99, rng=rng)
  np.testing.assert_array_equal(dense_operator(every.exclusive)[0], hub.toarray()[0])


def test_edge_dropout_drops_directions_by_themselves_and_does_not_rescale():
  rng = np.random.default_rng(0)
  full = common_neighbors.adjacency(np.stack(np.triu_indices(40, 1)), 40)
  ends = np.stack(np.triu_indices(40, 1))
  made = common_neighbors.pairs(full, ends, exclusive=True, edge_dropout=0.5, rng=rng)
  common = dense_operator(made.common)
  assert set(np.unique(common)) == {0.0, 1.0}
  assert abs(common[: ends.shape[1]].sum(axis=1).mean() / 38 - 0.25) < 0.02  # both entries must stay
  again = common_neighbors.pairs(full, ends, depth=1, edge_dropout=0.5, rng=rng)
  once = common_neighbors.pairs(full, ends, depth=1, edge_dropout=0.5, drop_again=False, rng=rng)
  share = [(made.inner.common.values > 0).sum() / made.inner.mask.sum() / 38 for made in (again, once)]
  assert (
    abs(share[0] - 1 / 16) < 0.02 and abs(share[1] - 1 / 4) < 0.05
  )  # one graph each, and pairs of a node with itself


@pytest.mark.parametrize(
  ("argument", "call"),
  [
    ("edges", lambda a: common_neighbors.adjacency(np.zeros((3, 2), int), 4)),
    ("edges", lambda a: common_neighbors.adjacency(np.array([[0], [4]]), 4)),
    ("pairs", lambda a: common_neighbors.neighbor_sets(a, np.zeros((2, 1)))),
    ("pairs", lambda a: common_neighbors.pairs(a, np.array([[0], [9]]))),
    ("depth", lambda a: common_neighbors.pairs(a, np.array([[0], [1]]), depth=-1)),
    ("edge_dropout", lambda a: common_neighbors.pairs(a, np.array([[0], [1]]), edge_dropout=1.0)),
    ("max_exclusive", lambda a: common_neighbors.pairs(a, np.array([[0], [1]]), max_exclusive=0)),
    ("rng", lambda a: common_neighbors.pairs(a, np.array([[0], [1]]), edge_dropout=0.1)),
  ],
)
def test_bad_input(argument, call):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    call(common_neighbors.adjacency(np.array([[0, 1], [1, 2]]), 4))
