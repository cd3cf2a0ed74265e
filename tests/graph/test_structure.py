import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jraph
import networkx as nx
import numpy as np
import pytest
import scipy.sparse

from jaxlab.graph import sparse, structure


@st.composite
def edge_lists(draw, max_nodes=12):
  """Number of nodes, senders and receivers: duplicates, loops, isolated nodes and empty graphs included."""
  n = draw(st.integers(1, max_nodes))
  ids = hnp.arrays("int64", draw(st.integers(0, 3 * max_nodes)), elements=st.integers(0, n - 1))
  senders = draw(ids)
  receivers = draw(hnp.arrays("int64", senders.size, elements=st.integers(0, n - 1)))
  return n, senders, receivers


def dense(graph):
  """[receiver, sender] weights, entry by entry."""
  n = int(graph.n_node.sum())
  a = np.zeros((n, n))
  weights = np.ones(len(graph.senders)) if graph.edges is None else graph.edges
  for s, r, w in zip(graph.senders, graph.receivers, weights, strict=True):
    a[r, s] += w
  return a


def small(nodes=True):
  """0 <-> 1 <-> 2, a loop at 2 of weight 3, and the isolated node 3."""
  return structure.from_edges(
    [0, 1, 2],
    [1, 2, 2],
    num_nodes=4,
    nodes=np.arange(8, dtype="float32").reshape(4, 2) if nodes else None,
    edges=np.array([1.0, 2.0, 3.0]),
    self_loops="keep",
    undirected=True,
  )


# ------------------------------------------------------------------------------------------------ from other formats


@hypothesis.given(edge_lists(), st.booleans(), st.sampled_from(["sum", "drop"]), st.sampled_from(["keep", "drop"]))
@hypothesis.settings(max_examples=60, deadline=None)
def test_from_edges_against_a_dictionary(edges, undirected, duplicates, self_loops):
  n, senders, receivers = edges
  weights = np.arange(1, senders.size + 1)
  expected = {}
  for s, r, w in zip(senders.tolist(), receivers.tolist(), weights.tolist(), strict=True):
    if s == r and self_loops == "drop":
      continue
    for pair in {(s, r), (r, s)} if undirected else {(s, r)}:
      expected[pair] = expected.get(pair, 0) + w if duplicates == "sum" else expected.get(pair, w)
  graph = structure.from_edges(
    senders,
    receivers,
    num_nodes=n,
    edges=weights,
    duplicates=duplicates,
    self_loops=self_loops,
    undirected=undirected,
  )
  pairs = zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)
  assert dict(zip(pairs, graph.edges.tolist(), strict=True)) == expected
  assert len(graph.senders) == len(expected) == graph.n_edge[0]
  order = graph.receivers.astype(int) * n + graph.senders
  assert (np.diff(order) > 0).all()  # by receiver, then sender
  assert graph.senders.dtype == graph.receivers.dtype == np.int32 and graph.edges.dtype == np.float32


def test_features_of_edges_follow_their_edges():
  features = np.arange(6, dtype="float64").reshape(3, 2)
  graph = structure.from_edges([2, 0, 1], [0, 2, 1], num_nodes=3, edges=features, self_loops="keep")
  assert graph.senders.tolist() == [2, 1, 0] and graph.receivers.tolist() == [0, 1, 2]
  np.testing.assert_array_equal(graph.edges, features[[0, 2, 1]])
  assert graph.edges.dtype == np.float32


def test_sum_without_weights_counts_occurrences():
  graph = structure.from_edges([0, 0, 1], [1, 1, 0], num_nodes=2, duplicates="sum")
  np.testing.assert_array_equal(dense(graph), [[0, 1], [2, 0]])


def test_empty_graphs():
  graph = structure.from_edges([], [], num_nodes=3, undirected=True)
  assert graph.senders.shape == (0,) and graph.n_node.tolist() == [3]
  np.testing.assert_array_equal(dense(structure.normalize(graph)), np.eye(3))
  assert structure.num_nodes(structure.from_edges([], [], num_nodes=0)) == 0


