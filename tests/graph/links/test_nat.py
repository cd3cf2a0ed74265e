import functools
import pathlib

import golden_rule
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import train
from jaxlab.data import temporal
from jaxlab.data.temporal import Batches
from jaxlab.graph.links import nat
from jaxlab.graph.links.nat import _caches

# ---------------------------------------------------------------------------------------------------- official outputs


def step_of(model):
  @jax.jit
  def step(variables, memory, tables, events, key):
    logits, read = model.apply(variables, memory, tables, events)
    return nat.write(memory, nat.changes(model, memory, events, read, key)), logits

  return step


def test_golden():
  """Five batches with distinct ends, then five with repeated ones: probabilities and the whole state after each."""
  names = {"sum": "p", "attention": "p_attention"}

  def apply(variables, given):
    out = {}
    for kind, name in names.items():
      model = nat.NAT((4, 3), 5, position_dim=4, replace_prob=1.0, aggregation=kind)
      step, tables = step_of(model), nat.Tables(given["node"], given["edge"])
      for case in ("distinct", "repeated"):
        memory, scores, states = nat.reset(model, 20, 7), [], []
        for ids, times in zip(given[f"{case}.ids"].swapaxes(0, 1), given[f"{case}.times"], strict=True):
          memory, logits = step(variables[kind], memory, tables, Batches(*ids, times), jax.random.key(0))
          scores.append(jax.nn.sigmoid(logits))
          states.append(jax.tree.map(lambda a: a[1:], memory[:3]))  # without nobody's row
        out[f"{case}.{name}"] = np.stack(scores)
        if kind == "sum":
          slots, self_rep, latest = jax.tree.map(lambda *a: np.stack(a), *states)
          # The key of hop 0 is the node itself, written there only when first touched.
          parts = {"keys": slots.key[..., 1:], "edges": slots.edge, "slot_times": slots.time, "reps": slots.rep}
          parts |= {"self_rep": self_rep, "latest": np.stack(latest, -1)}
          out |= {f"{case}.{part}": array for part, array in parts.items()}
    return out

  convert = lambda state: {kind: nat.from_torch(state, kind) for kind in names}
  golden_rule.check("nat", convert, apply, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
  ("model", "width", "count"),
  [
    (nat.wikipedia(), 172, 218_011),
    (nat.wikipedia(), 1, 59_665),
    (nat.wiki_talk(), 1, 70_472 - 10_804 - 22 - 2),  # of the published count: unused head, skip projection, attention
    (nat.wikipedia(aggregation="attention"), 172, 218_011 + 688),
  ],
)
def test_parameter_counts(model, width, count):
  tables = nat.Tables(jnp.zeros((4, width)), jnp.zeros((9, width)))
  events = Batches(*jnp.zeros((4, 5), "int32"), jnp.zeros(5))
  variables = jax.eval_shape(model.init, jax.random.key(0), nat.reset(model, 3), tables, events)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


# ------------------------------------------------------------------------------- a simulation in plain Python and NumPy


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


