"""What the specification says must hold, as far as it takes seconds; accuracies are in `experiments/sir_gcn.py`."""

import functools

import flax.linen as nn
import golden_rule
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
import scipy.special

from jaxlab import interop
from jaxlab.data import synthetic
from jaxlab.graph import layers, sparse, structure
from jaxlab.graph.nets import sir_gcn

AGGREGATIONS = ("sum", "mean", "sym", "max")
N, D, H, OUT, DE = 12, 3, 4, 2, 2


def make_graph(seed=0):
  """Directed, with repeated edges and loops; node 5 is isolated, node 0 only sends, node 3 only receives."""
  rng = np.random.default_rng(seed)
  senders = rng.choice(np.setdiff1d(np.arange(N), [3, 5]), 30)
  receivers = rng.choice(np.setdiff1d(np.arange(N), [0, 5]), 30)
  senders[:3], receivers[:3] = 0, 3
  order = np.lexsort((senders, receivers))
  return jraph.GraphsTuple(
    nodes=rng.normal(size=(N, D)).astype("float32"),
    edges=rng.normal(size=(30, DE)).astype("float32"),
    senders=senders[order].astype("int32"),
    receivers=receivers[order].astype("int32"),
    globals=None,
    n_node=np.array([N], "int32"),
    n_edge=np.array([30], "int32"),
  )


GRAPH = make_graph()
KEY = jax.random.key(0)
SIGMA = {
  "identity": lambda z: z,
  "relu": lambda z: np.maximum(z, 0),
  "leaky_relu": lambda z: np.where(z > 0, z, 0.2 * z),
  "gelu": lambda z: z * scipy.special.ndtr(z),
}


def dense(params, x):
  return x @ np.float64(params["kernel"]) + (np.float64(params["bias"]) if "bias" in params else 0)


def loop(graph, message, aggregation, width):
  """AGG of c_vu message(u, v, e) at every node, edge by edge; and which nodes have an edge."""
  out_degree = np.maximum(np.bincount(graph.senders, minlength=N), 1)
  in_degree = np.maximum(np.bincount(graph.receivers, minlength=N), 1)
  y, seen = np.zeros((N, width)), np.zeros(N, bool)
  for e, (v, u) in enumerate(zip(graph.senders, graph.receivers, strict=True)):
    m = message(u, v, e)
    if aggregation == "max":
      y[u] = np.maximum(y[u], m) if seen[u] else m
    else:
      y[u] += m / {"sum": 1, "mean": in_degree[u], "sym": np.sqrt(out_degree[v] * in_degree[u])}[aggregation]
    seen[u] = True
  return y, seen


def edge_loop(params, graph, x, aggregation, sigma, edges=None):
  """SIRConv by its definition, in float64."""
  q, k = dense(params["query"], np.float64(x)), dense(params["key"], np.float64(x))
  e_map = np.zeros((len(graph.senders), q.shape[1])) if edges is None else dense(params["edge"], np.float64(edges))
  messages = lambda u, v, e: sigma(q[u] + k[v] + e_map[e])
  if aggregation == "max":
    width = params["relation"]["kernel"].shape[1]
    return loop(graph, lambda *ends: dense(params["relation"], messages(*ends)), "max", width)[0]
  return dense(params["relation"], loop(graph, messages, aggregation, q.shape[1])[0])


def filled(module, *arguments):
  """Variables of the shapes that `init` makes, filled here: nothing to compile, no zeros to hide behind."""
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    noise = rng.normal(size=leaf.shape) * (0.2 if leaf.ndim < 2 else leaf.shape[0] ** -0.5)
    return (noise + (path[-1].key in ("var", "scale", "mean_scale"))).astype("float32")

  return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(module.init, KEY, *arguments))


@functools.cache
def made(**options):
  """A convolution and its parameters."""
  conv = sir_gcn.SIRConv(OUT, H, **options)
  return conv, filled(conv, GRAPH, GRAPH.nodes)["params"]


