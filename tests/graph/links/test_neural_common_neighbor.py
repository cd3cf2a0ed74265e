import functools

import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.graph import common_neighbors, sparse, structure
from jaxlab.graph.links import neural_common_neighbor as ncn

H = 8
NODES = 14


def random_graph(seed, probability=0.3):
  rng = np.random.default_rng(seed)
  edges = np.argwhere(np.triu(rng.random((NODES, NODES)) < probability, 1)).T
  return common_neighbors.adjacency(edges, NODES)


def as_graph(adjacency, nodes):
  return structure.from_scipy(adjacency, nodes=nodes)


# -------------------------------------------------------------------------------------------------------------- golden

CALIBRATION = {"scale": 4.3, "offset": 0.2, "prior": 0.75, "alpha": 0.9}
USUAL = {"node_residual": True, "tail_activation": True}
HEADS = {
  "cn0": USUAL | {"variant": "cn0"},
  "scn1": USUAL | {"variant": "scn1"},
  "cn1": USUAL | {"variant": "cn1"},
  "cn1_two": {"variant": "cn1", "node_residual": True, "two_layer_score": True},
  "cn1_plain": {"variant": "cn1", "layer_norm": False},
  "cn1half": {"variant": "cn1.5"},
  "cn1res": {"variant": "cn1res"},
  "cn2": {"variant": "cn2"},
  "incn1cn1": USUAL | CALIBRATION | {"variant": "incn1cn1"},
  "incn1cn1_prior": USUAL | CALIBRATION | {"variant": "incn1cn1", "learn_prior": True},
  "incn1cn1_depth2": USUAL | CALIBRATION | {"variant": "incn1cn1", "depth": 2},
  "sincn1cn1": USUAL | CALIBRATION | {"variant": "sincn1cn1"},
}
ENCODERS = {
  "puregcn": {"conv": "puregcn", "num_layers": 2, "jumping": True},
  "puresum": {"conv": "puresum", "residual": True},
  "puremean": {"conv": "puremean", "num_layers": 2},
  "puremax": {"conv": "puremax"},
  "gcn": {"conv": "gcn"},
  "gcn3": {"conv": "gcn", "num_layers": 3, "residual": True, "jumping": True},
  "sage": {"conv": "sage", "num_layers": 2},
  "gin": {"conv": "gin", "num_layers": 2},
  "max": {"conv": "max", "num_layers": 2},
  "ids": {"conv": "gcn", "num_layers": 2, "num_embeddings": 4},
}