class Simulation:
  """Dictionaries of dictionaries, keys removed when another takes their slot. Shares no code with the module."""

  def __init__(self, params, sizes, seed, nodes, edges):
    self.p = jax.tree.map(lambda a: np.asarray(a, "float64"), params)
    self.sizes, self.seed, self.nodes, self.edges = (1, *sizes), seed, nodes, edges
    width = self.p["self_gru"]["hidden_kernel"].shape[0]
    self.f = self.p["slot_gru"]["hidden_kernel"].shape[0]
    self.caches = {n: [{n: (0, 0.0, np.zeros(self.f))}, {}, {}] for n in range(1, len(nodes))}
    self.self_rep = np.zeros((len(nodes), width))
    self.latest = dict.fromkeys(range(1, len(nodes)), (0, 0, 0.0))
    self.collisions = []

  def slot(self, key, hop):
    return (key * self.seed + key * key * (self.seed + 1)) % self.sizes[hop]

  def gru(self, name, node, edge, time, hidden):
    p, w = self.p[f"{name}_gru"], self.p["time_code"]
    message = np.concatenate([self.self_rep[node], self.edges[edge], np.cos(time * w["frequency"] + w["phase"])])
    r, z, n = np.split(message @ self.p[f"{name}_kernel"] @ p["input_kernel"] + p["input_bias"], 3)
    r_h, z_h, n_h = np.split(hidden @ p["hidden_kernel"] + p["hidden_bias"], 3)
    z = sigmoid(z + z_h)
    return (1 - z) * np.tanh(n + sigmoid(r + r_h) * n_h) + z * hidden

  def refreshed(self, node):
    out = []
    for cache in self.caches[node]:
      new = {}
      for key, (edge, time, rep) in cache.items():
        new[key] = edge, time, self.gru("slot", key, edge, time, rep) if time else np.zeros(self.f)
      out.append(new)
    return out, self.gru("self", *self.latest[node], self.self_rep[node])

  def logit(self, u, v):
    (first, first_self), (second, second_self) = self.refreshed(u), self.refreshed(v)
    p, total = self.p["aggregation"], 0
    for key in {key for cache in first + second for key in cache}:
      holders = [(bit, cache[key]) for bit, cache in enumerate(first + second) if key in cache]
      row = [self.nodes[key] * len(holders), sum(entry[2] for _, entry in holders)]
      total = total + np.concatenate([*row, p["position"][sum(2**bit for bit, _ in holders)]]) @ p["kernel"]
    pooled = total.reshape(-1, self.nodes.shape[1]).mean(axis=0) + p["bias"]
    x = np.concatenate([pooled, first_self, second_self])
    h = np.maximum(x @ self.p["hidden_layer"]["kernel"] + self.p["hidden_layer"]["bias"], 0)
    return (h @ self.p["output_layer"]["kernel"] + self.p["output_layer"]["bias"])[0]

  def insert(self, node, hop, key, entry):
    cache = self.caches[node][hop]
    for other in [k for k in cache if k != key and self.slot(k, hop) == self.slot(key, hop)]:
      del cache[other]
      self.collisions.append((node, hop, other, key))
    cache[key] = entry

  def step(self, batch):
    """Scores a batch [[u, v, w, edge, time], ...], then writes it."""
    scores = np.array(
      [[self.logit(u, other) for u, v, w, _, _ in batch for other in [(v, w)[side]]] for side in (0, 1)]
    )
    rows = [(u, v, e, t) for u, v, _, e, t in batch] + [(v, u, e, t) for u, v, _, e, t in batch]
    before = {n: self.refreshed(n) for row in rows for n in row[:2]}
    for node, partner, edge, time in rows:
      self.self_rep[node] = before[node][1]
      self.latest[node] = partner, edge, time
    for node, partner, _, _ in rows:
      # In order of slots, as one node's keys may share a slot of the other's hop 2.
      for key, entry in sorted(before[node][0][1].items(), key=lambda item: self.slot(item[0], 1)):
        self.insert(partner, 2, key, entry)
    for node, partner, edge, time in rows:
      known = before[node][0][1].get(partner)
      self.insert(node, 1, partner, (edge, time, known[2] if known else np.zeros(self.f)))
    for node, _, edge, time in rows:
      self.insert(node, 0, node, (edge, time, before[node][0][0][node][2]))
    return scores

  def table(self, name):
    """The caches as the module lays them out."""
    shape = (len(self.nodes), sum(self.sizes), *[self.f] * (name == "rep"))
    out = np.zeros(shape)
    out[:, 0] = np.arange(len(self.nodes)) if name == "key" else 0
    for node, caches in self.caches.items():
      for hop, cache in enumerate(caches):
        for key, entry in cache.items():
          place = sum(self.sizes[:hop]) + self.slot(key, hop)
          out[node, place] = {"key": key, "edge": entry[0], "time": entry[1], "rep": entry[2]}[name]
    return out


NODES, SIZES = 12, (4, 3)
MODEL = nat.NAT(SIZES, 5, 3, 2, 3, 2, replace_prob=1.0)
STEP, RUN = step_of(MODEL), jax.jit(functools.partial(nat.stream, MODEL))


