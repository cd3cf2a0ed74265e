"""Every layer against a dense computation with full matrices that shares no code with it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxlab.graph import layers, sparse, structure

N, F, H = 7, 5, 4


def make_graph(seed=0):
  """Directed; node 5 has a loop of weight 2, node 6 is isolated. Also the dense pattern, row = receiver."""
  rng = np.random.default_rng(seed)
  pattern = rng.random((N, N)) < 0.35
  np.fill_diagonal(pattern, False)
  pattern[6] = pattern[:, 6] = False
  pattern[5, 5] = True
  receivers, senders = np.nonzero(pattern)
  weights = np.where(senders == receivers, 2.0, 0.5 + rng.random(senders.size))
  x = rng.normal(size=(N, F)).astype("float32")
  graph = structure.from_edges(senders, receivers, num_nodes=N, nodes=x, edges=weights, self_loops="keep")
  return graph, pattern


def randomize(variables, seed=0):
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(tree, [rng.normal(size=leaf.shape).astype("float32") for leaf in leaves])


def apply(layer, graph, x, **options):
  variables = randomize(layer.init(jax.random.key(0), graph, x))
  return jax.jit(lambda v, g, x: layer.apply(v, g, x, **options))(variables, graph, x), variables["params"]


def gcn(p, graph, pattern, x):
  a = np.zeros((N, N))
  a[graph.receivers, graph.senders] = graph.edges
  return a @ x @ p["linear"]["kernel"] + p["bias"]


def sage(p, graph, pattern, x):
  mean = np.stack([x[row].mean(axis=0) if row.any() else np.zeros(F) for row in pattern])
  return x @ p["root"]["kernel"] + p["root"]["bias"] + mean @ p["neighbor"]["kernel"]


def gat(p, graph, pattern, x, heads=2, concat=True):
  z = (x @ p["linear"]["kernel"]).reshape(N, heads, H)
  out = np.zeros((N, heads, H))
  for h in range(heads):
    score = (z[:, h] @ p["attention_receiver"][h])[:, None] + (z[:, h] @ p["attention_sender"][h])[None]
    score = np.where(score > 0, score, 0.2 * score)
    weight = np.where(pattern, np.exp(score), 0)
    out[:, h] = weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-30) @ z[:, h]
  return (out.reshape(N, -1) if concat else out.mean(axis=1)) + p["bias"]


def gin(p, graph, pattern, x):
  return ((1 + p["eps"]) * x + pattern @ x) @ p["mlp"]["kernel"] + p["mlp"]["bias"]


CASES = {
  "gcn": (layers.GCNConv(H), gcn),
  "sage": (layers.SAGEConv(H), sage),
  "gat": (layers.GATConv(H, heads=2), gat),
  "gat_mean": (layers.GATConv(H, heads=2, concat=False), lambda *a: gat(*a, concat=False)),
  "gin": (layers.GINConv(nn.Dense(H), train_eps=True), gin),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["graph", "operator", "padded"])
def test_layer_against_dense(name, form):
  layer, oracle = CASES[name]
  graph, pattern = make_graph()
  given = {
    "graph": graph,
    "operator": sparse.operator(graph),
    "padded": structure.pad(graph, nodes=N + 3, edges=len(graph.senders) + 9),
  }[form]
  x = graph.nodes
  if form == "padded":
    x = np.concatenate([x, np.full((3, F), 100, "float32")])
  got, params = apply(layer, given, x)
  np.testing.assert_allclose(got[:N], oracle(params, graph, pattern, graph.nodes), atol=2e-5)


@pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
def test_sparse_features_equal_dense_ones(name):
  graph, _ = make_graph()
  x = np.where(np.random.default_rng(1).random((N, F)) < 0.4, graph.nodes, 0)
  dense, _ = apply(CASES[name][0], graph, x)
  from_sparse, _ = apply(CASES[name][0], graph, sparse.from_scipy(scipy.sparse.csr_array(x)))
  np.testing.assert_allclose(dense, from_sparse, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_parameter_and_bfloat16_runs(name):
  layer, _ = CASES[name]
  graph, _ = make_graph()
  variables = randomize(layer.init(jax.random.key(0), graph, graph.nodes))
  gradient = jax.grad(lambda v: jnp.sum(layer.apply(v, graph, graph.nodes) ** 2))(variables)
  assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(gradient))
  if name != "gin":  # its dtype is that of its mlp
    exact = layer.apply(variables, graph, graph.nodes)
    rough = layer.clone(dtype="bfloat16").apply(variables, graph, graph.nodes)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype("float32"), exact, atol=0.05 * np.abs(exact).max())


def test_attention_sums_to_one_over_incoming_edges():
  graph, pattern = make_graph()
  layer = layers.GATConv(1, use_bias=False)
  variables = randomize(layer.init(jax.random.key(0), graph, graph.nodes))
  variables["params"]["linear"]["kernel"] = np.zeros((F, 1), "float32")
  x = np.ones((N, F), "float32")
  variables["params"]["linear"]["kernel"][:] = 1 / F  # z = 1 everywhere, so y is the sum of the weights
  np.testing.assert_allclose(layer.apply(variables, graph, x)[:, 0], pattern.any(axis=1), atol=1e-6)


def test_graph_norm_per_graph():
  graphs = [make_graph(s)[0] for s in (0, 1)]
  joined = structure.batch(graphs, nodes=2 * N + 3, edges=60, num_graphs=4)
  x = np.array(joined.nodes)
  x[2 * N :] = 50
  got, p = apply(layers.GraphNorm(), joined, x)
  for part in (slice(0, N), slice(N, 2 * N)):
    centred = x[part] - p["mean_scale"] * x[part].mean(axis=0)
    expected = p["scale"] * centred / np.sqrt((centred**2).mean(axis=0) + 1e-5) + p["bias"]
    np.testing.assert_allclose(got[part], expected, atol=1e-5)


def test_torch_initialisation():
  variables = layers.Linear(4000).init(jax.random.key(0), np.ones((1, 16)))["params"]
  for leaf in (variables["kernel"], variables["bias"]):  # U(-1/4, 1/4): bound and variance
    assert np.abs(leaf).max() <= 0.25
    np.testing.assert_allclose(np.var(leaf), 0.25**2 / 3, rtol=0.05)
  assert (layers.Linear(4, initializer="glorot").init(jax.random.key(0), np.ones((1, 16)))["params"]["bias"] == 0).all()


def test_dropout_of_sparse_features_has_the_distribution_of_dense_dropout():
  matrix = scipy.sparse.random_array((200, 300), density=0.2, rng=np.random.default_rng(0))
  features = sparse.from_scipy(matrix)
  drop = layers.Dropout(0.8)
  dropped = drop.apply({}, features, train=True, rngs={"dropout": jax.random.key(1)})
  ratio = np.asarray(dropped.values / features.values)
  kept = ratio > 0
  np.testing.assert_allclose(ratio[kept], 5, rtol=1e-4)  # 1 / (1 - 0.8)
  np.testing.assert_allclose(kept.mean(), 0.2, atol=4 * np.sqrt(0.16 / kept.size))
  np.testing.assert_array_equal(dropped.columns, features.columns)
  np.testing.assert_array_equal(drop.apply({}, features, train=False).values, features.values)
  other = drop.apply({}, features, train=True, rngs={"dropout": jax.random.key(2)})
  assert np.any(other.values != dropped.values)
