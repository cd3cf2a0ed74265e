"""FedZip: the card's fixture, bits that read back exactly and are as many as counted, and FedAvg as a limit."""

import functools

import chex
import golden_rule
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxlab.decentral import fedzip, simulator

PLACE = np.arange(1000)
FIXTURE = np.sin(0.37 * PLACE + 0.1) * np.exp(-0.004 * PLACE) * (1 + 0.5 * np.cos(1.9 * PLACE))

COUNT = jax.jit(fedzip.bits)


@functools.cache
def fixture():
  pruned = jax.jit(lambda x: fedzip.top(x, 0.8))(jnp.asarray(FIXTURE, jnp.float32))
  return np.asarray(pruned), jax.device_get(jax.jit(fedzip.quantize)(pruned))


# ------------------------------------------------------------------------------------------------------------- fixture


def test_fixture_of_pruning_and_clustering():
  pruned, message = fixture()
  assert (pruned != 0).sum() == 200
  assert np.abs(pruned[pruned != 0]).min() == pytest.approx(0.256077350, abs=1e-7)
  np.testing.assert_allclose(message.centroids, [-0.54583466, 0.00010130, 0.56896248], atol=1e-6)
  np.testing.assert_array_equal(np.bincount(message.symbols), [83, 834, 83])
  values = np.asarray(fedzip.values(message))
  assert np.sqrt(np.mean((values - FIXTURE) ** 2)) == pytest.approx(0.137127816, abs=1e-6)


def test_fixture_of_sizes():
  _, message = fixture()
  official = fedzip.official_bits(message.symbols)
  assert official == {"original": 32_000, "huffman": 1083, "address": 4482, "gap": 320}
  assert {k: len(fedzip.encode(message, k)) * 8 for k in fedzip.METHODS} == {
    k: int(v) for k, v in COUNT(message).items()
  }
  header = 8 * (1 + 12 + 3)
  assert len(fedzip.encode(message, "huffman")) * 8 == header + 1168  # 1166 bits in whole bytes
  each = [
    sum(max(1, int(g).bit_length()) for g in np.diff(np.flatnonzero(message.symbols == k), prepend=0)) for k in range(3)
  ]
  assert each == [158, 919, 162]


def test_official_outputs():
  """Pruning, three values and sizes of the official functions on the fixture, normal, heavy-tailed and 4-D tensors."""
  file = np.load(golden_rule.GOLDEN / "fedzip.npz")
  names = [name.removeprefix("in.") for name in file.files if name.startswith("in.")]
  assert sorted(names) == ["bias", "fixture", "heavy", "kernel", "normal"]
  run = jax.jit(lambda update: (messages := fedzip.compress(update, sparsity=0.8), fedzip.restore(messages, update)))
  given = {name: jnp.asarray(file[f"in.{name}"]) for name in names}
  messages, restored = jax.device_get(run(given))
  for message, name in zip(messages, sorted(names), strict=True):
    np.testing.assert_allclose(restored[name], file[f"quantized.{name}"], atol=2e-6 * np.abs(given[name]).max())
    if name != "bias":
      np.testing.assert_array_equal(fedzip.top(given[name].reshape(-1), 0.8), file[f"pruned.{name}"].reshape(-1))
      official, each = fedzip.official_bits(message.symbols), sorted(file[f"gap.{name}"])
      assert official["gap"] == each[0] + each[1]
      assert (official["huffman"], official["address"]) == (file[f"huffman.{name}"], file[f"address.{name}"])


# --------------------------------------------------------------------------------------------------------- the streams


def streams():
  """Of three lengths, since each compiles a program; among them those of one kind alone."""
  kinds = st.sampled_from([{0}, {2}, {0, 1}, {1, 2}, {0, 1, 2}])
  return st.tuples(st.sampled_from([1, 2, 41]), kinds).flatmap(
    lambda given: hnp.arrays(np.int8, given[0], elements=st.sampled_from(sorted(given[1])))
  )