@functools.cache
def material(batches, rows, seed=0):
  """Parameters, features and a stream with repeated ends inside its batches."""
  rng = np.random.default_rng(seed)
  senders = rng.integers(1, NODES + 1, (batches, rows))
  receivers = (senders + rng.integers(1, NODES, senders.shape) - 1) % NODES + 1
  edges = np.arange(1, senders.size + 1).reshape(senders.shape)
  times = np.sort(rng.uniform(1, 9, senders.size)).reshape(senders.shape).astype("float32")
  negatives = rng.integers(1, NODES + 1, senders.shape)
  node, edge = (rng.standard_normal((n + 1, 2)).astype("float32") for n in (NODES, senders.size))
  node[0] = edge[0] = 0
  tables = nat.Tables(node, edge)
  stream = Batches(*(a.astype("int32") for a in (senders, receivers, negatives, edges)), times)
  params = jax.jit(MODEL.init)(jax.random.key(1), nat.reset(MODEL, NODES), tables, at(stream, 0))["params"]
  return params, tables, stream


def at(stream, i):
  return jax.tree.map(lambda a: a[i], stream)


@pytest.mark.parametrize(("batches", "rows"), [(200, 1), (40, 5)])
def test_state_and_scores_equal_a_simulation_with_dictionaries(batches, rows):
  params, tables, stream = material(batches, rows)
  simulation = Simulation(params, SIZES, 7, *tables)
  memory = nat.reset(MODEL, NODES, 7)
  for i in range(batches):
    memory, logits = STEP({"params": params}, memory, tables, at(stream, i), jax.random.key(i))
    scores = simulation.step(list(zip(*(np.asarray(a).tolist() for a in at(stream, i)), strict=True)))
    np.testing.assert_allclose(logits, scores, atol=1e-4)
    for name in ("key", "edge", "time"):
      np.testing.assert_array_equal(getattr(memory.slots, name), simulation.table(name).astype("float32"), name)
    np.testing.assert_allclose(memory.slots.rep, simulation.table("rep"), atol=1e-4)
    np.testing.assert_allclose(memory.self_rep, simulation.self_rep, atol=1e-4)
    np.testing.assert_allclose(np.stack(memory.latest, -1)[1:], np.array(list(simulation.latest.values())), rtol=1e-6)
  assert len(simulation.collisions) > batches  # keys did fight for slots

  # The scan that writes late gives the same as the loop.
  late, scores = RUN(params, nat.reset(MODEL, NODES, 7), tables, stream, jax.random.key(0))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), late, memory)
  np.testing.assert_allclose(scores[-1], logits, atol=1e-5)


def test_hash_is_exact_for_every_id():
  keys = np.array([0, 1, 2, 46_340, 46_341, 99_999, 2**24 + 1, 2**31 - 1], "int32")
  for size in (1, 3, 16, 32, 1000, 1024):
    for seed in (0, 7, 99):
      expected = [(k * seed + k * k * (seed + 1)) % size for k in keys.tolist()]
      np.testing.assert_array_equal(_caches.slot_of(jnp.asarray(keys), seed, size), expected)


# ------------------------------------------------------------------------------------------------------------ the join


@hypothesis.given(st.integers(0, 2**16), st.integers(0, 99))
def test_joint_code_is_membership_in_the_six_dictionaries(seed, hash_seed):
  rng, sizes = np.random.default_rng(seed), (1, 4, 3)
  starts = np.cumsum((0, *sizes))
  key, members = np.zeros((3, 16), "int32"), []
  for pair in key:
    held = []
    for side in (0, 8):
      for hop, size in enumerate(sizes):
        dictionary = {}
        for a in rng.integers(1, 9, rng.integers(0, 5) if hop else 1).tolist():
          dictionary[(a * hash_seed + a * a * (hash_seed + 1)) % size] = a
        for slot, a in dictionary.items():
          pair[side + starts[hop] + slot] = a
        held.append(set(dictionary.values()))
    members.append(held)
  for form in (_caches.join, _caches._join_reference):  # the host kernel and the plain form
    bits, place = form(jnp.asarray(key), sizes, jnp.asarray(hash_seed))
    for p, (pair, held) in enumerate(zip(key.tolist(), members, strict=True)):
      for i, a in enumerate(pair):
        assert bits[p, i] == (sum(2**b for b, group in enumerate(held) if a in group) if a else 0)
        assert place[p, i] == (pair.index(a) if a else 16)
      assert sum(place[p, i] == i for i in range(16)) == len(set(pair) - {0})  # each distinct key counts once


