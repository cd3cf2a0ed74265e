"""ForwardGNN against the official outputs, explicit graphs, and what the paper says must hold."""

import functools

import chex
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import sklearn.metrics

from jaxlab import train
from jaxlab.graph import layers, sparse, structure
from jaxlab.graph.nets import forward_gnn as fg
from jaxlab.graph.nets.forward_gnn import engine, joint

KINDS = ("gcn", "sage", "gat")
EVERY = fg.Recipe(epochs=3, validate_every=3, epochs_per_step=1)  # one epoch a step, no early stop


# ------------------------------------------------------------------------------------------------- official outputs


def mask(*nodes):
  return np.isin(np.arange(6), nodes)


def node_task(given, labels):
  split = [(mask(0, 1, 2, 3), mask(4), mask(5))]
  ends = np.concatenate([given["edges"], given["edges"][::-1]], axis=1)
  return fg.node_task(given["x"], *ends, given[labels], split)


def link_task(given):
  ends = given["edges"][:, [0, 1, 2, 3, 5]]
  graph = structure.from_edges(*ends, num_nodes=6, undirected=True)
  pairs = fg.Pairs(given["positive"][None].astype("int32"), given["negative"][None].astype("int32"))
  ones = jnp.ones((1, 10))
  return fg.LinkTask(jnp.asarray(given["x"]), sparse.operator(graph), ones, ones, pairs, pairs, pairs)


def start(method, params, drawn, task):
  """The state before training, of one split, with given parameters and draws."""
  state = jax.eval_shape(method.learner.init, jax.random.key(0), task)
  fill = lambda leaf: np.zeros(leaf.shape, leaf.dtype)
  state = jax.tree.map(fill, state)
  one = jax.tree.map(lambda leaf: np.asarray(leaf)[None], (params, drawn))
  run = state.run._replace(params=one[0], best=one[0], drawn=one[1], score=np.full(1, -np.inf, np.float32))
  return state._replace(run=run)


def layerwise(make, params, drawn, task):
  """Losses of three steps on each of two layers, the last output, and the scores."""
  method = make(net_of(params, task), EVERY)
  state, step = start(method, params, drawn, task), jax.jit(method.learner.step)
  losses = []
  for _ in range(8):  # a layer's fourth epoch validates its third update, and freezes
    before = int(state.layer)
    state, metrics = step(state, task)
    if before == state.layer:
      losses.append(metrics["loss"][0])
  assert state.layer == 2
  scores = predict(method, state, task)
  return {"losses": np.reshape(losses, (2, 3)), "hidden": state.run.hidden[0], "scores": scores}


def jointly(make, params, drawn, task, first):
  """The states that `first` makes, three epochs' losses, and the states and scores after them."""
  net = net_of(params, task)
  method = make(net, EVERY)
  state, step = start(method, params, drawn, task), jax.jit(method.learner.step)
  states = jax.jit(functools.partial(first, net))(params, one_split(task))
  state = state._replace(run=state.run._replace(states=[s[None] for s in states]))
  losses = []
  for _ in range(3):
    state, metrics = step(state, task)
    losses.append(metrics["loss"][0])
  scores, after = predict(method, state, task), jnp.stack([s[0] for s in state.run.states])
  return {"first": jnp.stack(states), "losses": np.stack(losses), "states": after, "scores": scores}


def backpropagated(make, params, drawn, task):
  """Three epochs' losses and the logits after them."""
  method = make(net_of(params, task), EVERY)
  state, step = start(method, params, drawn, task), jax.jit(method.learner.step)
  losses = []
  for _ in range(3):
    state, metrics = step(state, task)
    losses.append(metrics["loss"][0])
  return {"losses": np.stack(losses), "logits": predict(method, state, task)}


def predict(method, state, task, view="validation"):
  """Scores of the first split."""
  return jax.jit(method.predict, static_argnums=2)(state, task, view)[0]


def net_of(params, task):
  kind = {2: "gcn", 3: "sage", 4: "gat"}[len(params["layer_0"])]
  return fg.Net(int(task.labels.max()) + 1 if isinstance(task, fg.NodeTask) else None, 4, len(params), kind)


