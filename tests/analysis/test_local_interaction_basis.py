"""The official outputs, and the properties of bases and edges, against oracles in plain NumPy."""

import functools

import flax.linen as nn
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxlab.analysis import local_interaction_basis as lib

perceptron = jax.jit(lib.mlp, static_argnums=1)


def wide(tree):
  return jax.tree.map(lambda a: np.asarray(a, "float64"), tree)


# ------------------------------------------------------------------------------------------------------ golden outputs

RUNS = {
  "transformer.lib": {},
  "transformer.pca": {"method": "pca"},
  "relu.lib": {},
  "relu.uncentered": {"center": False, "rotate_output": True},
  "gelu.integrated": {"integration": "gauss_legendre", "intervals": 2},
  "gelu.trapezoid": {"integration": "trapezoid", "intervals": 2},
  "gelu.older": {"method": "(1-0)*alpha", "integration": "gauss_legendre", "intervals": 2},
  "gelu.oldest": {"method": "(1-alpha)^2", "integration": "trapezoid", "intervals": 2},
}


def test_golden():
  """A transformer and perceptrons by every formula: bases up to signs, edges, logits."""

  def convert(state):
    layers = [{"kernel": state.pop(f"layers.{i}.W"), "bias": state.pop(f"layers.{i}.b")} for i in range(3)]
    return wide((lib.from_torch(state), layers))

  def apply(weights, inputs):
    variables, layers = weights
    tokens = lib.pairs(7, train=1)[0]["tokens"]
    tokens = tokens[np.lexsort((tokens[:, 1], tokens[:, 0]))][::2]
    network, x, logits = transformer(variables, tokens)
    out = {"transformer.logits": logits[:, None]}
    features = np.append(inputs["x"], np.ones((40, 1)), 1)[:, None]
    networks = {"relu": perceptron(layers), "gelu": perceptron(layers, "gelu"), "transformer": network}
    for name, options in RUNS.items():
      kind = name.split(".")[0]
      acts = x if kind == "transformer" else features
      graph = lib.interaction_graph(networks[kind], acts, threshold=1e-8, batch_size=10, **options)
      for i, (basis, edges) in enumerate(zip(graph.bases, graph.edges, strict=False)):
        out |= {f"{name}.into{i}": abs(basis.into), f"{name}.back{i}": abs(basis.back), f"{name}.edges{i}": edges}
    return out

  with jax.enable_x64(True):
    golden_rule.check("local_interaction_basis", convert, apply, atol=2e-5, rtol=2e-5)


@jax.jit
def transformer(variables, tokens):
  """Sections, activations of the first node layer, and logits; the sections give the same ones."""
  model = lib.ModularAddition(7, 10, 2, 14, "float64", "float64")
  params = variables["params"]
  return lib.modular_addition(params), lib.embed(params, tokens), model.apply(variables, tokens)


def test_transformer_has_the_published_size():
  params = jax.eval_shape(lib.ModularAddition().init, jax.random.key(0), jnp.zeros((1, 3), "int32"))["params"]
  assert sum(int(np.prod(a.shape)) for a in jax.tree.leaves(params)) == 227_442


# ---------------------------------------------------------------------------------------- properties, on one perceptron

COUNT, WIDTH, DEPTH = 10_000, 8, 5


def made(kind):
  """Layers and inputs: random ones, with biases; or two blocks that never meet, without."""
  rng = np.random.default_rng(0)
  if kind == "blocks":
    draw = lambda: scipy.linalg.block_diag(*(2 * rng.standard_normal((4, 4)) for _ in range(2)))
    return [{"kernel": draw(), "bias": np.zeros(8)} for _ in range(DEPTH)], rng.standard_normal((COUNT, 8))
  layers = [
    {"kernel": rng.standard_normal((8, 8)) / 2, "bias": 0.5 * rng.standard_normal(8)} for _ in range(DEPTH)
  ]  # fmt: skip
  return layers, rng.standard_normal((COUNT, 8)) @ rng.standard_normal((8, 8)) + rng.standard_normal(8)


@functools.cache
def explained(kind="random", method="lib"):
  """The folded layers' weights, activations without positions, and the graph, computed with 64 bits switched off."""
  layers, x = made(kind)
  x = np.append(x, np.ones((COUNT, 1)), 1)
  with jax.enable_x64(True):
    network = jax.device_get(perceptron(layers))
  graph = lib.interaction_graph(network, x[:, None], method=method)
  weights, acts = [section.kernel for section in network], [x]
  for weight in weights[:-1]:
    acts.append(np.maximum(acts[-1] @ weight, 0))
  return weights, [*acts, acts[-1] @ weights[-1]], graph


