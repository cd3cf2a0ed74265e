import functools
import os
import pathlib

import chex
import golden_rule
import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.data import planetoid
from jaxlab.graph import common_neighbors, evaluation, sparse, structure
from jaxlab.graph.links import topological_concentration as tc

NODES, H = 40, 8
KEYS = jax.random.split(jax.random.key(0), 64)
needs_cora = pytest.mark.skipif(
  not (os.environ.get("JAXLAB_DATA") and (pathlib.Path(os.environ["JAXLAB_DATA"]) / "planetoid").is_dir()),
  reason="JAXLAB_DATA names no folder with planetoid/",
)


def random_graph(n, probability, seed):
  edges = np.argwhere(np.triu(np.random.default_rng(seed).random((n, n)) < probability, 1)).T
  return common_neighbors.adjacency(edges, n)


def of_networkx(graph):
  return common_neighbors.adjacency(np.array(graph.edges()).reshape(-1, 2).T, graph.number_of_nodes())


def by_walks(graph, targets, depth, decay=None):
  """TC from dense powers, one pair of levels after the other."""
  a = graph.toarray().astype("float64")
  own, t = targets is None, a if targets is None else targets.toarray()
  beta = 1 / a.sum(1).mean() if decay is None else decay
  powers = [np.linalg.matrix_power(a, k) for k in range(1, depth + 1)]
  out = np.zeros(len(a))
  for i in range(len(a)):
    near = np.flatnonzero(t[i])
    if len(near) <= own or not a[i].any():
      continue
    ratios = []
    for j in near:
      inter = norm = 0.0
      for x, one in enumerate(powers):
        for y, other in enumerate(powers):
          inter += beta ** (x + y) * one[i][other[j] > 0].sum()
          norm += beta ** (x + y) * (one[i].sum() - (own and x == 0 and y == 0))
      ratios.append(inter / norm)
    out[i] = np.mean(ratios)
  return out


# ------------------------------------------------------------------------------------------------------ exact TC


def test_equals_the_official_loop():
  """`cal_tc` on graphs of 40, 90 and 200 nodes, for K = 1, 2, 3 and all three splits."""
  with np.load(golden_rule.GOLDEN / "topological_concentration.npz") as file:
    for g, n in enumerate((40, 90, 200)):
      part = {s: common_neighbors.adjacency(file[f"tc{g}.{s}"].astype("int64"), n) for s in ("train", "valid", "test")}
      for depth in (1, 2, 3):
        for name, targets in part.items():
          got = tc.concentration(part["train"], None if name == "train" else targets, depth=depth)
          expected = file[f"tc{g}.K{depth}.{name}"]
          assert expected.any() or depth == 1
          np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


@given(st.integers(2, 25), st.floats(0.02, 0.6), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_dense_enumeration(n, probability, depth, seed, own):
  graph, targets = random_graph(n, probability, seed), None if own else random_graph(n, 0.2, seed + 1)
  decay = None if seed % 2 else 0.7
  for block in (1, 2**20):  # nodes one after the other, and all at once
    got = tc.concentration(graph, targets, depth=depth, decay=decay, block=block)
    expected = np.zeros(n) if not graph.nnz else by_walks(graph, targets, depth, decay)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_one_level_is_the_clustering_coefficient(seed):
  graph = nx.powerlaw_cluster_graph(300, 4, 0.5, seed=seed)
  expected = nx.clustering(graph)
  np.testing.assert_array_equal(tc.concentration(of_networkx(graph)), [expected[i] for i in range(300)])


def test_complete_graphs_and_trees():
  assert (tc.concentration(of_networkx(nx.complete_graph(7))) == 1).all()
  assert not tc.concentration(of_networkx(nx.balanced_tree(3, 3))).any()
  assert tc.concentration(of_networkx(nx.balanced_tree(3, 3)), depth=2).any()  # grandparents are shared


@pytest.mark.parametrize("depth", [1, 2])
def test_relabelling_and_isolated_nodes(depth):
  graph, targets = random_graph(50, 0.1, 0), random_graph(50, 0.05, 1)
  order = np.random.default_rng(0).permutation(50)
  move = lambda a: scipy.sparse.csr_array(a[order][:, order])
  before = tc.concentration(graph, targets, depth=depth)
  np.testing.assert_allclose(tc.concentration(move(graph), move(targets), depth=depth), before[order], rtol=1e-12)
  larger, wider = (common_neighbors.adjacency(np.stack(a.nonzero()), 51) for a in (graph, targets))
  after = tc.concentration(larger, wider, depth=depth)
  assert after[-1] == 0
  if depth == 1:
    np.testing.assert_array_equal(after[:-1], before)
  else:  # nothing but beta changes
    assert np.abs(after[:-1] - before).max() > 1e-5
    np.testing.assert_allclose(
      after[:-1], tc.concentration(graph, targets, depth=depth, decay=51 / graph.nnz), rtol=1e-12
    )


def test_multiplicity_counts_in_one_tree_only():
  """On a path 0-1-2 with a triangle hung on 2, the overlap seen from one end is not that from the other."""
  graph = common_neighbors.adjacency(np.array([[0, 1, 2, 2, 3], [1, 2, 3, 4, 4]]), 5)
  link = lambda a, b: scipy.sparse.csr_array(([1.0], ([a], [b])), (5, 5))
  one, other = (tc.concentration(graph, link(*ends), depth=2, decay=1.0) for ends in ((0, 2), (2, 0)))
  w0, w2 = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 3, 2, 2])  # walks of one and two steps from either end
  s0, s2 = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 1, 2, 2])  # and the levels that reach a node
  assert one[0] == pytest.approx(w0 @ s2 / (w0.sum() * 2))
  assert other[2] == pytest.approx(w2 @ s0 / (w2.sum() * 2))