# ------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("activation", sorted(SIGMA))
def test_against_a_loop_over_edges(aggregation, activation):
  conv, params = made(activation=activation, aggregation=aggregation)
  got = np.asarray(conv.apply({"params": params}, GRAPH, GRAPH.nodes))
  np.testing.assert_allclose(got, edge_loop(params, GRAPH, GRAPH.nodes, aggregation, SIGMA[activation]), atol=1e-5)
  empty = 0 if aggregation == "max" else np.asarray(params["relation"]["bias"])
  np.testing.assert_array_equal(got[5], np.broadcast_to(empty, OUT))  # isolated
  np.testing.assert_array_equal(got[0], np.broadcast_to(empty, OUT))  # sends only


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_edge_features_against_a_loop(aggregation):
  conv = sir_gcn.SIRConv(OUT, H, "gelu", aggregation)
  params = filled(conv, GRAPH, GRAPH.nodes, GRAPH.edges)["params"]
  got = conv.apply({"params": params}, GRAPH, GRAPH.nodes, GRAPH.edges)
  expected = edge_loop(params, GRAPH, GRAPH.nodes, aggregation, SIGMA["gelu"], GRAPH.edges)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  plain = {name: value for name, value in params.items() if name != "edge"}
  without = conv.apply({"params": plain}, GRAPH, GRAPH.nodes)
  assert np.abs(without - got).max() > 0.1
  silent = conv.apply({"params": params}, GRAPH, GRAPH.nodes, np.zeros_like(GRAPH.edges))
  np.testing.assert_allclose(silent, without, atol=1e-6)


