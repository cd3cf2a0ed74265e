"""Encodings beside networkx and dense powers."""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from jaxlab.graph import encodings, structure


@pytest.mark.parametrize("n, k", [(40, 5), (700, 4)])  # dense and iterative
def test_laplacian_eigenvectors(n, k):
  graph = nx.connected_watts_strogatz_graph(n, 6, 0.3, seed=0)
  laplacian = nx.normalized_laplacian_matrix(graph, weight=None).toarray()
  values = np.linalg.eigvalsh(laplacian)[1 : k + 1]
  found = encodings.laplacian_eigenvectors(structure.from_networkx(graph), k).astype("float64")
  np.testing.assert_allclose(laplacian @ found, found * values, atol=1e-5)
  np.testing.assert_allclose(found.T @ found, np.eye(k), atol=1e-5)


def test_each_graph_by_itself_and_zeros_where_it_is_small():
  graphs = [structure.from_networkx(nx.path_graph(n)) for n in (3, 9)]
  both = graphs[0]._replace(
    senders=np.append(graphs[0].senders, graphs[1].senders + 3),
    receivers=np.append(graphs[0].receivers, graphs[1].receivers + 3),
    n_node=np.array([3, 9]),
    n_edge=np.array([4, 16]),
  )
  joint = encodings.laplacian_eigenvectors(both, 4)
  assert np.abs(joint[:3, :2]).max() > 0 and not joint[:3, 2:].any()
  np.testing.assert_allclose(np.abs(joint[3:]), np.abs(encodings.laplacian_eigenvectors(graphs[1], 4)), atol=1e-6)
  for function in (lambda g: encodings.random_walk(g, 3), encodings.pagerank):
    np.testing.assert_allclose(function(both), np.concatenate([function(g) for g in graphs]), atol=1e-7)


def test_random_walk():
  graph = nx.karate_club_graph()
  adjacency = nx.to_numpy_array(graph, weight=None)
  p = adjacency / adjacency.sum(1, keepdims=True)
  expected = np.stack([np.linalg.matrix_power(p, k).diagonal() for k in range(1, 8)], 1)
  np.testing.assert_allclose(encodings.random_walk(structure.from_networkx(graph), 7), expected, atol=1e-6)


def test_random_walk_on_a_directed_graph():
  graph = nx.gn_graph(12, seed=0).to_undirected().to_directed()
  graph.remove_edge(*next(iter(graph.edges)))
  adjacency = nx.to_numpy_array(graph)
  p = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1)
  expected = np.stack([np.linalg.matrix_power(p, k).diagonal() for k in range(1, 5)], 1)
  np.testing.assert_allclose(encodings.random_walk(structure.from_networkx(graph), 4), expected, atol=1e-6)


def test_pagerank():
  graph = nx.gnp_random_graph(25, 0.1, seed=2, directed=True)
  expected = nx.pagerank(graph, alpha=0.85, tol=1e-10)
  found = encodings.pagerank(structure.from_networkx(graph))
  np.testing.assert_allclose(found, [expected[v] for v in range(25)], atol=1e-6)


def test_signs_are_one_for_each_graph_and_column():
  ids = jnp.repeat(jnp.arange(50), 3)
  signs = encodings.random_signs(jax.random.key(0), jnp.ones((150, 4)), ids, 50).reshape(50, 3, 4)
  assert set(np.unique(signs)) == {-1, 1}
  assert (signs == signs[:, :1]).all()
  assert abs(float(signs.mean())) < 0.2


def test_bad_input_is_named():
  path = structure.from_networkx(nx.path_graph(4))
  with pytest.raises(ValueError, match="^k: got 0"):
    encodings.laplacian_eigenvectors(path, 0)
  with pytest.raises(ValueError, match="^k: got 0"):
    encodings.random_walk(path, 0)
  with pytest.raises(ValueError, match="^graph: got a directed"):
    encodings.laplacian_eigenvectors(structure.from_networkx(nx.path_graph(4, create_using=nx.DiGraph)), 2)
  with pytest.raises(ValueError, match="^damping: got 1"):
    encodings.pagerank(path, damping=1.0)