def test_golden():
  """Every head and every MPNN of the official code, on a graph with an isolated node and adjacent pairs."""

  def part(state, name):
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}

  def convert(state):
    made = {}
    for name in HEADS:
      model = ncn.LinkPredictor(ncn.Encoder(H, num_layers=2, jumping=True), ncn.Head(H, **HEADS[name]))
      variables = ncn.from_torch(model, part(state, "encoder_puregcn"), part(state, f"head_{name}"))
      made[f"head_{name}"] = variables["params"]["head"]
    for name in ENCODERS:
      model = ncn.LinkPredictor(ncn.Encoder(H, **ENCODERS[name]), ncn.Head(H, **HEADS["cn1"]))
      variables = ncn.from_torch(model, part(state, f"encoder_{name}"), part(state, "head_cn1"))
      made[f"encoder_{name}"] = variables["params"]["encoder"]
    return made

  def apply(made, inputs):
    adjacency = common_neighbors.adjacency(inputs["edges"], NODES)
    heads = {name: ncn.Head(H, **attributes) for name, attributes in HEADS.items()}
    pairs = {name: common_neighbors.pairs(adjacency, inputs["pairs"], **head.needs) for name, head in heads.items()}
    graph = as_graph(adjacency, inputs["x"])

    @jax.jit
    def all_of_them(made, graph, ids, h, pairs):
      outputs = {}
      for name, head in heads.items():
        logits = head.apply({"params": made[f"head_{name}"]}, h, pairs[name])
        outputs[f"head_{name}"] = logits[: inputs["pairs"].shape[1]]
      for name, attributes in ENCODERS.items():
        given = graph._replace(nodes=ids) if name == "ids" else graph
        outputs[f"encoder_{name}"] = ncn.Encoder(H, **attributes).apply({"params": made[f"encoder_{name}"]}, given)
      return outputs

    return all_of_them(made, graph, inputs["ids"], inputs["h"], pairs)

  golden_rule.check("neural_common_neighbor", convert, apply, atol=2e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- what must hold


@functools.partial(jax.jit, static_argnums=0)
def logits_of(head, params, x, pairs):
  return head.apply({"params": params}, x, pairs)


def filled(shapes, seed=0):
  """Random parameters in place of shapes: betas, norms and biases too, and nothing to compile."""
  rng = np.random.default_rng(seed)
  scale = lambda leaf: leaf.shape[0] ** -0.5 if len(leaf.shape) > 1 else 0.3
  return jax.tree.map(
    lambda leaf: ((len(leaf.shape) == 1) + scale(leaf) * rng.standard_normal(leaf.shape)).astype("float32"), shapes
  )


def case(seed=0, **attributes):
  """A head with random parameters, embeddings, a graph, and all of its pairs."""
  head = ncn.Head(H, **USUAL | attributes)
  adjacency, x = random_graph(seed), np.random.default_rng(seed).standard_normal((NODES, H)).astype("float32")
  ends = np.stack(np.triu_indices(NODES, 1))
  pairs = common_neighbors.pairs(adjacency, ends, **head.needs)
  params = filled(jax.eval_shape(head.init, jax.random.key(0), x, pairs)["params"], seed)
  return head, params, jnp.asarray(x), adjacency, ends, pairs


def run(head, params, x, adjacency, ends):
  """Logits of pairs, enumerated anew."""
  return logits_of(head, params, x, common_neighbors.pairs(adjacency, ends, **head.needs))[: ends.shape[1]]


@pytest.mark.parametrize("variant", ["cn1", "incn1cn1", "sincn1cn1"])
def test_logits_are_symmetric(variant):
  head, params, x, adjacency, ends, _ = case(variant=variant)
  forward = run(head, params, x, adjacency, ends)
  assert forward.std() > 0.05
  np.testing.assert_allclose(run(head, params, x, adjacency, ends[::-1]), forward, atol=1e-5)


def test_ncnc_without_probability_is_ncn():
  head, params, x, adjacency, ends, pairs = case(variant="incn1cn1", alpha=0.0)
  ncn_logits = run(head.clone(variant="cn1"), params, x, adjacency, ends)
  np.testing.assert_allclose(logits_of(head, params, x, pairs)[: ends.shape[1]], ncn_logits, atol=1e-6)
  small = logits_of(head.clone(alpha=1e-6), params, x, pairs)[: ends.shape[1]]
  np.testing.assert_allclose(small, ncn_logits, atol=1e-4)
  probable = logits_of(head.clone(alpha=1.0, offset=0.0), params, x, pairs)[: ends.shape[1]]
  assert np.abs(probable - ncn_logits).max() > 0.1


def test_ncnc_with_certainty_pools_the_union():
  # scale 0 makes g = 1/2, so P = alpha pt / (1 + pt), which is 1 for alpha = (1 + pt) / pt.
  head, params, x, adjacency, ends, pairs = case(variant="incn1cn1", scale=0.0, prior=0.5, alpha=3.0)
  dense = adjacency.toarray()
  union = sparse.from_scipy(np.maximum(dense[ends[0]], dense[ends[1]]))
  of_union = common_neighbors.Pairs(ends[0], ends[1], np.ones(ends.shape[1], bool), union)
  want = logits_of(head.clone(variant="cn1"), params, x, of_union)
  np.testing.assert_allclose(logits_of(head, params, x, pairs)[: ends.shape[1]], want, atol=2e-5)


@pytest.mark.parametrize("inner", ["official", "paper"])
def test_ncnc_is_ncn_with_candidates_as_constants(inner):
  """Values and gradients: candidates scored one by one by NCN, their probabilities constants of a dense matrix."""
  head, params, x, adjacency, ends, pairs = case(variant="incn1cn1", inner=inner, offset=0.1, alpha=0.8, prior=0.6)
  simple, dense = head.clone(variant="cn1"), adjacency.toarray() > 0
  everyone = np.stack([a.ravel() for a in np.meshgrid(np.arange(NODES), np.arange(NODES), indexing="ij")])
  nodes = x
  if inner == "official":
    block = ncn.MLP(H, (False, True))
    nodes = x + block.apply({"params": params["node"]}, x, False)
  r = np.asarray(run(simple, params, nodes, adjacency, everyone), "float64").reshape(NODES, NODES)
  g = 1 / (1 + np.exp(-head.scale * (r - head.offset)))
  p = 0.8 * 0.6 * g / (0.6 * g + 1 - g)
  i, j = ends
  matrix = (dense[i] & dense[j]) + p[j] * (dense[i] & ~dense[j]) + p[i] * (dense[j] & ~dense[i])
  constant = common_neighbors.Pairs(i, j, np.ones(len(i), bool), sparse.from_scipy(matrix))
  slope = jnp.asarray(np.random.default_rng(1).standard_normal(len(i)), "float32")

  def total(head, pairs):
    return lambda params, x: (head.apply({"params": params}, x, pairs)[: len(i)] * slope).sum()

  got = jax.jit(jax.value_and_grad(total(head, pairs), (0, 1)))(params, x)
  want = jax.jit(jax.value_and_grad(total(simple, constant), (0, 1)))(params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3), got, want)
  np.testing.assert_allclose(
    logits_of(head, params, x, pairs)[: len(i)], logits_of(simple, params, x, constant), atol=5e-5
  )


