"""Clients, partitions and gossip against plain NumPy; FedAvg and decentralised SGD in their degenerate cases."""

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxlab import train
from jaxlab.decentral import gossip, partition, simulator

FULL = simulator.Work()  # one step on all data


# --------------------------------------------------------------------------------------------------------- partitions


@hypothesis.given(st.integers(2, 7), st.floats(0.05, 50), st.integers(0, 99))
def test_dirichlet_gives_every_example_one_owner(clients, alpha, seed):
  labels = np.random.default_rng(seed).integers(0, 4, 60)
  parts = partition.dirichlet(labels, clients, alpha, min_size=0, seed=seed)
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(60))


def test_dirichlet_is_uneven_for_small_alpha_and_even_for_large():
  labels = np.arange(4000) % 10
  spread = {}
  for alpha in (0.1, 1000.0):
    parts = partition.dirichlet(labels, 8, alpha, seed=0)
    shares = np.stack([np.bincount(labels[p], minlength=10) / len(p) for p in parts])
    spread[alpha] = shares.std()
  assert spread[1000.0] < 0.01 < 0.15 < spread[0.1]
  with pytest.raises(ValueError, match="^min_size: got 501"):
    partition.dirichlet(labels, 8, 1.0, min_size=501, seed=0)


def test_iid_is_stratified_disjoint_and_leaves_relays_empty():
  labels, holders = np.arange(47) % 3, np.array([True, False, True, True])
  parts = partition.iid(labels, 4, holders=holders, seed=1)
  assert len(parts[1]) == 0
  assert len(set(np.concatenate(parts))) == sum(map(len, parts)) == 45
  for part in (parts[0], parts[2], parts[3]):
    np.testing.assert_array_equal(np.bincount(labels[part]), [5, 5, 5])


def test_draws_follow_the_clients_weights():
  labels = np.array([0] * 3 + [1] * 10 + [2] * 1)
  weights = np.array([[0.2, 0.8, 0.0], [0.0, 0.0, 1.0]], "float32")
  rows = np.asarray(partition.draw(jax.random.key(0), weights, partition.classes(labels), 20_000))
  share = np.stack([np.bincount(labels[row], minlength=3) for row in rows]) / 20_000
  np.testing.assert_allclose(share, weights, atol=0.01)
  np.testing.assert_allclose(np.bincount(rows[0], minlength=14)[3:13] / 20_000, 0.08, atol=0.01)


# ------------------------------------------------------------------------------------------------------------- gossip


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_fixed_topologies_are_doubly_stochastic(n):
  for matrix in [make(n) for make in gossip.TOPOLOGIES.values()] + list(gossip.one_peer_exponential(n)):
    np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)


def test_one_peer_exponential_averages_exactly_after_a_period():
  product = np.linalg.multi_dot([np.eye(8), *gossip.one_peer_exponential(8)])
  np.testing.assert_allclose(product, 1 / 8, atol=1e-7)


def test_random_rows_have_the_stated_sizes_and_mean():
  draw = jax.jit(jax.vmap(gossip.random, (0, None, None)))
  keys, everyone = jax.random.split(jax.random.key(0), 4000), np.ones((5, 5), bool)
  for peers, sizes in ((0.2, {1: 0.8, 2: 0.2}), (2.0, {3: 1.0}), (4.0, {5: 1.0}), (9.0, {5: 1.0})):
    matrices = np.asarray(draw(keys, peers, everyone))
    np.testing.assert_allclose(matrices.sum(2), 1, atol=1e-6)
    assert (np.diagonal(matrices, axis1=1, axis2=2) > 0).all()
    found = np.bincount((matrices > 0).sum(2).ravel(), minlength=6) / matrices[..., 0].size
    np.testing.assert_allclose(found, [sizes.get(k, 0) for k in range(6)], atol=0.012)
    np.testing.assert_allclose(matrices.sum(1).mean(0), 1, atol=0.03)
  ring = np.asarray(draw(keys[:500], 1.5, gossip.neighbours(5, [-1, 1])))
  assert not ring[:, gossip.ring(5) == 0].any()
  assert set(np.unique((ring > 0).sum(2))) == {2, 3}


