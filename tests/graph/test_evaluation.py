import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from jaxlab.graph import evaluation

# ---------------------------------------------------------------------------------------------------------- splits


def test_planetoid_split_has_the_stated_sizes_and_never_draws_unlabelled_nodes():
  labels = np.random.default_rng(0).integers(-1, 3, 400)
  split = evaluation.planetoid_split(labels, 1, train_per_class=20, validation=50, test=100)
  assert [mask.sum() for mask in split] == [60, 50, 100]
  assert (np.bincount(labels[split.train]) == 20).all()
  assert not np.any(np.sum(split, axis=0) > 1)
  assert (labels[np.any(split, axis=0)] >= 0).all()


def test_splits_depend_on_the_seed_only():
  labels = np.arange(200) % 4
  for split in (
    lambda s: evaluation.planetoid_split(labels, s, validation=20, test=40),
    lambda s: evaluation.per_class_split(labels, s, validation_per_class=10),
  ):
    assert all(np.array_equal(a, b) for a, b in zip(split(3), split(3), strict=True))
    assert not np.array_equal(split(3).train, split(4).train)


def test_per_class_split_covers_every_candidate():
  labels = np.arange(300) % 3
  candidates = np.arange(300) < 240
  split = evaluation.per_class_split(labels, 0, candidates=candidates)
  assert (np.bincount(labels[split.train]) == 20).all() and (np.bincount(labels[split.validation]) == 30).all()
  assert np.array_equal(np.sum(split, axis=0), candidates.astype(int))


def test_edge_split_keeps_both_directions_together():
  rng = np.random.default_rng(0)
  edges = rng.integers(0, 30, (2, 200))
  split = evaluation.edge_split(np.concatenate([edges, edges[::-1]], axis=1), 0, validation=0.1, test=0.2)
  codes = [set(map(tuple, part.T.tolist())) for part in split]
  expected = {(min(a, b), max(a, b)) for a, b in edges.T.tolist() if a != b}
  assert codes[0] | codes[1] | codes[2] == expected
  assert sum(map(len, codes)) == len(expected)
  assert len(codes[1]) == int(0.1 * len(expected)) and len(codes[2]) == int(0.2 * len(expected))


@pytest.mark.parametrize("directed", [False, True])
def test_negative_edges_are_distinct_and_absent(directed):
  edges = np.random.default_rng(0).integers(0, 40, (2, 300))
  negative = evaluation.negative_edges(edges, 40, 150, 1, directed=directed)
  pairs = set(map(tuple, negative.T.tolist()))
  taken = set(map(tuple, edges.T.tolist())) | (set() if directed else set(map(tuple, edges[::-1].T.tolist())))
  assert len(pairs) == 150 and not pairs & taken and all(a != b for a, b in pairs)
  assert directed or all(a < b for a, b in pairs)