def test_shift_compares_nodes_that_have_both():
  """Two triangles; the test edges join them, so they share nobody."""
  graph = common_neighbors.adjacency(np.array([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3]]), 7)
  found = tc.shift(graph, common_neighbors.adjacency(np.array([[0, 1, 2], [3, 4, 6]]), 7))
  assert found == tc.Shift(1.0, 0.0, -1.0, 0.0, 5)
  random = random_graph(400, 0.02, 0).tocoo()
  upper = np.stack([random.row, random.col])[:, random.row < random.col]
  parts = evaluation.edge_split(upper, 0, validation=0.1, test=0.2)
  found = tc.shift(*(common_neighbors.adjacency(e, 400) for e in (parts.train, parts.test)))
  assert abs(found.difference) < 3 * found.standard_error


# ----------------------------------------------------------------------------------------------------------- ATC

embed = jax.jit(tc.embed, static_argnames=("width", "depth"))
approximate = jax.jit(tc.approximate, static_argnames=("width", "depth", "similarity"))


def expectation(graph, depth, decay):
  """Z Z' in float64."""
  a = graph.toarray().astype("float64")
  walk = a / np.maximum(a.sum(1, keepdims=True), 1)
  z = sum(decay ** (k - 1) * np.linalg.matrix_power(walk, k) for k in range(1, depth + 1))
  return z @ z.T


@pytest.mark.parametrize("depth", [1, 2])
def test_similarities_converge_to_their_expectation(depth):
  """With an error that halves when the width is four times as large, and without bias."""
  graph = random_graph(NODES, 0.12, 0)
  operator, exact = sparse.from_scipy(graph), expectation(graph, depth, NODES / graph.nnz)

  def errors(width):
    h = jax.vmap(lambda key: embed(operator, key, width=width, depth=depth))(KEYS)
    return np.asarray(jnp.einsum("bnd,bmd->bnm", h, h)) - exact

  small, large = errors(64), errors(256)
  assert np.sqrt((small**2).mean()) / np.sqrt((large**2).mean()) == pytest.approx(2, abs=0.1)
  assert np.abs(large.mean(0)).max() < 5 * large.std(0).max() / 8
  h = np.asarray(embed(operator, KEYS[0], width=4096, depth=depth))
  assert np.abs(h @ h.T - exact).max() < 0.05


