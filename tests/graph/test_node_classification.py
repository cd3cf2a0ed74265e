"""The protocol against the same rules written as a plain loop with an optimizer of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxlab.graph import node_classification, sparse
from jaxlab.graph.nets import dagnn

N, F, C = 30, 8, 3


def make_task(splits=2, sparse_features=False):
  rng = np.random.default_rng(0)
  labels = np.arange(N) % C
  x = (np.eye(C, F)[labels] + rng.normal(size=(N, F))).astype("float32")
  ring = np.arange(N)
  senders, receivers = np.concatenate([[ring, (ring + C) % N], [(ring + C) % N, ring]], axis=1)
  masks = []
  for _ in range(splits):
    part = rng.permutation(N) // (N // 3)
    masks.append((part == 0, part == 1, part == 2))
  x = scipy.sparse.csr_array(np.where(x > 0.5, x, 0)) if sparse_features else x
  return node_classification.task(x, senders, receivers, labels, masks)


class Softmax(nn.Module):
  """Logistic regression on smoothed features, with a layer that is not decayed."""

  @nn.compact
  def __call__(self, graph, operator, *, train=False):
    x = nn.Dense(4, name="first")(graph.nodes)
    return nn.Dense(C, name="last")(sparse.propagate(operator, x))


def plain_loop(task, split, params, *, learning_rate, l2, epochs, patience, decayed):
  """Adam by its formulas, lists instead of ring buffers, and a loop that breaks."""

  def losses(params, mask):
    logits = Softmax().apply({"params": params}, task.graph, task.operator)
    loss = -jax.nn.log_softmax(logits)[np.arange(N), task.labels]
    return loss[mask].mean(), (logits[mask].argmax(1) == task.labels[mask]).mean()

  masks = [np.asarray(m[split]) for m in (task.train, task.validation, task.test)]
  gradient = jax.jit(jax.grad(lambda p: losses(p, masks[0])[0]))
  measure = jax.jit(lambda p: [losses(p, m) for m in masks[1:]])
  first = jax.tree.map(jnp.zeros_like, params)
  second, history, best = first, [], (np.inf,)
  for epoch in range(1, epochs + 1):
    g = gradient(params)
    g = {k: jax.tree.map(lambda g, p, k=k: g + l2 * p * (k in decayed), g[k], params[k]) for k in g}
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, g)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, g)
    params = jax.tree.map(
      lambda p, m, v, t=epoch: p - learning_rate * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8),
      params,
      first,
      second,
    )
    (loss, validation), (_, test) = measure(params)
    if loss < best[0]:
      best = (float(loss), float(validation), float(test))
    history.append(float(loss))
    if patience and epoch > epochs // 2 and history[-1] > np.mean(history[-(patience + 1) : -1]):
      break
  return best, epoch, params


@pytest.mark.parametrize(
  "recipe",
  [
    {"learning_rate": 0.1, "l2": 0.01, "epochs": 60, "patience": 5, "decayed": ("first",)},  # stops early
    {"learning_rate": 0.1, "l2": 0.01, "epochs": 18, "patience": 20, "decayed": ("first", "last")},  # a short history
    {"learning_rate": 0.1, "l2": 0.0, "epochs": 23, "patience": 0, "decayed": ()},  # never stops, uneven steps
  ],
)
def test_protocol_equals_a_plain_loop(recipe):
  task = make_task()
  learner = node_classification.learner(Softmax(), **recipe, epochs_per_step=5)
  runs = jax.jit(learner.init)(jax.random.key(0), task)
  start = runs.variables["params"]
  step = jax.jit(learner.step)
  for _ in range(12):
    runs, metrics = step(runs, task)
  assert metrics["running"] == 0
  stops = []
  for i in range(2):
    best, epoch, params = plain_loop(task, i, jax.tree.map(lambda leaf, i=i: leaf[i], start), **recipe)
    assert runs.epoch[i] == epoch
    np.testing.assert_allclose([leaf[i] for leaf in runs.best[:3]], best, atol=2e-4)
    jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2e-3), runs.variables["params"], params)
    stops.append(epoch)
  if recipe["patience"] == 5:
    assert max(stops) < recipe["epochs"]  # the rule was exercised
  np.testing.assert_allclose(metrics["test_accuracy"], np.mean(runs.best.test), rtol=1e-6)


def test_best_parameters_are_those_of_the_best_epoch():
  task = make_task(sparse_features=True)
  net = node_classification.GCN(C)
  learner = node_classification.learner(net, learning_rate=0.05, l2=5e-4, epochs=40, patience=10, decayed=("layer_0",))
  runs, step = learner.init(jax.random.key(0), task), jax.jit(learner.step)
  runs, _ = step(*(runs, task))
  runs, _ = step(runs, task)
  for i in range(2):
    variables = jax.tree.map(lambda leaf, i=i: leaf[i], runs.best.variables)
    logits = net.apply(variables, task.graph, task.operator)
    mask = np.asarray(task.validation[i])
    np.testing.assert_allclose((logits.argmax(1) == task.labels)[mask].mean(), runs.best.validation[i], atol=1e-6)
  first, second = runs.variables["params"]["layer_0"]["linear"]["kernel"]
  assert not np.allclose(first, second)


def test_batch_statistics_are_those_of_training_and_evaluation_uses_them():
  task = make_task()
  net = dagnn.arxiv(num_classes=C, hops=2, hidden=4, dropout=0.0)
  learner = node_classification.learner(net, **dagnn.RECIPES["arxiv"]._asdict(), epochs_per_step=1)
  step = jax.jit(learner.step)
  runs = jax.jit(learner.init)(jax.random.key(0), task)
  mean = np.zeros((2, 4))
  for _ in range(2):
    layer = runs.variables["params"]["hidden_layer"]
    mean = 0.9 * mean + 0.1 * (np.mean(task.graph.nodes @ layer["kernel"], axis=1) + layer["bias"])
    runs, _ = step(runs, task)
    np.testing.assert_allclose(runs.variables["batch_stats"]["norm"]["mean"], mean, atol=1e-6)
  for i in range(2):
    logits = net.apply(jax.tree.map(lambda leaf, i=i: leaf[i], runs.best.variables), task.graph, task.operator)
    loss = -jax.nn.log_softmax(logits)[np.arange(N), task.labels][np.asarray(task.validation[i])].mean()
    np.testing.assert_allclose(loss, runs.best.loss[i], rtol=1e-5)


def test_a_run_does_not_depend_on_its_neighbours():
  task = make_task()
  one = task._replace(train=task.train[:1], validation=task.validation[:1], test=task.test[:1])
  learner = node_classification.learner(node_classification.GCN(C), learning_rate=0.05, l2=0.0, epochs=10, patience=3)
  both, alone = (learner.step(learner.init(jax.random.key(3), t), t)[0] for t in (task, one))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:1], b, atol=1e-4), both.best, alone.best)


def test_mlp_does_not_see_the_graph():
  task = make_task()
  net = node_classification.GCN(C, convolution=False)
  variables = net.init(jax.random.key(0), task.graph)
  np.testing.assert_array_equal(
    net.apply(variables, task.graph),
    net.apply(variables, task.graph._replace(edges=0 * task.graph.edges)),
  )
  gcn = node_classification.GCN(C)
  variables = gcn.init(jax.random.key(0), task.graph)
  np.testing.assert_allclose(
    gcn.apply(variables, task.graph), gcn.apply(variables, task.graph, task.operator), atol=1e-6
  )
  assert not np.allclose(
    gcn.apply(variables, task.graph), gcn.apply(variables, task.graph._replace(edges=0 * task.graph.edges))
  )


@pytest.mark.parametrize("wrong", ["none", "empty", "unlabelled"])
def test_bad_splits_are_named(wrong):
  labels = np.array([0, 1, -1])
  mask = lambda *nodes: np.isin(np.arange(3), nodes)
  splits = {
    "none": [],
    "empty": [(mask(0), mask(1), mask())],
    "unlabelled": [(mask(0), mask(2), mask(1))],
  }[wrong]
  with pytest.raises(ValueError, match="^splits: got"):
    node_classification.task(np.ones((3, 2), "float32"), np.array([0, 1]), np.array([1, 0]), labels, splits)
