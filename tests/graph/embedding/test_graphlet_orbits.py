"""Every matrix against brute force over subsets, the official code's counts, and the identities they must obey."""

import functools
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.data import files, networks, synthetic
from jaxlab.graph import common_neighbors, sparse
from jaxlab.graph.embedding import graphlet_orbits as go

ORBIT_OF_DEGREE = {  # by sorted degrees inside the graphlet
  (1, 1): {1: 0}, (1, 1, 2): {1: 1, 2: 2}, (2, 2, 2): {2: 3}, (1, 1, 2, 2): {1: 4, 2: 5}, (1, 1, 1, 3): {1: 6, 3: 7},
  (2, 2, 2, 2): {2: 8}, (1, 2, 2, 3): {1: 9, 2: 10, 3: 11}, (2, 2, 3, 3): {2: 12, 3: 13}, (3, 3, 3, 3): {3: 14},
}  # fmt: skip
PLACE = {pair: k for k, pair in enumerate(go.ORBIT_PAIRS)}
device = jax.jit(go.device_orbit_adjacencies, static_argnums=1)


# --------------------------------------------------------------------------------------------------------- brute force


@functools.cache
def patterns(size):
  """[2^pairs, size, size]: which matrix an ordered pair of a subset counts in, by the edges inside; -1 for none."""
  slots = list(itertools.combinations(range(size), 2))
  table = np.full((2 ** len(slots), size, size), -1)
  for code in range(len(table)):
    graph = nx.empty_graph(size)
    graph.add_edges_from(slot for bit, slot in enumerate(slots) if code >> bit & 1)
    if nx.is_connected(graph):
      orbit = ORBIT_OF_DEGREE[tuple(sorted(d for _, d in graph.degree))]
      distance = dict(nx.all_pairs_shortest_path_length(graph))
      for i, j in itertools.permutations(range(size), 2):
        table[code, i, j] = PLACE[distance[i][j], orbit[graph.degree[i]], orbit[graph.degree[j]]]
  return table


def brute_force(a):
  """All matrices [G, 28, n, n] of graphs [G, n, n], and how many there are of each edge pattern of four nodes."""
  count, n = a.shape[:2]
  result, four = np.zeros((count, len(PLACE), n, n), np.int64), np.zeros((count, 64), np.int64)
  for size in (2, 3, 4):
    subsets = np.array(list(itertools.combinations(range(n), size)), int).reshape(-1, size)
    bits = [a[:, subsets[:, i], subsets[:, j]] << b for b, (i, j) in enumerate(itertools.combinations(range(size), 2))]
    codes = np.sum(bits, axis=0)
    if size == 4:
      np.add.at(four, (np.arange(count)[:, None], codes), 1)
    which = patterns(size)[codes]
    for i, j in itertools.permutations(range(size), 2):
      graph, subset = np.nonzero(which[:, :, i, j] >= 0)
      at = which[graph, subset, i, j]
      np.add.at(result, (graph, at, subsets[subset, i], subsets[subset, j]), 1)
  return result, four


def random_graphs(seed, count, n):
  """[count, n, n] 0/1 of densities from none to all."""
  rng = np.random.default_rng(seed)
  density = np.concatenate([[0.0, 1.0], rng.uniform(0, 1, max(count - 2, 0))])[:count]
  upper = np.triu(rng.random((count, n, n)) < density[:, None, None], 1)
  return (upper | upper.swapaxes(1, 2)).astype(np.int64)


def dense(matrices, n):
  """[28, n, n]."""
  return np.stack(
    [np.asarray(matrices[p].toarray() if hasattr(matrices[p], "toarray") else matrices[p]) for p in PLACE]
  )


