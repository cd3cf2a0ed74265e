"""The supervised learner against plain formulas, and its transformations against separate runs."""

import chex
import digits_run
import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
import pytest

from jaxlab import train


def batch_of(n, start=0):
  return {name: x[start : start + n] for name, x in digits_run.digits().items()}


def run(learner, batches, key=None):
  key = jax.random.key(0) if key is None else key
  state, step = jax.jit(learner.init)(key, batches[0]), jax.jit(learner.step)
  history = []
  for batch in batches:
    state, metrics = step(state, batch)
    history.append(metrics)
  return state, history


PLAIN = digits_run.Net(norm=False, dropout=0.0)


def test_step_is_a_hand_written_sgd_step():
  batch = batch_of(16)
  learner = train.supervised(PLAIN, train.cross_entropy(), optax.sgd(0.1))
  before = jax.jit(learner.init)(jax.random.key(1), batch)
  after, metrics = jax.jit(learner.step)(before, batch)

  def loss(params):
    hidden = np.asarray(batch["image"]) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    logits = jnp.maximum(hidden, 0) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    return jnp.mean(jax.nn.logsumexp(logits, 1) - logits[jnp.arange(16), batch["label"]])

  value, grads = jax.value_and_grad(loss)(before.params)
  chex.assert_trees_all_close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, before.params, grads), atol=1e-6)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
  np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)
  assert after.step == 1
  assert after.best_variables is not None and after.average is None


def test_accumulation_is_the_big_batch():
  # Adam would turn rounding of tiny gradients into whole steps; SGD keeps the comparison of gradients direct.
  batches = [batch_of(24, 24 * i) for i in range(4)]
  make = lambda n: train.supervised(PLAIN, train.cross_entropy(), optax.sgd(0.3, momentum=0.9), accumulate=n)
  big, big_metrics = run(make(1), batches)
  small, small_metrics = run(make(4), batches)
  chex.assert_trees_all_close(small.params, big.params, atol=2e-6)  # sums of 24 float32 terms in another order
  chex.assert_trees_all_close(small_metrics, big_metrics, rtol=1e-5)


def test_accumulation_threads_statistics():
  learner = digits_run.learner(accumulate=4)
  state, (metrics,) = run(learner, [{name: np.repeat(x[:1], 32, axis=0) for name, x in batch_of(1).items()}])
  # Four momentum updates of the running mean in one step: 1 - 0.9^4 of the batch mean from zero, not 1 - 0.9.
  one, _ = run(digits_run.learner(), [{name: np.repeat(x[:1], 32, axis=0) for name, x in batch_of(1).items()}])
  mean = lambda s: np.asarray(s.collections["batch_stats"]["BatchNorm_0"]["mean"])
  np.testing.assert_allclose(mean(state), mean(one) * (1 - 0.9**4) / (1 - 0.9), rtol=1e-5)
  assert np.isfinite(metrics["loss"])


def test_average_follows_its_formula_and_evaluate_uses_it():
  learner = digits_run.learner(ema_decay=0.75)
  step = jax.jit(learner.step)
  state = jax.jit(learner.init)(jax.random.key(0), batch_of(32))
  expected = jax.tree.map(np.asarray, state.variables)
  for i in range(3):
    state, _ = step(state, batch_of(32, 32 * i))
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * np.asarray(b), expected, state.variables)
  chex.assert_trees_all_close(state.average, expected, rtol=1e-5, atol=1e-7)

  logits = digits_run.Net().apply(expected, batch_of(50)["image"], train=False)
  accuracy = np.mean(np.argmax(logits, 1) == batch_of(50)["label"])
  np.testing.assert_allclose(learner.evaluate(state, batch_of(50))["accuracy"], accuracy)
  raw = state.replace(average=None)
  assert not np.allclose(learner.evaluate(raw, batch_of(50))["loss"], learner.evaluate(state, batch_of(50))["loss"])


def test_dropout_differs_between_steps_and_repeats_between_runs():
  learner = train.supervised(digits_run.Net(norm=False, dropout=0.5), train.cross_entropy(), optax.sgd(0.0))
  _, first = run(learner, [batch_of(32)] * 3)
  _, again = run(learner, [batch_of(32)] * 3)
  losses = [float(m["loss"]) for m in first]
  assert len(set(losses)) == 3
  assert losses == [float(m["loss"]) for m in again]


def test_vmapped_seeds_are_separate_runs():
  keys = jax.random.split(jax.random.key(7), 3)
  batches = [batch_of(32, 32 * i) for i in range(3)]
  learner = digits_run.learner()
  together, history = run(train.over_seeds(learner), batches, keys)
  assert history[0]["loss"].shape == (3,)
  for i, key in enumerate(keys):
    alone, _ = run(learner, batches, key)
    one = jax.tree.map(lambda x, i=i: x[i], together)
    # Batched matmuls sum in another order than single ones; three Adam steps of 3e-3 pass that on.
    chex.assert_trees_all_close(one.params, alone.params, atol=1e-5)


def test_seeds_may_have_their_own_batches():
  keys = jax.random.split(jax.random.key(7), 2)
  pair = jax.tree.map(lambda *x: np.stack(x), batch_of(32), batch_of(32, 32))
  learner = train.supervised(PLAIN, train.cross_entropy(), optax.sgd(0.1))
  together, _ = run(train.over_seeds(learner, batch_axis=0), [pair], keys)
  alone, _ = run(learner, [batch_of(32, 32)], keys[1])
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], together).params, alone.params, atol=1e-6)


class NodeNet(nn.Module):
  @nn.compact
  def __call__(self, graph, *, train=False):
    del train
    summed = jax.ops.segment_sum(graph.nodes[graph.senders], graph.receivers, len(graph.nodes))
    return nn.Dense(3)(graph.nodes + summed)


