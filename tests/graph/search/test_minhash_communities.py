import pathlib

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.data import files, networks, synthetic
from jaxlab.graph.search import minhash_communities as mc

EMPTY = 2**32 - 1


def replay(senders, receivers, n, hashes):
  """The official code's hashes in NumPy, edge by edge."""
  value = hashes.a * np.asarray(senders).astype(np.uint64)[:, None] + hashes.b
  value = (value % np.uint64(3000000019) % np.uint64(3000000000)).astype(np.uint32)
  result = np.full((n, len(hashes.a)), EMPTY, np.uint32)
  np.minimum.at(result, receivers, value)
  return result


def jaccard(senders, receivers, n):
  """Exact, all pairs."""
  a = scipy.sparse.csr_array((np.ones(len(senders)), (receivers, senders)))
  a.data[:] = 1
  both, size = (a @ a.T).toarray(), np.diff(a.indptr)
  either = size[:, None] + size - both
  return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


@pytest.fixture(scope="module")
def fans():
  return synthetic.fans(600, 3000, 30, mean_follows=12, seed=1)


@pytest.fixture(scope="module")
def exact(fans):
  return jaccard(fans.senders, fans.receivers, 600)


@pytest.fixture(scope="module")
def signed(fans):
  return mc.signatures([fans[:2]], 600, mc.hash_family(100))


def mails():
  try:
    return networks.email_eu_core_directed()
  except files.MissingFile:
    pytest.skip("no file of email-Eu-core")


# ----------------------------------------------------------------------------------------------------------- signatures


def test_family_is_the_published_one():
  hashes = mc.hash_family(100)
  random = np.random.RandomState(0)
  floats = random.uniform(0, np.iinfo(np.uint64).max, 300)
  assert hashes.a.tolist() == [int(x) + 1 for x in floats[:100]] and (hashes.a % 2 == 1).all()
  assert hashes.a.max() > 2**63 and hashes.b.max() > 2**32 and hashes.b.max() <= 2**33
  assert (mc.hash_family(100, seed=1).a != hashes.a).any()


def test_signatures_of_the_mails_are_the_replays_bit_for_bit():
  senders, receivers, labels = mails()
  hashes = mc.hash_family(100)
  expected = replay(senders, receivers, len(labels), hashes)
  signed = mc.signatures([(senders, receivers)], len(labels), hashes)
  assert signed.dtype == np.uint32
  np.testing.assert_array_equal(signed, expected)
  order = np.random.default_rng(0).integers(0, len(senders), 200_000)  # any order, with repetition
  order = np.concatenate([order, np.arange(len(senders))])
  blocks = ((senders[part], receivers[part]) for part in np.array_split(order, 7))
  np.testing.assert_array_equal(mc.signatures(blocks, len(labels), hashes), expected)
  assert np.count_nonzero((signed == EMPTY).all(axis=1)) == np.count_nonzero((signed == EMPTY).any(axis=1)) == 14


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(0, 60), st.integers(1, 5))
def test_any_stream_is_the_replay_and_merging_is_the_union(seed, count, edges, parts):
  rng = np.random.default_rng(seed)
  senders = rng.integers(0, 2**64 - 1, 9, dtype=np.uint64, endpoint=True)[rng.integers(0, 9, edges)]
  receivers = rng.integers(0, 8, edges)
  hashes = mc.hash_family(count, seed % 3)
  blocks = list(zip(np.array_split(senders, parts), np.array_split(receivers, parts), strict=True))
  signed = mc.signatures(blocks, 8, hashes)
  np.testing.assert_array_equal(signed, replay(senders, receivers, 8, hashes))
  separate = [mc.signatures([block], 8, hashes) for block in blocks]
  np.testing.assert_array_equal(mc.merge(*separate), signed)
  # The union of all neighbourhoods is that of a vertex which receives every edge.
  union = mc.signatures([(senders, np.zeros(edges, int))], 1, hashes)[0]
  np.testing.assert_array_equal(mc.merge(*signed), union)


