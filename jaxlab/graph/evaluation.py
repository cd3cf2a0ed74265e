"""Protocols that the literature on graphs shares: splits, negatives, ranking metrics, linear probes.

Splits and probes are host code (NumPy, scikit-learn); metrics of scores are device code that can live inside a
jitted step.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from jaxlab import checks

# ---------------------------------------------------------------------------------------------------------- splits


class NodeSplit(NamedTuple):
  """Three disjoint masks over nodes, each [N] bool."""

  train: Bool[np.ndarray, " n"]
  validation: Bool[np.ndarray, " n"]
  test: Bool[np.ndarray, " n"]


class EdgeSplit(NamedTuple):
  """Three disjoint sets of undirected edges, each [2, E_i] int32 with the smaller endpoint first."""

  train: Int[np.ndarray, "2 a"]
  validation: Int[np.ndarray, "2 b"]
  test: Int[np.ndarray, "2 c"]


def planetoid_split(
  labels: Int[np.ndarray, " n"],
  seed: int,
  *,
  train_per_class: int = 20,
  validation: int = 500,
  test: int = 1000,
  candidates: Bool[np.ndarray, " n"] | None = None,
) -> NodeSplit:
  """Host. A random split of the Planetoid form: a few nodes of each class to train on, then fixed numbers of others.

  Args:
    labels: [N] class of each node; negative means unlabelled and is never drawn.
    seed: of NumPy's default generator.
    train_per_class: labelled nodes per class.
    validation: number of validation nodes, from all classes together.
    test: number of test nodes, likewise.
    candidates: [N] nodes that may be drawn (for instance the largest component); default all.

  Raises:
    ValueError: if a class or the graph is too small, or a number negative.

  Source: Yang et al., ICML 2016, arXiv:1603.08861, as randomised by Shchur et al., arXiv:1811.05868.
  """
  for name, count in (("train_per_class", train_per_class), ("validation", validation), ("test", test)):
    checks.count(name, count, 0)
  rng = np.random.default_rng(seed)
  train, rest = _draw_per_class(labels, rng, train_per_class, candidates)
  if rest.size < validation + test:
    raise ValueError(f"test: got {test} after {validation} validation nodes, expected at most {rest.size} together")
  rest = rng.permutation(rest)
  return NodeSplit(
    *(_mask(labels, nodes) for nodes in (train, rest[:validation], rest[validation : validation + test]))
  )


def per_class_split(
  labels: Int[np.ndarray, " n"],
  seed: int,
  *,
  train_per_class: int = 20,
  validation_per_class: int = 30,
  candidates: Bool[np.ndarray, " n"] | None = None,
) -> NodeSplit:
  """Host. Fixed numbers of training and validation nodes in every class; every other labelled node is a test node.

  The split of the Coauthor and Amazon graphs (Shchur et al., arXiv:1811.05868). Arguments as `planetoid_split`.
  """
  checks.count("train_per_class", train_per_class, 0)
  checks.count("validation_per_class", validation_per_class, 0)
  rng = np.random.default_rng(seed)
  train, rest = _draw_per_class(labels, rng, train_per_class, candidates)
  validation, rest = _draw_per_class(labels, rng, validation_per_class, _mask(labels, rest))
  return NodeSplit(*(_mask(labels, nodes) for nodes in (train, validation, rest)))


def edge_split(edges: Int[np.ndarray, "2 e"], seed: int, *, validation: float = 0.05, test: float = 0.1) -> EdgeSplit:
  """Host. A random split of undirected edges; hide the validation and test edges from the model (both directions).

  Args:
    edges: [2, E], any direction; (i, j) and (j, i) are one edge, self-loops are left out.
    seed: of NumPy's default generator.
    validation: share of the edges, in [0, 1).
    test: share of the edges, likewise.
  """
  edges = np.asarray(edges)
  if edges.ndim != 2 or edges.shape[0] != 2:
    raise ValueError(f"edges: got shape {edges.shape}, expected [2, E]")
  if validation < 0 or test < 0 or validation + test >= 1:
    raise ValueError(f"validation, test: got {validation}, {test}, expected shares that leave edges to train on")
  unique = np.unique(np.sort(edges[:, edges[0] != edges[1]], axis=0), axis=1).astype("int32")
  unique = np.random.default_rng(seed).permutation(unique, axis=1)
  a, b = int(validation * unique.shape[1]), int(test * unique.shape[1])
  return EdgeSplit(train=unique[:, a + b :], validation=unique[:, :a], test=unique[:, a : a + b])


class LinkSplit(NamedTuple):
  """Pairs to find, as in `EdgeSplit`, and pairs to rank them against; each [2, E_i] int32, smaller node first."""

  train: Int[np.ndarray, "2 a"]
  validation: Int[np.ndarray, "2 b"]
  validation_negative: Int[np.ndarray, "2 m"]
  test: Int[np.ndarray, "2 c"]
  test_negative: Int[np.ndarray, "2 n"]


def planetoid_link_split(edges: Int[np.ndarray, "2 e"], num_nodes: int, seed: int) -> LinkSplit:
  """Host. The 70/10/20 split of the citation graphs, with negatives: Cora has 3696 + 527 + 1055 edges.

  A fifth of the edges is drawn for validation and a fifth for tests; half of the former goes back to training. There
  are as many negatives for validation as it had edges before (on Cora 1055, not 527), which Hits@K depends on much,
  and as many for tests; all are distinct, and no edge of any part is among them.

  Args:
    edges: [2, E], any direction; (i, j) and (j, i) are one edge, self-loops are left out.
    num_nodes: N.
    seed: of NumPy's default generator.

  Source: `ogbdataset.py` of `GraphPKU/NeuralCommonNeighbor`, built on PyTorch Geometric's `train_test_split_edges`.
  """
  first = edge_split(edges, seed, validation=0.2, test=0.2)
  count, kept = first.validation.shape[1], first.validation.shape[1] // 2
  every = np.concatenate(first, axis=1)
  negative = negative_edges(every, num_nodes, 2 * count, seed)
  return LinkSplit(
    train=np.concatenate([first.train, first.validation[:, kept:]], axis=1),
    validation=first.validation[:, :kept],
    validation_negative=negative[:, :count],
    test=first.test,
    test_negative=negative[:, count:],
  )


def negative_edges(
  edges: Int[np.ndarray, "2 e"], num_nodes: int, count: int, seed: int, *, directed: bool = False
) -> Int[np.ndarray, "2 m"]:
  """Host. Distinct pairs of nodes that are not edges, uniformly by rejection.

  Args:
    edges: [2, E] edges to avoid (pass all of them, hidden ones too).
    num_nodes: N.
    count: M, pairs to draw.
    seed: of NumPy's default generator.
    directed: whether (i, j) and (j, i) are different pairs; if not, the smaller node comes first.

  Raises:
    ValueError: if fewer than `count` pairs exist, or so few that rejection would not end soon.
  """
  edges = np.asarray(edges, "int64")
  if not directed:
    edges = np.sort(edges, axis=0)
  taken = np.unique(edges[0] * num_nodes + edges[1])
  loops = np.count_nonzero(taken // num_nodes == taken % num_nodes)
  free = (num_nodes * (num_nodes - 1) if directed else num_nodes * (num_nodes - 1) // 2) - (taken.size - loops)
  if not 0 <= 2 * count <= free:
    raise ValueError(f"count: got {count}, expected at most half of the {free} pairs that are not edges")
  rng = np.random.default_rng(seed)
  found = np.empty(0, "int64")
  while found.size < count:
    pair = rng.integers(0, num_nodes, (2, 2 * count + 16))
    pair = pair[:, pair[0] != pair[1]]
    if not directed:
      pair = np.sort(pair, axis=0)
    code = pair[0] * num_nodes + pair[1]
    code = np.concatenate([found, code[~np.isin(code, taken)]])
    found = code[np.sort(np.unique(code, return_index=True)[1])]  # in order of arrival, so no pair is favoured
  found = found[:count]
  return np.stack([found // num_nodes, found % num_nodes]).astype("int32")


def _draw_per_class(labels, rng, count, candidates):
  """`count` nodes of each class, and all labelled candidates that were not drawn."""
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"labels: got {labels.dtype} of shape {labels.shape}, expected integers of shape [N]")
  allowed = labels >= 0 if candidates is None else (labels >= 0) & candidates
  groups = []
  for c in np.unique(labels[labels >= 0]):
    members = rng.permutation(np.flatnonzero(allowed & (labels == c)))
    if members.size < count:
      raise ValueError(f"labels: got {members.size} nodes of class {c}, expected at least {count}")
    groups.append(members[:count])
  drawn = np.concatenate([np.empty(0, int), *groups])
  return drawn, np.setdiff1d(np.flatnonzero(allowed), drawn)


def _mask(labels, nodes):
  mask = np.zeros(len(labels), bool)
  mask[nodes] = True
  return mask


# --------------------------------------------------------------------------------------------------------- metrics


def accuracy(
  logits: Float[Array, "n c"], labels: Int[Array, " n"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, ""]:
  """Share of the masked nodes whose highest logit is their label; 0 when the mask is empty."""
  weight = jnp.ones(labels.shape) if mask is None else mask.astype("float32")
  hit = (jnp.argmax(logits, -1) == labels).astype("float32")
  return jnp.sum(hit * weight) / jnp.maximum(jnp.sum(weight), 1)


def hits_at_k(positive: Float[Array, " p"], negative: Float[Array, " m"], k: int) -> Float[Array, ""]:
  """Share of positives that score strictly above the k-th best negative; 1 if there are fewer than k negatives.

  Source: the evaluator of the Open Graph Benchmark (Hu et al., arXiv:2005.00687) for `ogbl-collab` and `ogbl-ddi`.
  """
  if k < 1:
    raise ValueError(f"k: got {k}, expected at least 1")
  if negative.shape[0] < k:
    return jnp.ones(())
  return jnp.mean(positive > jnp.sort(negative)[-k], dtype="float32")


def ranks(positive: Float[Array, " p"], negative: Float[Array, "p m"] | Float[Array, " m"]) -> Float[Array, " p"]:
  """Rank of each positive among its own M negatives or M that all share; 1 is best, a tie counts as half a place.

  Source: the Open Graph Benchmark's evaluator, which averages the optimistic and the pessimistic rank.
  """
  if negative.ndim == 1:
    ordered = jnp.sort(negative)
    above = negative.shape[0] - jnp.searchsorted(ordered, positive, side="right")
    not_below = negative.shape[0] - jnp.searchsorted(ordered, positive, side="left")
  else:
    above = jnp.sum(negative > positive[:, None], axis=1)
    not_below = jnp.sum(negative >= positive[:, None], axis=1)
  return 1 + (above + not_below) / 2


def mean_reciprocal_rank(
  positive: Float[Array, " p"], negative: Float[Array, "p m"] | Float[Array, " m"]
) -> Float[Array, ""]:
  """Mean of 1 / `ranks`: the metric of `ogbl-citation2`, where each positive has 1000 negatives."""
  return jnp.mean(1 / ranks(positive, negative))


def hits_by_rank(
  positive: Float[Array, " p"], negative: Float[Array, "p m"] | Float[Array, " m"], k: int
) -> Float[Array, ""]:
  """Share of positives of rank k or better: Hits@K of ranking tasks, where `hits_at_k` compares with one threshold."""
  if k < 1:
    raise ValueError(f"k: got {k}, expected at least 1")
  return jnp.mean(ranks(positive, negative) <= k, dtype="float32")


def average_precision(scores: Float[Array, " n"], positive: Bool[Array, " n"]) -> Float[Array, ""]:
  """Mean over positives of the precision at their score; tied scores share one threshold, as in scikit-learn.

  The area under the precision-recall steps, sum_n (R_n - R_{n-1}) P_n over distinct thresholds n.
  """
  order = jnp.argsort(-scores)
  sorted_scores, hit = -scores[order], positive[order].astype("float32")
  end_of_tie = jnp.searchsorted(sorted_scores, sorted_scores, side="right")
  precision = jnp.cumsum(hit)[end_of_tie - 1] / end_of_tie
  return jnp.sum(hit * precision) / jnp.maximum(jnp.sum(hit), 1)


# ---------------------------------------------------------------------------------------------------------- probes


class F1(NamedTuple):
  """Scores in [0, 1], one per seed: each [S]."""

  micro: Float[np.ndarray, " s"]
  macro: Float[np.ndarray, " s"]


def multilabel_f1(
  embedding: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n l"] | scipy.sparse.spmatrix | scipy.sparse.sparray,
  train_fraction: float,
  seeds: Iterable[int],
  C: float = 1.0,
) -> F1:
  """Host. Multi-label node classification by the DeepWalk protocol.

  For every seed: shuffle the nodes, fit one logistic regression per label (liblinear, L2) on the first
  `train_fraction` of them, and for each other node predict as many labels as it truly has, the most probable ones.

  Args:
    embedding: [N, D] finite rows.
    labels: [N, L] 0/1 indicator, dense or sparse. Nodes without any label are kept and predict nothing.
    train_fraction: in (0, 1).
    seeds: one shuffle each.
    C: inverse strength of the L2 penalty.

  Returns:
    Micro- and macro-F1 over the test nodes, per seed.

  Source: Perozzi et al., KDD 2014, arXiv:1403.6652, section 5; their script `scoring.py`.
  """
  indicator = scipy.sparse.csr_array(labels).toarray() if scipy.sparse.issparse(labels) else np.asarray(labels)
  indicator = indicator.astype(bool)
  embedding = np.asarray(embedding)
  if embedding.ndim != 2 or indicator.ndim != 2 or len(embedding) != len(indicator):
    raise ValueError(
      f"labels: got shape {indicator.shape} for an embedding of shape {embedding.shape}, expected [N, L] and [N, D]"
    )
  if not np.isfinite(embedding).all():
    raise ValueError("embedding: got NaN or infinite entries, expected finite numbers")
  if not 0 < train_fraction < 1:
    raise ValueError(f"train_fraction: got {train_fraction}, expected a number in (0, 1)")
  scores = []
  for seed in seeds:
    order = np.random.default_rng(seed).permutation(len(embedding))
    train, test = np.split(order, [int(train_fraction * len(order))])
    if not len(train):
      raise ValueError(f"train_fraction: got {train_fraction}, expected at least one of {len(order)} nodes to train on")
    probability = np.stack(
      [_probability(embedding[train], column[train], embedding[test], C) for column in indicator.T], axis=1
    )
    truth = indicator[test]
    rank = np.argsort(np.argsort(-probability, axis=1, kind="stable"), axis=1)
    predicted = rank < truth.sum(axis=1, keepdims=True)
    scores.append([f1_score(truth, predicted, average=how, zero_division=0) for how in ("micro", "macro")])
  micro, macro = np.array(scores, "float32").reshape(-1, 2).T
  return F1(micro, macro)


def linear_probe(
  embedding: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, " n"],
  train: Bool[np.ndarray, " n"],
  test: Bool[np.ndarray, " n"],
  C: float = 1.0,
) -> float:
  """Host. Test accuracy of a one-vs-rest logistic regression on frozen embeddings, single-label.

  Args:
    embedding: [N, D].
    labels: [N] classes.
    train: [N] mask of training nodes.
    test: [N] mask of test nodes.
    C: inverse strength of the L2 penalty.
  """
  for name, mask in (("train", train), ("test", test)):
    if np.shape(mask) != np.shape(labels) or np.asarray(mask).dtype != bool or not np.any(mask):
      raise ValueError(f"{name}: got {np.asarray(mask).dtype} of shape {np.shape(mask)}, expected a non-empty mask [N]")
  embedding, labels = np.asarray(embedding), np.asarray(labels)
  classes = np.unique(labels[train])
  probability = [_probability(embedding[train], labels[train] == c, embedding[test], C) for c in classes]
  return float(np.mean(classes[np.argmax(probability, axis=0)] == labels[test]))


def _probability(x, y, x_test, C):
  """Probability of a positive at each test row; a label that is constant in training stays that constant."""
  if y.all() or not y.any():
    return np.full(len(x_test), float(y[0]))
  return LogisticRegression(solver="liblinear", C=C).fit(x, y).predict_proba(x_test)[:, 1]
