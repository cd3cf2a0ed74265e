"""What the specification says must hold, as far as it takes seconds; accuracies are in `experiments/dagnn.py`."""

import golden_rule
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxlab.graph import sparse, structure
from jaxlab.graph.nets import dagnn

N, F, C = 14, 6, 3


def make_graph(seed=0, connected=False):
  """Undirected, normalised; node 2 has a loop of its own; the last node is isolated unless `connected`."""
  rng = np.random.default_rng(seed)
  n = N if connected else N - 1
  pairs = np.concatenate([rng.integers(0, n, (2, 18)), np.stack([np.arange(n - 1), np.arange(1, n)])], axis=1)
  pairs = np.concatenate([pairs[:, pairs[0] != pairs[1]], [[2], [2]]], axis=1)
  return structure.from_edges(
    *pairs,
    num_nodes=N,
    nodes=rng.normal(size=(N, F)).astype("float32"),
    duplicates="drop",
    self_loops="keep",
    undirected=True,
  )


def dense_operator(graph):
  """D^-1/2 (A + I) D^-1/2 of the raw graph, with matrices."""
  a = np.zeros((N, N))
  a[graph.receivers, graph.senders] = 1
  a += np.diag(np.diag(a) == 0)
  root = np.diag(a.sum(axis=1) ** -0.5)
  return root @ a @ root


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def mlp(params, x):
  hidden = np.maximum(x @ params["hidden_layer"]["kernel"] + params["hidden_layer"]["bias"], 0)
  return hidden @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def dense_dagnn(params, a, x, hops):
  """The definition, hop by hop, in float64."""
  h, out = mlp(params, np.float64(x)), 0
  for _ in range(hops + 1):
    out = out + sigmoid(h @ params["gate"]["kernel"] + params["gate"]["bias"]) * h
    h = a @ h
  return out


def model(hops=4, **options):
  return dagnn.DAGNN(**{"num_classes": C, "hops": hops, "hidden": 8} | options)


RAW = make_graph()
GRAPH = structure.normalize(RAW)
VARIABLES = jax.jit(model().init)(jax.random.key(0), GRAPH)
VARIABLES["params"]["gate"]["kernel"] = 3 * VARIABLES["params"]["gate"]["kernel"]  # gates away from one half
apply = jax.jit(lambda variables, graph: model().apply(variables, graph))


# ------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("hops", [0, 1, 4, 16])
def test_against_dense_matrices(hops):
  got = model(hops).apply(VARIABLES, GRAPH)
  a = dense_operator(RAW)
  np.testing.assert_array_equal(a[-1], np.eye(N)[-1])  # an isolated node keeps its own prediction
  np.testing.assert_allclose(got, dense_dagnn(VARIABLES["params"], a, RAW.nodes, hops), atol=1e-5)


def test_no_hops_is_a_gated_mlp():
  got, seen = model(0).apply(VARIABLES, GRAPH, features=True)
  assert seen.hops.shape == (N, 1, C) and seen.gates.shape == (N, 1)
  np.testing.assert_array_equal(got, seen.gates * seen.hops[:, 0])
  np.testing.assert_allclose(seen.hops[:, 0], mlp(VARIABLES["params"], RAW.nodes), atol=1e-6)


def test_features_are_what_the_logits_are_made_of():
  logits, seen = model().apply(VARIABLES, GRAPH, features=True)
  assert seen.hops.shape == (N, 5, C) and seen.gates.shape == (N, 5)
  np.testing.assert_allclose(np.einsum("nk,nkc->nc", seen.gates, seen.hops), logits, atol=1e-6)
  np.testing.assert_allclose(logits, apply(VARIABLES, GRAPH), atol=1e-6)
  a = dense_operator(RAW)
  for k in range(5):
    np.testing.assert_allclose(seen.hops[:, k], np.linalg.matrix_power(a, k) @ seen.hops[:, 0], atol=1e-5)
  assert seen.gates.min() > 0 and seen.gates.max() < 1 and np.ptp(seen.gates) > 0.1
  assert not np.allclose(seen.gates.sum(axis=1), 1)  # not a softmax over hops


def test_constant_gates_make_the_network_linear_in_the_predictions():
  g = 0.3
  frozen = jax.tree.map(lambda v: v, VARIABLES)
  frozen["params"]["gate"] = {"kernel": np.zeros((C, 1), "float32"), "bias": np.full(1, np.log(g / (1 - g)), "float32")}
  powers = sum(np.linalg.matrix_power(dense_operator(RAW), k) for k in range(5))
  np.testing.assert_allclose(apply(frozen, GRAPH), g * powers @ mlp(VARIABLES["params"], RAW.nodes), atol=1e-5)


