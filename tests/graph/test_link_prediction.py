import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxlab.graph import evaluation, link_prediction
from jaxlab.graph.links import neural_common_neighbor as ncn

NODES, SIZE = 30, 8


def edges():
  """A ring on which nodes up to four steps apart are linked: common neighbours tell a hidden edge from a stranger."""
  node = np.arange(NODES)
  return np.concatenate([np.stack([node, (node + step) % NODES]) for step in (1, 2, 3, 4)], axis=1)


@pytest.fixture(scope="module")
def task():
  features = np.random.default_rng(1).standard_normal((NODES, 4)).astype("float32")
  return link_prediction.task(features, NODES, evaluation.planetoid_link_split(edges(), NODES, 0))


@pytest.fixture(scope="module")
def model():
  return ncn.cora("incn1cn1", features=4, encoder={"input_dropout": 0.1, "tail_dropout": 0.1})


def batches(task, model, **changes):
  options = {"batch_size": SIZE, "seed": 0, "needs": model.head.needs} | changes
  return link_prediction.Batches(task, **options)


def dense(batch):
  matrix = np.zeros((NODES, NODES))
  matrix[np.asarray(batch.operator.rows), np.asarray(batch.operator.columns)] = np.asarray(batch.operator.values)
  return matrix


def test_a_batch_has_its_positive_edges_in_neither_graph(task, model):
  for step in range(4):
    batch = batches(task, model)(step)
    i, j = batch.pairs.left, batch.pairs.right
    positive = (batch.labels > 0) & batch.pairs.mask
    full, graph = task.adjacency.toarray(), dense(batch)
    assert (full[i, j][positive] == 1).all() and (full[i, j][~positive] == 0).all()
    assert (graph[i, j] == 0).all() and np.array_equal(graph, graph.T)
    assert graph.sum() == full.sum() - 2 * SIZE  # and nothing else is gone
    # The sets come from the same graph.
    sets = np.zeros((len(i), NODES))
    op = batch.pairs.common
    np.add.at(sets, (op.rows, op.columns), op.values)
    np.testing.assert_array_equal(sets[batch.pairs.mask], (graph[i] * graph[j])[batch.pairs.mask])
    np.testing.assert_allclose(batch.weight[positive].sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(batch.weight.sum(), 2, rtol=1e-6)


def test_without_removal_the_graph_is_whole(task, model):
  batch = batches(task, model, remove_targets=False)(0)
  np.testing.assert_array_equal(dense(batch), task.adjacency.toarray())
  np.testing.assert_array_equal(batch.pairs.exclusive.values.sum() > 0, True)


def test_an_epoch_visits_distinct_edges_and_the_next_has_new_negatives(task, model):
  source = batches(task, model)
  ends = [np.stack([b.pairs.left, b.pairs.right])[:, : 2 * SIZE] for b in map(source, range(2 * source.steps))]
  first, second = (np.concatenate(part, axis=1) for part in (ends[: source.steps], ends[source.steps :]))
  assert source.steps == task.split.train.shape[1] // SIZE
  positives = np.concatenate([e[:, :SIZE] for e in ends[: source.steps]], axis=1)
  assert np.unique(positives, axis=1).shape[1] == source.steps * SIZE
  assert not np.array_equal(first, second)


def test_batches_depend_on_seed_and_step_alone(task, model):
  one, other = batches(task, model, edge_dropout=0.3), batches(task, model, edge_dropout=0.3)
  forward = [one(step) for step in (0, 7, 40)]
  backward = [other(step) for step in (40, 7, 0)][::-1]
  chex.assert_trees_all_equal(forward, backward)
  different = batches(task, model, edge_dropout=0.3, seed=1, sizes=one.sizes)(0)
  assert not np.array_equal(different.pairs.left, forward[0].pairs.left)


def test_training_learns_compiles_once_and_keeps_a_part_of_rate_zero(task, model):
  learner = link_prediction.learner(model, encoder_rate=0.0, head_rate=0.02, k=5)
  source = batches(task, model, edge_dropout=0.1)
  chex.clear_trace_counter()
  step = jax.jit(chex.assert_max_traces(learner.step, n=1))
  first, losses = jax.jit(learner.init)(jax.random.key(0), source(0)), []
  assert set(first.params) == {"encoder", "head"}
  state = first
  for i in range(80):
    state, metrics = step(state, source(i))
    losses.append(float(metrics["loss"]))
  assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.1
  chex.assert_trees_all_equal(state.params["encoder"], first.params["encoder"])
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params["head"], first.params["head"])
  assert max(jax.tree.leaves(moved)) > 0.05

  rankings = link_prediction.ranking(task, model.head.needs)
  measured, parts = jax.jit(
    lambda state, rankings: (learner.evaluate(state, rankings), [
      part[1:] for part in link_prediction.scores(model, state.variables, rankings["both"])])
  )(state, rankings)  # fmt: skip
  sizes = []
  for name, (positive, negative) in zip(("validation", "test"), parts, strict=True):
    threshold = np.sort(np.asarray(negative))[-5]
    np.testing.assert_allclose(measured[name], np.mean(np.asarray(positive) > threshold), atol=1e-6)
    sizes += [len(positive), len(negative)]
  assert sizes == [getattr(task.split, name).shape[1] for name in task.split._fields[1:]]


def test_tests_may_see_validation_edges(task):
  model = ncn.cora("cn1", features=4)
  apart = link_prediction.ranking(task, model.head.needs, validation_edges=True)
  assert float(apart["validation"].operator.values.sum()) == 2 * task.split.train.shape[1]
  both = task.split.train.shape[1] + task.split.validation.shape[1]
  assert float(apart["test"].operator.values.sum()) == 2 * both
  assert [one.parts[0][0] for one in apart.values()] == ["validation", "test"]


def test_sparse_features_are_the_dense_ones(task):
  features = (np.random.default_rng(2).random((NODES, 6)) < 0.3).astype("float32")
  model = ncn.cora("cn1", features=4)
  two = [link_prediction.task(x, NODES, task.split) for x in (features, scipy.sparse.csr_array(features))]
  one = link_prediction.ranking(two[0], model.head.needs)["both"]
  other = link_prediction.ranking(two[1], model.head.needs)["both"]
  variables = jax.jit(model.init)(jax.random.key(0), one.graph, one.pairs)
  got, want = (jax.jit(model.apply)(variables, r.graph, r.pairs, r.operator) for r in (one, other))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_mean_reciprocal_rank_gives_each_positive_its_own_negatives():
  positive, negative = jnp.array([0.5, 0.1]), jnp.array([0.6, 0.4, 0.1, 0.0])
  np.testing.assert_allclose(link_prediction.hits(positive, negative, 0), (1 / 2 + 1 / 1.5) / 2, rtol=1e-6)


@pytest.mark.parametrize(
  ("argument", "call"),
  [
    ("batch_size", lambda task, model: batches(task, model, batch_size=0)),
    ("batch_size", lambda task, model: batches(task, model, batch_size=10**6)),
    ("k", lambda task, model: link_prediction.learner(model, encoder_rate=0.1, head_rate=0.1, k=-1)),
    (
      "split",
      lambda task, model: link_prediction.task(
        np.zeros((NODES, 1)), NODES, task.split._replace(train=np.tile(task.split.train, 2))
      ),
    ),
  ],
)
def test_bad_input(task, model, argument, call):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    call(task, model)