def test_aggregate_collapses_to_sums_over_slots():
  """agg = W_n sum(node) + W_r sum(rep) over slots + W_p sum of embeddings over distinct keys, mean over heads, + b."""
  params, tables, stream = material(40, 5)
  memory, _ = RUN(params, nat.reset(MODEL, NODES, 7), tables, stream, jax.random.key(0))
  rng = np.random.default_rng(0)
  rows, width = memory.slots.key[np.array([1, 2, 5, 8, 9, 12])], tables.node.shape[1]
  rep = rng.standard_normal((*rows.shape, MODEL.slot_dim)).astype("float32") * (np.asarray(rows) != 0)[..., None]
  part = nat.Aggregation(MODEL.sizes, *MODEL._aggregation())
  bias = {"bias": rng.standard_normal(width).astype("float32")}
  weights = params["aggregation"] | bias
  pooled = part.apply({"params": weights}, rows, rep, jnp.asarray(tables.node), jnp.asarray(7), train=False)
  w = np.asarray(weights["kernel"]).reshape(-1, MODEL.num_heads, width).mean(axis=1)
  for pair, (first, second) in enumerate([(0, 2), (1, 3), (0, 4), (1, 5)]):
    keys = np.concatenate([rows[first], rows[second]])
    total = tables.node[keys].sum(axis=0) @ w[:width]
    total += (rep[first].sum(axis=0) + rep[second].sum(axis=0)) @ w[width : width + MODEL.slot_dim]
    holders = np.repeat(2 ** np.arange(6), np.tile(MODEL.sizes, 2))
    for a in set(keys.tolist()) - {0}:
      code = sum(set(holders[keys == a].tolist()))
      total += np.asarray(weights["position"])[code] @ w[width + MODEL.slot_dim :]
    np.testing.assert_allclose(pooled[pair], total + bias["bias"], atol=1e-5)


def test_gradient_of_sums_by_key_is_that_of_the_scatter():
  rng = np.random.default_rng(0)
  x, g = rng.standard_normal((2, 4, 16, 3)).astype("float32")
  place = rng.integers(0, 17, (4, 16))
  plain = lambda x: jnp.zeros_like(x).at[np.arange(4)[:, None], place].add(x, mode="drop")
  for value, expected in zip(
    jax.vjp(lambda x: _caches.sum_by_key(x, place), x)[1](g), jax.vjp(plain, x)[1](g), strict=True
  ):
    np.testing.assert_allclose(value, expected)


# ------------------------------------------------------------------------------------------------------- what must hold


def test_ids_matter_only_where_keys_collide():
  """With the real hash, relabelled scores are the same until the first collision of either labelling, then not."""
  params, tables, stream = material(200, 1)
  place = np.concatenate([[0], np.random.default_rng(3).permutation(NODES) + 1]).astype("int32")
  node = np.zeros_like(tables.node)
  node[place] = tables.node
  ids = {name: place[getattr(stream, name)] for name in ("senders", "receivers", "negatives")}
  first = {"tables": tables, "batches": stream}
  second = {"tables": tables._replace(node=node), "batches": stream._replace(**ids)}
  scores, collided = [], []
  for given in (first, second):
    memory = nat.reset(MODEL, NODES, 7)
    scores.append(RUN(params, memory, given["tables"], given["batches"], jax.random.key(0))[1])
    simulation = Simulation(params, SIZES, 7, *given["tables"])
    i = 0
    while not simulation.collisions:
      simulation.step(list(zip(*(np.asarray(a).tolist() for a in at(given["batches"], i)), strict=True)))
      i += 1
    collided.append(i)
  free = min(collided)  # the batch after the first collision is the first to see it
  assert free > 3
  np.testing.assert_allclose(scores[0][:free], scores[1][:free], atol=1e-5)
  assert np.abs(scores[0] - scores[1]).max() > 1e-3


def test_scores_do_not_depend_on_later_batches():
  params, tables, stream = material(40, 5)
  memory, key = nat.reset(MODEL, NODES, 7), jax.random.key(0)
  changed = jax.tree.map(lambda a: np.concatenate([a[:20], a[20:][::-1]]), stream)
  _, first = RUN(params, memory, tables, stream, key)
  _, second = RUN(params, memory, tables, changed, key)
  np.testing.assert_array_equal(first[:20], second[:20])
  assert np.abs(first[21:] - second[21:]).max() > 1e-3
  # Nor do they see what they are asked about: edge id and time of the batch itself.
  late = stream._replace(times=stream.times * 1.5, edges=stream.edges[::-1])
  np.testing.assert_array_equal(RUN(params, memory, tables, late, key)[1][0], first[0])