def test_one_level_expects_common_neighbours_over_degrees():
  graph = random_graph(NODES, 0.12, 0)
  degree = np.maximum(np.diff(graph.indptr), 1)
  np.testing.assert_allclose(
    expectation(graph, 1, 0.3), (graph @ graph).toarray() / np.outer(degree, degree), rtol=1e-12
  )


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_approximate_is_the_mean_over_targets(similarity):
  graph, targets = random_graph(NODES, 0.1, 0), random_graph(NODES, 0.05, 1)
  operator, key = sparse.from_scipy(graph), KEYS[0]
  got = approximate(operator, key, sparse.from_scipy(targets), depth=2, similarity=similarity)
  h = np.asarray(embed(operator, key, depth=2))
  if similarity == "cosine":
    h = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
  near = targets.toarray() > 0
  expected = [np.mean(h[near[i]] @ h[i]) if near[i].any() else 0 for i in range(NODES)]
  np.testing.assert_allclose(got, expected, atol=1e-5)
  own = approximate(operator, key, depth=2, similarity=similarity)
  np.testing.assert_allclose(own, approximate(operator, key, operator, depth=2, similarity=similarity))


@pytest.fixture(scope="module")
def cora():
  data = planetoid.load("cora")
  split = evaluation.planetoid_link_split(np.stack([data.senders, data.receivers]), data.num_nodes, 0)
  return common_neighbors.adjacency(split.train, data.num_nodes)


@needs_cora
def test_approximate_on_cora(cora):
  """Correlations with the expectation and with TC, over nodes with two train edges or more."""
  walk = scipy.sparse.diags_array(1 / np.maximum(np.diff(cora.indptr), 1)) @ cora
  share = walk @ walk.T
  exact = np.asarray(walk.multiply(share).sum(axis=1)).ravel()  # mean over neighbours of Z Z'
  some = np.diff(cora.indptr) > 1
  operator, concentration = sparse.from_scipy(cora), tc.concentration(cora)
  for width, expected in ((256, 0.940), (1024, 0.982), (4096, 0.996)):
    got = np.asarray(approximate(operator, KEYS[1], width=width))
    assert np.corrcoef(got[some], exact[some])[0, 1] == pytest.approx(expected, abs=0.02)
  several = [np.asarray(approximate(operator, key, width=256))[some] for key in KEYS[:6]]
  spearman = lambda with_: np.mean([scipy.stats.spearmanr(got, with_[some])[0] for got in several])
  assert spearman(exact) == pytest.approx(0.83, abs=0.02)
  assert spearman(concentration) > 0.7


@needs_cora
@pytest.mark.parametrize(("name", "mean"), [("cora", 0.2932), ("citeseer", 0.2416)])
def test_mean_concentration_of_the_full_graphs(name, mean):
  graph = planetoid.load(name).adjacency
  assert tc.concentration(graph)[np.diff(graph.indptr) > 1].mean() == pytest.approx(mean, abs=1e-4)


# --------------------------------------------------------------------------------------------------------- golden

MODELS = {
  "gcn": {"conv": "gcn"},
  "gcn3": {"conv": "gcn", "num_layers": 3},
  "sage": {"conv": "sage"},
  "sagenorm": {"conv": "sage", "normalize": True},
}