@hypothesis.settings(max_examples=80)
@hypothesis.given(streams(), st.sampled_from(fedzip.METHODS))
def test_streams_read_back_and_have_the_counted_length(symbols, method):
  message = fedzip.Quantized(symbols, np.array([-1.5, 0.25, 3.0], "float32"))
  stream = fedzip.encode(message, method)
  back = fedzip.decode(stream, len(symbols))
  np.testing.assert_array_equal(back.symbols, symbols)
  np.testing.assert_array_equal(back.centroids, message.centroids)
  assert COUNT(message)[method] == 8 * len(stream)


def test_long_streams_of_many_kinds_read_back():
  rng = np.random.default_rng(0)
  for clusters, p in ((5, [0.5, 0.2, 0.2, 0.09, 0.01]), (3, [0.001, 0.998, 0.001])):
    symbols = rng.choice(clusters, 20_000, p=p).astype("int8")
    message = fedzip.Quantized(symbols, rng.standard_normal(clusters).astype("float32"))
    counted = jax.device_get(COUNT(message))
    sizes = {}
    for method in fedzip.METHODS:
      stream = fedzip.encode(message, method)
      np.testing.assert_array_equal(fedzip.decode(stream, 20_000, clusters).symbols, symbols)
      assert counted[method] == 8 * len(stream)
      sizes[method] = len(stream)
    assert len(fedzip.encode(message)) == min(sizes.values())
    counts = np.bincount(symbols, minlength=clusters)
    entropy = -sum(c * np.log2(c / 20_000) for c in counts if c)
    assert 8 * min(sizes.values()) >= entropy
    if clusters == 3:
      low, mid, high = sorted(counts)
      payload = 2 * low + 2 * mid + high
      assert 8 * sizes["huffman"] == 8 * (1 + 12 + 3) + -(-payload // 8) * 8
      assert sizes["gap"] < sizes["huffman"] and 8 * sizes["gap"] >= fedzip.official_bits(symbols)["gap"]


def test_broken_streams_are_refused():
  _, message = fixture()
  for method in fedzip.METHODS:
    stream = fedzip.encode(message, method)
    for cut in (0, 5, 14, len(stream) // 2):
      with pytest.raises(ValueError, match="^stream: got"):
        fedzip.decode(stream[:cut], 1000)


def test_streams_that_nobody_wrote_are_refused():
  _, message = fixture()
  streams = {method: fedzip.encode(message, method) for method in fedzip.METHODS}
  changed = lambda stream, at, byte: stream[:at] + bytes([byte]) + stream[at + 1 :]
  alone = fedzip.encode(fedzip.Quantized(np.zeros(1000, "int8"), message.centroids), "huffman")
  cases = [(stream + b"\0", 1000) for stream in (*streams.values(), alone)]
  cases += [(stream, n) for stream in streams.values() for n in (500, 2000)]
  cases += [(changed(streams[method], 13, 3), 1000) for method in ("address", "gap")]  # the implicit kind
  cases += [
    (changed(streams["gap"], 14, 25), 1000),
    (changed(streams["huffman"], 13, 9), 1000),
    (changed(streams["huffman"], 13, 60), 1000),
    (changed(streams["huffman"], 13, 200), 1000),
    (changed(alone, 14, 255), 1000),
  ]
  for stream, n in cases:
    with pytest.raises(ValueError, match="^stream: got"):
      fedzip.decode(stream, n)
  # Two symbols of one kind at the same place.
  twice = fedzip.encode(fedzip.Quantized(np.array([0, 0, 1, 1, 1], "int8"), message.centroids), "address")
  bits = np.unpackbits(np.frombuffer(twice[14:], np.uint8))
  bits[9:12] = bits[6:9]
  with pytest.raises(ValueError, match="^stream: got counts"):
    fedzip.decode(twice[:14] + np.packbits(bits).tobytes(), 5)


# ------------------------------------------------------------------------------------------------------------- pruning


@hypothesis.given(st.integers(0, 99), st.sampled_from([0.0, 0.3, 0.8, 0.97, 1.0]))
def test_top_keeps_exactly_the_largest(seed, sparsity):
  x = np.random.default_rng(seed).standard_normal(41).astype("float32")
  kept = np.asarray(fedzip.top(jnp.asarray(x), sparsity))
  number = 41 - round(41 * sparsity)
  expected = np.zeros(41, bool)
  expected[np.argsort(-np.abs(x))[:number]] = True
  np.testing.assert_array_equal(kept, np.where(expected, x, 0))


def test_doubles_are_compared_as_doubles():
  with jax.enable_x64(True):
    x = 1 + np.arange(8) * 1e-12
    np.testing.assert_array_equal(np.asarray(fedzip.top(jnp.asarray(x), 0.5)) != 0, [False] * 4 + [True] * 4)


def test_ties_at_the_threshold_all_stay():
  x = jnp.array([3.0, 1.0, -1.0, 1.0, 0.0, 0.5])
  np.testing.assert_array_equal(fedzip.top(x, 4 / 6), [3, 1, -1, 1, 0, 0])
  mostly_zero = jnp.array([0.0, 0.0, 2.0, 0.0])
  np.testing.assert_array_equal(fedzip.top(mostly_zero, 0.5), mostly_zero)


def test_order_and_scale():
  x = np.asarray(fixture()[0])
  order = np.random.default_rng(0).permutation(1000)
  quantize = jax.jit(fedzip.quantize)
  message, permuted, scaled = fixture()[1], quantize(jnp.asarray(x[order])), quantize(jnp.asarray(3 * x))
  np.testing.assert_array_equal(permuted.symbols, message.symbols[order])
  np.testing.assert_array_equal(scaled.symbols, message.symbols)
  np.testing.assert_allclose(scaled.centroids, 3 * message.centroids, atol=1e-5)


def test_lloyd_steps_lower_the_error_where_zeros_are_apart_but_not_by_the_official_rule():
  apart = {i: jax.jit(functools.partial(fedzip.quantize, iterations=i, zero_aware=True)) for i in (1, 2, 4)}
  for seed in range(4):
    x = np.random.default_rng(seed).standard_normal(60).astype("float32")
    x[::3] = 0
    messages = [quantize(x) for quantize in apart.values()]
    errors = [float(jnp.sum((fedzip.values(m) - x) ** 2)) for m in messages]
    assert (np.diff(errors) <= 1e-4).all()
    assert (np.asarray(fedzip.values(messages[-1]))[::3] == 0).all()
  # Zeros in an outer cluster pull nothing, so its centroid moves away from them: one step makes the error grow.
  x = np.array([0.0] * 20 + [0.9, 1.0, 9.0, 10.0], "float32")
  start = (np.abs(x[:, None] - np.linspace(0, 10, 3)).min(1) ** 2).sum()
  assert float(jnp.sum((fedzip.values(fedzip.quantize(x, iterations=1)) - x) ** 2)) > 5 * start


def test_constant_and_zero_tensors():
  for value in (0.0, 2.5, -1.0):
    message = fedzip.quantize(jnp.full(7, value))
    np.testing.assert_allclose(fedzip.values(message), value)
    assert np.isfinite(message.centroids).all()


def test_more_clusters_and_no_pruning_lose_nothing():
  x = np.random.default_rng(0).standard_normal(30).astype("float32")
  gaps = []
  for clusters in (3, 15):
    message = fedzip.quantize(jnp.asarray(x), clusters=clusters, iterations=12)
    gaps.append(float(jnp.abs(fedzip.values(message) - x).max()))
  assert gaps[0] > 0.3 > 0.15 > gaps[1]


# ------------------------------------------------------------------------------------------------------- the algorithm

DATA = tiny.clients()
FULL = simulator.Work()


def test_without_compression_it_is_fedavg():
  exact = simulator.Codec(lambda update, key: (update, jnp.float32(8)))
  mine, history = tiny.run(fedzip.learner(tiny.SGD, FULL, exact, server_rate=1.0), DATA, 2)
  plain, _ = tiny.run(simulator.federated(tiny.SGD, FULL), DATA, 2)
  chex.assert_trees_all_equal(mine.model, plain.model)
  np.testing.assert_allclose(history[-1]["megabits"], 2 * 4 * 8e-6, rtol=1e-5)


def test_a_round_averages_what_the_streams_hold():
  learner = fedzip.learner(tiny.SGD, FULL, server_rate=0.5)
  state = jax.jit(learner.init)(jax.random.key(0), DATA)
  after, metrics = jax.jit(learner.step)(state, DATA)
  total, sent, compress = jax.tree.map(np.zeros_like, state.model), 0, jax.jit(fedzip.compress)
  for index in DATA.index:
    local = tiny.descend(state.model["params"], *(DATA.examples[k][index] for k in ("image", "label")))
    update = {"params": jax.tree.map(lambda a, b: jnp.asarray(a - b, jnp.float32), local, state.model["params"])}
    streams = [fedzip.encode(message) for message in jax.device_get(compress(update))]
    sent += 8 * sum(map(len, streams))
    sizes = [leaf.size for leaf in jax.tree.leaves(update)]
    back = fedzip.restore([fedzip.decode(s, n) for s, n in zip(streams, sizes, strict=True)], update)
    total = jax.tree.map(lambda t, b: t + np.asarray(b) / 4, total, back)
  expected = jax.tree.map(lambda w, t: w + 0.5 * t, state.model, total)
  chex.assert_trees_all_close(after.model, expected, atol=1e-5)
  np.testing.assert_allclose(metrics["megabits"], sent * 1e-6, rtol=1e-5)
  assert 0.1 < metrics["error"] < 1


def test_biases_are_not_pruned():
  update = {"kernel": jnp.arange(1.0, 11.0), "bias": jnp.arange(1.0, 11.0)}
  bias, kernel = fedzip.compress(update, sparsity=0.8)
  assert (fedzip.values(bias) > 0.5).all() and (np.asarray(fedzip.values(kernel)) > 5).sum() == 2


def test_feedback_sends_later_what_was_left_out():
  codec = fedzip.top_codec(0.1, feedback=True)
  learner = simulator.federated(tiny.SGD, FULL, codec=codec)
  state = jax.jit(learner.init)(jax.random.key(0), DATA)
  after, _ = jax.jit(learner.step)(state, DATA)
  start, moved = state.model["params"], after.model["params"]
  uncompressed = jax.tree.map(
    lambda *p: np.mean(p, 0),
    *[tiny.descend(start, *(DATA.examples[k][i] for k in ("image", "label"))) for i in DATA.index],
  )
  kept = jax.tree.map(lambda m, r: m + np.mean(r, 0), moved, after.residual["params"])
  chex.assert_trees_all_close(kept, uncompressed, atol=1e-6)


def test_baselines_keep_what_they_say():
  update = {"w": jnp.asarray(FIXTURE[:64], jnp.float32)}
  key = jax.random.key(0)
  kept, size = fedzip.top_codec(0.25).code(update, key)
  assert (kept["w"] != 0).sum() == 16 and size == 16 * (32 + 6) + 32
  levels, size = fedzip.uniform_codec(2).code(update, key)
  assert len(np.unique(np.round(levels["w"], 5))) <= 4 and size == 2 * 64 + 64
  step = float(update["w"].max() - update["w"].min()) / 3
  assert np.abs(levels["w"] - update["w"]).max() <= step / 2 + 1e-6
  draws, size = jax.vmap(fedzip.random_codec(0.25).code, (None, 0))(update, jax.random.split(key, 400))
  assert ((draws["w"] != 0).sum(1) == 16).all() and size[0] == 16 * 32 + 64
  np.testing.assert_allclose(draws["w"].mean(0), update["w"], atol=0.5)


def test_parameter_count():
  made = jax.eval_shape(fedzip.CNN().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
  assert sum(x.size for x in jax.tree.leaves(made)) == 1_199_882