def test_table_of_edge_types():
  conv, kinds = sir_gcn.SIRConv(OUT, H, edge_types=3), np.arange(30, dtype="int32") % 3
  params = filled(conv, GRAPH, GRAPH.nodes, kinds)["params"]
  onehot = {**params, "edge": {"kernel": params["edge"]["embedding"]}}
  expected = edge_loop(onehot, GRAPH, GRAPH.nodes, "sum", SIGMA["relu"], np.eye(3)[kinds])
  np.testing.assert_allclose(conv.apply({"params": params}, GRAPH, GRAPH.nodes, kinds), expected, atol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("with_edges", [False, True])
def test_general_form_against_a_loop(aggregation, with_edges):
  conv = sir_gcn.SIRConvBase(nn.Sequential([nn.Dense(H), nn.tanh, nn.Dense(OUT)]), aggregation)
  arguments = (GRAPH, GRAPH.nodes, GRAPH.edges) if with_edges else (GRAPH, GRAPH.nodes)
  variables = filled(conv, *arguments)
  first, second = (variables["params"]["message"][name] for name in ("layers_0", "layers_2"))
  x, edges = np.float64(GRAPH.nodes), np.float64(GRAPH.edges)

  def message(u, v, e):
    return dense(second, np.tanh(dense(first, np.concatenate([x[u], x[v], edges[e]] if with_edges else [x[u], x[v]]))))

  np.testing.assert_allclose(conv.apply(variables, *arguments), loop(GRAPH, message, aggregation, OUT)[0], atol=1e-5)


def test_general_form_holds_the_convolution():
  """g = ReLU of [W_Q; W_K] on [x_u, x_v] is the message of `SIRConv`."""
  conv, params = made()
  joint = jnp.concatenate([params["query"]["kernel"], params["key"]["kernel"]])
  base = sir_gcn.SIRConvBase(lambda pair: jax.nn.relu(pair @ joint + params["query"]["bias"]))
  expected = conv.apply({"params": params}, GRAPH, GRAPH.nodes)
  got = base.apply({}, GRAPH, GRAPH.nodes) @ params["relation"]["kernel"] + params["relation"]["bias"]
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_activation_with_parameters_and_by_function(aggregation):
  learned = sir_gcn.SIRConv(OUT, H, nn.Sequential([nn.relu, nn.Dense(H), nn.relu]), aggregation)
  params = filled(learned, GRAPH, GRAPH.nodes)["params"]
  inner = params["activation"]["layers_1"]
  inner["bias"] = jnp.arange(1.0, H + 1)
  sigma = lambda z: np.maximum(dense(inner, np.maximum(z, 0)), 0)
  got = learned.apply({"params": params}, GRAPH, GRAPH.nodes)
  np.testing.assert_allclose(got, edge_loop(params, GRAPH, GRAPH.nodes, aggregation, sigma), atol=1e-5)
  conv, params = made(aggregation=aggregation)
  named = conv.apply({"params": params}, GRAPH, GRAPH.nodes)
  got = conv.clone(activation=jax.nn.relu).apply({"params": params}, GRAPH, GRAPH.nodes)
  np.testing.assert_allclose(got, named, atol=1e-6)


def test_biases_can_be_left_out():
  conv = sir_gcn.SIRConv(OUT, H, inner_bias=False, outer_bias=False)
  shapes = jax.tree.map(np.shape, filled(conv, GRAPH, GRAPH.nodes)["params"])
  assert shapes == {"query": {"kernel": (D, H)}, "key": {"kernel": (D, H)}, "relation": {"kernel": (H, OUT)}}


def test_initialisation_is_torchs():
  conv = sir_gcn.SIRConv(50, 400)
  params = conv.init(KEY, GRAPH, np.ones((N, 100), "float32"))["params"]
  for layer, fan_in in (("query", 100), ("key", 100), ("relation", 400)):
    for leaf in params[layer].values():
      assert 0.9 * fan_in**-0.5 < np.abs(leaf).max() <= fan_in**-0.5
  assert "bias" not in params["key"]


def test_dropout_masks_nodes_not_messages():
  """With zero keys every message to u is relu(dropped q_u): entries are 0 or deg(u) q_u / (1 - p), never a part."""
  conv, params = made(activation="identity", dropout=0.5, aggregation="sum")
  params = jax.tree.map(jnp.zeros_like, params)
  params["query"]["bias"] = jnp.ones(H)
  params["relation"]["kernel"] = jnp.eye(H, OUT)
  degree = np.bincount(GRAPH.receivers, minlength=N)
  apply = lambda train, key=0: conv.apply(
    {"params": params}, GRAPH, GRAPH.nodes, train=train, rngs={"dropout": jax.random.key(key)}
  )
  np.testing.assert_allclose(apply(False), np.outer(degree, np.ones(OUT)))
  seen = np.stack([apply(True, key) for key in range(20)])
  assert np.isin(np.round(seen, 4), [0]).mean() > 0.3
  np.testing.assert_allclose(
    np.where(seen > 0, seen, 2 * degree[:, None]), np.broadcast_to(2 * degree[:, None], seen.shape)
  )


# ---------------------------------------------------------------------------------------------------- special cases


def linear_case(aggregation):
  """sigma = identity, W_Q = 0, b_Q = 0; and W_R W_K, b_R."""
  conv, params = made(activation="identity", aggregation=aggregation)
  params = {**params, "query": jax.tree.map(jnp.zeros_like, params["query"])}
  return conv, params, params["key"]["kernel"] @ params["relation"]["kernel"], params["relation"]["bias"]


def test_sym_with_self_loops_is_gcn():
  rng = np.random.default_rng(1)
  raw = structure.from_edges(
    *rng.integers(0, N, (2, 25)), num_nodes=N, nodes=GRAPH.nodes, duplicates="drop", self_loops="drop", undirected=True
  )
  conv, params, weight, bias = linear_case("sym")
  got = conv.apply({"params": params}, structure.add_self_loops(raw), raw.nodes)
  gcn = layers.GCNConv(OUT).apply(
    {"params": {"linear": {"kernel": weight}, "bias": bias}}, structure.normalize(raw), raw.nodes
  )
  np.testing.assert_allclose(got, gcn, atol=1e-5)


def test_mean_is_the_neighbour_branch_of_sage():
  conv, params, weight, bias = linear_case("mean")
  sage = layers.SAGEConv(OUT).apply(
    {"params": {"neighbor": {"kernel": weight}, "root": {"kernel": jnp.zeros((D, OUT)), "bias": bias}}},
    GRAPH,
    GRAPH.nodes,
  )
  np.testing.assert_allclose(conv.apply({"params": params}, GRAPH, GRAPH.nodes), sage, atol=1e-5)


def test_sum_is_what_gin_maps():
  conv, params, weight, bias = linear_case("sum")
  gin = layers.GINConv(lambda x: x @ weight + bias, eps=-1.0).apply({}, GRAPH, GRAPH.nodes)
  np.testing.assert_allclose(conv.apply({"params": params}, GRAPH, GRAPH.nodes), gin, atol=1e-5)


def test_identity_with_a_query_adds_the_degree():
  conv, params = made(activation="identity")
  _, silent, _, _ = linear_case("sum")
  degree = np.bincount(GRAPH.receivers, minlength=N)[:, None]
  added = degree * dense(params["relation"] | {"bias": 0}, dense(params["query"], GRAPH.nodes))
  got = conv.apply({"params": params}, GRAPH, GRAPH.nodes) - conv.apply({"params": silent}, GRAPH, GRAPH.nodes)
  np.testing.assert_allclose(got, added, atol=1e-5)


def batch_of(graphs, chosen):
  """Graphs of `hetero_edge_count` as one tuple."""
  first_node, first_edge = np.cumsum(graphs.n_node) - graphs.n_node, np.cumsum(graphs.n_edge) - graphs.n_edge
  parts = []
  for i in chosen:
    nodes, edges = (
      slice(first_node[i], first_node[i] + graphs.n_node[i]),
      slice(first_edge[i], first_edge[i] + graphs.n_edge[i]),
    )
    parts.append(
      structure.from_edges(
        graphs.senders[edges],
        graphs.receivers[edges],
        num_nodes=int(graphs.n_node[i]),
        nodes=graphs.labels[nodes],
        self_loops="keep",
      )  # fmt: skip
    )
  return structure.batch(parts)


@pytest.mark.parametrize("classes", [2, 5])
def test_exact_weights_for_hetero_edge_count(classes):
  """One-hot labels, W_Q = -I, W_K = I: relu(e_v - e_u) sums to 1 iff the labels differ."""
  graphs = synthetic.hetero_edge_count(classes, 20, max_nodes=15, seed=3)
  net = sir_gcn.HeteroEdgeCount(classes, classes)
  eye, zero = jnp.eye(classes), jnp.zeros(classes)
  params = {
    "embedding": {"embedding": eye},
    "conv_0": {
      "query": {"kernel": -eye, "bias": zero},
      "key": {"kernel": eye},
      "relation": {"kernel": eye, "bias": zero},
    },
    "regression": {"kernel": jnp.ones((classes, 1))},
  }
  counts = net.apply({"params": params}, batch_of(graphs, range(20)))
  np.testing.assert_array_equal(counts[:20], graphs.targets)  # mean squared error 0
  assert graphs.targets.std() > 10


def test_keys_of_a_dictionary_look_alike_to_gcn_but_not_to_us():
  """All that ask receive the same messages, so that a static convolution answers alike: at most 1 / n is right."""
  task = synthetic.dictionary_lookup(4, 3, seed=0)
  graph = structure.from_edges(task.senders, task.receivers, num_nodes=8, nodes=task.nodes[0])
  net = sir_gcn.dictionary_lookup(4)
  logits = net.apply(filled(net, graph), graph)[:4]
  assert np.ptp(logits, axis=0).max() > 0.01
  x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
  gcn = layers.GCNConv(4)
  normal = structure.normalize(graph, self_loops=False)
  assert np.ptp(gcn.apply(filled(gcn, normal, x), normal, x)[:4], axis=0).max() < 1e-6


# -------------------------------------------------------------------------------------------- symmetry and batching


@hypothesis.given(st.permutations(range(N)), st.sampled_from(AGGREGATIONS))
@hypothesis.settings(max_examples=10, deadline=None)
def test_relabelling_nodes_relabels_outputs(order, aggregation):
  order = np.array(order)  # new node i is old node order[i]
  number = np.argsort(order)
  senders, receivers = number[GRAPH.senders], number[GRAPH.receivers]
  by = np.lexsort((senders, receivers))
  relabelled = GRAPH._replace(
    nodes=GRAPH.nodes[order], senders=senders[by].astype("int32"), receivers=receivers[by].astype("int32")
  )
  conv, params = made(aggregation=aggregation)
  apply = jitted(conv)
  got, expected = apply(params, relabelled, relabelled.nodes), apply(params, GRAPH, GRAPH.nodes)
  np.testing.assert_allclose(got, expected[order], atol=1e-5)


@functools.cache
def jitted(conv):
  return jax.jit(lambda params, graph, x: conv.apply({"params": params}, graph, x))


NETWORKS = {
  "minesweeper": (sir_gcn.minesweeper, "float"),
  "roman_empire": (sir_gcn.roman_empire, "float"),
  "arxiv": (sir_gcn.arxiv, "float"),
  "zinc": (sir_gcn.zinc, 28),
  "zinc, GraphNorm": (functools.partial(sir_gcn.zinc, norm="graph"), 28),
  "mnist": (sir_gcn.mnist, "float"),
  "molhiv": (functools.partial(sir_gcn.molhiv, encoder=(4, 3)), (4, 3)),
  "hetero_edge_count": (functools.partial(sir_gcn.hetero_edge_count, 3), 3),
}


def small(name, train_like=False):
  """A narrow network of that name, a graph's nodes for it."""
  builder, kind = NETWORKS[name]
  changes = {"hidden": 4} if name == "hetero_edge_count" else {"hidden": 4, "depth": 1}
  rng = np.random.default_rng(0)

  def nodes(n):
    if kind == "float":
      return rng.normal(size=(n, D)).astype("float32")
    return np.stack([rng.integers(0, rows, n) for rows in np.atleast_1d(kind)], 1).astype("int32").squeeze()

  return builder(**changes), nodes


@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_is_its_graphs_and_padding_is_ignored(name):
  net, nodes = small(name)
  ring = lambda n: structure.from_edges(np.arange(n), (np.arange(n) + 1) % n, num_nodes=n, nodes=nodes(n))
  one, two = ring(6), ring(6)
  both = structure.batch([one, two], nodes=20, edges=25, num_graphs=4)
  variables = filled(net, one)
  apply = jax.jit(net.apply)
  got, first, second = (np.asarray(apply(variables, graph)) for graph in (both, one, two))
  if len(first) == 1:  # of a graph
    np.testing.assert_allclose(got[:2], np.concatenate([first, second]), atol=1e-5)
  else:
    np.testing.assert_allclose(got[:12], np.concatenate([first, second]), atol=1e-5)


@pytest.mark.parametrize("name", ["minesweeper", "molhiv"])
def test_padding_is_ignored_in_training_too(name):
  net, nodes = small(name)
  net = net.clone(
    **{field: 0.0 for field in ("dropout", "message_dropout", "input_dropout", "branch_dropout") if hasattr(net, field)}
  )
  ring = lambda n: structure.from_edges(np.arange(n), (np.arange(n) + 1) % n, num_nodes=n, nodes=nodes(n))
  graphs = [ring(6), ring(6)]
  tight, loose = structure.batch(graphs), structure.batch(graphs, nodes=30, edges=40, num_graphs=6)
  variables = filled(net, tight)
  apply = jax.jit(functools.partial(net.apply, train=True, mutable=["batch_stats"]))
  (a, statistics), (b, other) = (apply(variables, g) for g in (tight, loose))
  rows = 12 if name == "minesweeper" else 2
  np.testing.assert_allclose(a[:rows], b[:rows], atol=1e-4)  # molhiv normalises over two graphs
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), statistics, other)
  assert jax.tree.leaves(statistics)[0].any()