def test_hashes_beside_multiples_of_the_modulus():
  prime, rng = 3000000019, np.random.default_rng(0)
  times = np.concatenate([rng.integers(0, 2**64 // prime, 5000, dtype=np.uint64), np.array([0, 1, 2**64 // prime - 1])])
  senders = (times.astype(np.uint64)[:, None] * np.uint64(prime) + np.arange(3, dtype=np.uint64)).reshape(-1)
  senders = np.concatenate([senders, senders - np.uint64(1), np.array([2**64 - 1, 2**64 - 2**10], np.uint64)])
  receivers = np.arange(len(senders))
  for hashes in (mc.HashFamily(np.ones(1, np.uint64), np.zeros(1, np.uint64)), mc.hash_family(3)):
    expected = replay(senders, receivers, len(senders), hashes)
    np.testing.assert_array_equal(mc.signatures([(senders, receivers)], len(senders), hashes), expected)


def test_a_stream_is_read_block_by_block():
  """A generator that would not fit: each block is gone before the next is made."""
  alive = []

  def blocks():
    for k in range(5):
      block = (np.arange(1000) + 1000 * k, np.arange(1000) % 10)
      alive.append(k)
      yield block

  hashes = mc.hash_family(8)
  signed = mc.signatures(blocks(), 10, hashes)
  assert alive == [0, 1, 2, 3, 4]
  np.testing.assert_array_equal(signed, replay(np.arange(5000), np.arange(5000) % 10, 10, hashes))


def test_estimate_is_unbiased_with_the_theorys_error_at_any_number_of_hashes(fans, exact):
  pairs = np.triu_indices(600, 1)
  truth, errors = exact[pairs], []
  for count in (50, 200, 800):
    means, squares = [], []
    for seed in range(4):
      signed = mc.signatures([fans[:2]], 600, mc.hash_family(count, seed))
      error = mc.similarity(signed, np.arange(600))[pairs] - truth
      means.append(error.mean())
      squares.append((error**2).mean())
    assert np.abs(means).max() < 0.002
    errors.append(np.sqrt(np.mean(squares)))
    assert errors[-1] == pytest.approx(np.sqrt((truth * (1 - truth)).mean() / count), rel=0.1)
  np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.1)  # as 1 / sqrt(H)


def test_similarity_is_the_share_of_equal_entries(signed):
  rows, columns = np.array([3, 500, 3]), np.array([7, 3, 599, 0])
  np.testing.assert_array_equal(
    mc.similarity(signed, rows, columns), (signed[rows][:, None] == signed[columns]).mean(axis=2)
  )


# ---------------------------------------------------------------------------------------------------------------- table


def brute_force(signed, seeds, bands, mask_empty=True):
  """Who has a whole band in common with a seed."""
  split = signed.reshape(len(signed), bands, -1)
  equal = (split[seeds][:, None] == split).all(axis=3).any(axis=2).any(axis=0)
  if mask_empty:
    equal &= signed[:, 0] != EMPTY
  return np.union1d(np.flatnonzero(equal), seeds)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 5]), st.integers(1, 6), st.integers(1, 400), st.booleans())
def test_candidates_are_those_of_brute_force(seed, width, bands, n, mask_empty):
  rng = np.random.default_rng(seed)
  values = rng.integers(0, 2**32 - 1, 1 + seed % 5, dtype=np.uint32)  # few, so that bands meet often
  signed = values[rng.integers(0, len(values), (n, width * bands))]
  signed[rng.random(n) < 0.1] = EMPTY
  index = mc.build(signed, bands, mask_empty=mask_empty)
  seeds = rng.permutation(n)[: 1 + seed % 4]
  np.testing.assert_array_equal(mc.candidates(index, seeds), brute_force(signed, seeds, bands, mask_empty))
  members = np.where(index.order < 0, ~index.order, index.order)
  np.testing.assert_array_equal(np.sort(members, axis=1), np.tile(np.arange(n), (bands, 1)))


def test_candidates_of_a_fan_graph(signed):
  for bands in (100, 50, 20):
    index = mc.build(signed, bands)
    for seed in range(20):
      seeds = np.random.default_rng(seed).choice(600, 4, replace=False)
      np.testing.assert_array_equal(mc.candidates(index, seeds), brute_force(signed, seeds, bands))