def undirected(a):
  return np.argwhere(np.triu(a)).T.astype("int32")


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_graphs_by_brute_force(seed, n):
  """100 graphs an example, from empty to complete, as parts of one whose nodes are mixed."""
  a = random_graphs(seed, 100, n)
  expected, _ = brute_force(a)
  place = np.random.default_rng(0).permutation(100 * n)
  rows_of, node_of = np.divmod(np.argsort(place), n)
  at, i, j = np.nonzero(a)
  graph = common_neighbors.adjacency(np.stack([place[at * n + i], place[at * n + j]]), 100 * n)
  got = go.orbit_adjacencies(graph)
  assert list(got) == list(go.ORBIT_PAIRS)
  for pair, matrix in got.items():
    assert matrix.dtype == np.int64 and matrix.has_canonical_format and (matrix.data > 0).all()
    rows, columns = matrix.tocoo().coords
    found = np.zeros((100, n, n), np.int64)
    found[rows_of[rows], node_of[rows], node_of[columns]] = matrix.data
    np.testing.assert_array_equal(found, expected[:, PLACE[pair]], err_msg=str(pair))
    np.testing.assert_array_equal(rows_of[rows], rows_of[columns])  # nothing between parts


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_device_by_brute_force(seed):
  """A batch of graphs under vmap, whose edges are padded."""
  a = random_graphs(seed, 64, 8)
  edges = np.full((64, 2, 28), 8, "int32")
  for g in range(64):
    one = undirected(a[g])
    edges[g, :, : one.shape[1]] = one
  got = batched(edges)
  expected, _ = brute_force(a)
  for pair, k in PLACE.items():
    assert got[pair].dtype == jnp.int32
    np.testing.assert_array_equal(got[pair], expected[:, k], err_msg=str(pair))


batched = jax.jit(jax.vmap(lambda edges: go.device_orbit_adjacencies(edges, 8)))


def test_host_and_device_agree_in_quadratic_memory():
  n = 200
  senders, receivers = synthetic.barabasi_albert(n, 9, seed=1)
  edges = np.stack([senders, receivers])
  host = go.orbit_adjacencies(common_neighbors.adjacency(edges, n))
  compiled = device.lower(edges[:, senders < receivers], n).compile()
  np.testing.assert_array_equal(dense(compiled(edges[:, senders < receivers]), n), dense(host, n))
  needs = compiled.memory_analysis()
  assert needs.temp_size_in_bytes + needs.output_size_in_bytes < 100 * 4 * n**2 < 4 * n**3


def test_networkx_counts_triangles_cliques_and_cycles():
  graph = nx.gnp_random_graph(40, 0.3, seed=2)
  degrees = go.node_degrees(adjacency(graph))
  np.testing.assert_array_equal(degrees[:, 0], [d for _, d in graph.degree])
  np.testing.assert_array_equal(degrees[:, 3], list(nx.triangles(graph).values()))
  cliques = [c for c in nx.enumerate_all_cliques(graph) if len(c) == 4]
  np.testing.assert_array_equal(degrees[:, 14], np.bincount(np.ravel(cliques), minlength=40))
  cycles = [c for c in nx.chordless_cycles(graph, length_bound=4) if len(c) == 4]
  np.testing.assert_array_equal(degrees[:, 8], np.bincount(np.ravel(cycles), minlength=40))


# -------------------------------------------------------------------------------------------------------------- golden

GOLDEN = np.load(pathlib.Path(__file__).parents[2] / "golden" / "graphlet_orbits.npz")
MANIFEST = json.loads(str(GOLDEN["manifest"]))


def golden_graph(name):
  return common_neighbors.adjacency(GOLDEN[f"{name}.edges"].astype(int), MANIFEST["graphs"][name])


@pytest.mark.parametrize("name", [n for n in MANIFEST["graphs"] if n != "ba"])
def test_golden(name):
  """G(30, 0.25), a star, K6, C8, Petersen's graph, and one with isolated nodes."""
  got = go.orbit_adjacencies(golden_graph(name))
  for k, pair in enumerate(MANIFEST["pairs"]):
    np.testing.assert_array_equal(got[tuple(pair)].toarray(), GOLDEN[f"{name}.matrices"][k], err_msg=str(pair))