def one_split(task):
  take = lambda axis, field: field if axis is None else jax.tree.map(lambda leaf: leaf[0], field)
  return type(task)(*map(take, task.axes, task))


def convert(state):
  models = {}
  for name, array in state.items():
    model, rest = name.split(".", 1)
    models.setdefault(model, {})[rest] = array
  return {model: fg.from_torch(weights) for model, weights in models.items()}


def node_sweeps(virtual):
  def first(net, params, task):
    a = joint.augmented(task, virtual)
    names = [f"layer_{i}" for i in range(net.depth)]
    return joint.Sweeps(net.conv(), names, a.graph, fg.normalize(a.features), [fg.normalize(a.labels)]).first(params)

  return first


def link_sweeps(net, params, task):
  names = [f"layer_{i}" for i in range(net.depth)]
  return joint.Sweeps(net.conv(), names, task.graph("validation"), fg.normalize(task.features), []).first(params)


def every_output(params, given):
  """Every algorithm with GCN; SF with SAGE; backpropagation with GAT, whose last layer averages heads."""
  two, three, links = node_task(given, "labels"), node_task(given, "labels3"), link_task(given)
  virtual, virtual3 = given["virtual"], given["virtual3"]
  top_down = lambda net, recipe: fg.link_top_down(net, recipe._replace(l2=0.0))
  bottom_up = lambda net, p, task: joint.bottom_up(net, p, joint.augmented(task, virtual))
  runs = {f"sf_{kind}": (layerwise, fg.single_forward, virtual, two) for kind in ("gcn", "sage")}
  runs |= {
    "la_gcn": (layerwise, fg.label_appending, given["la_negatives"], three),
    "vn_gcn": (layerwise, fg.virtual_nodes, (virtual3, given["vn_negatives"]), three),
    "linkfl_gcn": (layerwise, fg.link_forward, (), links),
    "linkff_gcn": (layerwise, functools.partial(fg.link_forward, loss="ff"), (), links),
    "t2l_gcn": (jointly, fg.top_to_loss, virtual, two, bottom_up),
    "t2i_gcn": (jointly, fg.top_to_input, virtual, two, node_sweeps(virtual)),
    "linktd_gcn": (jointly, top_down, (), links, link_sweeps),
  }
  runs |= {f"bp_{kind}": (backpropagated, fg.backprop, (), two) for kind in ("gcn", "gat")}
  out = {}
  for name, (how, make, drawn, task, *first) in runs.items():
    results = how(make, params[name], drawn, task, *first)
    out |= {f"{name}_{part}": value for part, value in results.items()}
  return out