def test_restricted_average_ignores_the_dead_and_follows_weights():
  path = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]])
  alive = np.array([True, True, True, False])
  np.testing.assert_allclose(
    gossip.restrict(path, alive), [[1 / 2, 1 / 2, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0, 1 / 2, 1 / 2, 0], [0, 0, 0, 1]]
  )
  weighted = gossip.restrict(path, alive, np.array([3.0, 1.0, 0.0, 5.0]))
  np.testing.assert_allclose(weighted, [[3 / 4, 1 / 4, 0, 0], [3 / 4, 1 / 4, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
  nothing = gossip.restrict(path, alive, np.zeros(4))
  np.testing.assert_allclose(nothing, gossip.restrict(path, alive))


def test_mixing_is_a_matrix_product_and_consensus_its_spread():
  rng = np.random.default_rng(0)
  models = {"a": rng.standard_normal((3, 2, 2)).astype("float32"), "n": np.arange(3)}
  matrix = rng.random((3, 3)).astype("float32")
  mixed = gossip.mix(matrix, jax.tree.map(jnp.asarray, models))
  np.testing.assert_allclose(mixed["a"], np.einsum("ij,jkl->ikl", matrix, models["a"]), rtol=1e-5)
  np.testing.assert_array_equal(mixed["n"], [0, 1, 2])
  spread = ((models["a"] - models["a"].mean(0)) ** 2).sum() / 3
  np.testing.assert_allclose(gossip.consensus({"a": models["a"]}), spread, rtol=1e-5)
  once = gossip.mix(gossip.complete(3), {"a": models["a"]})
  assert gossip.consensus(once) < 1e-12
  np.testing.assert_allclose(gossip.mean(once)["a"], models["a"].mean(0), atol=1e-6)
  chex.assert_trees_all_close(gossip.mix(gossip.complete(3), once), once, atol=1e-6)
  assert gossip.transfers(gossip.ring(5)) == 10


def test_many_models_are_mixed_by_few_entries_or_by_all_alike():
  rng = np.random.default_rng(0)
  models = {"a": rng.standard_normal((70, 3)).astype("float32"), "b": rng.standard_normal((70, 2, 2)).astype("float32")}
  mixing = jax.jit(gossip.mix)
  for entries in (1, 2, 3, 8, 9, 70):
    matrix = np.zeros((70, 70), "float32")
    for row in matrix:
      row[rng.permutation(70)[:entries]] = rng.random(entries)
    mixed = mixing(matrix, models)
    np.testing.assert_allclose(mixed["a"], matrix @ models["a"], atol=1e-5)
    np.testing.assert_allclose(mixed["b"].reshape(70, 4), matrix @ models["b"].reshape(70, 4), atol=1e-5)


@pytest.mark.parametrize("n", [3, 70])
def test_a_model_that_has_diverged_reaches_those_alone_that_hear_it(n):
  w = np.eye(n, dtype="float32")
  w[0, :3] = 0.5, 0.25, 0.25
  models = {"a": jnp.arange(n * 2.0).reshape(n, 2).at[2, 1].set(jnp.inf), "b": jnp.ones(n)}
  mixed = gossip.mix(w, models)
  sound = np.setdiff1d(np.arange(n), [0, 2])
  assert np.isnan(mixed["a"][jnp.array([0, 2])]).all()
  np.testing.assert_array_equal(mixed["a"][sound], models["a"][sound])
  np.testing.assert_array_equal(mixed["b"], 1)


# -------------------------------------------------------------------------------------------------- minibatches, rounds


@hypothesis.given(st.integers(0, 7), st.integers(1, 9), st.integers(1, 3))
def test_an_epoch_sees_every_example_once(count, size, epochs):
  place, real = simulator.minibatches(jax.random.key(count), jnp.asarray(count), 7, simulator.Work(size, epochs))
  place, real = np.asarray(place), np.asarray(real)
  assert place.shape == real.shape == (epochs * -(-7 // size), size)
  for part, mask in zip(np.split(place, epochs), np.split(real, epochs), strict=True):
    np.testing.assert_array_equal(np.sort(part[mask]), np.arange(count))
  assert (place < max(count, 1)).all()  # what is not real is the client's own, too


def test_a_number_of_steps_runs_through_passes():
  place, real = simulator.minibatches(jax.random.key(0), jnp.asarray(6), 6, simulator.Work(4, steps=3))
  assert np.asarray(real).all()
  for part in np.split(np.asarray(place).ravel(), 2):
    np.testing.assert_array_equal(np.sort(part), np.arange(6))
  place, _ = simulator.minibatches(jax.random.key(0), jnp.asarray(2), 6, simulator.Work(4, steps=3))
  np.testing.assert_array_equal(np.sort(np.asarray(place).reshape(-1, 2), axis=1), [[0, 1]] * 6)


def test_steps_without_a_batch_size_are_passes_over_what_is_real():
  place, real = simulator.minibatches(jax.random.key(0), jnp.asarray(4), 6, simulator.Work(steps=3))
  assert place.shape == (3, 6)
  for part, mask in zip(np.asarray(place), np.asarray(real), strict=True):
    np.testing.assert_array_equal(np.sort(part[mask]), np.arange(4))


def test_clients_train_as_if_alone_and_the_idle_do_not_change():
  data = tiny.clients((6, 0, 5, 2))
  states = jax.jit(lambda key: simulator.start(tiny.MOMENTUM, key, data, common=False))(jax.random.key(0))
  keys, active = jax.random.split(jax.random.key(1), 4), np.array([True, True, True, False])
  train_clients = jax.jit(
    lambda s, active: simulator.train_clients(tiny.MOMENTUM, s, data, keys, simulator.Work(4, 2), active=active)
  )
  after, metrics = train_clients(states, active)
  for i in (1, 3):  # no data; not active
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x, i=i: x[i], s.opt_state) for s in (after, states)))
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x, i=i: x[i], s.params) for s in (after, states)))
  assert metrics["loss"][1] == metrics["loss"][3] == 0 < metrics["loss"][0]
  np.testing.assert_array_equal(after.step, [4, 0, 4, 0])
  # Client 2: the same minibatches through the learner by itself.
  one = jax.tree.map(lambda x: x[2], states)
  alone = jax.jit(tiny.MOMENTUM.step)
  place, real = simulator.minibatches(keys[2], jnp.asarray(5), 6, simulator.Work(4, 2))
  for p, r in zip(place, real, strict=True):
    rows = data.index[2][p]
    batch = {name: array[rows] for name, array in data.examples.items()} | {"mask": r}
    one, _ = alone(one, batch)
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[2], after.params), one.params, atol=1e-6)