def test_gradients_do_not_cross_batches():
  params, tables, stream = material(40, 5)
  memory, key = nat.reset(MODEL, NODES, 7), jax.random.key(0)
  before, _ = RUN(params, memory, tables, jax.tree.map(lambda a: a[:40], stream), key)

  def end(params):
    after, logits = nat.stream(MODEL, params, before, tables, jax.tree.map(lambda a: a[:2], stream), key)
    return logits[-1].sum() + after.self_rep.sum() + after.slots.rep.sum()

  first, _ = STEP({"params": params}, before, tables, at(stream, 0), key)
  alone = lambda params: MODEL.apply({"params": params}, first, tables, at(stream, 1))[0].sum()
  grads = jax.jit(lambda p: (jax.grad(end)(p), jax.grad(alone)(p)))(params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), *grads)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_replacement_frequency(alpha):
  """Ten batches of 500 events between nodes whose only slot is taken: 10,000 collisions."""
  count, model = 500, nat.NAT((1,), 2, 1, replace_prob=alpha)
  other = 2 * count + 1
  empty = nat.reset(model, other)
  taken = empty._replace(slots=empty.slots._replace(key=empty.slots.key.at[:, 1].set(other)))
  ids = jnp.arange(1, other)
  events = Batches(ids[:count], ids[count:], ids[count:], ids[:count], jnp.ones(count))
  everyone = jnp.concatenate([ids, ids[count:]])

  @jax.jit
  def keys_after(memory, seed):
    slots = jax.tree.map(lambda a: a[everyone], memory.slots)
    read = nat.Read(everyone, slots, jnp.zeros((3 * count, 2, 1)), jnp.zeros((3 * count, 2)))
    memory = nat.write(memory, nat.changes(model, memory, events, read, jax.random.key(seed)))
    return memory.slots.key[1:other, 1]

  partner = np.roll(ids, count)
  assert np.array_equal(keys_after(empty, 0), partner)  # free slots fill whatever alpha is
  found = np.stack([keys_after(taken, seed) for seed in range(10)])
  assert np.all((found == other) | (found == partner))
  assert abs((found == partner).sum() - 1e4 * alpha) <= 3 * (1e4 * alpha * (1 - alpha)) ** 0.5


def test_training_ignores_padding():
  """Loss and memory of the first batch are those of the batch without padding; nobody's row stays empty."""
  params, tables, stream = material(40, 5)
  padded = Batches(*(np.pad(a[:3], ((0, 0), (0, 3))) for a in stream))
  tx, key, model = optax.sgd(0.0), jax.random.key(0), MODEL.clone(dropout=0.0)
  start = nat.Training(params, tx.init(params), nat.reset(model, NODES, 7))
  end, losses = jax.jit(functools.partial(nat.train_stream, model, tx))(start, tables, padded, key)
  memory, expected = start.memory, []
  for i in range(3):
    memory, logits = STEP({"params": params}, memory, tables, at(stream, i), key)
    p = sigmoid(np.asarray(logits, "float64"))
    expected.append(-np.log(p[0]).mean() - np.log(1 - p[1]).mean())
  np.testing.assert_allclose(losses, expected, rtol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), end.memory, memory)
  assert not np.any(end.memory.slots.key[0]) and not np.any(end.memory.self_rep[0])