def test_official_outputs():
  """Losses of three steps of every algorithm, states or frozen outputs after them, and scores."""
  golden_rule.check("forward_gnn", convert, every_output, atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- augmented graph


def small_graph(nodes=24, seed=0):
  rng = np.random.default_rng(seed)
  ends = rng.integers(0, nodes, (2, 3 * nodes))
  return structure.from_edges(*ends, num_nodes=nodes, undirected=True, self_loops="drop", duplicates="drop")


def explicit(graph, links):
  """The graph with virtual nodes as an ordinary edge list."""
  n = len(links)
  real, virtual = np.nonzero(links)
  senders = np.concatenate([graph.senders, real, virtual + n])
  receivers = np.concatenate([graph.receivers, virtual + n, real])
  return structure.from_edges(senders, receivers, num_nodes=n + links.shape[1])


def test_only_training_nodes_are_linked_each_with_its_class():
  graph, labels, train = small_graph(), np.arange(24) % 3, np.arange(24) < 14
  links = np.asarray(fg.class_links(jnp.asarray(labels), jnp.asarray(train), 3))
  augmented = explicit(graph, links)
  assert structure.num_nodes(augmented) == 24 + 3
  assert len(augmented.senders) == len(graph.senders) + 2 * train.sum()
  np.testing.assert_array_equal(links.sum(axis=1), train)
  np.testing.assert_array_equal(links.argmax(axis=1)[train], labels[train])
  # Unit vectors through the mean of neighbours tell which virtual node reaches which real one, and back.
  reach = fg.aggregate("sage", fg.bordered(graph, jnp.asarray(links)), jnp.eye(27)) > 0
  np.testing.assert_array_equal(reach[:24, 24:], links > 0)
  np.testing.assert_array_equal(reach[24:, :24], links.T > 0)
  assert not reach[24:, 24:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_convolution_with_a_border_is_that_of_the_whole_graph(kind):
  """Against the layers of `graph.layers` on the explicit edge list, gradients too."""
  graph = small_graph()
  links = np.eye(3, dtype="float32")[np.arange(24) % 3] * (np.arange(24) < 14)[:, None]
  x = np.random.default_rng(1).standard_normal((27, 5)).astype("float32")
  ours = fg.Conv(8, kind, heads=2)
  params = jax.jit(ours.init)(jax.random.key(0), fg.bordered(graph, links), [jnp.asarray(x)])["params"]
  params = jax.tree.map(lambda w: w + 0.1, params)  # a bias that is not zero
  whole = explicit(graph, links)
  if kind == "gcn":
    theirs, whole = layers.GCNConv(8), structure.normalize(whole)
    renamed = {"linear": {"kernel": params["linear_kernel"]}, "bias": params["bias"]}
  elif kind == "sage":
    theirs, neighbor = layers.SAGEConv(8), {"kernel": params["neighbor_kernel"]}
    renamed = {"neighbor": neighbor, "root": {"kernel": params["root_kernel"], "bias": params["bias"]}}
  else:
    theirs, whole = layers.GATConv(4, 2), structure.add_self_loops(whole)
    renamed = dict(params) | {"linear": {"kernel": params["linear_kernel"]}}
    del renamed["linear_kernel"]

  def loss(apply, weights, x):
    y = apply(weights, x)
    return jnp.sum(jnp.sin(y)), y

  bordered = fg.bordered(graph, jnp.asarray(links))
  mine = lambda w, x: ours.apply({"params": w}, bordered, [x])
  operator = sparse.operator(whole)
  other = lambda w, x: theirs.apply({"params": w}, operator, x)
  (_, y), dx = jax.jit(jax.value_and_grad(functools.partial(loss, mine), 1, has_aux=True))(params, x)
  (_, z), dz = jax.jit(jax.value_and_grad(functools.partial(loss, other), 1, has_aux=True))(renamed, x)
  np.testing.assert_allclose(y, z, atol=2e-5)
  np.testing.assert_allclose(dx, dz, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_weight_zero_are_no_edges(kind):
  graph = small_graph()
  keep = np.random.default_rng(2).permutation(len(graph.senders)) < len(graph.senders) // 2
  full = fg.bordered(graph)
  part = full._replace(adjacency=full.adjacency.replace_values(keep.astype("float32")))
  fewer = fg.bordered(graph._replace(senders=graph.senders[keep], receivers=graph.receivers[keep]))
  x = jax.random.normal(jax.random.key(0), (24, 5))
  conv = fg.Conv(8, kind, heads=2)
  params, apply = jax.jit(conv.init)(jax.random.key(1), full, [x]), jax.jit(conv.apply)
  np.testing.assert_allclose(apply(params, part, [x]), apply(params, fewer, [x]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_input_is_aggregated_once(kind):
  """A (x W) = (A x) W in loss and gradient, for blocks dense and sparse; attention has no such form."""
  task, _ = tiny_task()
  links = fg.class_links(task.labels, task.train[0], 3)
  graph = fg.Bordered(task.adjacency, links, task.train[0].astype("float32"))
  wide = scipy.sparse.random_array((27, 6), density=0.3, rng=np.random.default_rng(0), dtype="float32")
  x, y = sparse.from_scipy(wide), jax.random.normal(jax.random.key(0), (27, 4))
  conv = fg.Conv(8, kind, heads=2)
  params = jax.jit(conv.init)(jax.random.key(1), graph, [x, y])
  dense = jnp.concatenate([jnp.asarray(wide.toarray()), y], axis=1)

  @jax.jit
  def gradient(blocks, known):
    return jax.value_and_grad(lambda p: jnp.sum(jax.nn.relu(conv.apply(p, graph, blocks, known)) ** 2))(params)

  known = fg.frozen_aggregate(kind, graph, [x, y])
  assert [k is not None for k in known] == [False, kind != "gat"]
  whole = gradient([dense], fg.frozen_aggregate(kind, graph, [dense]))
  for blocks, frozen in (([x, y], known), ([x, y], None), ([dense], None)):
    chex.assert_trees_all_close(gradient(blocks, frozen), whole, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- what must hold


def tiny_task(splits=1, nodes=24, features=6):
  """Three classes that features and neighbours tell apart, on a random graph."""
  rng = np.random.default_rng(0)
  labels = np.arange(nodes) % 3
  x = rng.uniform(0, 1, (nodes, features)).astype("float32")
  x[np.arange(nodes), labels] += 1
  graph = small_graph(nodes)
  parts = [np.random.default_rng(s).permutation(nodes) % 5 for s in range(splits)]
  masks = [(p < 3, p == 3, p == 4) for p in parts]
  return fg.node_task(x / x.sum(1, keepdims=True), graph.senders, graph.receivers, labels, masks), masks


@pytest.fixture(scope="module")
def trained():
  """SF on two splits after each step of two epochs: states before, between and after the layers."""
  task, _ = tiny_task(2)
  method = fg.single_forward(fg.Net(3, 8, 3), fg.Recipe(0.01, epochs=20, patience=4, epochs_per_step=2))
  step, states, metrics = jax.jit(method.learner.step), [jax.jit(method.learner.init)(jax.random.key(0), task)], []
  for _ in range(method.steps):
    state, m = step(states[-1], task)
    states.append(state)
    metrics.append(m)
  return task, method, states, metrics


def test_a_layer_is_frozen_while_others_train(trained):
  _, _, states, _ = trained
  assert states[-1].layer == 3
  for before, after in zip(states[:-1], states[1:], strict=True):
    layer = int(before.layer)
    for i in range(3):
      same = jax.tree.map(np.array_equal, before.run.params[f"layer_{i}"], after.run.params[f"layer_{i}"])
      assert all(jax.tree.leaves(same)) or i == layer
  first = next(s for s in states if s.layer == 1)  # bits of layer 0 when layer 1 begins, and at the end
  chex.assert_trees_all_equal(first.run.params["layer_0"], states[-1].run.params["layer_0"])
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[0].run.params, states[-1].run.params)
  assert min(jax.tree.leaves(moved)) > 1e-4  # each was trained


def test_an_ended_run_stays(trained):
  task, method, states, _ = trained
  again, _ = jax.jit(method.learner.step)(states[-1], task)
  chex.assert_trees_all_equal(again, states[-1])


def test_each_layer_keeps_its_best_parameters(trained):
  """The metric of a frozen stack is the best that validation saw while its last layer trained."""
  task, method, states, metrics = trained
  by_depth = jax.jit(method.learner.evaluate)(states[-1], task)["validation_by_depth"]  # [S, 3]
  for layer in range(3):
    seen = [m["validation"] for m, s in zip(metrics, states[1:], strict=True) if s.layer == layer]
    end = next(m["validation"] for m, s in zip(metrics, states[1:], strict=True) if s.layer == layer + 1)
    np.testing.assert_allclose(by_depth[:, layer], np.max([*seen, end], axis=0) if layer == 2 else end, atol=1e-6)


def test_gradients_stay_inside_a_layer():
  """d loss_l / d theta_k = 0 for k other than l where inputs are frozen, and not where they are not."""
  task, _ = tiny_task()
  net = fg.Net(3, 8, 3)
  links = fg.class_links(task.labels, task.train[0], 3)
  virtual = jax.random.normal(jax.random.key(3), (3, 6))
  graph = fg.Bordered(task.adjacency, links, task.train[0].astype("float32"))
  state = jax.jit(fg.single_forward(net).learner.init)(jax.random.key(0), task)
  params = jax.tree.map(lambda leaf: leaf[0], state.run.params)

  def losses(params, freeze):
    h, values = fg.normalize(fg.stack(task.features, virtual)), []
    for i in range(3):
      z = jax.nn.relu(net.conv().apply({"params": params[f"layer_{i}"]}, graph, [h]))
      values.append(engine.mean_cross_entropy(fg.class_logits(z, 3), task.labels, task.train[0]))
      h = fg.normalize(jax.lax.stop_gradient(z) if freeze else z)
    return jnp.stack(values)

  for freeze in (True, False):
    jacobian = jax.jit(jax.jacrev(functools.partial(losses, freeze=freeze)))(params)
    reach = np.array([
      [max(float(np.abs(leaf[i]).max()) for leaf in jax.tree.leaves(jacobian[f"layer_{k}"])) > 0 for k in range(3)]
      for i in range(3)
    ])  # fmt: skip
    np.testing.assert_array_equal(reach, np.eye(3, dtype=bool) if freeze else np.tri(3, dtype=bool))


def test_memory_does_not_grow_with_depth():
  """Scratch memory of a compiled step: an activation of every node and layer is kept by backpropagation alone."""
  task, _ = tiny_task(nodes=4000)

  def scratch(make, depth):
    learner = make(fg.Net(3, 16, depth), fg.Recipe(epochs_per_step=1)).learner
    state = jax.eval_shape(learner.init, jax.random.key(0), task)
    compiled = jax.jit(learner.step, donate_argnums=0).lower(state, task).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  activation = 4000 * 16 * 4
  forward = scratch(fg.single_forward, 2), scratch(fg.single_forward, 5)
  back = [scratch(fg.backprop, depth) for depth in (2, 3, 5)]
  assert (forward[1] - forward[0]) / 3 < 0.05 * activation
  assert (back[2] - back[0]) / 3 > activation
  assert (back[2] - back[1]) / 2 == pytest.approx(back[1] - back[0], rel=0.1)  # linear


def test_goodness_ignores_the_scale_of_the_input_unless_it_is_not_normalised():
  """Without n a layer could pass on the goodness of the one below: scaled input, scaled goodness."""
  task, _ = tiny_task()
  graph, x = fg.Bordered(task.adjacency, jnp.zeros((24, 0)), jnp.zeros(24)), task.features
  conv = fg.Conv(8)
  params = jax.jit(conv.init)(jax.random.key(0), graph, [x])
  goodness = jax.jit(lambda x: jnp.sum(jax.nn.relu(conv.apply(params, graph, [x])) ** 2, axis=1))
  np.testing.assert_allclose(goodness(fg.normalize(3 * x)), goodness(fg.normalize(x)), rtol=1e-5)
  np.testing.assert_allclose(goodness(3 * x), 9 * goodness(x), rtol=1e-5)


def test_forward_forward_loss_at_the_threshold():
  """ln 2 for positive and ln 2 for negative examples; other values by hand; nodes outside the mask do not count."""
  mask = np.array([True, True, False])
  at = jnp.full((4, 3), 2.0)
  np.testing.assert_allclose(fg.goodness_loss(at, mask, 2.0), 2 * np.log(2), rtol=1e-6)
  goodness = np.array([[3.0, 1.0, 9.0], [0.5, 2.5, 9.0], [4.0, 0.0, 9.0]])
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  by_hand = -np.log(sigmoid(goodness[0, :2] - 2)).mean() - np.log(1 - sigmoid(goodness[1:, :2] - 2)).mean()
  np.testing.assert_allclose(fg.goodness_loss(jnp.asarray(goodness), mask, 2.0), by_hand, rtol=1e-6)


def test_negative_classes_are_all_the_wrong_ones_in_random_order():
  labels = jnp.arange(200) % 4
  wrong = np.asarray(fg.wrong_classes(jax.random.key(0), labels, 4))
  for i in range(200):
    assert sorted([*wrong[i], int(labels[i])]) == [0, 1, 2, 3]
  assert len({tuple(row) for row in wrong[labels == 0]}) == 6  # every order occurs


def test_published_parameter_counts():
  """Cora-ML: (d + 1) h of GCN, (2 d + 1) h of SAGE, d h + 3 h of GAT, for each layer."""
  n, f, c, h = 40, 2879, 7, 128
  ends = np.arange(n), (np.arange(n) + 1) % n
  both = np.concatenate(ends), np.concatenate(ends[::-1])
  labels, part = np.arange(n) % c, np.arange(n) % 5
  task = fg.node_task(np.ones((n, f), "float32"), *both, labels, [(part < 3, part == 3, part == 4)])
  links = fg.link_task(np.ones((n, f), "float32"), *both, [0])

  def count(method, task):
    params = jax.eval_shape(method.learner.init, jax.random.key(0), task).run.params
    return sum(leaf.size for leaf in jax.tree.leaves(params))

  net = lambda kind, depth=2, classes=c: fg.Net(classes, h, depth, kind)
  assert count(fg.single_forward(net("gcn")), task) == 385152
  assert count(fg.single_forward(net("gcn", 4)), task) == 385152 + 2 * 129 * h
  assert count(fg.single_forward(net("sage")), task) == (2 * f + 1) * h + 257 * h
  assert count(fg.single_forward(net("gat")), task) == f * h + 3 * h + h * h + 3 * h
  assert count(fg.top_to_loss(net("gcn")), task) == 385152
  assert count(fg.virtual_nodes(net("gcn")), task) == 385152
  assert count(fg.label_appending(net("gcn")), task) == 385152 + c * h
  assert count(fg.top_to_input(net("gcn")), task) == (f + h + 1) * h + (h + c + 1) * h
  assert count(fg.backprop(net("gcn")), task) == (f + 1) * h + (h + 1) * c
  assert count(fg.backprop(net("gat")), task) == f * h + 3 * h + h * 4 * c + 8 * c + c  # the last averages heads
  assert count(fg.link_forward(net("gcn", classes=None)), links) == 385152
  assert count(fg.link_top_down(net("gcn", classes=None)), links) == (f + h + 1) * h + 129 * h
  assert count(fg.backprop(net("gcn", classes=None)), links) == 385152


def test_splits_that_train_together_train_as_alone():
  """Each with its own masks and early stop, and a run of one epoch a step is that of many."""
  task, _ = tiny_task(2)
  key = jax.random.key(1)

  def run(task, per_step, start=None):
    recipe = fg.Recipe(0.01, epochs=30, patience=3, epochs_per_step=per_step)
    method = fg.single_forward(fg.Net(3, 8, 2), recipe)
    state, step = begin if start is None else start, jax.jit(method.learner.step)
    for _ in range(method.steps):
      state, _ = step(state, task)
    return state

  begin = jax.jit(fg.single_forward(fg.Net(3, 8, 2)).learner.init)(key, task)
  both, other = run(task, 50), run(task, 7)
  chex.assert_trees_all_close(both.run.params, other.run.params, atol=1e-6)
  second = lambda axis, field: field if axis is None else field[1:]
  alone = fg.NodeTask(*map(second, task.axes, task))
  start = begin._replace(run=jax.tree.map(lambda leaf: leaf[1:], begin.run))
  single = run(alone, 50, start)
  chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1:], both.run.params), single.run.params, atol=1e-5)


def test_prediction_of_forward_forward_asks_for_all_classes_at_once():
  """FF-LA by hand: every node in question carries class c, training nodes their own, the rest the uniform vector."""
  task, masks = tiny_task()
  method = fg.label_appending(fg.Net(3, 8, 2), fg.Recipe(epochs=4, epochs_per_step=5))
  state = jax.jit(method.learner.init)(jax.random.key(0), task)._replace(layer=jnp.asarray(2))
  scores = predict(method, state, task, "test")
  params = jax.tree.map(lambda leaf: np.asarray(leaf[0]), state.run.params)
  a = np.zeros((24, 24))
  a[task.adjacency.rows, task.adjacency.columns] = 1
  a = (a + np.eye(24)) / np.sqrt(np.outer(a.sum(1) + 1, a.sum(1) + 1))
  known, asked = masks[0][0] | masks[0][1], masks[0][2]
  for c in range(3):
    label = np.full((24, 3), 1 / 3)
    label[known] = np.eye(3)[task.labels][known]
    label[asked] = np.eye(3)[c]
    h, total = np.concatenate([task.features, label], axis=1), 0
    for name in ("layer_0", "layer_1"):
      h = h / np.linalg.norm(h, axis=1, keepdims=True)
      h = np.maximum(a @ h @ params[name]["linear_kernel"] + params[name]["bias"], 0)
      total = total + (h**2).mean(axis=1) - 2
    np.testing.assert_allclose(scores[:, c], total, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- splits, links


def test_node_splits_are_those_of_the_paper():
  splits = fg.node_splits(2995)
  assert [tuple(int(m.sum()) for m in split) for split in splits] == [(1916, 480, 599)] * 5
  assert (sum(split.test.astype(int) for split in splits) == 1).all()
  assert all((split.train.astype(int) + split.validation + split.test == 1).all() for split in splits)
  assert len({split.test.tobytes() for split in splits}) == 5


def test_link_task_hides_what_is_asked():
  graph = small_graph(60)
  task = fg.link_task(np.ones((60, 4), "float32"), graph.senders, graph.receivers, [0, 1])
  rows, columns = np.asarray(task.adjacency.rows), np.asarray(task.adjacency.columns)
  total = len(rows) // 2
  for s in range(2):
    parts = {}
    for name in ("train", "validation", "test"):
      pairs = getattr(task, name)
      parts[name] = {tuple(p) for p in np.asarray(pairs.positive[s]).T}
      negative = {tuple(p) for p in np.asarray(pairs.negative[s]).T}
      assert len(negative) == len(parts[name]) and not negative & set(zip(columns, rows, strict=True))
    assert len(parts["train"] | parts["validation"] | parts["test"]) == total
    assert len(parts["validation"]) == int(0.16 * total) and len(parts["test"]) == int(0.2 * total)
    for values, names in ((task.messages, ["train"]), (task.test_messages, ["train", "validation"])):
      seen = {(min(i, j), max(i, j)) for i, j, v in zip(rows, columns, values[s], strict=True) if v > 0}
      assert seen == set().union(*(parts[name] for name in names))


def test_area_under_the_curve():
  """Against scikit-learn, ties included."""
  graph = small_graph(60)
  task = fg.link_task(np.ones((60, 4), "float32"), graph.senders, graph.receivers, [0])
  scores = np.random.default_rng(0).integers(0, 9, 40) / 8.0
  truth = np.arange(40) < 20
  got = task.metric(jnp.asarray(scores, "float32"), "test")
  np.testing.assert_allclose(got, sklearn.metrics.roc_auc_score(truth, scores), rtol=1e-6)


def test_bfloat16_trains():
  task, _ = tiny_task()
  method = fg.single_forward(fg.Net(3, 8, 2, dtype="bfloat16"), fg.Recipe(0.01, epochs=4, epochs_per_step=10))
  state, metrics = jax.jit(method.learner.step)(jax.jit(method.learner.init)(jax.random.key(0), task), task)
  assert state.layer == 1 and state.run.hidden.dtype == jnp.bfloat16 and np.isfinite(metrics["loss"]).all()


def test_fit_resumes_between_layers(tmp_path):
  """Through `train.fit`, killed and restarted, the run ends with the same bits."""
  task, _ = tiny_task()
  method = fg.virtual_nodes(fg.Net(3, 8, 2), fg.Recipe(0.01, epochs=8, patience=2, epochs_per_step=4))
  learner = method.learner._replace(init=jax.jit(method.learner.init), step=jax.jit(method.learner.step))
  run = functools.partial(train.fit, learner, task, key=jax.random.key(0), progress=False, tensorboard=False)
  whole = run(steps=method.steps, workdir=tmp_path / "whole")
  run(steps=3, workdir=tmp_path / "parts", save_every=1)
  parts = run(steps=method.steps, workdir=tmp_path / "parts")
  assert whole.layer == 2
  chex.assert_trees_all_equal(whole, parts)