def test_fedavg_by_hand_with_unequal_clients():
  data = tiny.clients((6, 3, 2, 5))
  learner = simulator.federated(tiny.SGD, simulator.Work(None, epochs=2))
  state = jax.jit(learner.init)(jax.random.key(0), data)
  after, _ = jax.jit(learner.step)(state, data)
  total, expected = 16, jax.tree.map(np.zeros_like, state.model["params"])
  for index, count in zip(data.index, data.count, strict=True):
    rows = index[:count]
    local = tiny.descend(state.model["params"], *(data.examples[k][rows] for k in ("image", "label")), steps=2)
    expected = jax.tree.map(lambda e, p, c=count: e + c / total * p, expected, local)
  chex.assert_trees_all_close(after.model["params"], expected, atol=1e-6)
  slow = simulator.federated(tiny.SGD, simulator.Work(None, epochs=2), server_rate=0.1)
  tenth = jax.tree.map(lambda a, b: a + 0.1 * (b - a), state.model["params"], expected)
  chex.assert_trees_all_close(jax.jit(slow.step)(state, data)[0].model["params"], tenth, atol=1e-6)


def test_fedavg_of_one_step_and_complete_gossip_are_central_gradient_descent():
  data = tiny.clients()
  federated = simulator.federated(tiny.SGD, FULL)
  state, history = tiny.run(federated, data, 3)
  start = jax.jit(federated.init)(jax.random.key(0), data).model["params"]
  central = tiny.descend(start, data.examples["image"], data.examples["label"], steps=3)
  chex.assert_trees_all_close(state.model["params"], central, atol=1e-6)
  np.testing.assert_allclose(history[-1]["megabits"], 3 * 4 * 43 * 32e-6, rtol=1e-5)  # 43 weights, 4 clients

  gossiping = simulator.gossiping(tiny.SGD, FULL, gossip.complete(4)[None])
  state, history = tiny.run(gossiping, data, 3)
  start = jax.tree.map(lambda x: x[0], jax.jit(gossiping.init)(jax.random.key(0), data).clients.params)
  central = tiny.descend(start, data.examples["image"], data.examples["label"], steps=3)
  for i in range(4):
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], state.clients.params), central, atol=1e-6)
  assert [int(h["sent"]) for h in history] == [12, 24, 36]