def test_golden_sums():
  """BA(1000, 10): number of entries, sum, weighted sum and maximum of every matrix; degree vectors."""
  graph = golden_graph("ba")
  got = go.orbit_adjacencies(graph)
  i = np.arange(1000)
  for k, pair in enumerate(MANIFEST["pairs"]):
    m = got[tuple(pair)]
    assert [m.nnz, m.sum(), (i % 97) @ (m @ (i % 89)), m.max()] == GOLDEN["ba.sums"][k].tolist(), pair
  np.testing.assert_array_equal(go.node_degrees(graph), GOLDEN["ba.node_degrees"])


def test_golden_sums_of_orbits():
  graph = golden_graph("gnp")
  matrices = go.orbit_adjacencies(graph)
  np.testing.assert_array_equal(go.node_degrees(graph), GOLDEN["gnp.node_degrees"])
  np.testing.assert_array_equal(go.edge_degrees(graph).counts, GOLDEN["gnp.edge_degrees"])
  for g in range(9):
    np.testing.assert_array_equal(go.graphlet_adjacency(matrices, g).toarray(), GOLDEN["gnp.graphlets"][g])


# ---------------------------------------------------------------------------------------------------------- identities


def adjacency(graph):
  return common_neighbors.adjacency(np.array(graph.edges).T.reshape(2, -1), len(graph))


@pytest.fixture(scope="module")
def ba():
  """A graph with hubs, [n, n]; its matrices by pair."""
  senders, receivers = synthetic.barabasi_albert(400, 7, seed=3)
  graph = common_neighbors.adjacency(np.stack([senders, receivers]), 400)
  return graph, {pair: m.toarray() for pair, m in go.orbit_adjacencies(graph).items()}


def test_transposes(ba):
  for (hop, o, p), m in ba[1].items():
    np.testing.assert_array_equal(m, ba[1][hop, p, o].T)


def test_relabelling_conjugates(ba):
  graph, expected = ba
  order = np.random.default_rng(1).permutation(400)
  got = go.orbit_adjacencies(graph[order][:, order])
  for pair, m in got.items():
    np.testing.assert_array_equal(m.toarray(), expected[pair][order][:, order])