def jacobians(weight, acts, last):
  """d next / d x, [N, D, E]."""
  return np.broadcast_to(weight, (len(acts), *weight.shape)) if last else weight * (acts @ weight > 0)[:, None]


def layers_of(found):
  weights, acts, graph = found
  for i, (weight, basis) in enumerate(zip(weights, graph.bases, strict=False)):
    yield i, weight, acts[i], basis, graph.bases[i + 1], graph.edges[i]


def test_activations_end_in_one():
  _, acts, graph = explained()
  assert all((a[:, -1] == 1).all() for a in acts[:-1])
  assert all(b.into.dtype == "float64" and b.into.flags.writeable for b in graph.bases)


def test_features_have_mean_squares_lambda():
  for _, _, x, basis, _, _ in layers_of(explained()):
    features = x @ basis.into
    assert np.ptp(features[:, 0]) < 1e-9 * abs(features[0, 0]) and features[0, 0] ** 2 == pytest.approx(
      basis.importance[0]
    )
    gram = features[:, 1:].T @ features[:, 1:] / COUNT
    np.testing.assert_allclose(gram, np.diag(basis.importance[1:]), atol=1e-9 * basis.importance[1])


def test_jacobians_to_the_next_features_are_white():
  for i, weight, x, basis, after, _ in layers_of(explained()):
    slopes = jacobians(weight, x, i == DEPTH - 1) @ after.into
    gram = np.einsum("nde,nfe->df", slopes, slopes) / COUNT
    kept = basis.importance > 1e-9 * basis.importance.max()
    inner = (basis.back @ gram @ basis.back.T)[kept][:, kept][1:, 1:]
    np.testing.assert_allclose(inner, np.eye(len(inner)), atol=1e-7)


def test_pseudoinverse():
  """And all of the data where no feature was dropped for want of importance."""
  ranks, whole = [], 0
  for method in ("pca", "lib"):
    for i, _, x, basis, _, _ in layers_of(explained(method=method)):
      np.testing.assert_allclose(basis.back @ basis.into, np.eye(len(basis.importance)), atol=1e-8)
      ranks.append(len(basis.importance))
      if method == "pca" or ranks[i] == ranks[-1]:
        np.testing.assert_allclose(x @ basis.into @ basis.back, x, atol=1e-8)
        whole += 1
  assert whole > DEPTH


def test_edges_are_mean_squared_attributions():
  for i, weight, x, basis, after, edges in layers_of(explained()):
    slopes = basis.back @ jacobians(weight, x, i == DEPTH - 1) @ after.into
    attributions = slopes * (x @ basis.into)[:, :, None]  # [N, from, to]
    np.testing.assert_allclose(edges, (attributions**2).mean(0).T, rtol=1e-7, atol=1e-9)
    if i == DEPTH - 1:  # linear, and features are uncorrelated
      np.testing.assert_allclose(edges.sum(1), ((x @ weight) ** 2).mean(0), rtol=1e-7)


def test_euler():
  """A section of ReLU is homogeneous, so its outputs are the sum of what inputs contribute; here all are positive."""
  rng = np.random.default_rng(3)
  layers = [{"kernel": rng.uniform(size=(8, 8)), "bias": rng.uniform(size=8)} for _ in range(DEPTH)]
  x = np.append(rng.uniform(size=8), 1)[None]
  with jax.enable_x64(True):
    network = perceptron(layers)
    edges = lib.edge_weights(network[0], np.repeat(x[None], COUNT, 0), (np.eye(9), np.eye(9)), np.eye(9))
    np.testing.assert_allclose(np.sqrt(edges).sum(1), (x @ network[0].kernel)[0], rtol=1e-9)


def test_rotated_inputs_change_nothing():
  layers, x = made("random")
  turn = np.linalg.qr(np.random.default_rng(5).standard_normal((8, 8)))[0]
  layers[0] = layers[0] | {"kernel": turn.T @ layers[0]["kernel"]}
  with jax.enable_x64(True):
    network = jax.device_get(perceptron(layers))
  graph = lib.interaction_graph(network, np.append(x @ turn, np.ones((COUNT, 1)), 1)[:, None])
  _, _, expected = explained()
  assert graph.bases[0].importance == pytest.approx(expected.bases[0].importance, rel=1e-8)
  for edges, same in zip(graph.edges, expected.edges, strict=True):
    np.testing.assert_allclose(edges, same, rtol=1e-6, atol=1e-9)
  moved = scipy.linalg.block_diag(turn.T, 1) @ expected.bases[0].into
  np.testing.assert_allclose(abs(graph.bases[0].into), abs(moved), atol=1e-7)