def test_narrow_bands_find_all_similar_pairs(signed, exact):
  index = mc.build(signed, 100)
  found = np.zeros((600, 600), bool)
  for v in range(600):
    found[v, mc.candidates(index, np.array([v]))] = True
  similar = (exact >= 0.2) & ~np.eye(600, dtype=bool)
  assert similar.sum() > 500 and found[similar].mean() > 0.999


def test_candidate_rate_follows_the_formula(fans, exact):
  """Over 12 families, since pairs of one family share its functions."""
  pairs = np.triu_indices(600, 1)
  truth, bins = exact[pairs], np.array([0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5])
  place = np.digitize(truth, bins)
  for bands in (30, 20, 10):
    rates = []
    for seed in range(12):
      index = mc.build(mc.signatures([fans[:2]], 600, mc.hash_family(60, seed)), bands)
      found = np.zeros((600, 600), bool)
      for v in range(600):
        found[v, mc.candidates(index, np.array([v]))] = True
      rates.append(found[pairs])
    expected = 1 - (1 - truth ** (60 // bands)) ** bands
    checked = 0
    for k in range(1, len(bins)):
      inside = place == k
      if inside.sum() < 300:
        continue
      p, count = expected[inside].mean(), 12 * inside.sum()
      # Pairs that share a vertex are not independent: 4 standard deviations of an eighth as many pairs.
      assert abs(np.mean([r[inside] for r in rates]) - p) < 4 * np.sqrt(p * (1 - p) / (count / 8)) + 1e-3
      checked += 1
    assert checked >= 5


# -------------------------------------------------------------------------------------------------------------- ranking


def averages(signed, members, active):
  return (signed[members][:, None] == signed[active]).mean(axis=2).mean(axis=0)


def test_initial_averages_and_growth_equal_recomputing(signed):
  index = mc.build(signed, 50)
  for seed in range(5):
    seeds = np.random.default_rng(seed).choice(600, 5, replace=False)
    active = mc.candidates(index, seeds)
    ranked = mc.initial_averages(signed, seeds, active, 30)
    others = np.setdiff1d(active, seeds)
    mean = averages(signed, seeds, others)
    order = np.lexsort((others, -mean.round(12)))[:30]
    np.testing.assert_array_equal(ranked.vertices, others[order])
    np.testing.assert_allclose(ranked.scores, mean[order], atol=1e-12)
    grown, members = mc.minrank(signed, seeds, active, 30), list(seeds)
    for vertex, score in zip(*grown, strict=True):
      rest = np.setdiff1d(active, members)
      mean = averages(signed, members, rest)
      assert score == pytest.approx(mean.max(), abs=1e-12)
      assert vertex == rest[np.flatnonzero(mean > mean.max() - 1e-12)[0]]  # the first of equals
      members.append(vertex)
    assert not set(grown.vertices) & set(seeds) and len(set(grown.vertices)) == 30


def test_rankings_end_with_their_candidates(signed):
  seeds, active = np.array([4, 2]), np.array([1, 2, 4, 9])
  for method in (mc.initial_averages, mc.minrank, mc.pagerank):
    assert sorted(method(signed, seeds, active, 50).vertices) == [1, 9]
  assert sorted(mc.pagerank(signed, seeds, active, 50, keep_seeds=True).vertices) == [1, 2, 4, 9]
  assert len(mc.minrank(signed, seeds, seeds[::-1], 5).vertices) == 0


def test_pagerank_is_the_official_one_and_converges_to_networkxs(signed):
  seeds = np.array([3, 40, 77])
  active = mc.candidates(mc.build(signed, 50), seeds)
  m = len(active)
  w = (signed[active][:, None] == signed[active]).mean(axis=2)
  ranked = mc.pagerank(signed, seeds, active, m, keep_seeds=True)
  rank, restart = np.ones(m), np.isin(active, seeds)
  for _ in range(3):
    rank = 0.9 * (w / w.sum(axis=0)) @ rank
    rank += (m - rank.sum()) / 3 * restart
  score = np.zeros(600)
  score[ranked.vertices] = ranked.scores
  np.testing.assert_allclose(score[active], rank, rtol=1e-5)
  assert (np.diff(ranked.scores) <= 0).all()
  limit = mc.pagerank(signed, seeds, active, m, keep_seeds=True, steps=200)
  oracle = nx.pagerank(nx.from_numpy_array(w), 0.9, dict(enumerate(restart.astype(float))), tol=1e-10, max_iter=500)
  score[limit.vertices] = limit.scores / m
  np.testing.assert_allclose(score[active], [oracle[i] for i in range(m)], rtol=1e-4)


def test_vertices_without_followers_are_similar_to_nobody():
  signed = mc.signatures([(np.arange(20), np.arange(20) % 4 + 2)], 8, mc.hash_family(20))  # 0, 1, 6, 7 have none
  seeds = np.array([0, 3])
  for mask_empty, expected in ((True, [0, 3]), (False, [0, 1, 3, 6, 7])):
    active = mc.candidates(mc.build(signed, 10, mask_empty=mask_empty), seeds)
    np.testing.assert_array_equal(active, np.union1d(brute_force(signed, seeds, 10, mask_empty), expected))
    assert set(expected) <= set(active) and mask_empty is not (1 in active)
  every = np.arange(8)
  masked = mc.similarity(signed, every)
  assert masked[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
  assert mc.similarity(signed, every, mask_empty=False)[0].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
  np.testing.assert_array_equal(masked[2:6, 2:6], mc.similarity(signed, every, mask_empty=False)[2:6, 2:6])
  ranked = mc.minrank(signed, np.array([0, 6]), every, 3)
  assert ranked.scores.max() == 0 and mc.minrank(signed, np.array([0, 6]), every, 3, mask_empty=False).scores[0] == 1


# --------------------------------------------------------------------------------------------------------------- device

DEVICE = jax.jit(lambda index, seeds: mc.device.gather(index, seeds, size=256, bucket_size=64))
GROW = jax.jit(lambda active: mc.device.minrank(active, 300))
SCORES = jax.jit(lambda active: (mc.device.initial_averages(active), mc.device.pagerank(active)))


@pytest.mark.parametrize("mask_empty", [True, False])
def test_device_answers_are_the_hosts(signed, mask_empty):
  signed = signed.copy()
  signed[[5, 8, 100]] = EMPTY
  index = mc.build(signed, 50, mask_empty=mask_empty)
  table = jax.tree.map(jnp.asarray, index)
  for seed in range(4):
    seeds = np.random.default_rng(seed).choice(600, 5, replace=False)
    if seed == 3:
      seeds[:2] = 5, 8
    expected = mc.candidates(index, seeds)
    m = len(expected)
    active = DEVICE(table, jnp.asarray(seeds))
    assert not active.overflow and active.exists.sum() == m
    np.testing.assert_array_equal(active.vertices[:m], expected)
    assert (active.vertices[m:] == 600).all()
    options = {"mask_empty": mask_empty}
    ranked = mc.minrank(signed, seeds, expected, 300, **options)
    order, score = GROW(active)
    k = len(ranked.vertices)
    assert k < 300
    np.testing.assert_array_equal(order[:k], ranked.vertices)
    np.testing.assert_allclose(score[:k], ranked.scores, rtol=1e-6)
    assert (order[k:] == -1).all() and (score[k:] == 0).all()
    for host, scores in zip((mc.initial_averages, mc.pagerank), map(np.asarray, SCORES(active)), strict=True):
      ranked = host(signed, seeds, expected, m, **options)
      place = np.searchsorted(expected, ranked.vertices)
      np.testing.assert_allclose(scores[place], ranked.scores, rtol=1e-5, atol=1e-7)
      assert (scores[m:] == 0).all()


def test_device_says_what_did_not_fit(signed):
  table, seeds = jax.tree.map(jnp.asarray, mc.build(signed, 50)), jnp.arange(5)
  m = int(DEVICE(table, seeds).exists.sum())
  gather = jax.jit(mc.device.gather, static_argnames=("size", "bucket_size"))
  for size, bucket_size, overflow in ((m, 64, False), (m - 1, 64, True), (m, 1, True)):
    assert gather(table, seeds, size=size, bucket_size=bucket_size).overflow == overflow


# -------------------------------------------------------------------------------------------------------------- quality


def test_a_complete_isolated_community():
  for n in (3, 6, 11):
    w = np.ones((n, n)) - np.eye(n)
    inside = n * (n - 1) / 2
    assert mc.density(inside, n) == 1 and mc.conductance(inside, 0) == 0
    assert mc.clustering(w) == pytest.approx((n - 2) / (n - 1)) and mc.separability(inside, 0) == inside
  assert mc.conductance(0, 0) == 1 and mc.conductance(2, 4) == 0.5 and mc.separability(2, 4) == 0.5
  assert mc.clustering(np.zeros((4, 4))) == 0 and mc.cohesiveness(np.zeros((4, 4))) == 1


def test_clustering_is_holmes_with_isolated_members_left_out():
  rng = np.random.default_rng(0)
  w = np.triu(rng.random((9, 9)) * (rng.random((9, 9)) < 0.5), 1)
  w += w.T
  w[4] = w[:, 4] = 0
  keep = np.delete(np.arange(9), 4)
  v = w[keep][:, keep]
  expected = np.mean(np.diag(v @ v @ v) / np.diag(v @ np.ones((8, 8)) @ v))
  assert mc.clustering(w) == pytest.approx(expected)


def sweep(w, start):
  """Cohesiveness from one start, part by part."""
  n, degree = len(w), w.sum(axis=0)
  rank = np.ones(n)
  for _ in range(2):
    rank = 0.85 * (w / degree) @ rank
    rank[start] += n - rank.sum()
  order, least = np.argsort(-(rank / degree), kind="stable"), 1.0
  for size in range(2, n):
    part = order[:size]
    if 2 * w[part].sum() > w.sum():
      break
    inside = w[part][:, part].sum()
    least = min(least, (w[part].sum() - inside) / w[part].sum())
  return least


def test_cohesiveness_finds_the_weakest_cut():
  rng = np.random.default_rng(1)
  for seed in range(5):
    w = np.triu(rng.random((14, 14)), 1)
    w += w.T
    starts = np.random.default_rng(seed).integers(0, 14, 10)
    assert mc.cohesiveness(w, seed=seed) == pytest.approx(min(sweep(w, start) for start in starts))
  halves = np.kron(np.eye(2), np.ones((8, 8))) + 0.01
  np.fill_diagonal(halves, 0)
  assert mc.cohesiveness(halves) == pytest.approx(8 * 0.01 / (7 * 1.01 + 8 * 0.01))


def test_assessment_is_that_of_the_dense_graph(signed):
  members = np.arange(10, 40)
  w = (signed[:, None] == signed).mean(axis=2)
  np.fill_diagonal(w, 0)
  inside, leaving = w[members][:, members].sum() / 2, np.delete(w[members], members, axis=1).sum()
  found = mc.assess(signed, members, seed=3)
  local = w[members][:, members]
  assert found.size == 30 and found.density == pytest.approx(inside / 435)
  assert found.separability == pytest.approx(inside / leaving)
  assert found.conductance == pytest.approx(leaving / (2 * inside + leaving))
  assert found.clustering == mc.clustering(local) and found.cohesiveness == mc.cohesiveness(local, seed=3)
  assert found.ratio == found.conductance / found.cohesiveness


def canonical(labels):
  first, inverse = np.unique(labels, return_index=True, return_inverse=True)[1:]
  return np.argsort(np.argsort(first))[inverse]


def test_walktrap_finds_the_partitions_of_igraph():
  """Recorded from igraph 1.0, `community_walktrap(weights, steps=4)`, on random weighted graphs of 2 to 5 blocks."""
  golden = np.load(pathlib.Path(__file__).parents[2] / "golden/minhash_communities.npz")
  names = sorted(name.removesuffix("_labels") for name in golden if name.endswith("_labels"))
  assert len(names) == 13
  for name in names:
    np.testing.assert_array_equal(
      mc.walktrap(golden[f"{name}_weights"]), canonical(golden[f"{name}_labels"]), err_msg=name
    )


def test_walktrap_of_blocks_and_of_nothing():
  w = np.kron(np.eye(3), np.ones((6, 6))) + 0.02
  np.fill_diagonal(w, 0)
  np.testing.assert_array_equal(mc.walktrap(w), np.repeat(np.arange(3), 6))
  np.testing.assert_array_equal(mc.walktrap(np.zeros((4, 4))), np.arange(4))
