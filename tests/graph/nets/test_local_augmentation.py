"""LAGNN: official outputs, exact sizes, and what the generator, its selection and the consistency loss must satisfy."""

import functools
import itertools

import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
import scipy.special

from jaxlab import train
from jaxlab.graph import node_classification, sparse, structure
from jaxlab.graph.nets import local_augmentation as la
from jaxlab.graph.nets.local_augmentation import cvae as cvae_module
from jaxlab.graph.nets.local_augmentation import networks, selector

KEY = jax.random.key(0)


def small_graph(nodes=12, features=6, seed=0):
  """A random graph with two real-valued feature matrices."""
  rng = np.random.default_rng(seed)
  s, r = np.nonzero(np.triu(rng.random((nodes, nodes)) < 0.3, 1))
  x = rng.random((2, nodes, features)).astype("float32")
  return structure.normalize(structure.from_edges(s, r, num_nodes=nodes, nodes=x[1], undirected=True)), x[:1]


# ---------------------------------------------------------------------------------------------------------- parity


def _golden(variables, given):
  graph = structure.from_edges(given["senders"], given["receivers"], num_nodes=9, nodes=given["real"])
  normalized = structure.normalize(graph)
  operators = sparse.operator(graph), sparse.operator(normalized), sparse.from_scipy(given["condition"])
  return _golden_outputs(variables, given, normalized, *operators)


@jax.jit
def _golden_outputs(variables, given, graph, plain, operator, sparse_condition):
  generated = given["generated"][None]
  z, x = given["z"], given["x"]
  out = {}
  for name, continuous in (("cvae", False), ("cvae_ogb", True)):
    net = la.CVAE(7, 4, continuous=continuous)
    weights = variables[name]
    condition = given["condition"] if continuous else sparse_condition
    posterior = net.apply(weights, x, condition, z)
    out[f"{name}_mean"], out[f"{name}_log_variance"] = posterior.mean, posterior.log_variance
    out[f"{name}_decoded"] = net.apply(weights, z, condition, method=la.CVAE.decode)
    out[f"{name}_loss"] = la.negative_elbo(posterior, x, continuous=continuous)
    if continuous:
      decode = functools.partial(net.apply, method=la.CVAE.decode, mutable=["batch_stats"])
      out["cvae_ogb_decoded_by_batch"] = decode(weights, z, condition, train=True)[0]
    else:
      out["generated"] = la.row_normalize(out["cvae_decoded"])
  out["rownorm_raw"] = la.row_normalize(given["condition"])
  networks = {
    "gcn": (la.LAGCN(3, 5), operator),
    "gcnii": (la.LAGCNII(3, 4, depth=6), operator),
    "gat": (la.LAGAT(3, 3, heads=2), operator),
    "sage": (la.LAOGB(3, 5, convolution="sage"), plain),
    "ogb_gcn": (la.LAOGB(3, 5), operator),
  }
  for name, (net, op) in networks.items():
    out[name] = net.apply(variables[name], graph, generated, op)
  out["grand"] = la.GRANDMLP(3, 5, batch_norm=True).apply(variables["grand"], graph, given["real"])
  out["consistency"] = la.consistency_loss(jnp.stack([given[f"view{i}"] for i in range(4)]))
  out["propagation"] = la.random_propagation(operator, given["real"], 3, 0.3)
  return out


def test_golden():
  """CVAE of both forms, every network, the losses, and GRAND's propagation, as the official code computes them."""

  def convert(state):
    parts = {}
    for name, value in state.items():
      model, rest = name.split(".", 1)
      parts.setdefault(model, {})[rest] = value
    return {model: la.from_torch(part) for model, part in parts.items()}

  golden_rule.check("local_augmentation", convert, _golden, atol=1e-6, rtol=1e-5)


def test_weights_of_the_official_pickles_have_these_shapes():
  """Sizes of the shipped generators of PubMed (latent size 5) and ogbn-arxiv."""
  assert _count(la.CVAE(500, 5)) == 516_862
  assert _count(la.CVAE(128, continuous=True)) == 140_692


# --------------------------------------------------------------------------------------------------- exact parameters