def test_memory_is_updated_in_place():
  """A training scan needs no copy of the memory: its scratch is far below one table of it."""
  model, tx, shape, nodes = nat.NAT((8, 4), 16), optax.sgd(1e-3), jax.ShapeDtypeStruct, 100_000
  memory = jax.eval_shape(lambda: nat.reset(model, nodes))
  tables = nat.Tables(shape((nodes + 1, 1), "float32"), shape((50, 1), "float32"))
  batches = Batches(*[shape((3, 8), "int32")] * 4, shape((3, 8), "float32"))
  one = jax.tree.map(lambda a: shape(a.shape[1:], a.dtype), batches)
  params = jax.eval_shape(model.init, jax.random.key(0), memory, tables, one)["params"]
  state = nat.Training(params, jax.eval_shape(tx.init, params), memory)
  step = jax.jit(functools.partial(nat.train_stream, model, tx), donate_argnums=0)
  needed = step.lower(state, tables, batches, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes
  assert needed < 1e6  # one table of 100,001 x 16 alone has 6.4e6


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("slots", [(4, 2), ()])
def test_common_neighbours_are_found_by_hops_alone(slots, tmp_path):
  stream, negatives, closing = temporal.open_triangles(320, 16, seed=0)
  late = np.arange(len(closing)) >= 1440  # of 1,920 events, 32 a stage
  arrange = lambda chosen: temporal.batches(stream, chosen, batch_size=32, seed=0, negatives=negatives)
  tables = nat.Tables(stream.node_features, stream.edge_features)
  task = jax.tree.map(jnp.asarray, nat.Task(tables, arrange(~late), arrange(late)))
  model = nat.NAT(slots, 8, position_dim=4, replace_prob=1.0)
  fit = functools.partial(train.fit, steps=12, workdir=tmp_path, key=jax.random.key(0), progress=False)
  run = fit(nat.learner(model, optax.adam(3e-3), patience=12), task, tensorboard=False)
  assert int(run.epoch) == 12
  # Only a third of the events close a triangle; nothing tells the others from their negatives.
  score = 3 * (float(run.best.average_precision) - 0.5 * 2 / 3)
  if slots:
    assert score > 0.95
  else:
    assert abs(score - 0.5) < 0.1


@pytest.fixture(scope="module")
def task():
  stream = temporal.communities(30, 600, num_communities=3)
  split = temporal.transductive_split(stream)
  train_batches = temporal.batches(stream, split.train, batch_size=20, seed=0)
  validation = temporal.batches(stream, split.validation, batch_size=20, seed=1, destinations=split.history)
  return jax.tree.map(
    jnp.asarray, nat.Task(nat.Tables(stream.node_features, stream.edge_features), train_batches, validation)
  )


def test_learner_keeps_the_best_epoch_and_stops(task):
  """With a learning rate of zero no epoch is better than the first: two are waited for, then steps change nothing."""
  model = nat.NAT((4, 3), 6, replace_prob=1.0)
  learner = nat.learner(model, optax.sgd(0.0), patience=2, tolerance=0.0)
  run, step, seen = jax.jit(learner.init)(jax.random.key(0), task), jax.jit(learner.step), []
  for _ in range(5):
    run, metrics = step(run, task)
    seen.append((int(run.epoch), int(run.waited), bool(metrics["running"])))
  assert seen == [(1, 0, True), (2, 1, True), (3, 2, True), (3, 2, False), (3, 2, False)]
  # The best memory is that after validation.
  through = jax.jit(functools.partial(nat.stream, model))
  memory, _ = through(run.best.params, nat.reset(model, 30, run.hash_seed), task.tables, task.train, jax.random.key(0))
  memory, logits = through(run.best.params, memory, task.tables, task.validation, jax.random.key(0))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), run.best.memory, memory)
  score = nat.batch_average_precision(logits, task.validation)
  np.testing.assert_allclose(score, metrics["validation_ap"], atol=1e-6)
  assert learner.evaluate(run, task)["best_validation_ap"] == run.best.average_precision


def test_seeds_can_train_together(task):
  learner = train.over_seeds(nat.learner(nat.NAT((4, 3), 6), optax.adam(1e-2)))
  runs, metrics = jax.eval_shape(
    lambda key: learner.step(learner.init(jax.random.split(key, 3), task), task), jax.random.key(0)
  )
  assert metrics["loss"].shape == (3,) and runs.best.memory.slots.key.shape == (3, 31, 8)


def test_batch_average_precision_ignores_padding():
  sklearn = pytest.importorskip("sklearn.metrics")
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((3, 2, 6)).astype("float32")
  real = np.arange(6)[None] < np.array([6, 6, 2])[:, None]
  batches = Batches(*[real.astype("int32")] * 4, real.astype("float32"))
  expected = [
    sklearn.average_precision_score(np.repeat([1, 0], r.sum()), np.concatenate([x[0, r], x[1, r]]))
    for x, r in zip(logits, real, strict=True)
  ]
  np.testing.assert_allclose(nat.batch_average_precision(logits, batches), np.mean(expected), atol=1e-6)


def test_weights_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match="missing: 'out_layer.fc1.weight'"):
    nat.from_torch({"n_feat_th": np.zeros((3, 1))})
  assert (pathlib.Path(golden_rule.GOLDEN) / "nat.npz").stat().st_size < 200_000