@hypothesis.given(st.permutations(range(N)))
@hypothesis.settings(max_examples=15, deadline=None)
def test_relabelling_nodes_relabels_logits(order):
  order = np.array(order)  # new node i is old node order[i]
  number = np.argsort(order)
  relabelled = structure.from_edges(
    number[RAW.senders], number[RAW.receivers], num_nodes=N, nodes=RAW.nodes[order], self_loops="keep"
  )
  got = apply(VARIABLES, structure.normalize(relabelled))
  np.testing.assert_allclose(got, apply(VARIABLES, GRAPH)[order], atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_padding_is_ignored(train):
  net = model(batch_norm=True, dropout=0.0)
  padded = structure.pad(GRAPH, nodes=N + 5, edges=len(GRAPH.senders) + 7)
  padded = padded._replace(nodes=np.where(np.arange(N + 5)[:, None] < N, padded.nodes, 1e3))
  variables = net.init(jax.random.key(0), GRAPH)
  (expected, statistics), (got, padded_statistics) = (
    net.apply(variables, g, train=train, mutable=["batch_stats"]) for g in (GRAPH, padded)
  )
  np.testing.assert_allclose(got[:N], expected, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), statistics, padded_statistics)
  assert train == bool(np.any(statistics["batch_stats"]["norm"]["mean"]))


def test_precomputed_operator_and_sparse_features_change_nothing():
  x = np.where(np.abs(RAW.nodes) > 0.7, RAW.nodes, 0)
  expected = apply(VARIABLES, GRAPH._replace(nodes=x))
  got = model().apply(VARIABLES, GRAPH._replace(nodes=sparse.from_scipy(scipy.sparse.csr_array(x))))
  np.testing.assert_allclose(got, expected, atol=1e-6)
  got = model().apply(VARIABLES, GRAPH._replace(nodes=x), sparse.operator(GRAPH))
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_dropout_acts_on_input_and_hidden_layer_in_training_only():
  ones = jax.tree.map(np.ones_like, VARIABLES)
  graph = GRAPH._replace(nodes=np.ones((N, F), "float32"))
  rngs = {"dropout": jax.random.key(0)}
  _, seen = model(dropout=0.5).apply(ones, graph, train=True, features=True, rngs=rngs)
  hidden_then_class = set(np.unique(np.round(np.asarray(seen.hops[:, 0, 0]))))
  assert len(hidden_then_class) > 3  # both masks vary from node to node
  assert np.unique(model(dropout=0.5).apply(ones, graph, features=True)[1].hops[:, 0]).size == 1
  _, seen = model(dropout=0.5, batch_norm=True).apply(
    {"params": ones["params"] | {"norm": {"scale": np.ones(8), "bias": np.ones(8)}}, "batch_stats": {}},
    graph,
    train=True,
    features=True,
    rngs=rngs,
    mutable=["batch_stats"],
  )[0]
  # A constant input that keeps all its entries normalises to 0: hidden units are 0 or (0 + 1) / 0.5, the class 1 + sum.
  np.testing.assert_allclose(seen.hops[:, 0, 0] % 2, 1, atol=0.01)
  assert np.ptp(seen.hops[:, 0, 0]) > 1


def test_gradients_reach_every_parameter_and_bfloat16_runs():
  loss = lambda v: jnp.sum(model().apply(v, GRAPH) ** 2)
  assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(jax.grad(loss)(VARIABLES)))
  rough, exact = model(dtype="bfloat16").apply(VARIABLES, GRAPH), apply(VARIABLES, GRAPH)
  assert rough.dtype == jnp.bfloat16
  np.testing.assert_allclose(rough.astype("float32"), exact, atol=0.03 * np.abs(exact).max())


def test_inference_needs_the_memory_of_one_hop():
  def temporary_bytes(hops):
    shapes = jax.eval_shape(lambda: (VARIABLES, GRAPH))
    return jax.jit(model(hops).apply).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes(40) == temporary_bytes(400)


def test_one_class_and_one_node_keep_their_axes():
  single = structure.normalize(structure.from_edges([], [], num_nodes=1, nodes=np.ones((1, F), "float32")))
  net = dagnn.DAGNN(num_classes=1, hops=2)
  assert net.apply(net.init(jax.random.key(0), single), single).shape == (1, 1)


# ------------------------------------------------------------------------------------------------ published variants


@pytest.mark.parametrize(
  ("variant", "num_features", "parameters"),
  [
    (dagnn.cora, 1433, 92_239),
    (dagnn.citeseer, 3703, 237_453),
    (dagnn.pubmed, 500, 32_263),
    (dagnn.coauthor_cs, 6805, 6805 * 64 + 64 + 64 * 15 + 15 + 16),
    (dagnn.coauthor_physics, 8415, 8415 * 64 + 64 + 64 * 5 + 5 + 6),
    (dagnn.amazon_computers, 767, 767 * 64 + 64 + 64 * 10 + 10 + 11),
    (dagnn.amazon_photo, 745, 745 * 64 + 64 + 64 * 8 + 8 + 9),
    (dagnn.arxiv, 128, 43_857),
  ],
)
def test_parameter_counts(variant, num_features, parameters):
  graph = GRAPH._replace(nodes=jax.ShapeDtypeStruct((N, num_features), "float32"))
  assert variant.__name__ in dagnn.RECIPES
  for hops in (1, 20):  # the count does not depend on K
    shapes = jax.eval_shape(variant(hops=hops).init, jax.random.key(0), graph)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == parameters