def _count(net, *shapes):
  if isinstance(net, la.CVAE):
    args = [jnp.zeros((1, net.features))] * 2 + [jnp.zeros((1, net.latent))]
  else:
    nodes, features, concat = shapes
    graph, _ = small_graph(nodes, features)
    args = [graph] if isinstance(net, node_classification.GCN) else [graph, jnp.zeros((concat, nodes, features))]
  made = jax.eval_shape(net.init, KEY, *args)["params"]
  return sum(leaf.size for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize(
  ("features", "classes", "concat", "hidden", "generator", "network"),
  [(1433, 7, 1, 8, 1_477_037, 23_063), (3703, 6, 1, 8, 3_803_787, 59_366), (500, 3, 3, 4, 520_712, 8_067)],
  ids=["cora", "citeseer", "pubmed"],
)
def test_parameters_of_the_generator_and_of_la_gcn(features, classes, concat, hidden, generator, network):
  """LA-GCN has exactly the parameters of the GCN with 16 hidden units, which is LA-GCN without generated features."""
  assert _count(la.CVAE(features)) == generator
  assert _count(la.LAGCN(classes, hidden), 5, features, concat) == network
  assert _count(la.LAGCN(classes, 16), 5, features, 0) == network
  assert _count(node_classification.GCN(classes, 16), 5, features, 0) == network


def test_parameters_of_the_other_networks():
  """As sums over their layers, and as counted in the official classes."""
  first = 2 * (1433 * 32 + 32)
  assert _count(la.LAGCNII(7), 5, 1433, 1) == first + 64 * 64**2 + 64 * 7 + 7
  head = 1433 * 32 + 2 * 32 + 32
  assert _count(la.LAGAT(7), 5, 1433, 1) == 2 * head + 64 * 7 + 2 * 7 + 7
  arxiv = 2 * (128 * 128 + 3 * 128) + 256 * 256 + 3 * 256 + 256 * 40 + 40
  assert _count(la.LAOGB(40), 5, 128, 1) == arxiv
  assert _count(la.LAOGB(40, convolution="sage"), 5, 128, 1) == arxiv + 2 * 128 * 128 + 256 * 256 + 256 * 40
  products = 100 * 256 + 256 * 256 + 256 * 47 + 256 + 256 + 47
  assert _count(la.LAOGB(47, 256, batch_norm=False, average=True), 5, 100, 1) == products
  graph, _ = small_graph(5, 1433)
  made = jax.eval_shape(la.GRANDMLP(7, batch_norm=True).init, KEY, graph, graph.nodes)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(made)) == 2 * 1433 + 1433 * 32 + 32 + 2 * 32 + 32 * 7 + 7


# ------------------------------------------------------------------------------------------------------ the generator


def _elbo(params, x, c, noise):
  """The loss in NumPy, float64."""
  relu = lambda a: np.maximum(a, 0)
  dense = lambda name, a: a @ params[name]["kernel"] + params[name]["bias"]
  h = relu(dense("encoder", np.concatenate([x, c], 1)))
  mean, log_variance = dense("mean", h), dense("log_variance", h)
  z = mean + np.exp(log_variance / 2) * noise
  p = scipy.special.expit(dense("output", relu(dense("decoder", np.concatenate([z, c], 1)))))
  bce = -(x * np.log(p) + (1 - x) * np.log(1 - p)).sum()
  kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum()
  return (bce + kl) / len(x)


def test_loss_and_its_gradient_equal_numpy_and_finite_differences():
  rng = np.random.default_rng(0)
  x, c = (rng.random((2, 5, 6)) < 0.4).astype("float32")
  noise = rng.standard_normal((5, 3)).astype("float32")
  net = la.CVAE(6, 3, 8)
  params = jax.jit(net.init)(KEY, x, c, noise)["params"]
  value, gradient = jax.jit(
    jax.value_and_grad(lambda params: la.negative_elbo(net.apply({"params": params}, x, c, noise), x))
  )(params)
  wide = jax.tree.map(lambda a: np.asarray(a, "float64"), params)
  np.testing.assert_allclose(value, _elbo(wide, x, c, noise), rtol=1e-5)
  leaves, tree = jax.tree.flatten(wide)

  def at(t, direction):
    return _elbo(tree.unflatten([a + t * d for a, d in zip(leaves, direction, strict=True)]), x, c, noise)

  for seed in range(4):  # along random directions
    rng = np.random.default_rng(seed)
    direction = [rng.standard_normal(leaf.shape) for leaf in leaves]
    slope = (at(1e-6, direction) - at(-1e-6, direction)) / 2e-6
    ours = sum((np.asarray(g) * d).sum() for g, d in zip(jax.tree.leaves(gradient), direction, strict=True))
    np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-4)


