"""Graph Mamba: what the paper claims of it, each beside an oracle or a construction of its own.

The recurrence and the mixer are compared with `transformers` in `tests/nn/test_mamba.py`, on the outputs in
`tests/golden/graph_mamba.npz`.
"""

import functools

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from jaxlab.graph import encodings, layers, sparse, structure, tokens
from jaxlab.graph.nets import graph_mamba
from jaxlab.nn import mamba

NODES, FEATURES = 12, 5
SMALL = {"features": 8, "state_size": 4}


def graph_of(seed=0, n=NODES):
  rng = np.random.default_rng(seed)
  graph = structure.from_networkx(nx.connected_watts_strogatz_graph(n, 4, 0.4, seed=seed))
  return graph._replace(nodes=rng.standard_normal((n, FEATURES)).astype("float32"))


def tokens_of(graph, **changes):
  return tokens.sample(graph, **{"length": 2, "walks": 3, "seed": 1} | changes)


def disturb(variables, seed=0):
  """Parameters none of which is 0 or 1, and statistics that matter."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: a + rng.uniform(0.02, 0.3, a.shape).astype("float32"), variables)


@functools.cache
def whole():
  net = graph_mamba.gmn(3, **SMALL, num_layers=2)
  graph = graph_of()
  sub = tokens.subgraphs(tokens_of(graph))
  return net, graph, sub, disturb(net.init(jax.random.key(0), graph, sub)), jax.jit(net.apply)


def block(params, x, starts=None):
  return mamba.BidirectionalMamba(state_size=4).apply({"params": params}, x, starts)


def layer_norm(p, x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(p, x):
  return x @ p["kernel"] + p["bias"]


def test_whole_network_step_by_step():
  """Algorithm 1, token by token and node by node: one subgraph and one sequence at a time, no batching."""
  net, graph, sub, variables, apply = whole()
  p, stats = variables["params"], variables["batch_stats"]
  drawn = tokens_of(graph)
  x = dense(p["encoder"], graph.nodes)
  conv = layers.GatedGCN(8, update_edges=False)
  conv_variables = {"params": p["local"]["conv_0"], "batch_stats": stats["local"]["conv_0"]}
  g = nx.Graph(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
  stops = np.cumsum(drawn.counts.reshape(-1)).reshape(drawn.counts.shape)
  y = []
  for v in range(NODES):
    phi = []
    for stop, count in zip(stops[v], drawn.counts[v], strict=True):
      members = drawn.members[stop - count : stop]
      induced = structure.from_networkx(nx.relabel_nodes(g.subgraph(members), {}), duplicates="drop")
      names = list(g.subgraph(members).nodes)
      h, _ = conv.apply(conv_variables, induced._replace(nodes=x[np.array(names)]), x[np.array(names)])
      phi.append(dense(p["local"]["out"], jnp.concatenate([h.mean(0), h[names.index(v)]])))
    y.append(block(p["token_block_0"], jnp.stack(phi)[None])[0, -1])
  y = jnp.stack(y)
  degree = np.bincount(graph.receivers, minlength=NODES)
  order = np.lexsort((np.arange(NODES), degree))
  edges = None
  for i in range(2):
    read = np.zeros((NODES, 8), "float32")
    read[order] = block(p[f"block_{i}"], y[order][None])[0]
    mpnn = layers.GatedGCN(8, update_edges=i == 0)
    passed, edges = mpnn.apply(
      {"params": p[f"mpnn_{i}"], "batch_stats": stats[f"mpnn_{i}"]}, graph, x if i == 0 else y, edges
    )
    y = read + passed
  expected = dense(p["head"], layer_norm(p["norm"], np.asarray(y)))
  np.testing.assert_allclose(apply(variables, graph, sub), expected, atol=2e-5)


def test_without_tokens_it_is_gps_with_a_state_space_for_attention():
  graph = graph_of(1)
  net = graph_mamba.gps_mamba(3, **SMALL, num_layers=1, mpnn="gine")
  variables = disturb(net.init(jax.random.key(0), graph))
  p = variables["params"]
  x = dense(p["encoder"], graph.nodes)
  order = np.lexsort((np.arange(NODES), np.bincount(graph.receivers, minlength=NODES)))
  mixed = np.zeros((NODES, 8), "float32")
  mixed[order] = block(p["block_0"], x[order][None])[0]
  total = np.zeros((NODES, 8))
  np.add.at(total, graph.receivers, np.maximum(np.asarray(x)[graph.senders], 0))
  hidden = np.maximum(dense(p["mpnn_0"]["first"], total + x), 0)
  new, s, q = dense(p["mpnn_0"]["second"], hidden), variables["batch_stats"]["mpnn_0"]["norm"], p["mpnn_0"]["norm"]
  passed = x + np.maximum((new - s["mean"]) / np.sqrt(s["var"] + 1e-5) * q["scale"] + q["bias"], 0)
  expected = dense(p["head"], layer_norm(p["norm"], np.asarray(mixed + passed)))
  np.testing.assert_allclose(jax.jit(net.apply)(variables, graph), expected, atol=2e-5)


def test_a_node_alone_is_read_by_a_function_of_the_node():
  """Sequences of length 1: no edges, so that every token is the node itself, and equal features give equal vectors."""
  graph = structure.from_edges(np.zeros(0, int), np.zeros(0, int), num_nodes=6)
  graph = graph._replace(nodes=np.repeat(np.eye(2, FEATURES, dtype="float32"), 3, 0))
  net = graph_mamba.gmn_minus(3, **SMALL)
  sub = tokens.subgraphs(tokens_of(graph))
  alone = sub.replace(  # keep the last token of each sequence alone
    pool=sparse.from_scipy(np.eye(6, dtype="float32")), members=sparse.from_scipy(np.eye(6, dtype="float32")),
    subgraphs=sparse.from_scipy(np.zeros((6, 6), "float32")), edges=jnp.zeros(0, "int32"),
  )  # fmt: skip
  variables = net.init(jax.random.key(0), graph, alone)
  call = functools.partial(net.apply, variables, graph, alone, method="_stage")
  del call
  one = {name: p for name, p in variables["params"].items()}
  phi = graph_mamba.SubgraphEncoder(8)
  encoded = phi.apply(
    {"params": one["local"], "batch_stats": variables["batch_stats"]["local"]}, alone,
    dense(one["encoder"], graph.nodes), mask=jnp.ones(6, bool),
  )  # fmt: skip
  read = block(one["token_block_0"], encoded[:, None])[:, 0]
  np.testing.assert_allclose(read[:3], np.repeat(read[:1], 3, 0), atol=1e-6)
  assert np.abs(read[0] - read[3]).max() > 1e-3


def regular_pair():
  """Two graphs that colour refinement cannot tell apart: two triangles, and a hexagon."""
  return nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(3)), nx.cycle_graph(6)


def second_pair():
  """Two 3-regular graphs of six nodes: the prism, which has triangles, and K_{3,3}, which has none."""
  return nx.circular_ladder_graph(3), nx.complete_bipartite_graph(3, 3)


@pytest.mark.parametrize("pair", [regular_pair, second_pair])
@pytest.mark.parametrize("local", ["gated_gcn", "walks"])
def test_tokens_tell_apart_what_colour_refinement_cannot(pair, local):
  graphs = [structure.from_networkx(g)._replace(nodes=np.ones((6, 1), "float32")) for g in pair()]
  net = graph_mamba.gmn_minus(2, task="graph", local=local, local_layers=2 if local == "gated_gcn" else 1, **SMALL)
  plain = graph_mamba.gmn_minus(2, task="graph", **SMALL)
  variables = disturb(plain.init(jax.random.key(0), graphs[0]))
  np.testing.assert_array_equal(*(plain.apply(variables, g) for g in graphs))  # m = 0

  form = tokens.subgraphs if local == "gated_gcn" else lambda t: tokens.walk_tokens(t, graphs[0], window=4)
  outputs = []
  for g in graphs:
    drawn = tokens.sample(g, length=3, walks=64, seed=0)
    device = tokens.subgraphs(drawn) if local == "gated_gcn" else tokens.walk_tokens(drawn, g, window=4)
    if not outputs:
      variables = disturb(net.init(jax.random.key(0), g, device))
    outputs.append(net.apply(variables, g, device))
  del form
  assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def relabelled(graph, order):
  place = np.argsort(order)
  moved = structure.from_edges(place[graph.senders], place[graph.receivers], num_nodes=len(order))
  return moved._replace(nodes=graph.nodes[order])


def test_renumbering_with_distinct_scores_renumbers_outputs():
  net, graph, sub, variables, apply = whole()
  scores = encodings.pagerank(graph) + np.float32(1e-4) * np.arange(NODES)
  assert np.unique(scores).size == NODES
  order = np.random.default_rng(5).permutation(NODES)
  moved = relabelled(graph, order)
  again = tokens.subgraphs(tokens_of(moved, keys=order))
  expected = apply(variables, graph, sub, scores=scores)
  np.testing.assert_allclose(apply(variables, moved, again, scores=scores[order]), expected[order], atol=2e-5)


def test_ties_of_degree_are_broken_by_number():
  """On a ring all degrees are equal, so that another numbering is another sequence: equivariance up to ties only."""
  ring = structure.from_networkx(nx.cycle_graph(8))
  ring = ring._replace(nodes=np.random.default_rng(0).standard_normal((8, FEATURES)).astype("float32"))
  net = graph_mamba.gps_mamba(3, **SMALL, num_layers=1)
  variables = disturb(net.init(jax.random.key(0), ring))
  order = np.random.default_rng(1).permutation(8)
  assert np.abs(net.apply(variables, relabelled(ring, order)) - net.apply(variables, ring)[order]).max() > 1e-3


def test_hubs_are_read_last():
  """One way only: what a node sees are the nodes of lower degree."""
  star = structure.from_networkx(nx.barabasi_albert_graph(10, 2, seed=1))
  x = np.random.default_rng(0).standard_normal((10, FEATURES)).astype("float32")
  net = graph_mamba.gmn_minus(1, bidirectional=False, **SMALL)
  variables = disturb(net.init(jax.random.key(0), star._replace(nodes=x)))
  seen = jax.jit(jax.jacobian(lambda x: net.apply(variables, star._replace(nodes=x))[:, 0]))(x)
  influence = np.abs(seen).sum(-1) > 0
  degree = np.bincount(star.receivers, minlength=10)
  rank = np.lexsort((np.arange(10), degree)).argsort()
  np.testing.assert_array_equal(influence, rank[:, None] >= rank)


@pytest.mark.parametrize("task", ["node", "graph"])
def test_packed_graphs_are_as_alone(task):
  """Scans and reversals stay within a graph, and padding changes nothing."""
  net = graph_mamba.gmn(3, task=task, **SMALL)
  graphs = [graph_of(seed, n) for seed, n in ((0, 12), (1, 7), (2, 9))]
  drawn = [tokens_of(g, seed=i) for i, g in enumerate(graphs)]
  packed = structure.batch(graphs, nodes=40, edges=150, num_graphs=6)
  joined = tokens.batch(drawn, graph_edges=[len(g.senders) for g in graphs], nodes=40, members=400, edges=900)
  variables = disturb(net.init(jax.random.key(0), graphs[0], tokens.subgraphs(drawn[0])))
  together = jax.jit(net.apply)(variables, packed, tokens.subgraphs(joined))
  alone = [net.apply(variables, g, tokens.subgraphs(t)) for g, t in zip(graphs, drawn, strict=True)]
  np.testing.assert_allclose(together[: 28 if task == "node" else 3], np.concatenate(alone), atol=2e-5)


def test_training_draws_order_signs_and_dropout():
  graph = graph_of()
  drawn = tokens.subgraphs(tokens_of(graph, repetitions=3))

  def spread(**changes):
    net = graph_mamba.gmn(2, **SMALL, **changes)
    variables = disturb(net.init(jax.random.key(0), graph, drawn))
    run = jax.jit(
      lambda key: net.apply(
        variables, graph, drawn, scores=jnp.arange(12.0), train=True, rngs={"dropout": key}, mutable=["batch_stats"]
      )[0]
    )
    return float(np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max())

  assert spread() > 1e-4  # the order of equal tokens
  one = tokens.subgraphs(tokens_of(graph))
  drawn = one
  assert spread() == 0  # nothing left to draw where scores are distinct
  assert spread(eigenvectors=2) > 1e-4
  assert spread(dropout=0.3) > 1e-4


def test_order_of_ties_is_drawn_in_training():
  ring = structure.from_networkx(nx.cycle_graph(8))
  ring = ring._replace(nodes=np.random.default_rng(0).standard_normal((8, FEATURES)).astype("float32"))
  net = graph_mamba.gmn_minus(2, **SMALL)
  variables = disturb(net.init(jax.random.key(0), ring))
  run = lambda key: net.apply(variables, ring, train=True, rngs={"dropout": key})  # noqa: E731
  assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 1e-4


def test_equal_signs_for_one_graph():
  graph = graph_of()
  net = graph_mamba.gmn_minus(2, eigenvectors=1, **SMALL)
  variables = disturb(net.init(jax.random.key(0), graph))
  outputs = [
    net.apply(variables, graph, scores=np.arange(12.0), train=True, rngs={"dropout": jax.random.key(i)})
    for i in range(8)
  ]
  flipped = graph._replace(nodes=graph.nodes * np.float32([1, 1, 1, 1, -1]))
  both = [net.apply(variables, g, scores=np.arange(12.0)) for g in (graph, flipped)]
  found = {min((0, 1), key=lambda i: float(np.abs(out - both[i]).max())) for out in outputs}
  assert found == {0, 1}
  assert all(min(np.abs(out - b).max() for b in both) < 1e-5 for out in outputs)


def test_edge_features_matter():
  graph = graph_of()
  rng = np.random.default_rng(0)
  first, second = (rng.standard_normal((graph.senders.size, 3)).astype("float32") for _ in range(2))
  drawn = tokens_of(graph)
  for local, device in (("gated_gcn", tokens.subgraphs(drawn)), ("walks", tokens.walk_tokens(drawn, graph))):
    net = graph_mamba.gmn_minus(2, local=local, edge_features=True, **SMALL)
    variables = disturb(net.init(jax.random.key(0), graph._replace(edges=first), device))
    apply = jax.jit(net.apply)
    outputs = [apply(variables, graph._replace(edges=e), device) for e in (first, second)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_cost_is_linear_in_nodes():
  """Counted operations and memory of the compiled gradient, m = 0; attention's are quadratic."""
  net = graph_mamba.gps_mamba(2, **SMALL, num_layers=1)

  def cost(n):
    shape = lambda *s, dtype="float32": jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    ring = structure.from_networkx(nx.cycle_graph(4))._replace(nodes=np.zeros((4, FEATURES), "float32"))
    graph = jax.tree.map(lambda a: shape(*a.shape, dtype=a.dtype), ring)._replace(
      nodes=shape(n, FEATURES), senders=shape(2 * n, dtype="int32"), receivers=shape(2 * n, dtype="int32")
    )
    variables = net.init(jax.random.key(0), ring)
    loss = lambda v, g: (net.apply(v, g) ** 2).sum()  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(variables, graph).compile().memory_analysis().temp_size_in_bytes

  small, middle, large = map(cost, (1000, 4000, 16000))
  assert 3.5 < middle / small < 4.5 and 3.5 < large / middle < 4.5


@pytest.mark.parametrize("variant, count", [("gmn", 126_977), ("gmn_minus", 105_665), ("gps_mamba", 239_041)])
def test_parameter_counts(variant, count):
  graph = graph_of()
  sub = tokens.subgraphs(tokens_of(graph)) if variant != "gps_mamba" else None
  shapes = jax.eval_shape(getattr(graph_mamba, variant)(1).init, jax.random.key(0), graph, sub)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