def test_merged_trajectory_of_quadratics_is_central_for_any_topology():
  rng = np.random.default_rng(0)
  a, rate, n = rng.standard_normal((4, 4)).astype("float32") / 2, 0.2, 5
  targets = rng.standard_normal((n, 4)).astype("float32")
  data = partition.clients({"image": targets, "label": np.zeros(n, "int32")}, [np.array([i]) for i in range(n)])
  learner = tiny.quadratic(a, rate)
  for topology in ("local", "left", "ring"):
    run = simulator.gossiping(learner, FULL, gossip.TOPOLOGIES[topology](n)[None])
    state = jax.jit(run.init)(jax.random.key(3), data)
    theta, step = np.asarray(state.clients.params["theta"][0], np.float64), jax.jit(run.step)
    for _ in range(10):
      state, _ = step(state, data)
      theta = theta - rate * a.T @ (a @ theta - targets.mean(0))
    np.testing.assert_allclose(np.mean(state.clients.params["theta"], 0), theta, atol=1e-5)
    assert gossip.consensus(state.clients.params) > 1e-3


def test_a_round_without_data_keeps_the_model():
  data = tiny.clients((0, 0, 6, 6), capacity=6)
  learner = simulator.federated(tiny.SGD, FULL, choose=lambda key, round, n: jnp.arange(2))
  state = jax.jit(learner.init)(jax.random.key(0), data)
  after, metrics = jax.jit(learner.step)(state, data)
  chex.assert_trees_all_equal(after.model, state.model)
  assert metrics["loss"] == 0


