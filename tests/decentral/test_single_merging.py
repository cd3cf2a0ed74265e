"""Single merging: official matrices, schedules, statistics and networks; the schedule's one dense round."""

import json
from typing import get_args

import chex
import flax.linen as nn
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxlab.decentral import gossip, simulator
from jaxlab.decentral import single_merging as sm

GOLDEN = np.load(golden_rule.GOLDEN / "single_merging.npz")


def official_weights(name):
  return sm.from_torch(
    {k: golden_rule.tensor(k, tuple(shape)) for k, shape in json.loads(str(GOLDEN[f"{name}.state"]))}
  )


# ------------------------------------------------------------------------------------------------------------- parity


def test_matrices_are_the_official_ones():
  names = [name.split(".")[1:] for name in GOLDEN.files if name.startswith("matrix.")]
  assert len(names) == 7
  for topology, n in names:
    mine = gossip.TOPOLOGIES[topology.replace("localtraining", "local")](int(n))
    np.testing.assert_allclose(mine, GOLDEN[f"matrix.{topology}.{n}"], atol=1e-7)


def test_schedules_are_the_official_ones():
  for kind in get_args(sm.Kind):
    schedule = sm.Schedule(kind, 0.2, 15, 2000, point=0.5, window=0.25)
    np.testing.assert_allclose(schedule(GOLDEN["steps"]), GOLDEN[f"r.{kind}"], rtol=3e-5, err_msg=kind)


def test_mixing_and_consensus_are_the_official_ones():
  theta = {"w": golden_rule.tensor("theta", (8, 40))}
  np.testing.assert_allclose(gossip.mix(gossip.exponential(8), theta)["w"], GOLDEN["mixed"], atol=1e-6)
  np.testing.assert_allclose(gossip.consensus(theta), GOLDEN["consensus"], rtol=1e-5)


def test_networks_and_statistics_are_the_official_ones():
  model, given = sm.MLP(4, hidden=(8, 6)), official_weights("mlp")
  np.testing.assert_allclose(model.apply(given, GOLDEN["in.mlp"]), GOLDEN["mlp.logits"], atol=1e-5)
  # Two clients whose mean is the official network.
  clients = jax.tree.map(lambda x: jnp.stack([x + 0.5, x - 0.5]), given)
  local = simulator.classifier(model, optax.sgd(0.1))
  data = tiny.clients((1, 1))
  data = data._replace(examples={"image": np.zeros((2, 12), "float32"), "label": data.examples["label"]})
  state = jax.eval_shape(lambda: simulator.peers(local, jax.random.key(0), data))
  state = state.replace(
    clients=state.clients.replace(params=clients["params"], collections={"batch_stats": clients["batch_stats"]})
  )
  new = jax.jit(lambda clients: sm.merged(model, state.replace(clients=clients), GOLDEN["in.batches"]))(state.clients)
  chex.assert_trees_all_close(new["params"], given["params"], atol=1e-6)
  for i in (0, 1):
    found = new["batch_stats"][f"norm{i}"]
    np.testing.assert_allclose(found["mean"], GOLDEN[f"mlp.mean{i}"], atol=1e-5)
    np.testing.assert_allclose(found["var"], GOLDEN[f"mlp.var{i}"] * 6 / 7, rtol=1e-4)  # torch: over n - 1, of 7
  chex.assert_trees_all_close(sm.merged(model, state), given, atol=1e-6)
  network = sm.ResNet18(10)
  logits = jax.jit(network.apply)(official_weights("resnet"), GOLDEN["in.resnet"])
  np.testing.assert_allclose(logits, GOLDEN["resnet.logits"], atol=2e-4)


def test_parameter_counts():
  def count(model, *shape):
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return sum(x.size for x in jax.tree.leaves(made["params"]))

  assert [count(sm.ResNet18(c), 64, 64, 3) for c in (200, 100, 10)] == [11_271_432, 11_220_132, 11_173_962]
  assert [count(sm.ResNet18(c), 64, 64, 3) for c in (200, 100, 10)] == GOLDEN["resnet.count"].tolist()
  assert count(sm.MLP(200), 64, 64, 3) == 61_043_912 == GOLDEN["mlp.count"]


# ---------------------------------------------------------------------------------------------------------- schedules