def test_kl_is_zero_at_the_prior_and_sums_are_divided_by_the_batch():
  logits, x = jnp.zeros((4, 6)), jnp.ones((4, 6))
  prior = cvae_module.Posterior(logits, jnp.zeros((4, 3)), jnp.zeros((4, 3)))
  np.testing.assert_allclose(la.negative_elbo(prior, x), 6 * np.log(2), rtol=1e-6)  # BCE alone, of 6 entries
  np.testing.assert_allclose(la.negative_elbo(prior, x, continuous=True), 6.0, rtol=1e-6)
  shifted = prior._replace(mean=prior.mean.at[0, 0].set(2.0))
  np.testing.assert_allclose(la.negative_elbo(shifted, x), 6 * np.log(2) + 0.5 * 2.0**2 / 4, rtol=1e-6)
  twice = jax.tree.map(lambda a: jnp.tile(a, (2, 1)), shifted)
  np.testing.assert_allclose(la.negative_elbo(twice, jnp.ones((8, 6))), la.negative_elbo(shifted, x), rtol=1e-6)
  half = jnp.arange(8) < 4
  damaged = twice._replace(mean=twice.mean.at[4:].set(9.0))
  np.testing.assert_allclose(
    la.negative_elbo(damaged, jnp.ones((8, 6)), mask=half), la.negative_elbo(shifted, x), rtol=1e-6
  )


def test_generated_features_are_positive_rows_that_sum_to_one():
  rng = np.random.default_rng(0)
  x = (rng.random((20, 9)) < 0.3).astype("float32")
  net = la.CVAE(9, 3, 8)
  made = la.Generator(jax.jit(net.init)(KEY, x, x, np.zeros((20, 3))), x)
  decoded = net.apply(made.variables, rng.standard_normal((20, 3)), x, method=la.CVAE.decode)
  assert decoded.min() > 0 and decoded.max() < 1
  generate = jax.jit(functools.partial(la.generate, net))
  generated = generate(made, KEY)
  np.testing.assert_allclose(generated.sum(1), 1, rtol=1e-5)
  assert np.abs(generated - generate(made, jax.random.key(1))).max() > 1e-3  # z is fresh
  rows = la.row_normalize(jnp.asarray([[1.0, 3.0], [0.0, 0.0]]))
  np.testing.assert_array_equal(rows, [[0.25, 0.75], [0, 0]])
  sparse_rows = la.generate(net, made._replace(condition=sparse.from_scipy(x)), KEY)
  np.testing.assert_allclose(sparse_rows, generated, rtol=1e-5)


def test_no_gradient_flows_into_the_generator():
  net = la.CVAE(4, 2, 3)
  x = jnp.eye(4)
  made = la.Generator(net.init(KEY, x, x, jnp.zeros((4, 2))), x)
  loss = lambda v: jnp.sum(la.generate(net, made._replace(variables=v), KEY) ** 2)
  gradient = jax.jit(jax.grad(loss))(made.variables)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.fixture(scope="module")
def couples():
  """2000 nodes in couples: the second's features are the first's with halves swapped, but for 2 % flipped."""
  rng = np.random.default_rng(0)
  first = rng.random((1000, 12)) < 0.5
  flipped = rng.random((1000, 12)) < 0.02
  x = np.stack([first, np.roll(first, 6, axis=1) ^ flipped], 1).reshape(2000, 12).astype("float32")
  a, b = np.arange(0, 2000, 2), np.arange(1, 2000, 2)
  return la.pairs(x, np.concatenate([a, b]), np.concatenate([b, a]), np.zeros(2000, "int32"), np.arange(2000) < 4)