def test_operator_made_before_changes_nothing():
  net, _ = small("minesweeper")
  variables = filled(net, GRAPH)
  got = net.apply(variables, GRAPH, sparse.operator(GRAPH))
  np.testing.assert_allclose(got, net.apply(variables, GRAPH), atol=1e-6)


# --------------------------------------------------------------------------------------------------------- cost


def memory(aggregation, features, edges=3000, hidden=32):
  """Scratch of value and gradient, in bytes."""
  rng = np.random.default_rng(0)
  graph = structure.from_edges(*rng.integers(0, 200, (2, edges)), num_nodes=200, duplicates="drop", self_loops="keep")
  conv, x = sir_gcn.SIRConv(features, hidden, "relu", aggregation), jnp.ones((200, 8))
  op = sparse.operator(graph._replace(nodes=x))
  params = jax.eval_shape(conv.init, KEY, op, x)
  loss = lambda params, op, x: (conv.apply(params, op, x) ** 2).sum()
  stats = jax.jit(jax.grad(loss)).lower(params, op, x).compile().memory_analysis()
  return stats.temp_size_in_bytes, op.rows.shape[0]


def test_memory_does_not_grow_with_outputs_per_edge():
  """Doubling d_out adds a few arrays over nodes to sum, mean and sym, and arrays over edges to max."""
  for aggregation in AGGREGATIONS:
    (narrow, entries), (wide, _) = memory(aggregation, 32), memory(aggregation, 64)
    if aggregation == "max":
      assert wide - narrow > 4 * entries * 32
    else:
      assert wide - narrow < 4 * 4 * 200 * 32 < 4 * entries * 32