def test_graph_batches_and_masks():
  rng = np.random.default_rng(0)
  nodes = rng.normal(size=(12, 4)).astype(np.float32)
  senders, receivers = rng.integers(0, 12, (2, 30))
  graph = jraph.GraphsTuple(nodes, None, receivers, senders, None, np.array([12]), np.array([30]))
  batch = {"graph": graph, "label": rng.integers(0, 3, 12), "mask": np.arange(12) < 5}
  loss = train.cross_entropy(mask=lambda batch: batch["mask"])
  learner = train.supervised(NodeNet(), loss, optax.sgd(0.1), inputs=lambda batch: batch["graph"])
  _, (metrics,) = run(learner, [batch])
  state = jax.jit(learner.init)(jax.random.key(0), batch)
  logits = np.asarray(NodeNet().apply(state.variables, graph), np.float64)[:5]
  labels = batch["label"][:5]
  expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(5), labels])
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(1) == labels), rtol=1e-6)
  # Labels outside the mask change nothing.
  other = {**batch, "label": np.where(batch["mask"], batch["label"], (batch["label"] + 1) % 3)}
  chex.assert_trees_all_equal(run(learner, [batch])[0].params, run(learner, [other])[0].params)


def test_cross_entropy_formulas():
  logits = np.array([[2.0, -1.0, 0.5], [0.0, 0.3, -2.0]])
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  smooth = np.array([[0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3], [0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3]])
  value, metrics = train.cross_entropy(label_smoothing=0.1)(jnp.asarray(logits), {"label": np.array([1, 2])})
  np.testing.assert_allclose(value, -np.mean(np.sum(smooth * log_p, 1)), rtol=1e-6)
  assert metrics["accuracy"] == 0
  mixed = np.array([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0]])
  value, metrics = train.cross_entropy()(jnp.asarray(logits), {"label": mixed})
  np.testing.assert_allclose(value, -np.mean(np.sum(mixed * log_p, 1)), rtol=1e-6)
  assert metrics["accuracy"] == 1
  nothing = train.cross_entropy(mask=lambda batch: batch["mask"])
  assert nothing(jnp.asarray(logits), {"label": np.array([1, 2]), "mask": np.zeros(2, bool)})[0] == 0


def test_loss_is_float32_for_bfloat16_logits():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 10)), jnp.bfloat16)
  value, _ = train.cross_entropy()(logits, {"label": np.arange(64) % 10})
  assert value.dtype == jnp.float32


def test_decay_mask_spares_vectors():
  mask = train.decay_mask({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones(())})
  assert mask == {"kernel": True, "bias": False, "scale": False}
  params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
  tx = optax.adamw(0.1, weight_decay=0.5, mask=train.decay_mask)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
  assert not np.any(updates["bias"])


def test_new_data_does_not_retrace():
  learner = digits_run.learner(accumulate=2)
  step = jax.jit(chex.assert_max_traces(learner.step, n=1))
  state = jax.jit(learner.init)(jax.random.key(0), batch_of(16))
  for i in range(3):
    state, _ = step(state, batch_of(16, i))


def test_axis_name_averages_over_devices():
  # vmap with an axis name stands for four devices; without dropout their average is the whole batch's update.
  whole = train.supervised(digits_run.Net(dropout=0.0), train.cross_entropy(), optax.sgd(0.1), ema_decay=0.9)
  parts = train.supervised(
    digits_run.Net(dropout=0.0, axis_name="data"),
    train.cross_entropy(),
    optax.sgd(0.1),
    ema_decay=0.9,
    axis_name="data",
  )
  batch = batch_of(32)
  state = jax.jit(whole.init)(jax.random.key(0), batch)
  expected, expected_metrics = jax.jit(whole.step)(state, batch)
  split = jax.tree.map(lambda x: x.reshape(4, 8, *x.shape[1:]), batch)
  after, metrics = jax.jit(jax.vmap(parts.step, (None, 0), axis_name="data"))(state, split)
  for i in range(4):
    one = jax.tree.map(lambda x, i=i: x[i], (after.params, after.collections, after.average, metrics))
    # Float32 sums over 8 and then 4 against 32; BatchNorm divides by a deviation of order 1.
    chex.assert_trees_all_close(
      one, (expected.params, expected.collections, expected.average, expected_metrics), atol=1e-5
    )


@pytest.mark.parametrize(
  ("name", "call"),
  [
    ("ema_decay", lambda: digits_run.learner(ema_decay=1.0)),
    ("ema_decay", lambda: digits_run.learner(ema_decay=-0.1)),
    ("ema_decay", lambda: digits_run.learner(ema_decay=float("nan"))),
    ("accumulate", lambda: digits_run.learner(accumulate=0)),
    ("accumulate", lambda: digits_run.learner(accumulate=2.0)),
    ("accumulate", lambda: run(digits_run.learner(accumulate=3), [batch_of(16)])),
    ("batch", lambda: run(digits_run.learner(accumulate=2), [{**batch_of(16), "weight": np.float32(1)}])),
    ("label_smoothing", lambda: train.cross_entropy(label_smoothing=1.0)),
    ("labels", lambda: train.cross_entropy()(jnp.ones((4, 3)), {"label": np.zeros(5, int)})),
    ("labels", lambda: train.cross_entropy()(jnp.ones((4, 3)), {"label": np.ones((4, 2))})),
    ("mask", lambda: train.cross_entropy(mask=lambda b: np.ones(3))(jnp.ones((4, 3)), {"label": np.zeros(4, int)})),
  ],
)
def test_bad_input_names_the_argument(name, call):
  with pytest.raises(ValueError, match=rf"^{name}\b.*got .*expected "):
    call()