def test_each_graphlet_is_counted_once_for_each_ordered_pair_of_its_nodes():
  a = random_graphs(5, 30, 9)
  _, four = brute_force(a)
  kinds = {}  # pattern -> graphlet
  for code, table in enumerate(patterns(4)):
    if table.max() >= 0:
      orbit = go.ORBIT_PAIRS[table[0, 1]][1]
      kinds[code] = next(g for g, orbits in enumerate(go.GRAPHLETS) if orbit in orbits)
  for g in range(30):
    matrices = go.orbit_adjacencies(scipy.sparse.csr_array(a[g]))
    for graphlet in range(3, 9):
      count = sum(four[g, code] for code, kind in kinds.items() if kind == graphlet)
      assert go.graphlet_adjacency(matrices, graphlet).sum() == 12 * count
    triangles = sum(nx.triangles(nx.from_numpy_array(a[g])).values()) // 3
    degree = a[g].sum(1)
    assert go.graphlet_adjacency(matrices, 2).sum() == 6 * triangles
    assert go.graphlet_adjacency(matrices, 1).sum() == 6 * ((degree * (degree - 1) // 2).sum() - 3 * triangles)


def simple_paths(m):
  """Simple paths of three edges between every two nodes, from the matrices."""
  return (
    m[3, 4, 4] + m[1, 8, 8] + m[2, 9, 10] + m[2, 10, 9] + m[1, 12, 13] + m[1, 13, 12] + 2 * m[2, 12, 12]
    + 2 * m[1, 14, 14]
  )  # fmt: skip


def test_walks_are_sums_of_orbit_adjacencies(ba):
  """A A = diag(d) + T + B, and A^3 of two nodes is their simple paths and what goes back and forth."""
  graph, m = ba
  a = graph.toarray().astype(int)
  d = a.sum(1)
  np.testing.assert_array_equal(a @ a, np.diag(d) + m[1, 3, 3] + m[2, 1, 1])
  walks = simple_paths(m) + a * (d[:, None] + d - 1)
  np.testing.assert_array_equal((a @ a @ a)[~np.eye(400, dtype=bool)], walks[~np.eye(400, dtype=bool)])


def test_simple_paths_by_search():
  graph = nx.gnp_random_graph(14, 0.4, seed=1)
  found = simple_paths({pair: m.toarray() for pair, m in go.orbit_adjacencies(adjacency(graph)).items()})
  for i, j in itertools.combinations(range(14), 2):
    assert found[i, j] == sum(len(p) == 4 for p in nx.all_simple_paths(graph, i, j, cutoff=3))


def test_degrees_by_two_routes(ba):
  graph, m = ba
  degrees = go.node_degrees(graph)
  rows = lambda *pair: m[pair].sum(1)
  np.testing.assert_array_equal(rows(1, 13, 13), degrees[:, 13])
  np.testing.assert_array_equal(rows(2, 12, 12), degrees[:, 12])
  np.testing.assert_array_equal(rows(3, 4, 4), degrees[:, 4])
  np.testing.assert_array_equal(rows(2, 8, 8), degrees[:, 8])
  np.testing.assert_array_equal(rows(2, 9, 10), 2 * degrees[:, 9])
  np.testing.assert_array_equal(rows(2, 6, 6), 2 * degrees[:, 6])


def test_patterns(ba):
  """Hop 1 on edges alone; hop 2 on pairs two steps apart; hop 3 neither on edges nor the diagonal."""
  graph, m = ba
  a = graph.toarray() > 0
  for (hop, _, _), matrix in m.items():
    assert not matrix[~a if hop == 1 else a].any()
    assert not np.diagonal(matrix).any()
  two = (a.astype(int) @ a > 0) & ~a & ~np.eye(400, dtype=bool)
  assert (m[2, 1, 1] > 0)[two].all()
  for (hop, _, _), matrix in m.items():
    if hop == 2:
      assert not matrix[~two].any()


def test_edge_degrees_by_brute_force():
  a = random_graphs(7, 5, 9)[4]
  (expected,), _ = brute_force(a[None])
  found = go.edge_degrees(scipy.sparse.csr_array(a))
  assert found.counts.shape == (found.edges.shape[1], 12)
  u, v = found.edges
  np.testing.assert_array_equal(found.edges, undirected(a))
  assert sorted(go.EDGE_PAIRS) == sorted(p for p in go.ORBIT_PAIRS if p[0] == 1 and 0 < p[1] <= p[2])
  for k, (hop, o, p) in enumerate(go.EDGE_PAIRS):
    both = expected[PLACE[hop, o, p]] + (expected[PLACE[hop, p, o]] if o != p else 0)
    np.testing.assert_array_equal(found.counts[:, k], both[u, v])


# ----------------------------------------------------------------------------------------------- what walks do not see


def test_pairs_without_a_path_over_the_whole_graphlet():
  found = set()
  for size in (3, 4):
    slots = list(itertools.combinations(range(size), 2))
    for code, table in enumerate(patterns(size)):
      graph = nx.empty_graph(size)
      graph.add_edges_from(slot for bit, slot in enumerate(slots) if code >> bit & 1)
      for i, j in itertools.permutations(range(size), 2):
        if table[i, j] >= 0 and not any(len(p) == size for p in nx.all_simple_paths(graph, i, j)):
          found.add(go.ORBIT_PAIRS[table[i, j]])
  assert found == set(go.INVISIBLE_TO_PATHS)


def test_walk_counts_do_not_tell_a_star_from_its_parts():
  """Equal numbers of paths of two and three edges between two nodes; different stars."""
  edge, star = nx.path_graph(2), nx.star_graph(3)  # the centre is node 0
  path = nx.path_graph(3)
  for few, many, pair, ends in ((edge, star, (1, 6, 7), (1, 0)), (path, star, (2, 6, 6), (0, 2))):
    few_m, many_m = ({p: m.toarray() for p, m in go.orbit_adjacencies(adjacency(g)).items()} for g in (few, many))
    at = ends if pair[0] == 1 else (0, 2)
    other = ends if pair[0] == 1 else (1, 2)
    for of in (simple_paths, lambda m: m[1, 3, 3] + m[2, 1, 1]):
      assert of(few_m)[at] == of(many_m)[other]
    assert (few_m[pair][at], many_m[pair][other]) == (0, 1)
  # The end is the row: the leaves' column of the centre is full.
  assert many_m[1, 6, 7].sum(0).tolist() == [3, 0, 0, 0]


# ----------------------------------------------------------------------------------------------- large counts, and rows


def hubs(first, second, shared, *, linked):
  """Node 0 with `first` leaves, node 1 with `second`, and neighbours of both; edge 0 - 1 or not."""
  n = 2 + first + second + shared
  of_0 = np.concatenate([np.arange(2, 2 + first), np.arange(2 + first + second, n)])
  edges = np.concatenate(
    [np.stack([0 * of_0, of_0]), np.stack([0 * np.arange(2 + first, n) + 1, np.arange(2 + first, n)])], 1
  )
  return common_neighbors.adjacency(np.concatenate([edges, [[0], [1]]], 1) if linked else edges, n)


def first_rows(graph, rows=2):
  """Of the block of the first rows: the others are too many."""
  block = next(go.stream(graph, go.ORBIT_PAIRS[:-1], rows=rows))
  return lambda *pair: block.matrix(pair).toarray()


@pytest.mark.parametrize("linked", [True, False])
def test_exact_beyond_float32(linked):
  """Closed forms, some above 2^24 and odd, where float32 rounds."""
  f, s, c = 4201, 4099, 5803
  m = first_rows(hubs(f, s, c, linked=linked))
  if linked:
    expected = {
      (1, 5, 5): f * s, (1, 13, 13): c * (c - 1) // 2, (1, 7, 6): math.comb(f, 2), (1, 6, 7): math.comb(s, 2),
      (1, 10, 11): c * s, (1, 11, 10): c * f, (1, 3, 3): c,
    }  # fmt: skip
  else:
    expected = {(2, 8, 8): c * (c - 1) // 2, (2, 4, 5): c * s, (2, 5, 4): c * f, (2, 1, 1): c}
  for pair, value in expected.items():
    got = m(*pair)
    assert got[0, 1] == value and got.dtype == np.int64, pair
  assert sum(v > 2**24 and int(np.float32(v)) != v for v in expected.values()) >= 2


def test_exact_beyond_int32():
  leaves = 70_001
  edges = np.stack([np.zeros(leaves, int), np.arange(1, leaves + 1)])
  row = first_rows(common_neighbors.adjacency(edges, leaves + 1), rows=1)(1, 7, 6)[0]
  assert row[1:].tolist() == [math.comb(leaves - 1, 2)] * leaves and row[1] > 2**31


def test_blocks_of_any_size_and_threads_are_the_same_rows(ba):
  graph, expected = ba
  for rows, threads in ((1, 1), (33, 2), (1000, 3)):
    at = 0
    for block in go.stream(graph, rows=rows, threads=threads):
      assert (block.first, block.last, block.num_nodes) == (at, min(at + rows, 400), 400)
      for pair in ((1, 9, 11), (2, 4, 5), (3, 4, 4)):
        np.testing.assert_array_equal(block.matrix(pair).toarray(), expected[pair][at : block.last])
      at = block.last
    assert at == 400


def test_only_hops_that_are_asked_for(ba):
  graph, expected = ba
  block = next(go.stream(graph, [(2, 6, 6)]))
  assert list(block.hops) == [2]
  np.testing.assert_array_equal(block.matrix((2, 6, 6)).toarray(), expected[2, 6, 6][:64])
  with pytest.raises(ValueError, match="^pair: got"):
    block.matrix((3, 4, 4))
  some = go.orbit_adjacencies(graph, [(3, 4, 4), (1, 0, 0)])
  assert list(some) == [(3, 4, 4), (1, 0, 0)]
  np.testing.assert_array_equal(some[1, 0, 0].toarray(), graph.toarray())


def test_a_stream_may_be_left(ba):
  """And another one starts from clean scratch."""
  graph, expected = ba
  stream = go.stream(graph, rows=7)
  next(stream)
  stream.close()
  np.testing.assert_array_equal(next(go.stream(graph)).matrix((2, 9, 10)).toarray(), expected[2, 9, 10][:64])


# ------------------------------------------------------------------------------------------------------------- vectors


def symmetric(n, seed):
  m = np.random.default_rng(seed).standard_normal((n, n)) * np.random.default_rng(seed + 1).random((n, n)) ** 4
  return (m + m.T).astype("float32")


def test_embed_is_the_truncated_svd():
  m = symmetric(60, 0)
  z = np.asarray(embed(sparse.from_scipy(scipy.sparse.csr_array(m)), jax.random.key(0), dim=7))
  u, s, _ = np.linalg.svd(m.astype(np.float64))
  np.testing.assert_allclose(z @ z.T, (u[:, :7] * s[:7]) @ u[:, :7].T, atol=2e-3)
  np.testing.assert_allclose((z**2).sum(0), s[:7], rtol=1e-4)
  np.testing.assert_allclose(np.abs(embed(jnp.asarray(m), jax.random.key(0), dim=7)), np.abs(z), atol=2e-3)


embed = jax.jit(go.embed, static_argnames=("dim", "iterations", "oversampling"))


def test_ppmi():
  """Against its definition on dense matrices, with a node that has no entries."""
  m = np.random.default_rng(0).integers(0, 5, (9, 9))
  m[4], m[:, 4] = 0, 0
  both = m + m.T
  expected = np.zeros((9, 9))
  for i, j in zip(*np.nonzero(both), strict=True):
    expected[i, j] = max(0, math.log(both[i, j] * both.sum() / (both[i].sum() * both[j].sum())))
  got = go.ppmi(scipy.sparse.csr_array(m))
  np.testing.assert_allclose(got.toarray(), expected, atol=1e-6)
  np.testing.assert_allclose(go.ppmi(scipy.sparse.csr_array(both)).toarray(), expected, atol=1e-6)
  np.testing.assert_allclose(go.device_ppmi(jnp.asarray(m)), expected, atol=1e-6)
  assert not go.ppmi(scipy.sparse.csr_array((3, 3))).nnz


def test_walk_adjacency_is_what_walks_see():
  """Pairs at most three steps apart in all walks of the stationary process."""
  graph = nx.lollipop_graph(4, 2)
  a = nx.to_numpy_array(graph)
  transition = a / a.sum(1, keepdims=True)
  expected = sum(a.sum(1)[:, None] * np.linalg.matrix_power(transition, k) for k in (1, 2, 3))
  np.testing.assert_allclose(go.walk_adjacency(adjacency(graph), 3).toarray(), expected, atol=1e-12)
  np.testing.assert_array_equal(go.walk_adjacency(scipy.sparse.csr_array((3, 3)), 2).toarray(), 0)


def test_email_network_separates_departments():
  """A vector's nearest other vector is of its department far more often than chance."""
  try:
    network = networks.email_eu_core()
  except files.MissingFile:
    pytest.skip("no file of email-Eu-core")
  matrix = go.orbit_adjacencies(network.adjacency, [(1, 4, 5)])[1, 4, 5]
  z = np.array(embed(sparse.from_scipy(go.ppmi(matrix)), jax.random.key(0), dim=32))
  z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-9)
  near = z @ z.T - 2 * np.eye(len(z))
  assert np.mean(network.labels[near.argmax(1)] == network.labels) > 0.5