# ------------------------------------------------------------------------------------------- parity and published


def converted(state):
  """Variables of each official model in the file, by its name."""
  parts = {}
  for name, value in state.items():
    model, rest = name.split(".", 1)
    parts.setdefault(model, {})[rest] = value
  made = {}
  for model, part in parts.items():
    if model in ("base", "edge_base"):
      made[model] = interop.variables(part, {"params/message": interop.dense("_message_func.0")})
    elif model == "graph_norm":
      made[model] = {"params": {"scale": part["weight"], "bias": part["bias"], "mean_scale": part["mean_scale"]}}
    else:
      made[model] = sir_gcn.from_torch(part, edge_tables=model == "table_conv")
  return made


def outputs(variables, inputs):
  """What the official models computed, by ours."""
  senders, receivers, n_node = inputs["senders"], inputs["receivers"], inputs["n_node"]
  n_edge = jnp.bincount(receivers >= n_node[0], length=2)
  x, e = inputs["x"], inputs["e"]
  # Two graphs and an empty one at the end, since the last of several is padding.
  graph = jraph.GraphsTuple(x, None, receivers, senders, None, jnp.append(n_node, 0), jnp.append(n_edge, 0))
  conv = functools.partial(sir_gcn.SIRConv, 2, 4)
  convs = {
    "conv": (conv("leaky_relu"), (x,)),
    "edge_conv": (conv("gelu"), (x, e)),
    "table_conv": (conv("relu", edge_types=5), (x, inputs["bonds"])),
    "base": (sir_gcn.SIRConvBase(nn.Dense(2)), (x,)),
    "edge_base": (sir_gcn.SIRConvBase(nn.Dense(2)), (x, e)),
  }
  got = {"graph_norm": layers.GraphNorm().apply(variables["graph_norm"], graph, x)}
  for name, (module, arguments) in convs.items():
    for a in AGGREGATIONS:
      got[f"{name}_{a}"] = module.clone(aggregation=a).apply(variables[name], graph, *arguments)
  tiny = {"hidden": 4, "depth": 2}
  models = {
    "minesweeper": (sir_gcn.minesweeper(**tiny), x),
    "roman_empire": (sir_gcn.roman_empire(num_outputs=2, **tiny), x),
    "arxiv": (sir_gcn.arxiv(num_outputs=2, **tiny), x),
    "molhiv": (sir_gcn.molhiv(encoder=(4, 3), readout=(2, 1), **tiny), inputs["atom_columns"]),
    "zinc": (sir_gcn.zinc(encoder=4, readout=(4,), **tiny), inputs["atoms"]),
    "zinc_gn": (sir_gcn.zinc(encoder=4, readout=(4,), norm="graph", **tiny), inputs["atoms"]),
    "mnist": (sir_gcn.mnist(num_outputs=2, readout=(4, 4), **tiny), x),
    "pattern": (sir_gcn.pattern(encoder=4, **tiny), inputs["atoms"]),
    "wikics": (sir_gcn.wikics(num_outputs=2, **tiny), x),
    "dictionary_lookup": (sir_gcn.dictionary_lookup(3, hidden=4), inputs["pairs"]),
    "hetero_edge_count": (sir_gcn.hetero_edge_count(4, hidden=4), inputs["atoms"]),
  }
  for name, (net, nodes) in models.items():
    y = net.apply(variables[name], graph._replace(nodes=nodes))
    got[name] = y[:2] if len(y) == 3 else y  # without the empty graph
  return got