def test_the_decoder_learns_the_neighbour_given_the_centre(couples):
  """On centres never seen it gives the swapped halves, far below the entropy log 2 of a bit without condition."""
  net = la.CVAE(12, 2, 64)
  learner = la.selection(net, 1, passes=0, steps_per_call=400)
  state, _ = jax.jit(learner.step)(jax.jit(learner.init)(KEY, couples), couples)
  assert int(state.best_step) == 400
  centre = np.random.default_rng(1).random((500, 12)) < 0.5
  z = np.random.default_rng(2).standard_normal((500, 2))
  decode = jax.jit(functools.partial(net.apply, method=la.CVAE.decode))
  p = np.clip(decode(state.best, z, centre.astype("float32")), 1e-7, 1 - 1e-7)
  truth = np.roll(centre, 6, axis=1)
  bce = -np.mean(np.where(truth, np.log(p), np.log(1 - p)))
  assert bce < 0.25 * np.log(2)
  other = decode(state.best, z, np.roll(centre, 1, axis=0).astype("float32"))
  assert np.abs(p - other).mean() > 0.3  # the condition decides, not z


# ---------------------------------------------------------------------------------------------------------- selection


def test_uncertainty_is_never_positive_and_zero_where_all_passes_agree():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 9)
  score = jax.jit(la.uncertainty)
  for scale in (1e-3, 1.0, 20.0):
    logits = (scale * rng.standard_normal((6, 9, 4))).astype("float32")
    p = scipy.special.softmax(logits.astype("float64"), -1)[:, np.arange(9), labels]
    expected = np.mean(-np.log(p.mean(0))) - np.mean(-np.log(p))
    assert expected < 0
    np.testing.assert_allclose(score(logits, labels), expected, rtol=1e-4, atol=1e-6)
  agreed = np.tile(logits[:1], (6, 1, 1))
  np.testing.assert_allclose(score(agreed, labels), 0, atol=1e-5)
  one_differs = agreed.copy()
  one_differs[0, 0, labels[0]] += 1.0
  assert score(one_differs, labels) < -1e-4


@pytest.fixture(scope="module")
def words():
  """A small citation graph with bags of words, as arrays and as `Pairs`."""
  rng = np.random.default_rng(0)
  nodes, features = 40, 10
  s, r = np.nonzero(np.triu(rng.random((nodes, nodes)) < 0.06, 1))
  s, r = np.concatenate([s, r]), np.concatenate([r, s])
  labels = rng.integers(0, 3, nodes)
  x = ((rng.random((nodes, features)) < 0.2) | (np.arange(features) % 3 == labels[:, None])).astype("float32")
  x[5] = 0
  train = np.arange(nodes) < 6
  return (x, s, r, labels, train), la.pairs(scipy.sparse.csr_array(x), s, r, labels, train)


def test_the_scout_sees_all_that_decides_its_output_at_labelled_nodes(words):
  """Without dropout it is the GCN of the whole graph, at those nodes; and passes that agree score 0."""
  (x, s, r, labels, train), pairs = words
  assert len(pairs.nodes) < len(labels)  # the graph is not all within two hops
  scout = la.Scout(3, 4, dropout=0.0)
  params = scout.init(KEY, pairs.first, pairs.second, pairs.normalized)["params"]
  logits = scout.apply({"params": params}, pairs.first, pairs.second, pairs.normalized)
  a = np.eye(len(labels))
  a[r, s] = 1
  a /= np.sqrt(np.outer(a.sum(0), a.sum(0)))
  total = x.sum(1, keepdims=True)
  normal = np.divide(x, total, out=np.zeros_like(x), where=total > 0)
  layer = lambda name, h: a @ (h @ params[name]["linear"]["kernel"]) + params[name]["bias"]
  np.testing.assert_allclose(logits, layer("second", np.maximum(layer("first", normal), 0))[train], atol=1e-5)
  assert abs(la.uncertainty(jnp.stack([logits] * 3), pairs.labels)) < 1e-6