@pytest.mark.parametrize(
  ("call", "name"),
  [
    (lambda: evaluation.planetoid_split(np.zeros(5), 0), "labels"),
    (lambda: evaluation.planetoid_split(np.zeros(5, int), 0), "labels"),
    (lambda: evaluation.planetoid_split(np.zeros(50, int), 0), "test"),
    (lambda: evaluation.planetoid_split(np.zeros(50, int), 0, validation=-3), "validation"),
    (
      lambda: evaluation.planetoid_split(np.arange(4) // 2, 0, train_per_class=1, candidates=np.arange(4) < 2),
      "labels",
    ),
    (lambda: evaluation.per_class_split(np.zeros(50, int), 0, train_per_class=-2), "train_per_class"),
    (lambda: evaluation.edge_split(np.zeros((3, 2), int), 0), "edges"),
    (lambda: evaluation.edge_split(np.zeros((2, 2), int), 0, test=1.0), "validation, test"),
    (lambda: evaluation.negative_edges(np.array([[0], [1]]), 3, 2, 0), "count"),
    (lambda: evaluation.hits_at_k(np.ones(2), np.ones(2), 0), "k"),
    (lambda: evaluation.hits_by_rank(np.ones(2), np.ones(2), 0), "k"),
    (lambda: evaluation.multilabel_f1(np.ones((4, 2)), np.ones((3, 2)), 0.5, [0]), "labels"),
    (lambda: evaluation.multilabel_f1(np.full((4, 2), np.nan), np.ones((4, 2)), 0.5, [0]), "embedding"),
    (lambda: evaluation.multilabel_f1(np.ones((4, 2)), np.ones((4, 2)), 1.5, [0]), "train_fraction"),
    (lambda: evaluation.multilabel_f1(np.ones((4, 2)), np.ones((4, 2)), 0.1, [0]), "train_fraction"),
    (lambda: evaluation.linear_probe(np.ones((4, 2)), np.ones(4, int), np.arange(4), np.ones(4, bool)), "train"),
    (lambda: evaluation.linear_probe(np.ones((4, 2)), np.ones(4, int), np.ones(4, bool), np.zeros(4, bool)), "test"),
  ],
)
def test_bad_input_is_named(call, name):
  with pytest.raises(ValueError, match=f"^{name}: got"):
    call()


# --------------------------------------------------------------------------------------------------------- metrics

scores = st.lists(st.integers(0, 5), min_size=2, max_size=25)  # few values: ties are the hard part


def test_accuracy_counts_masked_nodes_only():
  logits = np.array([[1.0, 0], [0, 1], [0, 1], [1, 0]])
  labels = np.array([0, 0, 1, 1])
  assert evaluation.accuracy(logits, labels) == 0.5
  assert evaluation.accuracy(logits, labels, np.array([True, False, True, False])) == 1
  assert evaluation.accuracy(logits, labels, np.zeros(4, bool)) == 0


@hypothesis.given(scores, scores, st.integers(1, 30))
@hypothesis.settings(max_examples=25, deadline=None)
def test_hits_by_counting(positive, negative, k):
  expected = np.mean([sum(n >= p for n in negative) < k for p in positive])
  got = evaluation.hits_at_k(np.float32(positive), np.float32(negative), k)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_mean_reciprocal_rank_by_hand():
  positive = np.array([3.0, 1.0, 2.0])
  negative = np.array([[1.0, 2.0, 0.0], [2.0, 3.0, 4.0], [2.0, 3.0, 1.0]])
  np.testing.assert_allclose(evaluation.mean_reciprocal_rank(positive, negative), (1 + 1 / 4 + 1 / 2.5) / 3, rtol=1e-6)


@hypothesis.given(scores, scores, st.integers(1, 6))
@hypothesis.settings(deadline=None, max_examples=8)
def test_shared_negatives_rank_as_copies_do_and_ties_count_half(positive, negative, k):
  positive, negative = np.float32(positive), np.float32(negative)
  want = [1 + sum(n > p for n in negative) + 0.5 * sum(n == p for n in negative) for p in positive]
  copies = np.tile(negative, (len(positive), 1))
  for given in (negative, copies):
    np.testing.assert_allclose(evaluation.ranks(positive, given), want)
    np.testing.assert_allclose(evaluation.hits_by_rank(positive, given, k), np.mean(np.array(want) <= k), rtol=1e-6)


def test_planetoid_link_split_has_the_published_sizes():
  """Cora's: 5278 edges make 3696 + 527 + 1055, and 1055 negatives for each of validation and test."""
  rng = np.random.default_rng(0)
  codes = rng.choice(2708 * 2708, 20_000, replace=False)
  low, high = codes // 2708, codes % 2708
  edges = np.unique(np.stack([low, high])[:, low < high], axis=1)[:, :5278]
  split = evaluation.planetoid_link_split(np.concatenate([edges, edges[::-1]], axis=1), 2708, 1)
  assert [part.shape[1] for part in split] == [3696, 527, 1055, 1055, 1055]
  codes = [part[0].astype(int) * 2708 + part[1] for part in split]
  assert np.unique(np.concatenate(codes)).size == 3696 + 527 + 3 * 1055  # every pair is in one part, once
  everything = np.sort(np.concatenate([codes[0], codes[1], codes[3]]))
  np.testing.assert_array_equal(everything, np.sort(edges[0] * 2708 + edges[1]))
  other = evaluation.planetoid_link_split(edges, 2708, 2)
  assert not np.array_equal(split.test, other.test) and all((part[0] < part[1]).all() for part in split)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=12, max_size=12))
@hypothesis.settings(max_examples=25, deadline=None)
def test_average_precision_equals_scikit_learn(pairs):
  score, positive = np.float32([p[0] for p in pairs]), np.array([p[1] for p in pairs])
  hypothesis.assume(positive.any())
  got = jax.jit(evaluation.average_precision)(score, positive)
  np.testing.assert_allclose(got, average_precision_score(positive, score), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- probes


def multilabel_problem():
  rng = np.random.default_rng(0)
  labels = rng.random((120, 4)) < np.array([0.5, 0.3, 0.2, 0.1])
  labels[:, 0] |= ~labels.any(axis=1)
  return labels @ rng.normal(size=(4, 6)) + 1.5 * rng.normal(size=(120, 6)), labels


def test_multilabel_f1_follows_the_protocol():
  x, y = multilabel_problem()
  got = evaluation.multilabel_f1(x, scipy.sparse.csr_matrix(y.astype(float)), 0.5, [7, 8], C=0.3)
  for i, seed in enumerate((7, 8)):  # written out: one classifier and one node at a time
    order = np.random.default_rng(seed).permutation(120)
    train, test = order[:60], order[60:]
    models = [LogisticRegression(solver="liblinear", C=0.3).fit(x[train], y[train, c]) for c in range(4)]
    predicted = np.zeros((60, 4), bool)
    for row, node in enumerate(test):
      probability = [m.predict_proba(x[node : node + 1])[0, 1] for m in models]
      predicted[row, np.argsort(probability)[::-1][: y[node].sum()]] = True
    np.testing.assert_allclose(got.micro[i], f1_score(y[test], predicted, average="micro"), rtol=1e-6)
    np.testing.assert_allclose(got.macro[i], f1_score(y[test], predicted, average="macro"), rtol=1e-6)


def test_multilabel_f1_without_training_example_of_a_label_or_labels_of_a_node():
  x, y = multilabel_problem()
  y = np.concatenate([y, np.zeros((120, 1), bool)], axis=1)  # a label nobody has
  y[np.random.default_rng(0).permutation(120)[-1]] = False  # a test node without labels
  score = evaluation.multilabel_f1(x, y, 0.5, [0])
  assert score.micro.shape == (1,) and 0.5 < score.micro[0] < 1
  assert score.macro[0] < score.micro[0]  # the empty label counts as 0


def test_linear_probe_is_perfect_on_separable_classes_and_chance_on_noise():
  labels = np.arange(300) % 3
  train = np.arange(300) < 150
  assert evaluation.linear_probe(np.eye(3)[labels], labels, train, ~train) == 1
  noise = np.random.default_rng(0).normal(size=(300, 5))
  assert evaluation.linear_probe(noise, labels, train, ~train) < 0.5