def test_golden():
  """Every aggregation of every convolution, GraphNorm and every model, as the official code has them on DGL 2.1."""
  golden_rule.check("sir_gcn", converted, jax.jit(outputs), atol=1e-6, rtol=1e-5)


def test_from_torch_reads_the_activation_once_and_names_what_it_does_not_know():
  state = {
    **{f"convs.0.linear_{name}.weight": np.ones((4, 4), "float32") for name in ("query", "key", "relation")},
    "activation.1.weight": np.ones((4, 4), "float32"),
    "convs.0.activation.1.weight": np.ones((4, 4), "float32"),
  }
  assert set(sir_gcn.from_torch(state)["params"]) == {"conv_0", "activation"}
  with pytest.raises(ValueError, match="unused: 'init_emb.weight'"):
    sir_gcn.from_torch(state | {"init_emb.weight": np.ones((1, 4), "float32")})


COUNTS = {
  "dictionary_lookup": {10: 7_800, 20: 30_800, 30: 69_000, 40: 122_400, 50: 191_000},
  "hetero_edge_count": {2: 1_300, 4: 5_080, 6: 11_340, 8: 20_080, 10: 31_300},
  "roman_empire": (300, 5_420_050),
  "amazon_ratings": (300, 869_125),
  "minesweeper": (7, 1_319_937),
  "tolokers": (10, 1_320_705),
  "questions": (301, 3_309_569),
  "arxiv": (128, 98_460),
  "molhiv": ((9,), 96_201),
  "zinc": ((), 99_376),
  "mnist": (3, 99_290),
  "cifar10": (5, 99_770),
  "pattern": ((), 104_402),
  "cluster": ((), 105_046),
  "wikics": (300, 102_610),
}