@pytest.fixture(scope="module")
def selected(words):
  """48 steps of the selection, 8 of them warm-up: the first state, and what follows each call of 4 steps."""
  learner = la.selection(la.CVAE(10, 2, 8), 3, passes=5, warmup=8, batch_size=16, scout_epochs=30, steps_per_call=4)
  step = jax.jit(learner.step)
  initial = jax.jit(learner.init)(KEY, words[1])
  state, history = initial, []
  for _ in range(12):
    state, metrics = step(state, words[1])
    seen = state.best_step, state.score, metrics["score"], metrics["loss"], state.best, state.scout
    history.append(jax.device_get(seen))
  return initial, history


def test_generators_are_kept_after_the_warm_up_and_the_scout_is_tuned_on_them(selected):
  initial, history = selected
  best_step, score, value, loss, best, scout = zip(*history, strict=True)
  np.testing.assert_array_equal(score, np.maximum.accumulate(value))  # in warm-up too
  assert max(score) <= 0 and score[1] > -np.inf
  assert not any(best_step[:2])  # nothing is kept in the first 8 steps
  equal = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
  assert equal(best[1], initial.best) and not equal(scout[0], initial.scout)  # trained on the real features first
  kept = 0
  for before, after in itertools.pairwise(range(12)):
    rose = score[after] > score[before] and after >= 2
    assert (best_step[after] > best_step[before]) == rose
    assert equal(best[after], best[before]) == equal(scout[after], scout[before]) == (not rose)
    kept += rose
  assert kept > 0
  assert loss[-1] < loss[0]


def test_a_pass_over_the_edges_sees_each_once(monkeypatch):
  """The rows that reach the loss, recorded: 6, 6, 6 and 2 make up all 20 edges, each time in another order."""
  number = np.arange(10, dtype="float32")
  s, r = np.arange(10), (np.arange(10) + 1) % 10
  s, r = np.concatenate([s, r]), np.concatenate([r, s])
  pairs = la.pairs(number[:, None], s, r, np.zeros(10, "int32"), number < 1)
  seen = []

  def record(posterior, x, *, continuous, mask):
    del continuous
    jax.debug.callback(lambda x, mask: seen.append(np.asarray(x[:, 0])[np.asarray(mask)]), x, mask, ordered=True)
    return jnp.sum(posterior.mean)

  monkeypatch.setattr(selector, "negative_elbo", record)
  learner = la.selection(la.CVAE(1, 1, 2), 1, passes=0, batch_size=6, steps_per_call=8)
  jax.block_until_ready(jax.jit(learner.step)(jax.jit(learner.init)(KEY, pairs), pairs))
  jax.effects_barrier()
  assert [len(rows) for rows in seen] == [6, 6, 6, 2] * 2
  passes = [np.concatenate(seen[i : i + 4]) for i in (0, 4)]
  for rows in passes:
    np.testing.assert_array_equal(np.sort(rows), np.sort(number[s]))
  assert (passes[0] != passes[1]).any()


# ----------------------------------------------------------------------------------------------------------- networks


def test_la_gcn_on_equal_inputs_is_the_gcn_with_blocks_side_by_side():
  """k first layers on the same X are one layer of width k h: exact, against dense algebra and the shared GCN."""
  graph, _ = small_graph()
  generated = jnp.stack([graph.nodes] * 2)
  net = la.LAGCN(4, 5)
  params = jax.jit(net.init)(KEY, graph, generated)["params"]
  params = jax.tree.map(lambda a: a + 0.1, params)  # biases that count
  kernel, bias = (jnp.concatenate([params[f"first_{i}"][name] for i in range(3)], -1) for name in ("kernel", "bias"))
  one = {"layer_0": {"linear": {"kernel": kernel}, "bias": bias}, "layer_1": params["second"]}
  expected = node_classification.GCN(4, 15).apply({"params": one}, graph)
  np.testing.assert_allclose(net.apply({"params": params}, graph, generated), expected, atol=1e-5)
  a = np.zeros((12, 12))
  a[graph.receivers, graph.senders] = graph.edges
  second = params["second"]
  dense = a @ (np.maximum(a @ (graph.nodes @ kernel) + bias, 0) @ second["linear"]["kernel"]) + second["bias"]
  np.testing.assert_allclose(expected, dense, atol=1e-5)


