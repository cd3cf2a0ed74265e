"""How good a community is in the graph whose weights are estimated similarities, and how it is structured; host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt32

from jaxlab.graph.search.minhash_communities.ranking import similarity


class Quality(NamedTuple):
  """What `assess` returns; `ratio` is conductance / cohesiveness."""

  size: int
  clustering: float
  cohesiveness: float
  conductance: float
  ratio: float
  density: float
  separability: float


def assess(
  signatures: UInt32[np.ndarray, "v h"],
  members: Int[np.ndarray, " n"],
  *,
  restarts: int = 10,
  seed: int = 0,
  mask_empty: bool = True,
) -> Quality:
  """Host. All measures of a community, in the graph of all vertices.

  Args:
    signatures: [V, H].
    members: different vertices, at least two.
    restarts: of `cohesiveness`.
    seed: of the restarts.
    mask_empty: as in `similarity`.

  Raises:
    ValueError: an argument of another shape or out of range.
  """
  members = np.asarray(members)
  if members.ndim != 1 or len(members) < 2 or len(np.unique(members)) < len(members):
    raise ValueError(f"members: got {members}, expected different vertices, at least two")
  weights = similarity(signatures, members, members, mask_empty=mask_empty)
  np.fill_diagonal(weights, 0)
  # By parts: all pairs of a community and a large graph need not be in memory at once.
  parts = np.array_split(members, -(-len(members) * len(signatures) // 10**7))
  everything = sum(similarity(signatures, part, mask_empty=mask_empty).sum() for part in parts) - len(members)
  inside, leaving = weights.sum() / 2, everything - weights.sum()
  out, cohesive = conductance(inside, leaving), cohesiveness(weights, restarts=restarts, seed=seed)
  return Quality(
    size=len(members),
    clustering=clustering(weights),
    cohesiveness=cohesive,
    conductance=out,
    ratio=out / cohesive if cohesive > 0 else np.inf,
    density=density(inside, len(members)),
    separability=separability(inside, leaving),
  )


def separability(inside: float, leaving: float) -> float:
  """m_s / c_s of the weight inside (each pair once) and leaving; m_s if none leaves."""
  return float(inside / leaving) if leaving > 0 else float(inside)


def density(inside: float, size: int) -> float:
  """m_s over the number of pairs."""
  if size < 2:
    raise ValueError(f"size: got {size}, expected at least 2")
  return float(inside / (size * (size - 1) / 2))


def conductance(inside: float, leaving: float) -> float:
  """c_s / (2 m_s + c_s); 1 if both are 0."""
  return float(leaving / (2 * inside + leaving)) if inside > 0 or leaving > 0 else 1.0


def clustering(weights: Float[np.ndarray, "n n"]) -> float:
  """Host. Mean of (W^3)_ii / (W 1 1' W)_ii over vertices that have edges; 0 if none has.

  Args:
    weights: symmetric, of diagonal 0.

  Source: Holme et al., Physica A 373, 821 (2007).
  """
  w = _check_weights(weights)
  strength = w.sum(axis=1)
  some = strength > 0
  closed = ((w @ w) * w).sum(axis=1)
  return float((closed[some] / strength[some] ** 2).mean()) if some.any() else 0.0


def cohesiveness(weights: Float[np.ndarray, "n n"], *, restarts: int = 10, seed: int = 0) -> float:
  """Host. The least conductance of a part of the community: of sweeps over 2-step PageRank from random members.

  A part is of at least two members and at most half of the volume; 1 if there is none.

  Args:
    weights: symmetric, of diagonal 0.
    restarts: random members.
    seed: of the random members.
  """
  w = _check_weights(weights)
  if restarts < 1:
    raise ValueError(f"restarts: got {restarts}, expected at least 1")
  n, strength = len(w), w.sum(axis=1)
  inverse = np.divide(1, strength, out=np.zeros(n), where=strength > 0)
  least = 1.0
  for start in np.random.default_rng(seed).integers(0, n, restarts):
    rank = np.ones(n)
    for _ in range(2):
      rank = 0.85 * w @ (rank * inverse)
      rank[start] += n - rank.sum()
    order = np.argsort(-rank * inverse, kind="stable")
    swept = w[order][:, order]
    volume = np.cumsum(strength[order])
    twice = 2 * np.cumsum(np.tril(swept).sum(axis=1))  # 2 m_s of every prefix
    allowed = (np.arange(1, n + 1) >= 2) & (2 * volume <= strength.sum()) & (volume > 0)
    if allowed.any():
      least = min(least, ((volume - twice)[allowed] / volume[allowed]).min())
  return float(max(least, 0.0))


def walktrap(weights: Float[np.ndarray, "n n"], *, length: int = 4) -> Int[np.ndarray, " n"]:
  """Host. Communities by short random walks; for what fits a display, since it takes O(n^3).

  Neighbouring communities are merged, those first whose merger least increases the mean squared distance
  sum_k (P^t_ik - P^t_jk)^2 / d_k of members to their community; of all levels the one of highest modularity is kept.
  Every vertex has a loop of its mean edge's weight, or it could not stay where it is.

  Args:
    weights: symmetric, of diagonal 0.
    length: t of the walks.

  Returns:
    Community of each vertex, numbered by first appearance.

  Source: Pons and Latapy, "Computing communities in large networks using random walks", 2006.
  """
  w = _check_weights(weights)
  if length < 1:
    raise ValueError(f"length: got {length}, expected at least 1")
  n = len(w)
  edges, strength = (w > 0).sum(axis=1), w.sum(axis=1)
  flow = w + np.diag(np.divide(strength, edges, out=np.ones(n), where=edges > 0))
  degree = flow.sum(axis=1)
  walk = np.linalg.matrix_power(flow / degree[:, None], length) / np.sqrt(degree)
  label, size, near = np.arange(n), np.ones(n), w > 0
  between = w.copy()  # weight between communities; inside, twice over
  cost = np.full((n, n), np.inf)
  for i in range(n):
    cost[i, near[i]] = _increase(walk, size, i, near[i])
  best, labels = _modularity(between), label.copy()
  while np.isfinite(cost).any():
    i, j = sorted(int(end) for end in np.unravel_index(np.argmin(cost), cost.shape))
    walk[i] = (size[i] * walk[i] + size[j] * walk[j]) / (size[i] + size[j])
    size[i] += size[j]
    label[label == j] = i
    for table in (between, between.T):
      table[i] += table[j]
      table[j] = 0
    near[i] |= near[j]
    near[i, [i, j]] = False
    near[:, i], near[j], near[:, j] = near[i], False, False
    cost[[i, j]], cost[:, [i, j]] = np.inf, np.inf
    cost[i, near[i]] = cost[near[i], i] = _increase(walk, size, i, near[i])
    if (value := _modularity(between)) > best:
      best, labels = value, label.copy()
  first, inverse = np.unique(labels, return_index=True, return_inverse=True)[1:]
  return np.argsort(np.argsort(first))[inverse]


def _increase(walk, size, i, others):
  """Of the squared distances, if community i and one of the others merge."""
  return size[i] * size[others] / (size[i] + size[others]) * ((walk[others] - walk[i]) ** 2).sum(axis=1)


def _modularity(between):
  total = between.sum()
  return (np.trace(between) - (between.sum(axis=1) ** 2).sum() / total) / total if total > 0 else 0.0


def _check_weights(weights):
  w = np.asarray(weights, np.float64)
  if w.ndim != 2 or w.shape[0] != w.shape[1] or not w.size:
    raise ValueError(f"weights: got shape {w.shape}, expected [N, N]")
  if not np.array_equal(w, w.T) or not (w >= 0).all() or np.diagonal(w).any():
    raise ValueError("weights: got negative, NaN, asymmetric or diagonal ones, expected none")
  return w