def test_chunks_of_candidates_change_memory_not_logits():
  head, params, x, adjacency, ends, pairs = case(variant="incn1cn1", offset=0.0)
  whole, parts = (
    jax.jit(lambda p, x, pairs, head=head: head.apply({"params": p}, x, pairs)).lower(params, x, pairs).compile()
    for head in (head, head.clone(chunk=20))
  )
  np.testing.assert_allclose(parts(params, x, pairs), whole(params, x, pairs), atol=1e-5)
  assert parts.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes


def test_deeper_completion_differs_and_at_depth_zero_is_ncn():
  head, params, x, adjacency, ends, _ = case(variant="incn1cn1", offset=1.5, scale=1.0)
  by_depth = [run(head.clone(depth=d), params, x, adjacency, ends) for d in (0, 1, 2)]
  np.testing.assert_allclose(by_depth[0], run(head.clone(variant="cn1"), params, x, adjacency, ends), atol=1e-6)
  assert np.abs(by_depth[1] - by_depth[0]).max() > 0.05 and np.abs(by_depth[2] - by_depth[1]).max() > 1e-3


def test_calibration_is_a_probability():
  r = jnp.linspace(-1.0, 6.0, 200)
  p = ncn.calibrate(r, 0.75, alpha=0.4, scale=4.3, offset=2.8)
  assert (p > 0).all() and (p < 0.4).all() and (jnp.diff(p) > 0).all()
  at_offset = ncn.calibrate(jnp.array([2.8]), 0.75, alpha=0.4, scale=4.3, offset=2.8)
  np.testing.assert_allclose(at_offset, 0.4 * 0.75 / 1.75, rtol=1e-6)
  g = 1 / (1 + np.exp(-4.3 * (np.asarray(r, "float64") - 2.8)))
  np.testing.assert_allclose(p, 0.4 * 0.75 * g / (0.75 * g + 1 - g), rtol=1e-5)
  assert np.isfinite(ncn.calibrate(jnp.array([-1e4, 1e4]), 0.5, alpha=1.0, scale=10.0, offset=0.0)).all()


def test_the_hexagon_separates_ncn_from_an_auto_encoder():
  """Constant features on C6: nodes at distance 2 and 3 have the same ends, but one common neighbour and none."""
  ring = np.arange(6)
  adjacency = common_neighbors.adjacency(np.stack([ring, (ring + 1) % 6]), 6)
  graph, ends = as_graph(adjacency, np.ones((6, 3), "float32")), np.array([[0, 0], [2, 3]])
  for variant, differ in (("cn0", False), ("cn1", True), ("incn1cn1", True)):
    model = ncn.LinkPredictor(ncn.Encoder(H), ncn.Head(H, variant))
    pairs = common_neighbors.pairs(adjacency, ends, **model.head.needs)
    params = filled(jax.eval_shape(model.init, jax.random.key(0), graph, pairs), seed=3)
    logits = jax.jit(model.apply)(params, graph, pairs)
    assert (abs(logits[0] - logits[1]) > 1e-3) == differ, variant