def test_generated_features_have_layers_of_their_own():
  """The first layer of generated features comes first; the real ones take the last."""
  graph, generated = small_graph()
  net = la.LAGCN(3, 5)
  params = jax.jit(net.init)(KEY, graph, generated)["params"]
  apply = lambda p, g: net.apply({"params": p}, graph, g)
  without = params | {"first_0": jax.tree.map(jnp.zeros_like, params["first_0"])}
  assert np.abs(apply(params, generated) - apply(params, 2 * generated)).max() > 1e-3
  np.testing.assert_array_equal(apply(without, generated), apply(without, 2 * generated))


def test_the_average_form_sees_the_mean_of_generated_and_real_features():
  graph, generated = small_graph()
  net = la.LAOGB(3, 4, batch_norm=False, average=True)
  variables = jax.jit(net.init)(KEY, graph, generated)
  assert "first_1" not in variables["params"]
  mean = graph._replace(nodes=(graph.nodes + generated[0]) / 2)
  plain = la.LAOGB(3, 4, batch_norm=False).apply(variables, mean, generated[:0])
  np.testing.assert_allclose(net.apply(variables, graph, generated), plain, atol=1e-6)


@pytest.mark.parametrize("convolution", ["gcn", "sage"])
def test_batch_normalisation_ignores_padding(convolution):
  graph, generated = small_graph()
  net = la.LAOGB(3, 4, dropout=0.0, convolution=convolution)
  variables = jax.jit(net.init)(KEY, graph, generated)
  apply = jax.jit(functools.partial(net.apply, train=True, mutable=["batch_stats"]))
  expected, statistics = apply(variables, graph, generated)
  padded = structure.pad(graph, nodes=16, edges=100)
  logits, updated = apply(variables, padded, np.pad(generated, ((0, 0), (0, 4), (0, 0)), constant_values=7.0))
  np.testing.assert_allclose(logits[:12], expected, atol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), updated, statistics)


def test_gradient_of_the_tall_product():
  rng = np.random.default_rng(0)
  x, w, g = (rng.standard_normal(shape).astype("float32") for shape in ((7, 9), (9, 3), (7, 3)))
  y, pull = jax.vjp(networks.tall_product, x, w)
  np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
  for ours, expected in zip(pull(g), (g @ w.T, x.T @ g), strict=True):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_random_propagation_drops_whole_rows_unscaled_and_averages_powers():
  graph, _ = small_graph()
  operator, a = sparse.operator(graph), np.zeros((12, 12))
  a[graph.receivers, graph.senders] = graph.edges
  mean = (np.eye(12) + a + a @ a) / 3
  np.testing.assert_allclose(la.random_propagation(operator, graph.nodes, 2, 0.4), mean @ graph.nodes * 0.6, atol=1e-5)
  dropped = la.random_propagation(operator, sparse.from_scipy(scipy.sparse.csr_array(graph.nodes)), 0, 0.4, KEY)
  gone = ~np.any(dropped, 1)
  assert 0 < gone.sum() < 12
  np.testing.assert_array_equal(np.asarray(dropped)[~gone], graph.nodes[~gone])
  through = la.random_propagation(operator, graph.nodes, 2, 0.4, KEY)
  np.testing.assert_allclose(through, mean @ dropped, atol=1e-5)


def test_official_initialisation_has_a_negative_mean():
  params = {"kernel": jnp.zeros((3000, 16)), "bias": jnp.zeros(16)}
  made = la.official_init(KEY, params)
  np.testing.assert_allclose([made["kernel"].mean(), made["kernel"].std()], [-0.25, 0.25], atol=0.01)
  assert made["bias"].shape == (16,) and made["bias"].std() > 0.05


# ----------------------------------------------------------------------------------------------- consistency training


def test_consistency_is_zero_where_views_are_one_class_and_the_same():
  sure = jnp.zeros((3, 5, 4)).at[:, jnp.arange(5), jnp.asarray([0, 1, 2, 3, 0])].set(80.0)
  np.testing.assert_allclose(la.consistency_loss(sure), 0, atol=1e-12)
  # Views that agree without being sure are sharpened: not zero, but zero at temperature 1.
  unsure = jnp.broadcast_to(jax.random.normal(KEY, (5, 4)), (3, 5, 4))
  assert la.consistency_loss(unsure) > 1e-3
  np.testing.assert_allclose(la.consistency_loss(unsure, 1.0), 0, atol=1e-12)
  half = la.consistency_loss(unsure.at[:, 0].set(50.0), mask=jnp.arange(5) > 0)
  np.testing.assert_allclose(half, la.consistency_loss(unsure[:, 1:]), rtol=1e-5)