@hypothesis.given(edge_lists())
@hypothesis.settings(max_examples=20, deadline=None)
def test_scipy_both_ways(edges):
  n, senders, receivers = edges
  matrix = scipy.sparse.coo_array((np.arange(1.0, senders.size + 1), (receivers, senders)), shape=(n, n))
  graph = structure.from_scipy(matrix, duplicates="sum", self_loops="keep")
  np.testing.assert_array_equal(structure.to_scipy(graph).toarray(), matrix.toarray())
  x = np.arange(n, dtype="float32")[:, None]
  np.testing.assert_allclose(matrix @ x, sparse.propagate(graph._replace(nodes=x), x), rtol=1e-6)


@pytest.mark.parametrize("kind", [nx.Graph, nx.DiGraph])
def test_networkx(kind):
  source = kind()
  source.add_nodes_from((name, {"x": [i, -i]}) for i, name in enumerate("cab"))
  source.add_weighted_edges_from([("a", "b", 2.0), ("b", "c", 3.0), ("c", "c", 4.0)])
  graph = structure.from_networkx(source, weight="weight", features="x", self_loops="keep")
  np.testing.assert_array_equal(dense(graph), nx.to_numpy_array(source).T)
  np.testing.assert_array_equal(graph.nodes, [[0, 0], [1, -1], [2, -2]])
  assert structure.from_networkx(source, self_loops="keep").edges is None
  assert structure.from_networkx(kind(), weight="weight", features="x").n_node == 0


def test_parallel_edges_of_a_multigraph():
  source = nx.MultiGraph([(0, 1), (0, 1), (1, 2)])
  np.testing.assert_array_equal(dense(structure.from_networkx(source, duplicates="sum")), nx.to_numpy_array(source))


# ----------------------------------------------------------------------------------------------------- normalisation


@hypothesis.given(edge_lists(), st.booleans(), st.booleans())
@hypothesis.settings(max_examples=40, deadline=None)
def test_normalize_against_dense_matrices(edges, undirected, self_loops):
  n, senders, receivers = edges
  weights = 0.5 + np.arange(senders.size) % 3
  graph = structure.from_edges(
    senders,
    receivers,
    num_nodes=n,
    edges=weights,
    duplicates="drop",
    self_loops="keep",
    undirected=undirected,
  )
  a = dense(graph)
  if self_loops:
    a += np.diag(np.diag(a) == 0)
  degree = a.sum(axis=1)
  with np.errstate(divide="ignore"):
    root = np.where(degree > 0, degree**-0.5, 0)
  symmetric = structure.normalize(graph, "symmetric", self_loops=self_loops)
  row = structure.normalize(graph, "row", self_loops=self_loops)
  np.testing.assert_allclose(dense(symmetric), root[:, None] * a * root, atol=1e-6)
  np.testing.assert_allclose(dense(row), root[:, None] ** 2 * a, atol=1e-6)
  structure.validate(symmetric)
  assert structure.is_symmetric(symmetric) or not undirected


def test_a_loop_keeps_its_weight_and_an_isolated_node_gets_an_identity_row():
  graph = small()
  np.testing.assert_array_equal(np.diag(dense(structure.add_self_loops(graph))), [1, 1, 3, 1])
  np.testing.assert_array_equal(dense(structure.normalize(graph))[3], [0, 0, 0, 1])


def test_normalize_of_a_batch_is_the_batch_of_the_normalized():
  graphs = [small(), structure.from_edges([0], [1], num_nodes=2, nodes=np.ones((2, 2), "float32"), edges=[2.0])]
  joined = structure.batch([structure.normalize(g) for g in graphs])
  chex.assert_trees_all_close(structure.normalize(jraph.batch_np(graphs)).edges, joined.edges)
  assert structure.normalize(jraph.batch_np(graphs)).n_edge.tolist() == joined.n_edge.tolist()[:2]


def test_undirected_helpers():
  directed = structure.from_edges([0, 1, 1], [1, 0, 2], num_nodes=3, edges=[5.0, 6.0, 7.0])
  assert not structure.is_symmetric(directed)
  both = structure.to_undirected(directed)
  assert structure.is_symmetric(both)
  np.testing.assert_array_equal(dense(both), [[0, 6, 0], [6, 0, 7], [0, 7, 0]])  # the first in order stays: 1 -> 0
  np.testing.assert_array_equal(dense(structure.to_undirected(directed, duplicates="sum"))[0], [0, 11, 0])


