"""GatedGCN and GINE against loops over edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import kernels
from jaxlab.graph import gated, layers, sparse, structure

N, F = 9, 4


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(0)
  pattern = rng.random((N, N)) < 0.3
  np.fill_diagonal(pattern, False)
  pattern[7] = pattern[:, 7] = False
  receivers, senders = np.nonzero(pattern)
  x, e = rng.standard_normal((N, F)).astype("float32"), rng.standard_normal((senders.size, F)).astype("float32")
  return structure.from_edges(senders, receivers, num_nodes=N, nodes=x), x, e


def randomize(variables, seed=0):
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(tree, [rng.uniform(0.2, 1.2, leaf.shape).astype("float32") for leaf in leaves])


def oracle(p, stats, graph, x, e):
  linear = lambda name, v: v @ p[name]["kernel"] + p[name]["bias"]
  norm = lambda name, v: (
    (v - stats[name]["mean"]) / np.sqrt(stats[name]["var"] + 1e-5) * p[name]["scale"] + p[name]["bias"]
  )
  to_gate, to_message = np.split(linear("sender", x), 2, axis=1)
  gate = linear("receiver", x)[graph.receivers] + to_gate[graph.senders] + linear("edge", e)
  eta = 1 / (1 + np.exp(-gate))
  out = linear("root", x)
  for v in range(N):
    mine = graph.receivers == v
    out[v] += (eta[mine] * to_message[graph.senders[mine]]).sum(0) / (eta[mine].sum(0) + 1e-6)
  return x + np.maximum(norm("norm", out), 0), e + np.maximum(norm("edge_norm", gate), 0)


def test_gated_gcn(problem):
  graph, x, e = problem
  layer = layers.GatedGCN(F)
  variables = randomize(jax.jit(layer.init)(jax.random.key(0), graph, x, e))
  nodes, edges = jax.jit(layer.apply)(variables, graph, x, e)
  expected = oracle(variables["params"], variables["batch_stats"], graph, np.float64(x), np.float64(e))
  np.testing.assert_allclose(nodes, expected[0], atol=1e-5)
  np.testing.assert_allclose(edges, expected[1], atol=1e-5)


def test_gated_gcn_without_edges_has_states_of_zero(problem):
  graph, x, e = problem
  with_edges = layers.GatedGCN(F)
  variables = randomize(jax.jit(with_edges.init)(jax.random.key(0), graph, x, e))
  edge = variables["params"]["edge"] | {"bias": jnp.zeros(F)}
  zeros = jax.jit(with_edges.apply)(variables | {"params": variables["params"] | {"edge": edge}}, graph, x, 0 * e)
  params = {name: p for name, p in variables["params"].items() if name != "edge"}
  none = jax.jit(with_edges.apply)(variables | {"params": params}, graph, x)
  np.testing.assert_allclose(none[0], zeros[0], atol=1e-6)
  np.testing.assert_allclose(none[1], zeros[1], atol=1e-6)


def test_statistics_leave_padding_out(problem):
  graph, x, e = problem
  layer = layers.GatedGCN(F)
  variables = jax.jit(layer.init)(jax.random.key(0), graph, x, e)
  padded = structure.pad(graph._replace(edges=e), nodes=15, edges=40)
  train = jax.jit(
    lambda *args, mask=None: layer.apply(variables, *args, train=True, mutable=["batch_stats"], mask=mask)
  )
  (nodes, edges), stats = train(graph, x, e)
  far = jnp.where(structure.node_mask(padded)[:, None], padded.nodes, 100.0)
  (wide, wide_edges), wide_stats = train(padded, far, padded.edges, mask=structure.node_mask(padded))
  np.testing.assert_allclose(wide[:N], nodes, atol=1e-5)
  np.testing.assert_allclose(wide_edges[: len(e)], edges, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), wide_stats, stats)


def test_gradient_of_gated_gcn(problem):
  graph, x, e = problem
  layer = layers.GatedGCN(F, update_edges=False)
  variables = randomize(jax.jit(layer.init)(jax.random.key(0), graph, x, e))
  direction = np.random.default_rng(1).standard_normal(x.shape).astype("float32")
  f = lambda x, op: layer.apply(variables, op, x, e)[0].sum()
  slope = np.vdot(jax.jit(jax.grad(f))(x, sparse.operator(graph)), direction)
  full = dict(variables["params"], edge_norm=variables["params"]["norm"])
  stats = dict(variables["batch_stats"], edge_norm=variables["batch_stats"]["norm"])
  value = lambda x: oracle(full, stats, graph, x, np.float64(e))[0].sum()
  difference = (value(x + 1e-6 * np.float64(direction)) - value(x - 1e-6 * np.float64(direction))) / 2e-6
  np.testing.assert_allclose(slope, difference, rtol=1e-3)


@pytest.mark.parametrize("with_edges", [False, True])
def test_gine(problem, with_edges):
  graph, x, e = problem
  layer = layers.GINEConv(lambda h: 2 * h, eps=0.3)
  out = layer.apply({}, graph, x, e if with_edges else None)
  expected = 1.3 * np.float64(x)
  for sender, receiver, edge in zip(graph.senders, graph.receivers, e if with_edges else 0 * e, strict=True):
    expected[receiver] += np.maximum(x[sender] + edge, 0)
  np.testing.assert_allclose(out, 2 * expected, atol=1e-5)


def test_rows_at_senders(problem):
  graph, x, _ = problem
  weight = np.random.default_rng(2).standard_normal((graph.senders.size, F)).astype("float32")
  rows, back = jax.vjp(lambda x: layers.at_senders(sparse.operator(graph), x), x)
  np.testing.assert_array_equal(rows, x[graph.senders])
  expected = np.zeros_like(x)
  np.add.at(expected, graph.senders, weight)
  np.testing.assert_allclose(back(weight)[0], expected, atol=1e-5)


def arguments(seed, edges, width=19):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype("float32")
  return {"p": normal(N, width), "qm": normal(N, 2 * width), "e": normal(edges, width)}


@pytest.mark.skipif(not kernels.available(), reason="host kernels are for the CPU backend")
@pytest.mark.parametrize("has_e, gates", [(False, False), (True, True), (False, True)])
def test_forms_of_the_gated_mean_agree(problem, has_e, gates, monkeypatch):
  op = sparse.operator(problem[0])
  inputs = arguments(3, op.rows.shape[0])
  weight = np.random.default_rng(4).standard_normal((N + op.rows.shape[0], 19)).astype("float32")

  def objective(inputs, op):
    mean, gate = gated.gated_mean(op, inputs["p"], inputs["qm"], inputs["e"] if has_e else None, gates=gates)
    return (weight[:N] * mean).sum() + ((weight[N:] * gate).sum() if gates else 0)

  both = jax.jit(jax.value_and_grad(objective))(inputs, op)
  monkeypatch.setattr(gated.kernels, "available", lambda: False)
  expected = jax.jit(lambda *a: jax.value_and_grad(objective)(*a))(inputs, op)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4), both, expected)


@pytest.mark.parametrize("pattern_too", [False, True])
def test_gated_mean_of_a_batch(problem, pattern_too):
  graph = problem[0]
  order = np.random.default_rng(0).permutation(N)
  other = structure.from_edges(order[graph.senders], order[graph.receivers], num_nodes=N, nodes=graph.nodes)
  ops = [sparse.operator(graph), sparse.operator(other if pattern_too else graph)]
  many = [arguments(seed, len(graph.senders)) for seed in (0, 1)]
  stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

  def gradients(inputs, op):
    return jax.grad(lambda i: (gated.gated_mean(op, i["p"], i["qm"], i["e"])[0] ** 2).sum())(inputs)

  mapped = jax.jit(jax.vmap(gradients, (0, 0 if pattern_too else None)))
  together, alone = mapped(stack(many), stack(ops) if pattern_too else ops[0]), jax.jit(gradients)
  for i in range(2):
    expected = alone(many[i], ops[i])
    jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5), together, expected)


def test_bad_input_is_named(problem):
  op, i = sparse.operator(problem[0]), arguments(0, len(problem[0].senders))
  for name, change in (("receiver", {"p": i["p"][1:]}), ("sender", {"qm": i["p"]}), ("edges", {"e": i["e"][1:]})):
    with pytest.raises(ValueError, match=f"^{name}: got shape"):
      gated.gated_mean(op, *(i | change).values())