def test_no_gradient_flows_into_the_sharpened_mean():
  logits = jax.random.normal(KEY, (3, 5, 4))
  p = scipy.special.softmax(np.asarray(logits, "float64"), -1)
  q = p.mean(0) ** 2
  q /= q.sum(-1, keepdims=True)
  # d/dlogits of mean |p - q|^2 with q held: p * (v - sum(p v)), v = 2 (p - q) / (views * nodes).
  v = 2 * (p - q) / 15
  expected = p * (v - (p * v).sum(-1, keepdims=True))
  np.testing.assert_allclose(jax.grad(la.consistency_loss)(logits), expected, atol=1e-6)


@pytest.fixture(scope="module")
def task(words):
  """The citation graph as a batch, with a generator."""
  (x, s, r, labels, train), _ = words
  number = np.arange(len(labels))
  masks = (train, (number >= 6) & (number < 20), number >= 20)
  normal = x / np.maximum(x.sum(1, keepdims=True), 1)
  made = node_classification.task(scipy.sparse.csr_array(normal), s, r, labels, [masks])
  net = la.CVAE(10, 2, 8)
  generator = la.Generator(net.init(KEY, x, x, np.zeros((len(x), 2))), sparse.from_scipy(x))
  return la.batch(made, generator), lambda source, key: la.generate(net, source, key)


def test_training_lowers_the_loss_and_the_best_epoch_can_be_evaluated_again(task):
  """The key in `best` gives the very features that the epoch was evaluated on."""
  batch, draw = task
  views = la.augmented(la.LAGCN(3, 6), draw, samples=2)
  learner = la.RECIPES["gcn", "cora"].learner(views, epochs=60, epochs_per_step=20)
  run, step = jax.jit(learner.init)(KEY, batch), jax.jit(learner.step)
  losses = []
  for _ in range(3):
    run, metrics = step(run, batch)
    losses.append(float(metrics["loss"]))
  assert losses[2] < losses[0] and bool(run.stopped) and 0 < int(run.best.epoch) <= 60
  evaluate = jax.jit(views.evaluate)
  test = np.asarray(batch.test)
  hit = np.argmax(evaluate(run.best.variables, batch, run.best.key), 1) == batch.labels
  np.testing.assert_allclose(hit[test].mean(), run.best.test, atol=1e-6)
  other = evaluate(run.best.variables, batch, jax.random.key(5))
  assert np.abs(other - evaluate(run.best.variables, batch, run.best.key)).max() > 1e-6
  after, metrics = step(run, batch)  # a stopped run stays as it is
  assert int(after.epoch) == 60 and float(metrics["test_accuracy"]) == float(run.best.test)


def test_one_step_is_adam_on_the_mean_of_views_with_l2_by_layer(task):
  """Against the same step written out: NLL over views, the consistency term, L2 in the gradient, Adam's first step."""
  batch, _ = task
  views = la.augmented(la.LAGCN(3, 6), None, concat=0, samples=2)
  settings = {"learning_rate": 0.1, "l2": 0.5, "l2_of": {"second": 2.0}, "epochs": 9, "consistency": 0.7}
  learner = la.learner(views, **settings, epochs_per_step=1)
  run = jax.jit(learner.init)(KEY, batch)
  after, _ = jax.jit(learner.step)(run, batch)
  key = jax.random.split(jax.random.fold_in(run.key, 0))[0]

  def loss(params):
    logits, _ = views.train({"params": params}, batch, key)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, batch.train], batch.labels[batch.train][None])
    return jnp.mean(nll) + 0.7 * la.consistency_loss(logits)

  gradient = jax.jit(jax.grad(loss))(run.variables["params"])
  for name, rate in (("first_0", 0.5), ("second", 2.0)):
    for (old, new), g in zip(
      zip(*(jax.tree.leaves(r.variables["params"][name]) for r in (run, after)), strict=True),
      jax.tree.leaves(gradient[name]),
      strict=True,
    ):
      total = np.asarray(g + rate * old)
      clear = np.abs(total) > 1e-4  # where Adam's first step is the sign
      np.testing.assert_allclose(np.asarray(new - old)[clear], -0.1 * np.sign(total[clear]), rtol=1e-2)