def parameters(net, nodes):
  graph = structure.from_edges(np.array([0]), np.array([1]), num_nodes=2, nodes=nodes)
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(jax.eval_shape(net.init, KEY, graph)["params"]))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
  builder, count = getattr(sir_gcn, name), COUNTS[name]
  assert name in sir_gcn.RECIPES
  if isinstance(count, dict):
    nodes = np.zeros((2, 2) if name == "dictionary_lookup" else 2, "int32")
    assert {size: parameters(builder(size), nodes) for size in count} == count
  else:
    shape, expected = count
    nodes = np.zeros((2, *shape), "int32") if isinstance(shape, tuple) else np.zeros((2, shape), "float32")
    assert parameters(builder(), nodes) == expected


def test_recipes_are_the_published_ones():
  r = sir_gcn.RECIPES
  assert r["arxiv"] == sir_gcn.Recipe(1e-2, 1000, 0, 1e-3, 0.0, 0.0, 40, 20)
  assert r["minesweeper"] == sir_gcn.Recipe(3e-5, 1000, 0, 0.0, 0.0, 0.0, 1000, 10)
  assert r["zinc"] == sir_gcn.Recipe(1e-3, 500, 128, 0.0, 1e-7, 1e-7, 10, 10)
  assert r["mnist"].l1 == r["cifar10"].l2 == 1e-6 and r["wikics"].l1 == 1e-5 and r["wikics"].batch_size == 0
  assert (r["molhiv"].batch_size, r["molhiv"].weight_decay, r["molhiv"].epochs) == (64, 1e-4, 100)
  assert r["dictionary_lookup"].warmup == 0 and r["hetero_edge_count"].batch_size == 256