def test_golden():
  """Encoders, MLP, re-weighting, weighted TC and node-level metrics of the official code."""

  def convert(state):
    part = lambda name: {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
    return {
      name: tc.from_torch(tc.LinkPredictor(H, **fields), part(name), part("head3" if name == "gcn3" else "head"))
      for name, fields in MODELS.items()
    }

  def apply(made, inputs):
    out, parts = {}, {name: common_neighbors.adjacency(inputs[name], NODES) for name in ("train", "validation", "test")}
    plain = structure.from_scipy(parts["train"], nodes=inputs["x"])
    for name, fields in MODELS.items():
      graph = structure.normalize(plain, "symmetric" if fields["conv"] == "gcn" else "row")
      model = tc.LinkPredictor(H, **fields)
      out[f"h_{name}"] = jax.jit(functools.partial(model.apply, method="encode"))(made[name], graph)
      out[f"logits_{name}"] = jax.jit(model.apply)(made[name], graph, inputs["pairs"])
      base = sparse.operator(graph)
      for context in ("gcn", "sage") if name in ("gcn", "sage") else ():
        weights = tc.reweight(model, made[name], graph, base, alpha=2.0, context=context)
        out[f"weights_{name}_{context}"] = dense(base, weights)
        if (name, context) == ("gcn", "gcn"):
          for ours, theirs in (("train", "train"), ("validation", "valid"), ("test", "test")):
            overlap = tc.edge_overlap(base, parts["train"], parts[ours])
            out[f"tcw_{theirs}"] = tc.weighted_concentration(base, weights, overlap)
    metrics = tc.node_metrics(inputs["scores"], inputs["truth"], inputs["known"], ks=(1, 3, 5, 10))
    fields = ("recall", "ndcg", "hits", "precision", "f1")
    return out | {name: getattr(metrics, name) for name in fields} | {"rr": metrics.reciprocal_rank}

  golden_rule.check("topological_concentration", convert, apply, atol=1e-5)


def dense(operator, weights):
  out = np.zeros(operator.shape, "float32")
  out[np.asarray(operator.rows), np.asarray(operator.columns)] = np.asarray(weights)
  return out


@pytest.mark.parametrize(
  ("model", "features", "encoder", "head"),
  [
    (tc.cora(), 1433, 432_896, 66_049),
    (tc.citeseer(), 3703, 1_014_016, 66_049),
    (tc.pubmed(), 500, 194_048, 66_049),
    (tc.collab(), 128, 164_608, 131_841),
    (tc.cora("sage"), 1433, 865_280, 66_049),
    (tc.citeseer("sage"), 3703, 2_027_520, 66_049),
    (tc.pubmed("sage"), 500, 387_584, 66_049),
    (tc.collab("sage"), 128, 328_448, 131_841),
  ],
)
def test_parameter_counts(model, features, encoder, head):
  graph = structure.normalize(structure.from_edges([0], [1], num_nodes=2, nodes=np.zeros((2, features), "float32")))
  params = jax.eval_shape(model.init, jax.random.key(0), graph, np.zeros((2, 1), "int32"))["params"]
  assert {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()} == {
    "encoder": encoder, "head": head,
  }  # fmt: skip


def test_tables_are_for_nodes_without_features():
  graph = structure.normalize(
    structure.from_edges([0], [1], num_nodes=7, nodes=np.arange(7, dtype="int32"), undirected=True)
  )
  params = jax.eval_shape(tc.vole(7, "sage").init, jax.random.key(0), graph, np.zeros((2, 1), "int32"))["params"]
  assert params["embedding"]["embedding"].shape == (7, 256)


# --------------------------------------------------------------------------------------------------- re-weighting


@pytest.fixture(scope="module")
def net():
  """A model on a graph of 20 nodes, one of them isolated, with a split of its edges."""
  graph = of_networkx(nx.powerlaw_cluster_graph(19, 3, 0.8, seed=1)).tocoo()
  edges = np.stack([graph.row, graph.col])
  split = evaluation.planetoid_link_split(edges, 20, 0)
  features = np.random.default_rng(0).standard_normal((20, 4)).astype("float32")
  task = tc.task(features, 20, split, "sage")
  model = tc.LinkPredictor(H, "sage")
  variables = jax.jit(model.init)(jax.random.key(0), task.graph, split.train)
  return model, variables, task


reweight = jax.jit(tc.reweight, static_argnums=0, static_argnames=("context", "receiver"))


@pytest.mark.parametrize("receiver", ["neighbour", "centre"])
def test_added_mass_is_alpha_times_the_centres_base_mass(net, receiver):
  """Per centre: over what it sends for the one, over what it receives for the other; and a softmax of the scores."""
  model, variables, task = net
  base = np.asarray(dense(task.operator, task.operator.values), "float64")
  got = reweight(model, variables, task.graph, task.operator, alpha=1.5, receiver=receiver)
  added = dense(task.operator, got) - base
  by_center = added.T if receiver == "neighbour" else added
  mass = base.sum(0) if receiver == "neighbour" else base.sum(1)
  np.testing.assert_allclose(by_center.sum(1), 1.5 * mass, rtol=1e-5)
  h = np.asarray(model.apply(variables, task.graph, method="encode"))
  degree = (base > 0).sum(1)
  center = (base > 0) / np.sqrt(np.outer(degree, degree)) @ h
  products = jnp.asarray(center[:, None] * h[None], "float32").reshape(400, H)
  scores = model.apply(variables, products, method="score").reshape(20, 20)
  for i in range(20):
    near = np.flatnonzero(base[i])
    score = np.asarray(scores[i, near])
    share = np.exp(1 / (1 + np.exp(-score)))
    np.testing.assert_allclose(by_center[i, near], 1.5 * mass[i] * share / share.sum(), atol=1e-5)


def test_alpha_of_zero_changes_no_bit(net):
  model, variables, task = net
  for receiver in ("neighbour", "centre"):
    weights = reweight(model, variables, task.graph, task.operator, alpha=0.0, receiver=receiver)
    np.testing.assert_array_equal(weights, task.operator.values)
  encode = jax.jit(functools.partial(model.apply, method="encode"))
  np.testing.assert_array_equal(
    encode(variables, task.graph, task.operator), encode(variables, task.graph, task.operator.replace_values(weights))
  )


def test_weights_start_from_the_base_every_time(net):
  model, variables, task = net
  again = functools.partial(reweight, model, variables, task.graph, task.operator, alpha=1.0)
  once, twice = again(), again(weights=again())
  np.testing.assert_allclose(once.sum(), twice.sum(), rtol=1e-5)  # accumulated, it would be half as much again
  assert np.abs(once - twice).max() > 1e-6  # but scores do follow the weights in force


def test_weighted_concentration_rises_with_weight_on_shared_neighbours():
  graph = of_networkx(nx.lollipop_graph(4, 2))
  operator = sparse.operator(structure.normalize(structure.from_scipy(graph)))
  overlap = tc.edge_overlap(operator, graph)
  watch = lambda weights: np.asarray(tc.weighted_concentration(operator, weights, overlap, receiver="centre"))
  ones = jnp.ones_like(operator.values)
  clustering = nx.clustering(nx.lollipop_graph(4, 2))
  degree = np.diff(graph.indptr)
  np.testing.assert_allclose(watch(ones), [clustering[i] * (degree[i] - 1) / degree[i] for i in range(6)], atol=1e-6)
  assert watch(jnp.where(overlap > 0, 5.0, 1.0))[3] > watch(ones)[3]  # the node between the clique and the tail


# -------------------------------------------------------------------------------------------------------- training


def started(net, **changes):
  model, _, task = net
  batches = tc.Batches(task, batch_size=8, seed=0)
  made = tc.learner(model, **{"steps_per_epoch": batches.steps, "k": 3} | changes)
  return batches, made, jax.jit(made.step), jax.jit(made.init)(jax.random.key(0), batches(0))


@pytest.mark.parametrize("reweighting", [None, tc.Reweighting(1.0, interval=2, warm_up=3)])
def test_messages_change_after_the_epochs_that_are_due(net, reweighting):
  batches, _, step, state = started(net, reweighting=reweighting)
  base, changed, before = net[2].operator.values, [], state.weights
  for i in range(8 * batches.steps):
    state, metrics = step(state, batches(i))
    if np.abs(state.weights - before).max() > 0:
      changed.append((i + 1) / batches.steps)
    before = state.weights
  assert changed == ([] if reweighting is None else [4, 6, 8])  # epochs count from 1
  assert np.isfinite(metrics["loss"])
  if reweighting is None:
    np.testing.assert_array_equal(state.weights, base)


def test_learns_and_keeps_the_best_epoch(net):
  model, _, task = net
  batches, made, step, state = started(net, encoder_rate=0.01, head_rate=0.01)
  losses, scores = [], []
  for i in range(60 * batches.steps):
    state, metrics = step(state, batches(i))
    losses.append(float(metrics["loss"]))
    scores.append(float(metrics["validation"]))
  assert np.mean(losses[-20:]) < 0.8 * losses[0]
  by_epoch = scores[batches.steps - 1 :: batches.steps]
  assert float(state.best.hits) == max(by_epoch)
  assert int(state.best.epoch) == 1 + int(np.argmax(by_epoch))
  split = task.split
  on = {
    "graph": task.graph, "operator": task.operator,
    "pairs": {"validation": (split.validation, split.validation_negative), "test": (split.test, split.test_negative)},
  }  # fmt: skip
  got = made.evaluate(state, on)
  assert float(got["validation"]) == max(by_epoch)
  logits = lambda pairs: model.apply(state.best.variables, task.graph, pairs)
  assert float(got["test"]) == pytest.approx(
    np.mean(np.asarray(logits(split.test)) > np.sort(logits(split.test_negative))[-3])
  )


def test_loss_and_clipped_step(net):
  """One step against the loss written out, and each part's gradient scaled to norm 1e-3 by itself before Adam."""
  model, _, task = net
  batches, _, step, state = started(net, clip=1e-3)
  batch = batches(0)

  def loss(params, graph):
    logit = lambda pairs: model.apply({"params": params}, graph, pairs)
    positive = jnp.log1p(jnp.exp(-logit(batch.positive))).mean()
    return (positive + jnp.log1p(jnp.exp(logit(batch.negative))).mean()) / 2

  value, grads = jax.jit(jax.value_and_grad(loss))(state.trained.params, task.graph)
  after, metrics = step(state, batch)
  assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
  for name in ("encoder", "head"):
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads[name])))
    first = lambda g, norm=norm: -1e-3 * (g * 1e-3 / norm) / (jnp.abs(g * 1e-3 / norm) + 1e-8)
    moved = jax.tree.map(lambda a, b: a - b, after.trained.params[name], state.trained.params[name])
    chex.assert_trees_all_close(moved, jax.tree.map(first, grads[name]), atol=2e-6)