def test_blocks_stay_apart():
  """The mass of edges between features of different blocks: LIB finds blocks in the inputs, where all of PCA's axes
  are as good as any."""

  def crossing(graph, layer):
    block = [abs(b.into[4:8, 1:]).sum(0) > abs(b.into[:4, 1:]).sum(0) for b in graph.bases[:-1]]
    block.append(np.arange(8) >= 4)  # outputs have no constant
    edges = graph.edges[layer][:, 1:] if layer == DEPTH - 1 else graph.edges[layer][1:, 1:]
    return edges[block[layer + 1][:, None] != block[layer]].sum() / edges.sum()

  mine, pca = explained("blocks")[2], explained("blocks", "pca")[2]
  assert crossing(mine, 0) < 0.03
  assert crossing(pca, 0) > 10 * crossing(mine, 0)
  assert all(crossing(mine, layer) < 0.02 for layer in range(1, DEPTH))


# ------------------------------------------------------------------------------- sections, and sums by their definition


class Pictures(nn.Module):
  """Two convolutions and a readout."""

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Conv(3, (3, 3), strides=2)(x), approximate=False)
    x = nn.relu(nn.Conv(2, (2, 2), padding="VALID")(x))
    return nn.Dense(4)(x.reshape(len(x), -1))


@jax.jit
def pictures(images):
  """A network on images 5x5x2, its sections and activations."""
  keys = iter(jax.random.split(jax.random.key(1), 8))
  shapes = jax.eval_shape(Pictures().init, next(keys), images)
  variables = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), shapes)
  params = variables["params"]
  network = (
    lib.conv(**params["Conv_0"], shape=(5, 5), activation="gelu", strides=(2, 2)),
    lib.conv(**params["Conv_1"], shape=(3, 3), padding="VALID"),
    lib.readout(**params["Dense_0"], positions=4),
  )
  return network, Pictures().apply(variables, images), lib.activations(network, lib.with_one(images.reshape(-1, 25, 2)))


def test_convolutions_fold():
  images = np.random.default_rng(0).standard_normal((6, 5, 5, 2)).astype("float32")
  network, logits, acts = pictures(images)
  np.testing.assert_allclose(acts[-1][:, 0], logits, atol=1e-5)
  for layer in acts[:-1]:
    np.testing.assert_allclose(layer[..., -1], 1, atol=1e-6)
  basis, to = bases(4, 0), bases(3, 1).into
  np.testing.assert_allclose(
    lib.edge_weights(network[1], acts[1], basis[:2], to, batch_size=4),
    defined(network[1], acts[1], basis, to)[1],
    rtol=1e-3,
  )


def bases(size, seed):
  into = np.random.default_rng(seed).standard_normal((size, size)).astype("float32") + 2 * np.eye(size, dtype="float32")
  return lib.Basis(into, np.linalg.inv(into), np.arange(size, 0, -1.0))


def defined(section, x, basis, to, points=1.0, weights=1.0):
  """M' and E from whole Jacobians [N, t, i, s, j], averaged over points on the line to x."""
  jacobian = jax.jit(jax.vmap(jax.jacrev(lambda a: section(a) @ to)))
  pairs = zip(np.atleast_1d(points), np.atleast_1d(weights), strict=True)
  slopes = sum(weight * np.asarray(jacobian((point * x).astype(x.dtype)), "float64") for point, weight in pairs)
  norm = len(x) * x.shape[1]
  attributions = np.einsum("ntisd,rd,nsr->ntir", slopes, basis.back, x @ basis.into)
  return np.einsum("ntisj,ntisk->jk", slopes, slopes) / norm, (attributions**2).sum((0, 1)) / norm