# ---------------------------------------------------------------------------------------------------- training parts


def torch_rates(losses, recipe):
  """ReduceLROnPlateau(factor 0.5, threshold 1e-4 relative) and the scripts' warm-up, in plain Python."""
  rate, best, bad, rates = recipe.learning_rate, np.inf, 0, []
  for epoch, loss in enumerate(losses, 1):
    if epoch <= recipe.warmup:
      rate = recipe.learning_rate * epoch / recipe.warmup
    rates.append(rate)
    if loss < best * (1 - 1e-4):
      best, bad = loss, 0
    else:
      bad += 1
    if bad > recipe.patience:
      rate, bad = rate * 0.5, 0
  return rates


@hypothesis.given(st.lists(st.sampled_from([1.0, 0.99995, 0.5, 2.0]), min_size=30, max_size=30), st.integers(0, 4))
@hypothesis.settings(max_examples=20, deadline=None)
def test_learning_rate(losses, warmup):
  recipe = sir_gcn.Recipe(0.1, patience=2, warmup=warmup)
  state, got = sir_gcn.first_rate(recipe), []
  for epoch, loss in enumerate(losses, 1):
    got.append(float(state.rate))
    state = sir_gcn.next_rate(state, jnp.float32(loss), epoch, recipe)
  np.testing.assert_allclose(got, torch_rates(losses, recipe), rtol=1e-6)


def test_loss_and_penalty():
  logits, labels = np.random.default_rng(0).normal(size=(5, 3)) * 3, np.array([0, 1, 2, 0, 1])
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  eps = 1 - np.log(2)
  expected = np.log(eps - np.log(p[range(5), labels])) - np.log(eps)
  got = sir_gcn.log_cross_entropy(jnp.asarray(logits, "float32"), jnp.asarray(labels))
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}
  recipe = sir_gcn.Recipe(l1=0.1, l2=0.01)
  np.testing.assert_allclose(sir_gcn.penalty(params, recipe), 0.1 * 6 + 0.01 * 14, rtol=1e-6)


@pytest.mark.parametrize(
  "call, argument",
  [
    (lambda: made(activation="tanh"), "activation"),
    (lambda: made(dropout=1.0), "dropout"),
    (lambda: sir_gcn.SIRConv(0, H).init(KEY, GRAPH, GRAPH.nodes), "features"),
    (lambda: sir_gcn.SIRConv(OUT, H).init(KEY, GRAPH, GRAPH.nodes[:, 0]), "x"),
    (lambda: sir_gcn.SIRConv(OUT, H).init(KEY, GRAPH, GRAPH.nodes, GRAPH.edges[:4]), "edges"),
    (lambda: sir_gcn.SIRConv(OUT, H, edge_types=3).init(KEY, GRAPH, GRAPH.nodes, GRAPH.edges), "edges"),
    (lambda: sir_gcn.SIRConvBase(jnp.tanh, "prod").init(KEY, GRAPH, GRAPH.nodes), "aggregation"),
    (lambda: sir_gcn.molhiv().init(KEY, GRAPH._replace(nodes=np.zeros((N, 3), "int32"))), "graph"),
    (lambda: sir_gcn.dictionary_lookup(3).init(KEY, GRAPH), "graph"),
  ],
)
def test_bad_input(call, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    call()