def test_batches_are_reproducible_and_avoid_train_edges(net):
  task = net[2]
  batches, again = tc.Batches(task, batch_size=8, seed=3), tc.Batches(task, batch_size=8, seed=3)
  later = batches(2 * batches.steps + 1)
  chex.assert_trees_all_equal(later, again(2 * batches.steps + 1))
  epoch = [batches(i) for i in range(batches.steps)]
  seen = np.concatenate([b.positive for b in epoch], axis=1)
  assert len(np.unique(seen, axis=1).T) == 8 * batches.steps  # no edge twice
  for batch in epoch:
    assert not np.asarray(task.adjacency[batch.negative[0], batch.negative[1]]).any()
  with pytest.raises(ValueError, match="^batch_size: got"):
    tc.Batches(task, batch_size=10**4, seed=0)


# --------------------------------------------------------------------------------------------------------- ranking


def test_node_metrics_of_a_ranking_by_hand():
  scores = np.array([[0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.5, 0.5], [4, 3, 2, 1]], "float32")
  truth = np.array([[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
  known = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], bool)
  got = tc.node_metrics(scores, truth, known, ks=(1, 2, 3))
  np.testing.assert_allclose(got.recall, [[0.5, 0.5, 1], [0, 0, 1], [0, 0, 0]])
  np.testing.assert_allclose(got.precision, [[1, 0.5, 2 / 3], [0, 0, 1 / 3], [0, 0, 0]], rtol=1e-6)
  np.testing.assert_allclose(got.f1[0], [2 / 3, 0.5, 0.8], rtol=1e-6)
  second = 1 / np.log2(3)
  np.testing.assert_allclose(got.ndcg[0], [1, 1 / (1 + second), 1.5 / (1 + second)], rtol=1e-6)
  np.testing.assert_allclose(got.ndcg[1], [0, 0, 0.5], rtol=1e-6)
  np.testing.assert_allclose(got.hits, [[1, 1, 1], [0, 0, 1], [0, 0, 0]])
  np.testing.assert_allclose(got.reciprocal_rank, [1, 1 / 3, 0], rtol=1e-6)


def test_rank_nodes_ranks_every_test_node(net):
  model, variables, task = net
  nodes, got = tc.rank_nodes(model, variables, task, ks=(2, 5), block=3)
  split = task.split
  near = lambda edges: common_neighbors.adjacency(edges, 20).toarray() > 0
  truth, known = near(split.test), near(np.concatenate([split.train, split.validation], axis=1))
  np.testing.assert_array_equal(nodes, np.flatnonzero(truth.any(1)))
  for row, i in enumerate(nodes):
    pairs = np.stack([np.full(20, i), np.arange(20)])
    scores = np.where(known[i], -np.inf, np.asarray(model.apply(variables, task.graph, pairs)))
    order = np.argsort(-scores, kind="stable")
    for c, k in enumerate((2, 5)):
      assert got.recall[row, c] == pytest.approx(truth[i][order[:k]].sum() / truth[i].sum())
    assert got.reciprocal_rank[row] == pytest.approx(1 / (1 + np.flatnonzero(truth[i][order])[0]))