def attending():
  rng = np.random.default_rng(4)
  heads = {n: {"kernel": rng.standard_normal((4, 2, 2)), "bias": rng.standard_normal((2, 2))} for n in ("query", "key")}
  value = {"kernel": rng.standard_normal((4, 2, 2)), "bias": rng.standard_normal((2, 2))}
  out = {"kernel": rng.standard_normal((2, 2, 4)), "bias": rng.standard_normal(4)}
  x = np.append(rng.standard_normal((10, 3, 4)), np.ones((10, 3, 1)), 2).astype("float32")
  narrow = lambda tree: jax.tree.map(lambda a: np.asarray(a, "float32"), tree)
  return jax.jit(functools.partial(lib.attention, last_only=False))(*map(narrow, (*heads.values(), value, out))), x


def test_causal_attention_by_definition():
  """More outputs than features, so that edges take forward passes."""
  section, x = attending()
  basis, to = bases(5, 0), bases(5, 1).into
  gram, edges = defined(section, x, basis, to, *lib.nodes("gauss_legendre", 1))
  options = {"integration": "gauss_legendre", "intervals": 1, "batch_size": 4}
  np.testing.assert_allclose(lib.jacobian_gram(section, x, to, **options), gram, rtol=1e-3, atol=1e-2)
  np.testing.assert_allclose(lib.edge_weights(section, x, basis[:2], to, **options), edges, rtol=1e-3)
  # The first position sees itself only.
  changed = x.copy()
  changed[:, 1:] += 1
  np.testing.assert_allclose(section(changed)[:, 0], section(x)[:, 0], rtol=1e-5)


def mixing(weights, x):
  """Linear, over positions and features."""
  return jnp.einsum("qp,...pd,de->...qe", weights[0], x, weights[1])


def test_random_sources():
  """In place of outputs t or i: right on average, with an error that falls as their number grows."""
  rng = np.random.default_rng(0)
  weights = tuple(rng.standard_normal((3, size)).astype("float32") for size in (2, 4))
  x = rng.standard_normal((50, 2, 3)).astype("float32")
  section = jax.tree_util.Partial(mixing, weights)
  gram = (weights[0] ** 2).sum() / 2 * weights[1] @ weights[1].T
  for sources in ((100, None), (None, 100), (10, 10)):
    names = dict(zip(("position_sources", "feature_sources"), sources, strict=True))
    estimate = lib.jacobian_gram(section, x, np.eye(4, dtype="float32"), jax.random.key(0), batch_size=20, **names)
    assert 1e-5 < abs(estimate - gram).max() / abs(gram).max() < 0.1


def gathering(order, kept, kernel, x):
  """A dense layer on some features in another order."""
  return jax.nn.relu(jnp.where(kept, x[..., order], 0) @ kernel)


def test_whole_numbers_and_bools_of_a_section_stay():
  rng = np.random.default_rng(0)
  order, kept = np.array([2, 0, 1, 3]), np.array([True, False, True, True])
  kernel = np.append(rng.standard_normal((4, 3)), [[0.0]] * 3 + [[1.0]], 1)
  x = np.append(rng.standard_normal((30, 1, 3)), np.ones((30, 1, 1)), 2)
  last = lib.Dense(rng.standard_normal((4, 2)), "identity")
  plain = np.zeros((4, 4))
  plain[order[kept]] = kernel[kept]
  mine = (jax.tree_util.Partial(gathering, order, kept, kernel), last)
  found, expected = (lib.interaction_graph(net, x) for net in (mine, (lib.Dense(plain), last)))
  for edges, same in zip(found.edges, expected.edges, strict=True):
    np.testing.assert_allclose(edges, same, rtol=1e-7, atol=1e-12)
  first = x.astype("float32")
  curve = lib.feature_curve(mine, found, 0, first, lambda outputs: float(jnp.sum(outputs)), [1, 4])
  assert curve[4] == pytest.approx(float(np.sum(np.maximum(x @ plain, 0) @ last.kernel)), rel=1e-4) != curve[1]


def test_blocks_and_dense_layers_by_definition():
  """Sums from slopes alone are those from whole Jacobians."""
  rng = np.random.default_rng(6)
  draw = lambda i, o: {"kernel": rng.standard_normal((i, o)), "bias": rng.standard_normal(o)}
  x = np.append(rng.standard_normal((7, 2, 4)), np.ones((7, 2, 1)), 2)
  with jax.enable_x64(True):
    for section in (lib.block(draw(4, 6), draw(6, 4), "gelu_tanh"), lib.dense(**draw(4, 4))):
      to = rng.standard_normal((5, 3))
      gram = defined(section, x, bases(5, 0), to)[0]
      np.testing.assert_allclose(lib.jacobian_gram(section, x, to), gram, rtol=1e-9)