@pytest.mark.parametrize("conv", ["gcn", "puremean", "max"])
def test_edges_of_weight_zero_are_no_edges(conv):
  adjacency, x = random_graph(2), np.random.default_rng(0).standard_normal((NODES, H)).astype("float32")
  encoder = ncn.Encoder(H, 2, conv)
  full = sparse.operator(as_graph(adjacency, x))
  keep = (full.rows + full.columns) % 3 > 0
  few = as_graph(common_neighbors.masked(adjacency, np.asarray(keep)), x)
  apply = jax.jit(encoder.init_with_output)
  without, _ = apply(jax.random.key(0), few, sparse.operator(few))
  masked, _ = apply(jax.random.key(0), few, full.replace_values(keep.astype("float32")))
  np.testing.assert_allclose(masked, without, atol=1e-5)


def test_dropout_acts_in_training_alone_and_depends_on_the_key():
  adjacency = random_graph(1)
  graph = as_graph(adjacency, np.random.default_rng(0).standard_normal((NODES, 5)).astype("float32"))
  ends = np.stack(np.triu_indices(NODES, 1))
  both = {"features": H, "variant": "incn1cn1"}
  model = ncn.cora(**both, encoder={"dropout": 0.3, "edge_dropout": 0.3}, head={"dropout": 0.3, "offset": 0.0})
  pairs = common_neighbors.pairs(adjacency, ends, **model.head.needs)
  variables = jax.jit(model.init)(jax.random.key(0), graph, pairs)
  apply = jax.jit(
    lambda train, key: model.apply(variables, graph, pairs, train=train, rngs={"dropout": key}), static_argnums=0
  )
  one, same, other = (apply(True, jax.random.key(k)) for k in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 0.01
  np.testing.assert_array_equal(apply(False, jax.random.key(1)), apply(False, jax.random.key(2)))


# -------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(
  ("builder", "features", "variant", "changes", "count"),
  [
    (ncn.cora, 1433, "cn1", {}, 764_163),
    (ncn.cora, 1433, "incn1cn1", {}, 764_163),
    (ncn.cora, 1433, "incn1cn1", {"learn_prior": True}, 830_212),
    (ncn.citeseer, 3703, "cn1", {}, 1_411_587),
    (ncn.citeseer, 3703, "incn1cn1", {"learn_prior": True}, 1_477_636),
    (ncn.pubmed, 500, "cn1", {}, 525_315),
    (ncn.pubmed, 500, "incn1cn1", {"learn_prior": True}, 591_364),
    (ncn.collab, 128, "cn1", {}, 33_922),
    (ncn.ppa, None, "cn1", {}, 33_538),
    (ncn.citation2, 128, "cn1", {}, 33_794),
    (ncn.ddi, None, "cn1", {}, 1_412_098),
  ],
)
def test_parameter_counts(builder, features, variant, changes, count):
  nodes = np.zeros(4, "int32") if features is None else np.zeros((4, features), "float32")
  adjacency, model = common_neighbors.adjacency(np.array([[0, 1], [1, 2]]), 4), builder(variant, **changes)
  pairs = common_neighbors.pairs(adjacency, np.array([[0], [2]]), **model.head.needs)
  shapes = jax.eval_shape(model.init, jax.random.key(0), as_graph(adjacency, nodes), pairs)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
  assert builder.__name__ in ncn.RECIPES


def test_official_blocks_that_a_variant_lacks_are_left_out_but_strangers_are_not():
  model = ncn.LinkPredictor(ncn.Encoder(H), ncn.Head(H, "cn0"))
  state = {f"xijlin.{i}.{kind}": np.ones((H, H) if (i, kind) in ((0, "weight"), (4, "weight")) else H)
           for i in (0, 1, 4) for kind in ("weight", "bias")}  # fmt: skip
  state |= {f"lin.{i}.{kind}": np.ones(H) for i in (0, 1) for kind in ("weight", "bias")}
  state |= {"lin.0.weight": np.ones((H, H)), "lin.8.weight": np.ones((1, H)), "lin.8.bias": np.ones(1)}
  encoder = {"xemb.1.weight": np.ones((H, 5)), "xemb.1.bias": np.ones(H)}
  unused = {"xlin.0.weight": np.ones((H, H)), "beta": np.ones(1)}
  assert set(ncn.from_torch(model, encoder, state | unused)["params"]["head"]) == {"product", "score"}
  with pytest.raises(ValueError, match="^state_dict: got 1 mismatches"):
    ncn.from_torch(model, encoder, state | {"stranger": np.ones(1)})
