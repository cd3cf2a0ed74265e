"""Tokens beside networkx and brute force."""

import networkx as nx
import numpy as np
import pytest

from jaxlab.graph import structure, tokens

LENGTH, WALKS, REPETITIONS = 3, 2, 2


def graph_of(seed=0):
  return nx.connected_watts_strogatz_graph(30, 4, 0.3, seed=seed)


@pytest.fixture(scope="module")
def sampled():
  graph = graph_of()
  return graph, tokens.sample(
    structure.from_networkx(graph), length=LENGTH, walks=WALKS, repetitions=REPETITIONS, seed=3
  )


def each(t):
  """(node, position in the sequence, members) of every token."""
  stops = np.cumsum(t.counts.reshape(-1))
  for i, (stop, count) in enumerate(zip(stops, t.counts.reshape(-1), strict=True)):
    yield i // t.counts.shape[1], i % t.counts.shape[1], t.members[stop - count : stop]


def steps(position):
  return LENGTH - position // REPETITIONS if position < LENGTH * REPETITIONS else 0


def test_sequences_run_from_wide_to_the_node_itself(sampled):
  graph, t = sampled
  distance = dict(nx.all_pairs_shortest_path_length(graph))
  assert t.counts.shape == (30, LENGTH * REPETITIONS + 1)
  for v, position, members in each(t):
    assert members[0] == v and len(set(members)) == len(members) <= 1 + WALKS * steps(position)
    assert max(distance[v][u] for u in members) <= steps(position)
    assert nx.diameter(graph.subgraph(members)) <= 2 * steps(position)
  np.testing.assert_array_equal(t.counts[:, -1], 1)


def test_members_are_what_the_walks_visit(sampled):
  graph, t = sampled
  for v, position, members in each(t):
    walks = t.walks[v, position]
    assert set(members) == set(walks[walks >= 0])
    for walk in walks:
      walk = walk[walk >= 0]
      assert len(walk) == steps(position) + 1 and walk[0] == v
      assert all(graph.has_edge(a, b) for a, b in zip(walk, walk[1:], strict=False))


def test_edges_are_those_of_the_induced_subgraphs(sampled):
  graph, t = sampled
  whole = structure.from_networkx(graph)
  np.testing.assert_array_equal(whole.senders[t.edges], t.members[t.senders])
  np.testing.assert_array_equal(whole.receivers[t.edges], t.members[t.receivers])
  assert (np.diff(t.receivers) >= 0).all()
  first = 0
  for _, _, members in each(t):
    inside = (t.receivers >= first) & (t.receivers < first + len(members))
    found = {(t.members[a], t.members[b]) for a, b in zip(t.senders[inside], t.receivers[inside], strict=True)}
    assert ((t.senders[inside] >= first) & (t.senders[inside] < first + len(members))).all()
    assert found == set(graph.subgraph(members).to_directed().edges)
    first += len(members)


def test_many_walks_cover_the_ball():
  graph = graph_of(1)
  t = tokens.sample(structure.from_networkx(graph), length=2, walks=300)
  for v, position, members in each(t):
    assert set(members) == set(nx.single_source_shortest_path_length(graph, v, cutoff=2 - position))


def test_walks_end_where_the_transition_matrix_says():
  graph = nx.karate_club_graph()
  t = tokens.sample(structure.from_networkx(graph), length=3, walks=4000, seed=1)
  adjacency = nx.to_numpy_array(graph, weight=None)
  p = adjacency / adjacency.sum(1, keepdims=True)
  for position in range(3):
    ends = t.walks[:, position, :, 3 - position]
    frequency = np.stack([np.bincount(row, minlength=34) for row in ends]) / 4000
    expected = np.linalg.matrix_power(p, 3 - position)
    error = np.sqrt(expected * (1 - expected) / 4000)
    assert (np.abs(frequency - expected) <= 5 * error + 1e-12).all()


def test_dead_ends_stay():
  directed = structure.from_edges(np.array([0, 1]), np.array([1, 2]), num_nodes=4)
  t = tokens.sample(directed, length=3, walks=1)
  np.testing.assert_array_equal(t.walks[:, 0, 0], [[0, 1, 2, 2], [1, 2, 2, 2], [2, 2, 2, 2], [3, 3, 3, 3]])