def test_nodes_integrate():
  for count in (1, 3):
    points, weights = lib.nodes("gauss_legendre", count)
    assert len(points) == count + 1
    degree = 2 * count + 1
    assert (weights * points**degree).sum() == pytest.approx(1 / (degree + 1))
  points, weights = lib.nodes("trapezoid", 4)
  assert points[[0, -1]] == pytest.approx([0.0002, 0.9998])
  assert list(weights) == [0.125, 0.25, 0.25, 0.25, 0.125]
  assert [list(a) for a in lib.nodes("trapezoid", 0)] == [[0.5], [1.0]]
  assert [list(a) for a in lib.nodes("gradient")] == [[1.0], [1.0]]


# ----------------------------------------------------------------------------------------------------------- ablations


def test_schedule():
  """The first two are examples of the official code, the last its stored one."""
  assert lib.schedule(24, every=3) == [0, 1, 2, 3, 4, 6, 10, 18, 24]
  assert lib.schedule(12, every=3) == [0, 1, 2, 3, 4, 6, 10, 12]
  assert lib.schedule(12, every=0) == [0, 1, 3, 7, 12]
  stored = np.load(golden_rule.GOLDEN / "local_interaction_basis_modular_addition.npz")["schedule"]
  assert lib.schedule(129, every=10, base=1.05) == list(stored)


def test_strongest():
  edges = np.arange(1, 10).reshape(3, 3)
  assert (lib.strongest(edges, 2) == [[1, 0, 0], [1, 0, 0], [1, 1, 1]]).all()
  assert (lib.strongest(edges, 2, constant=False) == [[0, 0, 0], [0, 0, 0], [0, 1, 1]]).all()
  assert (lib.strongest(edges, 0) == [[1, 0, 0]] * 3).all()
  assert lib.strongest(edges, 7).all() and lib.strongest(edges, 6).all()
  edges[1, 1] = 6
  assert lib.strongest(edges, 3)[:, 1:].sum() == 4  # ties stay


def test_fewer_edges():
  """Every feature of the next layer from its own sources; bisection ends between a number that does and one that does
  not."""
  weights, acts, graph = explained()
  basis, after = graph.bases[1:3]
  x, weight = acts[1][:50], weights[1]
  mask = lib.strongest(graph.edges[1], 15)
  with jax.enable_x64(True):
    found = lib.keep_edges(lib.Dense(weight), x[:, None], basis, after, mask)
  features = np.stack(
    [np.maximum((x @ basis.into * row) @ basis.back @ weight, 0) @ after.into[:, i] for i, row in enumerate(mask)], 1
  )
  np.testing.assert_allclose(found[:, 0], features @ after.back, atol=1e-9)

  network = tuple(lib.Dense(w, "identity" if i == DEPTH - 1 else "relu") for i, w in enumerate(weights))
  score = functools.partial(lib.accuracy, labels=acts[-1][:50].argmax(1))
  first = acts[0][:50, None]
  with jax.enable_x64(True):
    required = lib.edges_required(network, graph, 3, first, score, tolerance=0.05)
    curve = lib.feature_curve(network, graph, 3, first, score, [0, 3, 9])
  assert required.base == curve[9] == 1
  assert required.mask[:, 1:].sum() == required.edges < graph.edges[3][:, 1:].size
  assert required.scores[required.edges] >= 0.95 > required.scores[required.edges - 1]
  kept = acts[3][:50] @ graph.bases[3].into[:, :3] @ graph.bases[3].back[:3]
  outputs = np.maximum(kept @ weights[3], 0) @ weights[4]
  assert curve[3] == (outputs.argmax(1) == acts[-1][:50].argmax(1)).mean()


def test_pairs():
  """The permutation's first elements are those of `torch.randperm(25, generator=torch.manual_seed(3))`."""
  train, test = lib.pairs(5, train=0.4, seed=3)
  tokens = np.concatenate([train["tokens"], test["tokens"]])
  assert train["tokens"].shape == (10, 3) and len(np.unique(tokens, axis=0)) == 25 and (tokens[:, 2] == 5).all()
  assert (np.concatenate([train["label"], test["label"]]) == tokens[:, :2].sum(1) % 5).all()
  assert list(tokens[:6, 0] * 5 + tokens[:6, 1]) == PERMUTED


PERMUTED = [11, 9, 16, 6, 0, 5]