# -------------------------------------------------------------------------------------------------- parts of a graph


@hypothesis.given(edge_lists())
@hypothesis.settings(max_examples=30, deadline=None)
def test_largest_component_equals_networkx(edges):
  n, senders, receivers = edges
  nodes = np.arange(n, dtype="float32")[:, None]
  graph = structure.from_edges(senders, receivers, num_nodes=n, nodes=nodes, duplicates="drop", self_loops="keep")
  source = nx.Graph()
  source.add_nodes_from(range(n))
  source.add_edges_from(zip(senders.tolist(), receivers.tolist(), strict=True))
  part, keep = structure.largest_component(graph)
  assert keep.sum() == max(map(len, nx.connected_components(source)))
  assert set(np.flatnonzero(keep)) in [set(c) for c in nx.connected_components(source)]
  np.testing.assert_array_equal(dense(part), dense(graph)[np.ix_(keep, keep)])
  np.testing.assert_array_equal(part.nodes[:, 0], np.flatnonzero(keep))


# ----------------------------------------------------------------------------------------------------- static shapes


def test_padding_keeps_order_and_reaches_no_real_node():
  graph = structure.normalize(small())
  padded = structure.pad(graph, nodes=7, edges=20)
  structure.validate(padded)
  assert padded.nodes.shape == (7, 2) and padded.senders.shape == (20,)
  np.testing.assert_array_equal(structure.node_mask(padded), [True] * 4 + [False] * 3)
  x = np.where(structure.node_mask(padded)[:, None], padded.nodes, 1e9)
  got = jax.jit(sparse.propagate)(padded, x)
  np.testing.assert_allclose(got[:4], dense(graph) @ graph.nodes, rtol=1e-6)


def test_batch_is_disjoint_and_marks_its_padding():
  graphs = [small(), structure.from_edges([0], [1], num_nodes=2, nodes=np.ones((2, 2), "float32"), edges=[2.0])]
  joined = structure.batch(graphs, nodes=10, edges=12, num_graphs=5)
  assert joined.n_node.tolist() == [4, 2, 4, 0, 0] and joined.n_edge.tolist() == [5, 1, 6, 0, 0]
  np.testing.assert_array_equal(dense(joined)[:4, :4], dense(graphs[0]))
  np.testing.assert_array_equal(dense(joined)[4:6, 4:6], dense(graphs[1]))
  assert dense(joined)[:6, 6:].sum() == dense(joined)[6:, :6].sum() == 0
  masks, ids = jax.jit(lambda g: (structure.node_mask(g), structure.graph_ids(g)))(joined)
  assert np.flatnonzero(masks).tolist() == list(range(6))
  assert ids.tolist() == [0] * 4 + [1] * 2 + [2] * 4
  structure.validate(structure.batch(graphs))


def test_one_shape_one_compilation():
  apply = jax.jit(chex.assert_max_traces(lambda g: sparse.propagate(g, g.nodes), 1))
  for n in (3, 5, 8):
    ring = structure.from_edges(np.arange(n), (np.arange(n) + 1) % n, num_nodes=n, nodes=np.eye(n, 2, dtype="float32"))
    padded = structure.pad(structure.normalize(ring), nodes=10, edges=30)
    np.testing.assert_allclose(apply(padded)[:n], dense(structure.normalize(ring)) @ ring.nodes, atol=1e-6)


def test_unpadded_graph_is_all_real():
  assert structure.node_mask(small()).all() and (structure.graph_ids(small()) == 0).all()
  assert structure.node_mask(small(nodes=False)).shape == (4,)


def test_nodes_may_be_a_sparse_operator():
  features = sparse.from_scipy(scipy.sparse.random_array((4, 9), density=0.3, rng=np.random.default_rng(0)))
  graph = small()._replace(nodes=features)
  structure.validate(graph)
  assert structure.node_mask(graph).shape == (4,)
  with pytest.raises(ValueError, match="^nodes: got a sparse operator"):
    structure.pad(graph, nodes=8, edges=10)


# --------------------------------------------------------------------------------------------------------- bad input


