"""Training on blocks: the definition, micro-batches, workers that share nothing. Scores: `experiments/graphvite.py`."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import train
from jaxlab.graph.embedding import graphvite
from jaxlab.graph.embedding.graphvite import _kernels, device, partition, training
from jaxlab.graph.embedding.graphvite.device import State

DIM = 5


def reference(vertex, context, pairs, negatives, lr, weight=5.0, decay=0.005):
  """The official kernel's arithmetic in NumPy, a sample at a time; also the mean loss."""
  vertex, context, loss = vertex.copy(), context.copy(), 0.0
  for (h, t), others in zip(pairs, negatives, strict=True):
    v = vertex[h].copy()
    for u, y in [*((u, 0) for u in others), (t, 1)]:
      p = 1 / (1 + np.exp(-v @ context[u]))
      w = 1 if y else weight
      loss -= w * np.log(p if y else 1 - p)
      dv, dc = w * ((p - y) * context[u] + decay * v), w * ((p - y) * v + decay * context[u])
      v -= lr * dv
      context[u] -= lr * dc
    vertex[h] = v
  return vertex, context, loss / len(pairs) / (1 + weight * negatives.shape[1])


def case(seed, rows=7, samples=60, num_negatives=1, scale=1.0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.integers(0, rows, shape)
  return (
    scale * rng.standard_normal((rows, DIM)),
    scale * rng.standard_normal((rows, DIM)),
    draw(samples, 2),
    draw(samples, num_negatives),
  )


# ---------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("num_negatives", [1, 3])
def test_host_training_is_the_definition(num_negatives):
  given = case(num_negatives, num_negatives=num_negatives)
  assert (given[3] == given[2][:, 1:]).any()  # a negative may be the positive itself
  mine = graphvite.train_samples(*given, 0.1, negative_weight=3.0, weight_decay=0.02)
  for a, b in zip(mine, reference(*given, 0.1, 3.0, 0.02), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_host_training_leaves_its_arguments_and_works_in_float32():
  given = case(0)
  before = [x.copy() for x in given]
  graphvite.train_samples(*given, 0.1)
  for a, b in zip(given, before, strict=True):
    np.testing.assert_array_equal(a, b)
  narrow = graphvite.train_samples(*(x.astype("float32") for x in given[:2]), *given[2:], 0.1)
  assert narrow[0].dtype == np.float32
  np.testing.assert_allclose(narrow[1], reference(*given, 0.1)[1], atol=1e-5)


def test_device_training_of_single_samples_is_the_definition():
  with jax.enable_x64(True):
    vertex, context, pairs, negatives = case(1, num_negatives=2)
    rates = np.full(len(pairs), 0.1)
    state, loss = jax.jit(device.train_samples)(State(vertex, context), pairs, negatives, rates)
  for a, b in zip((*state, loss), reference(vertex, context, pairs, negatives, 0.1), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_device_micro_batches_add_up_updates_of_what_was_there_before():
  """One micro-batch of distinct tails and negatives: each sample as if it were alone, changes added up."""
  vertex, context, pairs, _ = case(2, rows=16, samples=8)
  pairs[:, 0] = [0, 0, 0, 1, 2, 3, 4, 5]
  rows = np.random.default_rng(0).permutation(16)
  pairs[:, 1], negatives = rows[:8], rows[8:, None]
  changes = [np.zeros_like(vertex), np.zeros_like(context)]
  for i in range(8):
    for total, new, old in zip(
      changes, reference(vertex, context, pairs[i : i + 1], negatives[i : i + 1], 0.1), (vertex, context), strict=False
    ):
      total += new - old
  state, _ = device.train_samples(
    State(*(x.astype("float32") for x in (vertex, context))), pairs, negatives, jnp.array([0.1])
  )
  np.testing.assert_allclose(state.vertex, vertex + changes[0], atol=2e-6)
  np.testing.assert_allclose(state.context, context + changes[1], atol=2e-6)


def test_a_short_last_micro_batch_trains_its_samples_alone():
  """Ten samples in micro-batches of four: padding names row 0, which no sample and no negative does."""
  vertex, context, pairs, _ = case(3, samples=10)
  pairs = 1 + pairs % 6
  tables = graphvite.partition.Negatives(jnp.zeros(7), jnp.full(7, 3))  # always row 3
  state = State(*(jnp.asarray(x, "float32") for x in (vertex, context)))
  rates = jnp.array([0.1, 0.05, 0.02])
  mine, loss = device.train_block(state, pairs, tables, jax.random.key(0), rates)
  first, a = device.train_samples(state, pairs[:8], np.full((8, 1), 3), rates[:2])
  both, b = device.train_samples(first, pairs[8:], np.full((2, 1), 3), rates[2:])
  for x, y in zip(mine, both, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6)
    assert np.array_equal(x[0], y[0])
  assert float(loss) == pytest.approx((8 * float(a) + 2 * float(b)) / 10, rel=1e-5)


def test_the_learning_rate_falls_with_the_number_of_the_sample():
  """Two workers' samples interleave; sample 7 + 2 j of 40, a new rate every 3 samples, never below 10^-4."""
  vertex, context, pairs, _ = case(4, samples=30)
  accept, alias = np.zeros(7, np.float32), np.full(7, 5, np.int32)
  expected = vertex, context
  # The rate is looked up once a chunk of samples, so each of them is a block of its own here.
  for j in range(30):
    number = (7 + 2 * j) // 3 * 3
    rate = 0.1 * max(1 - number / 40, 1e-4)
    expected = reference(*expected[:2], pairs[j : j + 1], np.array([[5]]), rate)
    one = pairs[j : j + 1].astype("int32"), accept, alias, np.uint64(0), 1
    _kernels.train_block(vertex, context, *one, 0.1, 7 + 2 * j, 2, 3, 40.0, 5.0, 0.005)
  for a, b in zip((vertex, context), expected, strict=False):
    np.testing.assert_allclose(a, b, atol=1e-12)


# ------------------------------------------------------------------------------------------------ partition, schedule


def test_zigzag_by_hand():
  """Degrees 9 to 0 in three parts: 9 4 3, 8 5 2, 7 6 1, and 0 turns back to the first... of the second turn."""
  degree = np.array([3, 9, 0, 7, 8, 1, 6, 2, 5, 4])
  place, sizes = partition.zigzag(degree, 3)
  # Falling degrees 9..0 are dealt 0 1 2 2 1 0 0 1 2 2.
  by_degree = dict(zip(degree.tolist(), place.tolist(), strict=True))
  assert [by_degree[d][0] for d in range(9, -1, -1)] == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2]
  assert [by_degree[d][1] for d in range(9, -1, -1)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
  assert sizes.tolist() == [3, 3, 4]


@pytest.mark.parametrize("parts", [1, 2, 4, 7, 16])
def test_parts_are_balanced_on_a_power_law(parts):
  """Degrees as of preferential attachment: the share of degrees above k is k^-2."""
  degree = np.floor(3 * (1 - np.random.default_rng(parts).random(20_011)) ** -0.5)
  degree = np.minimum(degree, 300)  # the largest hub is 4 % of a part, which no dealing could balance better
  place, sizes = partition.zigzag(degree, parts)
  assert sizes.sum() == len(degree) and sizes.max() - sizes.min() <= 1
  sums = np.bincount(place[:, 0], degree)
  assert sums.max() / sums.min() < 1.05
  for part in range(parts):
    assert np.array_equal(np.sort(place[place[:, 0] == part, 1]), np.arange(sizes[part]))


def test_blocks_and_back():
  x = np.random.default_rng(0).random((10, 2))
  parts = partition.zigzag(x[:, 0], 4)
  blocks = partition.to_blocks(x, parts)
  assert blocks.shape == (4, 3, 2) and np.count_nonzero(blocks) == 20
  np.testing.assert_array_equal(partition.from_blocks(blocks, parts), x)


@pytest.mark.parametrize("workers, groups", itertools.product([1, 2, 3, 8], [1, 2, 3]))
def test_workers_are_orthogonal_and_every_block_comes_once(workers, groups):
  parts = workers * groups
  steps = partition.schedule(parts, workers)
  for step in steps:
    assert len(set(step[:, 0])) == len(set(step[:, 1])) == workers
  blocks = steps.reshape(-1, 2)
  assert len(blocks) == len({tuple(b) for b in blocks}) == parts**2
  # The formula of the official code, and the tail part that stays.
  expected = [
    [(x + (i + offset) % workers, y + i) for i in range(workers)]
    for x, y, offset in itertools.product(range(0, parts, workers), range(0, parts, workers), range(workers))
  ]
  assert steps.tolist() == [[list(b) for b in step] for step in expected]
  assert (steps.reshape(-1, workers, workers, 2)[:, :1, :, 1] == steps.reshape(-1, workers, workers, 2)[..., 1]).all()


# ---------------------------------------------------------------------------------------------------------- parallel


def episode(parts, seed=0, rows=6, samples=9):
  """State, pool and tables of an episode, by part."""
  rng = np.random.default_rng(seed)
  state = State(*(rng.standard_normal((2, parts, rows, DIM)).astype("float32")))
  pool = rng.integers(0, rows, (parts, parts, samples, 2)).astype("int32")
  degree = rng.integers(1, 9, parts * rows)
  place = np.stack(np.divmod(np.arange(parts * rows), rows), axis=1)
  tables = partition.negatives(degree, partition.Partition(place, np.full(parts, rows)))
  return state, pool, tables


OPTIONS = {"micro_batch": 4, "batch_size": 16}
FIRST, TOTAL, RATE = (np.float32(x) for x in (100, 1000, 0.2))
train_block = jax.jit(device.train_block)


def serially(state, pool, tables, key, workers):
  """The blocks of an episode one after the other, each with its key and rates."""
  state, (parts, _, samples) = State(*(np.array(x) for x in state)), pool.shape[:3]
  for number, step in enumerate(partition.schedule(parts, workers)):
    for i, (head, tail) in enumerate(step):
      start = FIRST + np.float32(number * workers * samples + i) + workers * 4 * np.arange(3, dtype=np.float32)
      rates = RATE * np.maximum(1 - np.floor(start / 16) * 16 / TOTAL, np.float32(1e-4))
      block = jax.random.fold_in(key, int(tail) * parts + int(head))
      one = partition.Negatives(tables.accept[tail], tables.alias[tail])
      (v, c), _ = train_block(State(state.vertex[head], state.context[tail]), pool[tail, head], one, block, rates)
      state.vertex[head], state.context[tail] = v, c
  return state


def grouped(tree, workers):
  return jax.tree.map(lambda x: np.array(x).reshape(-1, workers, *x.shape[1:]), tree)


def test_eight_devices_equal_the_blocks_one_after_the_other_exactly():
  """Sixteen parts on eight devices; only head parts travel, from each device to the one before."""
  state, pool, tables = episode(16)
  mesh, key = train.mesh(), jax.random.key(7)
  split = NamedSharding(mesh, PartitionSpec(None, "data"))
  given = jax.tree.map(lambda x: jax.device_put(x, split), grouped((state, pool, tables), 8))
  compiled = device.train_pool.lower(*given, key, FIRST, TOTAL, RATE, mesh=mesh, **OPTIONS).compile()
  mine, loss = compiled(*given, key, FIRST, TOTAL, RATE)
  expected = grouped(serially(state, pool, tables, key, 8), 8)
  assert not np.array_equal(expected.vertex[0, 0], state.vertex[0]) and np.isfinite(loss)
  np.testing.assert_array_equal(np.asarray(mine.vertex), expected.vertex)
  np.testing.assert_array_equal(np.asarray(mine.context), expected.context)
  program = compiled.as_text()
  assert "collective-permute" in program and "all-gather" not in program and "all-to-all" not in program


def test_mapped_workers_equal_the_blocks_one_after_the_other():
  state, pool, tables = episode(4, seed=1)
  key = jax.random.key(3)
  mine, _ = device.train_pool(*grouped((state, pool, tables), 2), key, FIRST, TOTAL, RATE, **OPTIONS)
  expected = grouped(serially(state, pool, tables, key, 2), 2)
  np.testing.assert_allclose(mine.vertex, expected.vertex, atol=1e-6)
  np.testing.assert_allclose(mine.context, expected.context, atol=1e-6)


def communities(seed=0, nodes=120, groups=4):
  """Edges [2, E] of a graph of groups that are dense inside, and pairs inside and between groups."""
  rng = np.random.default_rng(seed)
  a, b = np.triu_indices(nodes, 1)
  same = a % groups == b % groups
  chosen = rng.random(len(a)) < np.where(same, 0.4, 0.02)
  return np.stack([a[chosen], b[chosen]]), np.stack([a, b])[:, ~chosen], same[~chosen]


def auc(scores, positive):
  order = np.argsort(np.argsort(scores))
  p, n = positive.sum(), (~positive).sum()
  return (order[positive].sum() - p * (p - 1) / 2) / (p * n)


EDGES, PAIRS, SAME = communities()


def embed(**changes):
  backend, threads, key, given, sampling = (
    changes.pop(name, default)
    for name, default in (
      ("backend", "host"),
      ("threads", 2),
      ("key", 0),
      ("given", {}),
      ("sampling", graphvite.Sampling(augmentation_step=2)),
    )
  )
  options = {"epochs": 150, "learning_rate": 0.05, "batch_size": 1000, "num_parts": 4, "num_workers": 2} | changes
  return graphvite.embed(
    EDGES,
    121,  # node 120 has no edges
    8,
    jax.random.key(key),
    sampling,
    graphvite.Training(**options),
    backend=backend,
    threads=threads,
    **given,
  )


def test_host_results_do_not_depend_on_threads_and_are_as_good_in_parts():
  one, two, whole = embed(threads=1), embed(threads=2), embed(num_parts=1, num_workers=1)
  for a, b in zip(one, two, strict=True):
    np.testing.assert_array_equal(a, b)
  in_parts, in_one = (auc(graphvite.link_scores(e, PAIRS), SAME) for e in (one, whole))
  assert in_one > 0.9 and abs(in_parts - in_one) < 0.03
  assert whole.loss[-1] < np.log(2)
  assert not one.context[120].any() and (np.abs(one.vertex[120]) <= 0.5 / 8).all() and one.vertex[120].any()
  assert not np.array_equal(embed(key=1).vertex, one.vertex)


def test_device_is_as_good():
  mesh = train.mesh(jax.devices()[:4])
  result = embed(backend="device", num_workers=4, micro_batch=8, epochs=100, given={"mesh": mesh})
  assert auc(graphvite.link_scores(result, PAIRS), SAME) > 0.9


def test_every_model_and_weights():
  heavy = np.where(EDGES[0] % 4 == EDGES[1] % 4, 3.0, 0.5)
  for sampling in (graphvite.DEEPWALK, graphvite.node2vec(), graphvite.Sampling(augmentation_step=1)):
    result = embed(sampling=sampling, given={"weights": heavy, "normalize": True}, num_parts=2)
    assert auc(graphvite.link_scores(result, PAIRS), SAME) > 0.85


def test_episodes_are_reported_and_a_loss_that_grows_stops():
  seen = []
  result = embed(epochs=10, block_samples=200, given={"on_episode": lambda *a: seen.append(a)})
  count = -(-10 * EDGES.shape[1] // (16 * 200))  # four parts
  assert [s[:2] for s in seen] == [(i + 1, count) for i in range(count)] and len(result.loss) == count
  with pytest.raises(FloatingPointError, match="episode 1"):
    embed(learning_rate=1e6)


def test_the_next_pool_is_drawn_while_one_is_in_use():
  started = [threading.Event() for _ in range(3)]

  def make(number):
    started[number].set()
    return number

  pools = training._ahead(make, 3)
  for number in range(3):
    assert next(pools) == number
    if number < 2:
      assert started[number + 1].wait(timeout=20)  # nobody asked for it yet
  assert next(pools, None) is None


def test_micro_batches_are_small_where_a_row_is_in_demand():
  flat, star = np.full(8000, 10.0), np.r_[8000.0, np.ones(7999)]
  assert device.largest_micro_batch(flat, 1) == 1000  # an eighth of the rows
  share = 8000 / 15999 + 8000**0.75 / (8000**0.75 + 7999)
  assert device.largest_micro_batch(star, 1) == int(16 / share)