def test_keys_go_along_with_a_renumbering(sampled):
  graph, t = sampled
  order = np.random.default_rng(0).permutation(30)  # new node i is old node order[i]
  place = np.argsort(order)
  whole = structure.from_networkx(graph)
  moved = structure.from_edges(place[whole.senders], place[whole.receivers], num_nodes=30)
  settings = {"length": LENGTH, "walks": WALKS, "repetitions": REPETITIONS, "seed": 3}
  again = tokens.sample(moved, **settings, keys=order)
  mine = {(v, position): list(members) for v, position, members in each(t)}
  assert all(mine[order[v], position] == list(order[members]) for v, position, members in each(again))
  other = tokens.sample(moved, **settings)
  assert any(mine[order[v], position] != list(order[members]) for v, position, members in each(other))


def test_seeds_differ_and_repeat(sampled):
  graph, t = sampled
  draw = lambda seed: tokens.sample(
    structure.from_networkx(graph), length=LENGTH, walks=WALKS, repetitions=REPETITIONS, seed=seed
  )
  np.testing.assert_array_equal(draw(3).walks, t.walks)
  assert (draw(4).walks != t.walks).mean() > 0.1
  assert (t.walks[:, 0] != t.walks[:, 1]).any()  # repetitions are draws of their own


def test_batch_is_the_tokens_of_the_batched_graph():
  graphs = [structure.from_networkx(nx.cycle_graph(n)) for n in (3, 5)]
  drawn = [tokens.sample(g, length=2, walks=2, seed=n) for n, g in enumerate(graphs)]
  joined = tokens.batch(drawn, graph_edges=[6, 10], nodes=10, members=60, edges=90)
  whole = structure.batch(graphs, nodes=10, edges=20)
  real = sum(len(t.members) for t in drawn), sum(len(t.edges) for t in drawn)
  assert len(joined.members) == 60 and len(joined.edges) == 90 and len(joined.counts) == 10
  np.testing.assert_array_equal(whole.senders[joined.edges[: real[1]]], joined.members[joined.senders[: real[1]]])
  np.testing.assert_array_equal(whole.receivers[joined.edges[: real[1]]], joined.members[joined.receivers[: real[1]]])
  np.testing.assert_array_equal(joined.members[real[0] :], 9)  # the last padding node
  assert (joined.senders[real[1] :] == 59).all() and (joined.receivers[real[1] :] == 59).all()
  assert joined.counts.sum() == 60 and (joined.counts[8:-1] == 0).all()
  np.testing.assert_array_equal(joined.walks[3:8], np.where(drawn[1].walks < 0, -1, drawn[1].walks + 3))
  with pytest.raises(ValueError, match="^members: got 5"):
    tokens.batch(drawn, graph_edges=[6, 10], members=5)
  with pytest.raises(ValueError, match="^tokens: got settings"):
    tokens.batch([drawn[0], tokens.sample(graphs[1], length=1, walks=2)], graph_edges=[6, 10])


def test_device_form_pools_and_picks(sampled):
  _, t = sampled
  device = tokens.subgraphs(t)
  x = np.random.default_rng(0).standard_normal((30, 4)).astype("float32")
  at_members = x[t.members]
  means = np.stack([x[members].mean(0) for _, _, members in each(t)])
  from jaxlab.graph import sparse

  np.testing.assert_allclose(sparse.propagate(device.members, x), at_members, rtol=1e-6)
  np.testing.assert_allclose(sparse.propagate(device.pool, at_members), means, atol=1e-6)
  np.testing.assert_array_equal(at_members[device.own], np.repeat(x, LENGTH * REPETITIONS + 1, 0))


def test_walk_bits(sampled):
  graph, t = sampled
  window = 2
  device = tokens.walk_tokens(t, structure.from_networkx(graph), window=window)
  whole = structure.from_networkx(graph)
  bits, edges = np.asarray(device.bits), np.asarray(device.edges)
  for index in np.ndindex(t.walks.shape[:3]):
    walk = t.walks[index]
    for i in range(len(walk)):
      inside = i > 0 and walk[i] >= 0
      assert (edges[index][i] >= 0) == inside
      if inside:
        assert (whole.senders[edges[index][i]], whole.receivers[edges[index][i]]) == (walk[i - 1], walk[i])
      same = [inside and i >= k and walk[i] == walk[i - k] for k in (1, 2)]
      linked = inside and i >= 2 and graph.has_edge(walk[i - 2], walk[i])
      np.testing.assert_array_equal(bits[index][i], [*same, linked])
  present = np.asarray(device.positions.values).reshape(t.walks.shape) > 0
  np.testing.assert_array_equal(present, t.walks >= 0)


@pytest.mark.parametrize("change", [{"length": 0}, {"walks": 0}, {"repetitions": 0}, {"keys": np.zeros(30, int)}])
def test_bad_input_is_named(change):
  with pytest.raises(ValueError, match=f"^{next(iter(change))}: got "):
    tokens.sample(structure.from_networkx(graph_of()), **{"length": 2, "walks": 2} | change)
