"""Disrupted peers: who is gone has no influence, consensus has its closed form, graphs are those of networkx."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest
import tiny

from jaxlab.decentral import disrupted_p2p as dp
from jaxlab.decentral import gossip, simulator

N = 4
PATH = np.zeros((N, N), bool)
for i in range(N - 1):
  PATH[i, i + 1] = PATH[i + 1, i] = True
NOBODY = np.zeros(N, bool)
LEARNER = dp.learner(tiny.MOMENTUM, simulator.Work(4, 2))
INIT, STEP = jax.jit(LEARNER.init), jax.jit(LEARNER.step)  # one program for all worlds below


def world(removed=(), time=2, adjacency=PATH, data=None):
  gone = NOBODY.copy()
  gone[list(removed)] = True
  return dp.World(tiny.clients() if data is None else data, adjacency, gone, np.int32(time))


def run(given, rounds, state=None):
  state = INIT(jax.random.key(0), given) if state is None else state
  for _ in range(rounds):
    state, _ = STEP(state, given)
  return state


def of(state, ids):
  return jax.tree.map(lambda x: np.asarray(x)[np.array(ids)], state.clients.params)


# ---------------------------------------------------------------------------------------------------------- disruption


def test_the_removed_never_influence_survivors_and_stay_as_they_were():
  before = run(world(), 2)
  given = world([1], time=2)
  after = run(given, 3, before)
  chex.assert_trees_all_equal(of(after, [1]), of(before, [1]))
  broken = given.clients._replace(index=np.where(np.arange(N)[:, None] == 1, 23, given.clients.index))
  strange = before.replace(
    clients=before.clients.replace(params=jax.tree.map(lambda x: x.at[1].set(99.0), before.clients.params))
  )
  other = run(given._replace(clients=broken), 3, strange)
  chex.assert_trees_all_equal(of(other, [0, 2, 3]), of(after, [0, 2, 3]))


def test_the_removed_may_be_given_as_numbers():
  given = world([1], time=0)
  found, numbers = run(given, 2), run(given._replace(removed=given.removed.astype("int32")), 2)
  chex.assert_trees_all_equal(numbers.clients.params, found.clients.params)
  alive = np.array([1, 0, 1, 1])
  np.testing.assert_array_equal(dp.neighbourhood(PATH, alive), dp.neighbourhood(PATH, alive == 1))


def test_an_isolated_survivor_trains_alone():
  before = run(world(), 2)
  after = run(world([1], time=2), 3, before)  # 0 has lost its only neighbour
  alone = run(world(adjacency=np.zeros((N, N), bool)), 3, before)
  chex.assert_trees_all_equal(of(after, [0]), of(alone, [0]))
  assert (
    max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (of(after, [2]), of(alone, [2]))), strict=True))
    > 1e-4
  )


def test_nothing_happens_before_its_time_or_to_nobody():
  plain = run(world(), 3)
  chex.assert_trees_all_equal(run(world([0, 2], time=3), 3).clients.params, plain.clients.params)
  chex.assert_trees_all_equal(run(world([], time=0), 3).clients.params, plain.clients.params)
  early = run(world([0, 2], time=2), 3)
  assert np.abs(early.clients.params["Dense_0"]["kernel"] - plain.clients.params["Dense_0"]["kernel"]).max() > 1e-4
  assert int(plain.sent) == 3 * 6 and int(early.sent) == 2 * 6  # then 1 and 3 are alone


def test_complete_graph_and_one_full_step_are_central_gradient_descent():
  learner = dp.learner(tiny.SGD, simulator.Work())
  given = world(adjacency=~np.eye(N, dtype=bool))
  state = jax.jit(learner.init)(jax.random.key(0), given)
  start = jax.tree.map(lambda x: x[0], state.clients.params)
  for _ in range(3):
    state, _ = jax.jit(learner.step)(state, given)
  examples = given.clients.examples
  # A round averages, then trains: after 3 rounds an average is the third central step.
  central = tiny.descend(start, examples["image"], examples["label"], steps=3)
  chex.assert_trees_all_close(gossip.mean(state.clients.params), central, atol=1e-6)
  averaged = simulator.mix(dp.neighbourhood(given.adjacency, np.ones(N, bool)), state.clients)
  for i in range(N):
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], averaged.params), central, atol=1e-6)


def test_relays_pass_on_under_equal_weights_and_only_repeat_others_under_data_weights():
  counts = np.array([6, 0, 6, 0])
  alive = np.ones(N, bool)
  np.testing.assert_allclose(dp.neighbourhood(PATH, alive)[1], [1 / 3, 1 / 3, 1 / 3, 0])
  by_data = np.asarray(dp.neighbourhood(PATH, alive, counts))
  np.testing.assert_allclose(by_data[1], [1 / 2, 0, 1 / 2, 0])
  np.testing.assert_allclose(by_data[0], [1, 0, 0, 0])  # hears only a relay, whose weight is 0
  np.testing.assert_allclose(dp.neighbourhood(PATH, np.array([0, 1, 0, 1], bool), counts)[1], [0, 1, 0, 0])
  data = tiny.clients((6, 0, 6, 0), capacity=6)
  given = world(data=data)
  state = INIT(jax.random.key(0), given)
  after, metrics = STEP(state, given)
  np.testing.assert_array_equal(after.clients.step, [4, 0, 4, 0])
  assert metrics["loss"] > 0.3


def test_consensus_converges_to_the_weighted_mean_at_the_rate_of_the_second_eigenvalue():
  adjacency = dp.barabasi_albert(12, 2, seed=3)
  removed = dp.choose_removed(adjacency, 2 / 12, seed=0)
  m = np.asarray(dp.neighbourhood(adjacency, ~removed), np.float64)
  found, x = dp.structure(adjacency, removed), np.random.default_rng(0).standard_normal((12, 3))
  models, errors = {"w": jnp.asarray(x, jnp.float32)}, []
  degree = (adjacency & ~removed & ~removed[:, None]).sum(1) + 1
  limit = x.copy()
  for c in range(found.components):
    inside = found.component == c
    limit[inside] = np.average(x[inside], axis=0, weights=degree[inside])
  mixing = jax.jit(gossip.mix)
  for _ in range(150):
    models = mixing(m, models)
    errors.append(np.abs(np.asarray(models["w"]) - limit).max())
  assert errors[-1] < 1e-4
  eigenvalues = np.sort(np.abs(np.linalg.eigvals(m[np.ix_(~removed, ~removed)])))[::-1]
  second = eigenvalues[found.components]  # one eigenvalue 1 a component
  rate = (errors[40] / errors[20]) ** (1 / 20)
  assert rate == pytest.approx(second, rel=0.05)


def test_evaluation_is_of_every_peer():
  state = run(world([1], time=1), 2)
  accuracy = jax.jit(LEARNER.evaluate)(state, tiny.TEST)["accuracy"]
  for i in range(N):
    params = jax.tree.map(lambda x, i=i: x[i], state.clients.params)
    hits = np.argmax(tiny.Net().apply({"params": params}, tiny.TEST["image"]), 1) == tiny.TEST["label"]
    np.testing.assert_allclose(accuracy[i], hits.mean(), atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- graphs


@hypothesis.given(st.integers(3, 14), st.floats(0.1, 0.8), st.integers(0, 50))
def test_betweenness_and_structure_are_networkx(n, p, seed):
  adjacency = dp.erdos_renyi(n, p, seed=seed)
  graph = nx.from_numpy_array(adjacency)
  expected = nx.betweenness_centrality(graph, normalized=False)
  np.testing.assert_allclose(dp.betweenness(adjacency), [expected[i] for i in range(n)], atol=1e-9)
  removed = dp.choose_removed(adjacency, 0.3, "random", seed=seed)
  found, rest = dp.structure(adjacency, removed), graph.subgraph(np.flatnonzero(~removed).tolist())
  pieces = list(nx.connected_components(rest))
  assert found.components == len(pieces) and found.giant == max(map(len, pieces))
  for piece in pieces:
    assert len({int(found.component[i]) for i in piece}) == 1
    assert all(found.size[i] == len(piece) for i in piece)
  if len(pieces) == 1 and len(rest) > 1:
    np.testing.assert_allclose(
      found.connectivity, nx.algebraic_connectivity(rest, tol=1e-9, method="lanczos"), atol=1e-5
    )
  else:
    assert found.connectivity == 0
  for i in np.flatnonzero(~removed):
    steps = [nx.shortest_path_length(graph, i, k) for k in np.flatnonzero(removed) if nx.has_path(graph, i, k)]
    assert found.distance[i] == min(steps, default=np.inf)


def test_preferential_attachment_has_hubs():
  degrees, reference = [], []
  for seed in range(20):
    adjacency = dp.barabasi_albert(60, 2, seed=seed)
    assert adjacency.sum() == 2 * 2 * 58 and (adjacency == adjacency.T).all() and not adjacency.diagonal().any()
    assert nx.is_connected(nx.from_numpy_array(adjacency))
    degrees.append(adjacency.sum(1).max())
    reference.append(max(d for _, d in nx.barabasi_albert_graph(60, 2, seed=seed).degree))
  assert abs(np.mean(degrees) - np.mean(reference)) < 3  # their deviation over graphs is about 4
  blocks = dp.block_model([5, 5], 1.0, 0.0, seed=0)
  assert nx.number_connected_components(nx.from_numpy_array(blocks)) == 2 and dp.star(5).sum(1).tolist() == [
    4,
    1,
    1,
    1,
    1,
  ]


def test_the_most_central_are_removed():
  adjacency = dp.barabasi_albert(30, 2, seed=1)
  for by, score in (("degree", adjacency.sum(1)), ("betweenness", dp.betweenness(adjacency))):
    removed = dp.choose_removed(adjacency, 0.2, by, seed=0)
    assert removed.sum() == 6 and score[removed].min() >= score[~removed].max()
  draws = np.mean([dp.choose_removed(adjacency, 0.2, "random", seed=s) for s in range(500)], axis=0)
  np.testing.assert_allclose(draws, 0.2, atol=0.08)


def test_scenarios_share_data_as_stated():
  labels, removed = np.arange(240) % 3, np.array([True, True, False, False, False, False])
  a, b, same = (dp.scenario(labels, removed, kind, seed=0) for kind in ("A", "B", "B'"))
  assert [len(x) for x in a] == [39] * 6  # 80 of each class, 13 a peer
  assert [len(x) for x in b] == [0, 0, 60, 60, 60, 60]
  for i in (2, 3, 4, 5):
    np.testing.assert_array_equal(same[i], a[i])
  assert not len(same[0]) and not len(same[1])


def test_parameter_count():
  made = jax.eval_shape(dp.MLP().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
  assert sum(x.size for x in jax.tree.leaves(made)) == 567_434


def test_uncoordinated_starts_differ():
  learner = dp.learner(simulator.classifier(tiny.Net(), optax.sgd(0.1)), simulator.Work(), common=False)
  apart = jax.jit(learner.init)(jax.random.key(0), world())
  assert gossip.consensus(INIT(jax.random.key(0), world()).clients.params) == 0
  assert gossip.consensus(apart.clients.params) > 0.1