def test_single_merge_is_dense_once_and_sparse_otherwise():
  schedule = sm.single_merge(32, 30_000, 100)
  peers = np.asarray(schedule(np.arange(100, 30_001, 100)))
  np.testing.assert_allclose(peers[:-1], 0.2)
  assert peers[-1] == 31
  everyone = np.ones((32, 32), bool)
  assert sm.budget(schedule, 32, 100, everyone) == pytest.approx(299 * 0.2 * 32 + 32 * 31)
  published = sm.Schedule("truncate", 0.2, 31, 30_000, point=0.997)  # the paper's own setting is the same
  np.testing.assert_allclose(published(np.arange(100, 30_001, 100)), peers)
  # Whoever may hear two others at most sends no more.
  assert sm.budget(schedule, 32, 100, gossip.ring(32) > 0) == pytest.approx(299 * 0.2 * 32 + 32 * 2)


def test_windows_of_equal_length_cost_the_same():
  everyone, costs = np.ones((8, 8), bool), []
  for point in (0.1, 0.5, 0.9):
    schedule = sm.Schedule("truncate_v2", 0.2, 7, 1000, point=point, window=0.05)
    costs.append(sm.budget(schedule, 8, 5, everyone))
  assert costs[0] == pytest.approx(costs[1]) == pytest.approx(costs[2])


# ------------------------------------------------------------------------------------------------------- the algorithm

STREAMS = sm.streams(tiny.examples(60), 4, 0.3, 12, seed=0)


def make(schedule, **options):
  return sm.learner(tiny.MOMENTUM, schedule, steps_per_round=2, batch_size=4, **options)


SINGLE = make(sm.single_merge(4, 12, 2, peers=0.5))


def test_a_run_is_sparse_then_merges_once():
  learner = SINGLE
  state, history = tiny.run(learner, STREAMS, 6)
  sent = np.diff([0] + [int(h["sent"]) for h in history])
  assert sent[-1] == 12 and (sent[:-1] <= 4).all() and sent[:-1].sum() > 0
  assert history[-1]["consensus"] < 1e-10 < 1e-5 < history[-2]["consensus"]
  metrics = jax.jit(learner.evaluate)(state, tiny.TEST)
  np.testing.assert_allclose(metrics["gap"], 0, atol=1e-6)
  momenta = np.asarray(state.clients.opt_state[0].trace["Dense_0"]["kernel"])
  assert np.ptp(momenta, axis=0).max() > 1e-3  # stay with their clients, so these part again
  after, more = jax.jit(learner.step)(state, STREAMS)
  assert more["consensus"] < 1e-10  # beyond the last step all rounds are dense


def test_merging_twice_changes_nothing():
  state, _ = tiny.run(SINGLE, STREAMS, 2)
  once = sm.merge_all(state)
  assert gossip.consensus(once.clients.params) < 1e-12 < gossip.consensus(state.clients.params)
  chex.assert_trees_all_close(sm.merge_all(once).clients.params, once.clients.params, atol=1e-6)
  chex.assert_trees_all_close(gossip.mean(once.clients.params), gossip.mean(state.clients.params), atol=1e-6)
  assert int(once.sent - state.sent) == 12


def test_all_peers_and_one_plain_step_are_central_gradient_descent_on_the_union():
  data = sm.streams(tiny.examples(60), 4, 5.0, 12, seed=0, resample=False)
  learner = sm.learner(tiny.SGD, sm.Schedule("fixed", 3, max_steps=3), steps_per_round=1, batch_size=12)
  state, _ = tiny.run(learner, data, 3)
  start = jax.tree.map(lambda x: x[0], jax.jit(learner.init)(jax.random.key(0), data).clients.params)
  union = data.clients.index.ravel()
  central = tiny.descend(start, *(data.clients.examples[k][union] for k in ("image", "label")), steps=3)
  for i in range(4):
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], state.clients.params), central, atol=1e-6)