def edges(senders=(0, 1), receivers=(1, 2), num_nodes=3, **options):
  return structure.from_edges(np.array(senders), np.array(receivers), num_nodes=num_nodes, **options)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: edges(senders=[0, 3]), "senders: got node 3"),
    (lambda: edges(receivers=[-1, 1]), "receivers: got node -1"),
    (lambda: edges(senders=[0.0, 1.0]), "senders: got float64"),
    (lambda: edges(senders=[True, False]), "senders: got bool"),
    (lambda: edges(senders=[[0, 1]]), "senders: got int64 of shape"),
    (lambda: edges(receivers=[1]), "receivers: got 1 entries"),
    (lambda: edges(num_nodes=-1), "num_nodes: got -1"),
    (lambda: edges(num_nodes=3.0), "num_nodes: got 3.0"),
    (lambda: edges(num_nodes=2**31), "num_nodes: got"),
    (lambda: edges(nodes=np.ones((2, 4))), r"nodes: got shape \(2, 4\)"),
    (lambda: edges(nodes=np.array([0, np.nan, 1])), "nodes: got NaN"),
    (lambda: edges(nodes=np.array(["a", "b", "c"])), "nodes: got <U1"),
    (lambda: edges(edges=np.array([1, np.nan])), "edges: got NaN"),
    (lambda: edges(edges=np.array([1, np.inf])), "edges: got NaN or inf"),
    (lambda: edges(edges=np.ones(3)), r"edges: got shape \(3,\)"),
    (lambda: edges(edges=np.ones(2, complex)), "edges: got complex"),
    (lambda: edges(receivers=[0, 2]), "self_loops: got 1 edges"),
    (lambda: edges(senders=[0, 0], receivers=[1, 1]), "duplicates: got 1 repeated"),
    (lambda: edges(senders=[0, 1], receivers=[1, 0], undirected=True), "duplicates: got 1 repeated"),
    (lambda: edges(duplicates="mean"), "duplicates: got 'mean'"),
    (lambda: edges(self_loops="add"), "self_loops: got 'add'"),
    (lambda: structure.from_scipy(scipy.sparse.eye_array(2, 3)), "matrix: got shape"),
    (lambda: structure.from_networkx(nx.path_graph(3), weight="w"), "weight: got 'w', which 2 of 2"),
    (lambda: structure.from_networkx(nx.path_graph(3), features="x"), "features: got 'x', which 3 of 3"),
    (lambda: structure.normalize(edges(edges=np.array([1.0, -1.0]))), "edges: got a weight of -1"),
    (lambda: structure.normalize(edges(edges=np.ones((2, 2)))), "edges: got features"),
    (lambda: structure.normalize(edges(), "column"), "kind: got 'column'"),
    (lambda: structure.add_self_loops(edges(), 2.0), "weight: got 2.0"),
    (lambda: structure.subgraph(small(), np.arange(4)), "keep: got int64"),
    (lambda: structure.pad(small(), nodes=4, edges=9), "nodes: got 4, expected at least 5"),
    (lambda: structure.pad(small(), nodes=9, edges=4), "edges: got 4, expected at least 5"),
    (lambda: structure.pad(small(), nodes=9, edges=9, graphs=1), "graphs: got 1"),
    (lambda: structure.batch([]), "graphs: got none"),
    (lambda: structure.batch([small(), small(nodes=False)]), "graphs: got features"),
    (
      lambda: structure.validate(small()._replace(receivers=small().receivers[::-1])),
      "receivers: got edges in another",
    ),
    (lambda: structure.validate(small()._replace(senders=small().senders[1:])), "receivers: got 5 for 4"),
    (lambda: structure.validate(small()._replace(edges=np.full(5, np.nan))), "edges: got NaN"),
    (lambda: structure.validate(small()._replace(edges=np.ones(4))), "edges: got 4 rows"),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    call()


def test_padding_values_do_not_leak_through_gradients():
  padded = structure.pad(structure.normalize(small()), nodes=6, edges=12)
  real = jnp.asarray(structure.node_mask(padded))[:, None]
  gradient = jax.grad(lambda x: jnp.sum(jnp.where(real, sparse.propagate(padded, x), 0) ** 2))(jnp.ones((6, 2)))
  assert (gradient[4:] == 0).all() and (gradient[:4] != 0).all()