def test_codecs_see_weights_and_other_collections_are_sent_whole():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
      return nn.Dense(tiny.CLASSES)(nn.BatchNorm(not train)(x))

  def nothing(update, key):
    assert list(update) == ["params"]
    return jax.tree.map(jnp.zeros_like, update), jnp.float32(8)

  local, data = simulator.classifier(Normed(), tiny.optax.sgd(tiny.RATE)), tiny.clients()
  plain = simulator.federated(local, FULL)
  state, history = tiny.run(plain, data, 1)
  start = jax.jit(plain.init)(jax.random.key(0), data).model
  coded, counted = tiny.run(simulator.federated(local, FULL, codec=simulator.Codec(nothing, feedback=True)), data, 1)
  chex.assert_trees_all_equal(coded.model["params"], start["params"])
  chex.assert_trees_all_close(coded.model["batch_stats"], state.model["batch_stats"], rtol=1e-6)
  assert (
    np.abs(start["batch_stats"]["BatchNorm_0"]["mean"] - state.model["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0
  )
  np.testing.assert_allclose(counted[0]["megabits"], 4 * (8 + 32 * 2 * tiny.FEATURES) * 1e-6, rtol=1e-6)
  assert counted[0]["error"] == 1 and history[0]["error"] == 0


def test_chosen_clients_alone_matter_and_optimizers_start_afresh():
  data = tiny.clients()
  learner = simulator.federated(tiny.MOMENTUM, FULL, choose=simulator.some_clients(2))
  state = jax.jit(learner.init)(jax.random.key(5), data)
  step = jax.jit(learner.step)
  seen = set()
  for _ in range(6):
    picks = jax.random.split(state.key, 3)[0]
    ids = np.asarray(jax.random.permutation(jax.random.fold_in(picks, state.round), 4))[:2]
    seen |= set(ids.tolist())
    after, _ = step(state, data)
    parts = [
      tiny.descend(state.model["params"], *(data.examples[k][data.index[i]] for k in ("image", "label"))) for i in ids
    ]
    mean = jax.tree.map(lambda *p: np.mean(p, axis=0), *parts)  # plain steps: no momentum from the round before
    chex.assert_trees_all_close(after.model["params"], mean, atol=1e-6)
    state = after
  assert len(seen) > 2


def test_evaluation_is_per_client_and_of_the_merged_model():
  data = tiny.clients()
  learner = simulator.gossiping(tiny.SGD, simulator.Work(2, 3), gossip.local(4)[None])
  state, _ = tiny.run(learner, data, 20)
  own = jax.jit(lambda s: simulator.evaluate_clients(tiny.SGD, s, tiny.TEST, at_once=3)["accuracy"])(state.clients)
  logits = [
    tiny.Net().apply({"params": jax.tree.map(lambda x, i=i: x[i], state.clients.params)}, tiny.TEST["image"])
    for i in range(4)
  ]
  np.testing.assert_allclose(own, [(np.argmax(x, 1) == tiny.TEST["label"]).mean() for x in logits], atol=1e-6)
  metrics = jax.jit(learner.evaluate)(state, tiny.TEST)
  np.testing.assert_allclose(metrics["accuracy"], own.mean(), rtol=1e-6)
  in_parts = jax.jit(lambda s: simulator.evaluate_clients(tiny.SGD, s, tiny.TEST, at_once=1, batch_size=7))
  whole = jax.jit(lambda s: simulator.evaluate_clients(tiny.SGD, s, tiny.TEST))
  chex.assert_trees_all_close(in_parts(state.clients), whole(state.clients), rtol=1e-5)
  mean = {"params": jax.tree.map(lambda x: np.mean(x, axis=0), state.clients.params)}
  merged = np.argmax(tiny.Net().apply(mean, tiny.TEST["image"]), 1)
  np.testing.assert_allclose(metrics["merged"], (merged == tiny.TEST["label"]).mean(), atol=1e-6)


def test_eight_devices_train_as_one():
  data = tiny.clients((3,) * 8)
  learner = simulator.gossiping(tiny.MOMENTUM, simulator.Work(2, 2), gossip.ring(8)[None])
  state = jax.jit(learner.init)(jax.random.key(0), data)
  mesh, step = train.mesh(), jax.jit(learner.step)
  split = simulator.shard(mesh, state, 8)
  assert len(split.clients.params["Dense_0"]["kernel"].sharding.device_set) == 8
  many, one = split, state
  for _ in range(2):
    many, _ = step(many, simulator.shard(mesh, data, 8))
    one, _ = step(one, data)
  chex.assert_trees_all_close(many.clients.params, one.clients.params, atol=1e-6)


def test_bad_arguments_are_named():
  data = tiny.clients()
  run = lambda learner: jax.eval_shape(learner.init, jax.random.key(0), data)
  ema = train.supervised(tiny.Net(), train.cross_entropy(), tiny.optax.sgd(0.1), ema_decay=0.9)
  for call, argument in (
    (lambda: partition.clients(data.examples, []), "parts"),
    (lambda: partition.clients(data.examples, [np.array([99])]), "parts"),
    (lambda: partition.clients(data.examples, [np.arange(5)], capacity=2), "capacity"),
    (lambda: partition.clients({"a": np.ones(3), "b": np.ones(2)}, [np.arange(2)]), "examples"),
    (lambda: partition.iid(np.ones(4), 2, seed=0), "labels"),
    (lambda: partition.iid(np.repeat(np.arange(2), 4), 5, seed=0), "labels"),
    (lambda: partition.iid(np.ones(4, int), 2, holders=np.zeros(2, bool), seed=0), "holders"),
    (lambda: partition.class_weights(3, 2, 0.0, seed=0), "alpha"),
    (lambda: partition.classes(np.array([0, 0, 2])), "labels"),
    (lambda: partition.draw(jax.random.key(0), np.ones((2, 3)) / 3, partition.classes(np.arange(2)), 4), "weights"),
    (lambda: gossip.uniform(np.ones((2, 3))), "hears"),
    (lambda: gossip.mix(np.ones((2, 3)), {"n": jnp.arange(3)}), "matrix"),
    (lambda: simulator.federated(tiny.SGD, FULL, server_rate=0.0), "server_rate"),
    (lambda: simulator.gossiping(tiny.SGD, FULL, gossip.ring(4)), "matrices"),
    (lambda: run(simulator.gossiping(tiny.SGD, FULL, gossip.ring(5)[None])), "matrices"),
    (lambda: run(simulator.federated(ema, FULL)), "local"),
    (lambda: simulator.some_clients(0), "count"),
    (lambda: simulator.shard(train.mesh(), data, 4), "num_clients"),
    (lambda: simulator.minibatches(jax.random.key(0), jnp.asarray(2), 4, simulator.Work(0)), "batch_size"),
    (lambda: simulator.minibatches(jax.random.key(0), jnp.asarray(2), 4, simulator.Work(2, 0)), "epochs"),
  ):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
      call()