def test_streams_are_drawn_anew_and_fixed_sets_are_not():
  assert STREAMS.clients.index.shape == (4, 12)
  fixed = sm.streams(tiny.examples(60), 4, 0.3, 12, seed=0, resample=False)
  assert all(len(set(row)) == 12 for row in fixed.clients.index)
  share = np.stack([np.bincount(fixed.clients.examples["label"][row], minlength=3) / 12 for row in fixed.clients.index])
  weights = np.random.default_rng(0).dirichlet([0.3] * 3, 4)  # the official draw
  np.testing.assert_allclose(STREAMS.weights, weights, rtol=1e-6)
  sure = weights.max(1) > 0.6
  assert sure.sum() >= 2
  np.testing.assert_array_equal(share.argmax(1)[sure], weights.argmax(1)[sure])


def test_clients_start_alike_or_apart():
  learner = make(sm.Schedule(), common=False)
  apart = jax.jit(learner.init)(jax.random.key(0), STREAMS)
  together = jax.jit(SINGLE.init)(jax.random.key(0), STREAMS)
  assert gossip.consensus(together.clients.params) == 0 < gossip.consensus(apart.clients.params)


def test_gradients_are_clipped_by_entry():
  tx = sm.optimizer(0.1, momentum=0.0, decay=0.5)
  updates, _ = tx.update({"w": jnp.array([3.0, -0.2])}, tx.init({"w": jnp.zeros(2)}), {"w": jnp.array([2.0, 2.0])})
  np.testing.assert_allclose(updates["w"], [-0.1 * (1 + 1), -0.1 * (-0.2 + 1)], rtol=1e-6)


def test_evaluation_takes_statistics_of_the_merged_model_from_training_images():
  rng = np.random.default_rng(0)
  model = sm.MLP(3, hidden=(5,))
  local = simulator.classifier(model, sm.optimizer(0.1))
  data = sm.streams(tiny.examples(60), 4, 0.3, 12, seed=0)
  options = {"steps_per_round": 3, "batch_size": 12}
  learner = sm.learner(local, sm.Schedule(), model=model, test_batch_size=7, **options)
  state, _ = tiny.run(learner, data, 2)
  batches = rng.standard_normal((2, 9, 4)).astype("float32") * 4 + 3
  found = jax.jit(learner.evaluate)(state, {**tiny.TEST, "batches": batches})
  accuracy = lambda v: (np.argmax(model.apply(v, tiny.TEST["image"]), 1) == tiny.TEST["label"]).mean()
  fresh, stale = accuracy(sm.merged(model, state, batches)), accuracy(sm.merged(model, state))
  assert fresh != stale
  np.testing.assert_allclose(found["merged"], fresh, atol=1e-6)
  plain = sm.learner(local, sm.Schedule(), **options)
  other = jax.jit(plain.evaluate)(state, tiny.TEST)
  np.testing.assert_allclose(other["merged"], stale, atol=1e-6)
  np.testing.assert_allclose(other["worst"], found["worst"], atol=1e-6)
  for made, test in ((learner, tiny.TEST), (plain, {**tiny.TEST, "batches": batches})):
    with pytest.raises(ValueError, match="^batches: got"):
      made.evaluate(state, test)


def test_merging_needs_statistics_of_the_merged_model():
  """Item 8: with those of clients far apart, or of none, the merged model is much worse than with its own."""

  rng = np.random.default_rng(0)
  images = rng.standard_normal((4, 60, 12)).astype("float32") * 3 + 2
  model = sm.MLP(3, hidden=(16,))
  given = jax.jit(model.init)(jax.random.key(0), images[0])
  reference = model.clone(bn_momentum=0.0, dropout=0.0).apply(given, images[0], train=True, mutable=["batch_stats"])[0]
  local = simulator.classifier(model, optax.sgd(0.1))
  data = tiny.clients((1, 1))._replace(examples={"image": np.zeros((2, 12), "float32"), "label": np.zeros(2, "int32")})
  state = jax.jit(lambda key: simulator.peers(local, key, data))(jax.random.key(0))
  state = state.replace(clients=simulator.give(state.clients, given))
  fresh, stale = jax.jit(lambda s: (sm.merged(model, s, images), sm.merged(model, s)))(state)
  error = lambda v: np.abs(model.apply(v, images[0]) - reference).mean()
  assert error(fresh) < 0.3 * error(stale)
  with pytest.raises(ValueError, match="^model: got a Plain"):

    class Plain(nn.Module):
      pass

    sm.merged(Plain(), state, images)