@pytest.mark.parametrize(
  ("name", "hops", "batch_norm", "hidden"), [("dagnn", (1, 4, 16), False, 64), ("dagnn_arxiv", (16,), True, 32)]
)
def test_official_outputs(name, hops, batch_norm, hidden):

  def outputs(variables, given):
    graph = structure.from_edges(*given["edges"], num_nodes=len(given["x"]), nodes=given["x"], self_loops="keep")
    classes = variables["params"]["classifier"]["bias"].size
    nets = {k: dagnn.DAGNN(classes, hops=k, hidden=hidden, batch_norm=batch_norm) for k in hops}
    return {f"k{k}": jax.nn.log_softmax(net.apply(variables, structure.normalize(graph))) for k, net in nets.items()}

  golden_rule.check(name, dagnn.from_torch, outputs, atol=1e-5)


def test_from_torch_reports_what_does_not_fit():
  with pytest.raises(ValueError, match="prop.proj.bias"):
    dagnn.from_torch({"lin1.weight": np.ones((2, 3))})


# ----------------------------------------------------------------------------------------------------------- theory


def test_powers_approach_their_limit_as_the_second_eigenvalue():
  raw = make_graph(connected=True)
  a, phi = dense_operator(raw), dagnn.stationary_direction(raw)
  rate = dagnn.second_eigenvalue(raw)
  assert 0.5 < rate < 1
  for k in (1, 2, 5, 20):
    distance = np.linalg.norm(np.linalg.matrix_power(a, k) - np.outer(phi, phi), 2)
    np.testing.assert_allclose(distance, rate**k, atol=1e-4)
  row = structure.to_scipy(structure.normalize(raw, "row")).toarray()
  np.testing.assert_allclose(np.linalg.matrix_power(row, 2000), np.tile(dagnn.stationary(raw), (N, 1)), atol=1e-4)


def test_second_eigenvalue_of_a_large_graph_equals_the_ring_formula():
  n = 601  # a ring with loops has eigenvalues (1 + 2 cos(2 pi j / n)) / 3; its iterative solver path
  ring = structure.from_edges(np.arange(n), (np.arange(n) + 1) % n, num_nodes=n, undirected=True)
  np.testing.assert_allclose(dagnn.second_eigenvalue(ring), (1 + 2 * np.cos(2 * np.pi / n)) / 3, atol=1e-6)


def test_smoothness_is_the_mean_half_distance_of_directions():
  x = np.random.default_rng(0).normal(size=(9, 4)).astype("float32")
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  expected = [sum(np.linalg.norm(u - v) / 2 for v in unit) / 8 for u in unit]
  np.testing.assert_allclose(dagnn.smoothness(x), expected, rtol=1e-5)
  np.testing.assert_allclose(dagnn.smoothness(3 * np.ones((4, 2))), 0, atol=1e-7)
  np.testing.assert_allclose(dagnn.smoothness(np.array([[1.0, 0], [-2, 0]])), 1)  # opposite directions: the most


def test_propagation_smooths_down_to_the_limit():
  raw = make_graph(connected=True)
  a, phi = dense_operator(raw), dagnn.stationary_direction(raw)
  z = np.random.default_rng(0).normal(size=(N, C))
  smv = lambda x: float(dagnn.smoothness(x).mean())
  values = [smv(np.linalg.matrix_power(a, k) @ z) for k in (0, 2, 5, 10, 30, 100, 300)]
  limit = smv(np.outer(phi, phi) @ z)
  assert (np.diff(values) < 1e-5).all() and values[0] > 0.3
  np.testing.assert_allclose(values[-1], limit, atol=1e-3)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: model(hops=-1).init(jax.random.key(0), GRAPH), "hops: got -1"),
    (lambda: model(num_classes=0).init(jax.random.key(0), GRAPH), "num_classes: got 0"),
    (lambda: model(hidden=0).init(jax.random.key(0), GRAPH), "hidden: got 0"),
    (lambda: model(dropout=1.0).init(jax.random.key(0), GRAPH), "dropout: got 1.0"),
    (lambda: model().init(jax.random.key(0), RAW), "graph: got edges without weights"),
    (lambda: model().init(jax.random.key(0), GRAPH._replace(nodes=None)), "graph: got nodes of shape None"),
    (lambda: model().init(jax.random.key(0), GRAPH._replace(nodes=np.ones(N))), r"graph: got nodes of shape \(14,\)"),
    (lambda: model().init(jax.random.key(0), GRAPH, sparse.from_scipy(scipy.sparse.eye_array(3))), "operator: got"),
    (lambda: dagnn.smoothness(np.ones((1, 4))), r"x: got shape \(1, 4\)"),
    (lambda: dagnn.second_eigenvalue(structure.from_edges([0], [1], num_nodes=2)), "graph: got a directed"),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    call()
