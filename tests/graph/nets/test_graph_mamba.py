"""Graph Mamba: what the paper claims of it, each beside an oracle or a construction of its own.

The recurrence and the mixer are compared with `transformers` in `tests/nn/test_mamba.py`, on the outputs in
`tests/golden/graph_mamba.npz`.
"""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from jaxlab.graph import encodings, structure, tokens
from jaxlab.graph.nets import graph_mamba
from jaxlab.nn import mamba

NODES, FEATURES = 12, 5
SMALL = {"features": 8, "state_size": 4}


def graph_of(seed=0, n=NODES):
  rng = np.random.default_rng(seed)
  graph = structure.from_networkx(nx.connected_watts_strogatz_graph(n, 4, 0.4, seed=seed))
  return graph._replace(nodes=rng.standard_normal((n, FEATURES)).astype("float32"))


def ring(n, features=FEATURES):
  graph = structure.from_networkx(nx.cycle_graph(n))
  return graph._replace(nodes=np.random.default_rng(0).standard_normal((n, features)).astype("float32"))


def tokens_of(graph, **changes):
  return tokens.sample(graph, **{"length": 2, "walks": 3, "seed": 1} | changes)


def start(net, *inputs):
  """Variables none of which is 0 or 1, so that each matters, without compiling an initialisation."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    if len(leaf.shape) > 1:
      return (rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0])).astype("float32")
    return rng.uniform(0.1, 0.6, leaf.shape).astype("float32")

  return jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0), *inputs))


def gap(a, b):
  return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# ---------------------------------------------------------------------------- the parts of the oracle, on NumPy arrays

_block = jax.jit(mamba.BidirectionalMamba(state_size=4).apply)


def block(params, x):
  if "A_log" not in params["backward"]:  # reads one token alone, so that any A will do
    params = params | {"backward": params["backward"] | {"A_log": params["forward"]["A_log"]}}
  return np.asarray(_block({"params": params}, x[None])[0])


def dense(p, x):
  return x @ np.asarray(p["kernel"]) + np.asarray(p["bias"])


def layer_norm(p, x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def batch_norm(p, s, x):
  return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def gated_gcn(p, s, pairs, x, states=None):
  """Over a list of (sender, receiver)."""
  to_gate, to_message = np.split(dense(p["sender"], x), 2, axis=1)
  above, below, new_states = np.zeros_like(to_message), np.full_like(to_message, 1e-6), []
  for i, (sender, receiver) in enumerate(pairs):
    gate = dense(p["receiver"], x)[receiver] + to_gate[sender]
    gate = gate if states is None else gate + dense(p["edge"], states[i])
    eta = 1 / (1 + np.exp(-gate))
    above[receiver] += eta * to_message[sender]
    below[receiver] += eta
    if "edge_norm" in p:
      new = np.maximum(batch_norm(p["edge_norm"], s["edge_norm"], gate), 0)
      new_states.append(new if states is None else new + states[i])
  return x + np.maximum(batch_norm(p["norm"], s["norm"], dense(p["root"], x) + above / below), 0), new_states


def by_degree(graph):
  return np.lexsort((np.arange(NODES), np.bincount(graph.receivers, minlength=NODES)))


@pytest.fixture(scope="module")
def whole():
  net, graph = graph_mamba.gmn(3, **SMALL, num_layers=2), graph_of()
  sub = tokens.subgraphs(tokens_of(graph))
  return graph, sub, start(net, graph, sub), jax.jit(net.apply)


def test_whole_network_step_by_step(whole):
  """Algorithm 1 token by token and node by node: one subgraph and one sequence at a time."""
  graph, sub, variables, apply = whole
  p, s = variables["params"], variables["batch_stats"]
  drawn = tokens_of(graph)
  x = dense(p["encoder"], graph.nodes)
  g = nx.Graph(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
  stops = np.cumsum(drawn.counts.reshape(-1)).reshape(drawn.counts.shape)
  y = []
  for v in range(NODES):
    phi = []
    for stop, count in zip(stops[v], drawn.counts[v], strict=True):
      names = sorted(drawn.members[stop - count : stop])
      pairs = [(names.index(a), names.index(b)) for a, b in g.subgraph(names).to_directed().edges]
      h = x[names]
      h[names.index(v)] += p["local"]["mark"]
      h, _ = gated_gcn(p["local"]["conv_0"], s["local"]["conv_0"], pairs, h)
      phi.append(dense(p["local"]["out"], np.concatenate([h.mean(0), h[names.index(v)]])))
    y.append(block(p["token_block_0"], np.stack(phi))[-1])
  y, order, states = np.stack(y), by_degree(graph), None
  for i in range(2):
    read = np.zeros((NODES, 8), "float32")
    read[order] = block(p[f"block_{i}"], y[order])
    pairs = list(zip(graph.senders, graph.receivers, strict=True))
    passed, states = gated_gcn(p[f"mpnn_{i}"], s[f"mpnn_{i}"], pairs, x if i == 0 else y, states)
    y = read + passed
  expected = dense(p["head"], layer_norm(p["norm"], y))
  np.testing.assert_allclose(apply(variables, graph, sub), expected, atol=3e-5)


def test_without_tokens_it_is_gps_with_a_state_space_for_attention():
  graph = graph_of(1)
  net = graph_mamba.gps_mamba(3, **SMALL, num_layers=1, mpnn="gine")
  variables = start(net, graph)
  p, s = variables["params"], variables["batch_stats"]["mpnn_0"]["norm"]
  x, order = dense(p["encoder"], graph.nodes), by_degree(graph)
  mixed = np.zeros((NODES, 8), "float32")
  mixed[order] = block(p["block_0"], x[order])
  total = np.array(x)
  np.add.at(total, graph.receivers, np.maximum(x[graph.senders], 0))
  new = dense(p["mpnn_0"]["second"], np.maximum(dense(p["mpnn_0"]["first"], total), 0))
  passed = x + np.maximum(batch_norm(p["mpnn_0"]["norm"], s, new), 0)
  expected = dense(p["head"], layer_norm(p["norm"], mixed + passed))
  np.testing.assert_allclose(jax.jit(net.apply)(variables, graph), expected, atol=3e-5)


def test_a_sequence_of_one_token_is_read_by_a_function_of_the_node():
  """The block on sequences of length 1, as a stage of the network sees them: nodes do not see each other."""
  net = mamba.BidirectionalMamba(state_size=4)
  x = np.random.default_rng(0).standard_normal((6, 1, 8)).astype("float32")
  variables = start(net, x)
  apply = jax.jit(net.apply)
  out, moved = apply(variables, x), apply(variables, x[::-1])
  np.testing.assert_array_equal(moved[::-1], out)
  np.testing.assert_array_equal(apply(variables, np.repeat(x[:1], 6, 0)), np.repeat(out[:1], 6, 0))


# Two graphs each, which colour refinement, and with it message passing, cannot tell apart: two triangles and a hexagon,
# the prism with its triangles and K_{3,3} without any.
PAIRS = {
  "two triangles, hexagon": (nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(3)), nx.cycle_graph(6)),
  "prism, K33": (nx.circular_ladder_graph(3), nx.complete_bipartite_graph(3, 3)),
}


@pytest.mark.parametrize("local", ["gated_gcn", "walks"])
def test_tokens_tell_apart_what_colour_refinement_cannot(local):
  plain = graph_mamba.gmn_minus(2, task="graph", **SMALL)
  net = graph_mamba.gmn_minus(2, task="graph", local=local, local_layers=2, **SMALL)
  plain_apply, apply, variables = jax.jit(plain.apply), jax.jit(net.apply), {}
  for pair in PAIRS.values():
    graphs = [structure.from_networkx(g)._replace(nodes=np.ones((6, 1), "float32")) for g in pair]
    drawn = [tokens.sample(g, length=2, walks=60, seed=0) for g in graphs]
    if local == "walks":
      device = [tokens.walk_tokens(t, g, window=4) for t, g in zip(drawn, graphs, strict=True)]
    else:
      sizes = {"nodes": 7, "members": 120, "edges": 300}
      graphs = [structure.pad(g, nodes=7, edges=len(g.senders)) for g in graphs]
      joined = [tokens.batch([t], graph_edges=[len(t.edges)], **sizes) for t in drawn]
      device = [tokens.subgraphs(t) for t in joined]
    if not variables:
      variables = start(plain, graphs[0]), start(net, graphs[0], device[0])
    a, b = (plain_apply(variables[0], g)[0] for g in graphs)  # m = 0
    np.testing.assert_allclose(a, b, atol=1e-6)
    a, b = (apply(variables[1], g, t)[0] for g, t in zip(graphs, device, strict=True))
    assert gap(a, b) > 2e-5


def relabelled(graph, order):
  place = np.argsort(order)
  moved = structure.from_edges(place[graph.senders], place[graph.receivers], num_nodes=len(order))
  return moved._replace(nodes=graph.nodes[order])


def test_renumbering_with_distinct_scores_renumbers_outputs(whole):
  graph, sub, variables, apply = whole
  scores = encodings.pagerank(graph) + np.float32(1e-4) * np.arange(NODES, dtype="float32")
  assert np.unique(scores).size == NODES
  order = np.random.default_rng(5).permutation(NODES)
  moved = relabelled(graph, order)
  again = tokens.subgraphs(tokens_of(moved, keys=order))
  expected = apply(variables, graph, sub, scores=scores)
  np.testing.assert_allclose(apply(variables, moved, again, scores=scores[order]), expected[order], atol=3e-5)


def test_ties_of_degree_are_broken_by_number_and_at_random_in_training():
  """On a ring all degrees are equal, so that another numbering is another sequence: equivariance up to ties only."""
  graph, net = ring(8), graph_mamba.gmn_minus(3, **SMALL)
  variables, apply = start(net, graph), jax.jit(net.apply)
  order = np.random.default_rng(1).permutation(8)
  assert gap(apply(variables, relabelled(graph, order)), apply(variables, graph)[order]) > 1e-3
  train = jax.jit(lambda key, graph: net.apply(variables, graph, train=True, rngs={"dropout": key}))
  assert gap(train(jax.random.key(0), graph), train(jax.random.key(1), graph)) > 1e-3


def test_hubs_are_read_last():
  """One way only: what a node sees are the nodes of lower degree."""
  graph = structure.from_networkx(nx.barabasi_albert_graph(10, 2, seed=1))
  graph = graph._replace(nodes=np.random.default_rng(0).standard_normal((10, FEATURES)).astype("float32"))
  net = graph_mamba.gmn_minus(1, bidirectional=False, **SMALL)
  variables = start(net, graph)
  output = lambda x, graph: net.apply(variables, graph._replace(nodes=x))[:, 0]
  influence = np.abs(jax.jit(jax.jacrev(output))(graph.nodes, graph)).sum(-1) > 0
  rank = np.lexsort((np.arange(10), np.bincount(graph.receivers, minlength=10))).argsort()
  np.testing.assert_array_equal(influence, rank[:, None] >= rank)


@pytest.mark.parametrize("task", ["node", "graph"])
def test_packed_graphs_are_as_alone(task):
  """Scans and reversals stay within a graph."""
  net = graph_mamba.gmn(3, task=task, **SMALL)
  graphs = [graph_of(seed, n) for seed, n in ((0, 12), (1, 7))]
  drawn = [tokens_of(g, seed=i) for i, g in enumerate(graphs)]

  def pack(*which):
    packed = structure.batch([graphs[i] for i in which], nodes=40, edges=150, num_graphs=4)
    edges = [len(graphs[i].senders) for i in which]
    joined = tokens.batch([drawn[i] for i in which], graph_edges=edges, nodes=40, members=400, edges=900)
    return packed, tokens.subgraphs(joined)

  variables, apply = start(net, *pack(0, 1)), jax.jit(net.apply)
  together, first, second = (apply(variables, *pack(*which)) for which in ((0, 1), (0,), (1,)))
  a, b = (12, 7) if task == "node" else (1, 1)
  np.testing.assert_allclose(together[: a + b], np.concatenate([first[:a], second[:b]]), atol=3e-5)


@pytest.mark.parametrize("repetitions", [1, 3])
def test_training_shuffles_tokens_of_one_length(repetitions):
  """With distinct scores and no dropout nothing else is drawn."""
  graph, net = graph_of(), graph_mamba.gmn_minus(2, local="mean", **SMALL)
  sub = tokens.subgraphs(tokens_of(graph, repetitions=repetitions))
  variables = start(net, graph, sub)
  run = jax.jit(
    lambda key, *inputs: net.apply(variables, *inputs, scores=jnp.arange(12.0), train=True, rngs={"dropout": key})
  )
  outputs = [run(jax.random.key(i), graph, sub) for i in range(2)]
  assert (gap(*outputs) > 1e-4) == (repetitions > 1)
  evaluate = jax.jit(lambda *inputs: net.apply(variables, *inputs, scores=jnp.arange(12.0)))
  assert (gap(outputs[0], evaluate(graph, sub)) > 1e-4) == (repetitions > 1)


def test_training_flips_the_signs_of_eigenvectors_together():
  graph, net = graph_of(), graph_mamba.gmn_minus(2, eigenvectors=1, **SMALL)
  variables = start(net, graph)
  scores = np.arange(12, dtype="float32")
  train = jax.jit(lambda key, graph: net.apply(variables, graph, scores=scores, train=True, rngs={"dropout": key}))
  outputs = [train(jax.random.key(i), graph) for i in range(8)]
  apply = jax.jit(lambda graph: net.apply(variables, graph, scores=scores))
  both = [apply(graph._replace(nodes=graph.nodes * np.float32([1, 1, 1, 1, sign]))) for sign in (1, -1)]
  assert gap(*both) > 1e-3
  found = [min((0, 1), key=lambda i: gap(out, both[i])) for out in outputs]
  assert set(found) == {0, 1}
  assert all(gap(out, both[i]) < 1e-5 for out, i in zip(outputs, found, strict=True))


@pytest.mark.parametrize("local", ["gated_gcn", "walks"])
def test_edge_features_matter(local):
  graph, rng = graph_of(), np.random.default_rng(0)
  first, second = (rng.standard_normal((graph.senders.size, 3)).astype("float32") for _ in range(2))
  drawn = tokens_of(graph)
  device = tokens.subgraphs(drawn) if local == "gated_gcn" else tokens.walk_tokens(drawn, graph)
  net = graph_mamba.gmn_minus(2, local=local, edge_features=True, **SMALL)
  variables, apply = start(net, graph._replace(edges=first), device), jax.jit(net.apply)
  assert gap(*(apply(variables, graph._replace(edges=e), device) for e in (first, second))) > 1e-4


def test_memory_is_linear_in_nodes():
  """Of the compiled gradient, m = 0."""
  net = graph_mamba.gmn_minus(2, **SMALL)
  variables = jax.eval_shape(net.init, jax.random.key(0), ring(4))

  def cost(n):
    shape = lambda *s, dtype="float32": jax.ShapeDtypeStruct(s, dtype)
    graph = ring(4)._replace(
      nodes=shape(n, FEATURES), senders=shape(2 * n, dtype="int32"), receivers=shape(2 * n, dtype="int32")
    )
    loss = lambda v, g: (net.apply(v, g) ** 2).sum()
    return jax.jit(jax.grad(loss)).lower(variables, graph).compile().memory_analysis().temp_size_in_bytes

  assert 7 < cost(16000) / cost(2000) < 9


@pytest.mark.parametrize("d", [64, 96])
def test_parameter_counts(d):
  """By hand: a mixer is in_proj, conv, x_proj, dt_proj, A, D, W_1; a block two of them, LN and W_out.

  In the block of the tokens the backward mixer reads the node itself alone and has no A.
  """
  inner, rank = 2 * d, -(-d // 16)
  mixer = d * 2 * inner + 5 * inner + inner * (rank + 32) + (rank + 1) * inner + 16 * inner + inner + inner * d
  block = 2 * mixer + 2 * d + d * d
  linear = lambda i, o: i * o + o
  gated = lambda: linear(d, 2 * d) + 2 * linear(d, d) + 2 * d
  ends = linear(FEATURES, d) + 2 * d + linear(d, 1)
  phi = d + gated() + linear(2 * d, d)
  graph = graph_of()
  sub = tokens.subgraphs(tokens_of(graph))

  def count(net, *inputs):
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))

  assert count(graph_mamba.gmn(1, features=d), graph, sub) == ends + phi + 2 * block - 16 * inner + gated()
  assert count(graph_mamba.gmn_minus(1, features=d), graph, sub) == ends + phi + 2 * block - 16 * inner
  # In a stack all but the last layer have norms of edges, all but the first a map of edges.
  layers = 4 * (block + gated()) + 3 * (2 * d + linear(d, d))
  assert count(graph_mamba.gps_mamba(1, features=d), graph) == ends + layers