def test_patience_stops_and_unknown_layers_are_named(task):
  batch, _ = task
  views = la.augmented(la.LAGCN(3, 4), None, concat=0, samples=1)
  learner = la.learner(views, learning_rate=0.0, l2=0.0, epochs=100, patience=3, consistency=0.0, epochs_per_step=10)
  run, _ = jax.jit(learner.step)(jax.jit(learner.init)(KEY, batch), batch)
  assert bool(run.stopped) and int(run.best.epoch) == 1 and int(run.epoch) == 4  # constant loss: first epoch is best
  learner = la.learner(views, learning_rate=0.1, l2=0.0, l2_of={"third": 1.0}, epochs=1)
  with pytest.raises(ValueError, match="^l2_of: got .'third'.*'second'"):
    jax.eval_shape(learner.step, run, batch)


def test_seeds_together_equal_seeds_alone(task):
  batch, _ = task
  views = la.augmented(la.LAGCN(3, 4), None, concat=0, samples=1, initialize=la.official_init)
  learner = la.learner(views, learning_rate=0.05, l2=5e-4, epochs=20, epochs_per_step=5, consistency=0.0)
  keys = jax.random.split(KEY, 2)
  together = train.over_seeds(learner)
  runs, _ = jax.jit(together.step)(jax.jit(together.init)(keys, batch), batch)
  run, _ = jax.jit(learner.step)(jax.jit(learner.init)(keys[1], batch), batch)
  for a, b in zip(jax.tree.leaves(runs.variables), jax.tree.leaves(run.variables), strict=True):
    np.testing.assert_allclose(a[1], b, atol=1e-4)


def test_grand_trains_on_real_and_generated_views(task):
  """2 S views; batch normalisation's statistics move; evaluation sees real features only and draws nothing."""
  batch, draw = task
  dense = draw(batch.source, KEY)
  real = sparse.propagate(batch.graph.nodes, jnp.eye(10))
  batch = batch._replace(source=dense, graph=batch.graph._replace(nodes=real))
  views = la.grand(la.GRANDMLP(3, 6, batch_norm=True), hops=2, drop_node=0.5, samples=1, initialize=la.official_init)
  learner = la.RECIPES["grand", "cora"].learner(views, epochs_per_step=3)
  run = jax.jit(learner.init)(KEY, batch)
  assert run.variables["params"]["first"]["kernel"].mean() < -0.1
  logits, _ = jax.eval_shape(views.train, run.variables, batch, KEY)
  assert logits.shape == (2, 40, 3)
  after, metrics = jax.jit(learner.step)(run, batch)
  assert np.isfinite(metrics["loss"])
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *(r.variables["batch_stats"] for r in (run, after)))
  assert min(jax.tree.leaves(moved)) > 1e-3
  a, b = (views.evaluate(after.variables, batch, jax.random.key(k)) for k in (0, 1))
  np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(a, views.evaluate(after.variables, batch._replace(source=0 * dense), KEY))


@pytest.mark.parametrize("net", [la.LAGAT(3, 2, heads=2), la.LAGCNII(3, 4, depth=3), la.LAOGB(3, 4)])
def test_every_backbone_learns_through_its_views(task, net):
  """A step along the gradient lowers the loss of the same views, and every parameter takes part."""
  batch, draw = task
  views = la.augmented(net, draw, samples=1)
  variables = jax.jit(views.init)(KEY, batch)

  def loss(params):
    logits, _ = views.train(variables | {"params": params}, batch, KEY)
    return optax.softmax_cross_entropy_with_integer_labels(logits[0], batch.labels).mean()

  both = jax.jit(jax.value_and_grad(loss))
  before, gradient = both(variables["params"])
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
  after, _ = both(jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], gradient))
  assert after < before
