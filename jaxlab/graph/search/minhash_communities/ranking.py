"""Order of candidates by similarity to a community, on the host."""

import functools
from typing import NamedTuple

import numba
import numpy as np
from jaxtyping import Float64, Int, Int32, UInt32

from jaxlab.graph.search.minhash_communities.hashing import EMPTY, in_parallel
from jaxlab.graph.search.minhash_communities.table import check_seeds, check_signatures


class Ranking(NamedTuple):
  """Vertices, best first, and their scores."""

  vertices: Int32[np.ndarray, " k"]
  scores: Float64[np.ndarray, " k"]


def similarity(
  signatures: UInt32[np.ndarray, "v h"],
  rows: Int[np.ndarray, " k"],
  columns: Int[np.ndarray, " m"] | None = None,
  *,
  mask_empty: bool = True,
) -> Float64[np.ndarray, "k m"]:
  """Host. J^, the share of equal entries; on all cores.

  Args:
    signatures: [V, H].
    rows: vertices.
    columns: vertices; None for all.
    mask_empty: vertices without in-neighbours are similar to themselves only, not to each other.
  """
  check_signatures(signatures)
  left = _gather(signatures, np.asarray(rows), mask_empty)
  right = _gather(signatures, np.arange(len(signatures)) if columns is None else np.asarray(columns), mask_empty)
  return _matches(left, right) / signatures.shape[1]


def initial_averages(
  signatures: UInt32[np.ndarray, "v h"],
  seeds: Int[np.ndarray, " s"],
  active: Int[np.ndarray, " m"],
  size: int,
  *,
  mask_empty: bool = True,
) -> Ranking:
  """Host. The vertices of highest mean similarity to the seeds.

  Args:
    signatures: [V, H].
    seeds: vertices.
    active: A, ascending, with all seeds in it, as `candidates` gives it.
    size: how many vertices beside the seeds; fewer if the active set has no more.
    mask_empty: as in `similarity`.

  Raises:
    ValueError: an argument of another shape or out of range.
  """
  active, places, local, total = _begin(signatures, seeds, active, size, mask_empty)
  total[places] = -1
  order = np.argsort(-total, kind="stable")[: min(size, len(active) - len(places))]
  return Ranking(active[order], total[order] / (len(places) * local.shape[1]))


def minrank(
  signatures: UInt32[np.ndarray, "v h"],
  seeds: Int[np.ndarray, " s"],
  active: Int[np.ndarray, " m"],
  size: int,
  *,
  mask_empty: bool = True,
) -> Ranking:
  """Host. Grows the community by the vertex of highest mean similarity to all that are in it, one at a time.

  Arguments and result as `initial_averages`; a vertex's score is its mean when it was added.
  """
  active, places, local, total = _begin(signatures, seeds, active, size, mask_empty)
  outside = np.ones(len(active), np.bool_)
  outside[places] = False
  count = min(size, len(active) - len(places))
  order, score = _grow(local, total, outside, len(places), count)
  return Ranking(active[order], score)


def pagerank(
  signatures: UInt32[np.ndarray, "v h"],
  seeds: Int[np.ndarray, " s"],
  active: Int[np.ndarray, " m"],
  size: int,
  *,
  damping: float = 0.9,
  steps: int = 3,
  keep_seeds: bool = False,
  limit: int = 4096,
  mask_empty: bool = True,
) -> Ranking:
  """Host. Personalised PageRank on the active set's graph of similarities (weight 1 to oneself).

      R <- damping W D^-1 R,  then what is missing of the initial sum (m: all start with 1) goes to the seeds evenly

  Arguments as `initial_averages`, and

  Args:
    signatures: [V, H].
    seeds: vertices.
    active: A.
    size: how many vertices.
    damping: 1 - probability to return to the seeds.
    steps: from R = 1.
    keep_seeds: rank the seeds too, as the official code does.
    limit: largest active set; the graph takes 4 m^2 bytes and m^2 H / 2 comparisons.
    mask_empty: as in `similarity`.
  """
  if not 0 <= damping <= 1:
    raise ValueError(f"damping: got {damping}, expected a number in [0, 1]")
  if len(active) > limit:
    raise ValueError(
      f"active: got {len(active)} vertices, expected at most {limit}, the limit; fewer seeds, wider bands or "
      f"`minrank`, which needs no pairs, help"
    )
  active, places, local, _ = _begin(signatures, seeds, active, size, mask_empty)
  w = _matches(local, local).astype(np.float32) / local.shape[1]
  degree = w.sum(axis=0, dtype=np.float64)
  rank = np.ones(len(active))
  for _ in range(steps):
    rank = damping * (w @ (rank / degree).astype(np.float32)).astype(np.float64)
    rank[places] += (len(active) - rank.sum()) / len(places)
  order = np.argsort(-rank, kind="stable")
  if not keep_seeds:
    order = order[~np.isin(order, places)]
  return Ranking(active[order[:size]], rank[order[:size]])


def _begin(signatures, seeds, active, size, mask_empty):
  """The active set, where in it the seeds are, its signatures, and each one's equal entries with all seeds."""
  check_signatures(signatures)
  seeds = check_seeds(seeds, len(signatures))
  active = np.asarray(active)
  if active.ndim != 1 or not np.issubdtype(active.dtype, np.integer) or (active[1:] <= active[:-1]).any():
    raise ValueError(f"active: got {active!r}, expected ascending vertex numbers")
  places = np.minimum(np.searchsorted(active, seeds), len(active) - 1)
  if not len(active) or (active[places] != seeds).any() or active[0] < 0 or active[-1] >= len(signatures):
    raise ValueError(f"active: got {active}, expected vertices in [0, {len(signatures)}), with the seeds among them")
  if size < 1:
    raise ValueError(f"size: got {size}, expected at least 1")
  local = _gather(signatures, active, mask_empty)
  total = np.zeros(len(active), np.int64)
  for place in places:
    _add_matches(local, local[place], total)
  return active.astype(np.int32), places, local, total


def _gather(signatures, vertices, mask_empty):
  """Their signatures; empty ones become different from each other by numbers above all hashes."""
  if vertices.ndim != 1 or not np.issubdtype(vertices.dtype, np.integer):
    raise ValueError(f"vertices: got {vertices!r}, expected vertex numbers")
  if len(vertices) and (vertices.min() < 0 or vertices.max() >= len(signatures)):
    raise ValueError(f"vertices: got {vertices}, expected numbers in [0, {len(signatures)})")
  local = signatures[vertices]
  if mask_empty:
    empty = np.flatnonzero(local[:, 0] == EMPTY)
    local[empty] = (EMPTY - vertices[empty].astype(np.uint32))[:, None]
  return local


def _matches(left, right):
  """[k, m] numbers of equal entries."""
  counts = np.zeros((len(left), len(right)), np.int32)
  in_parallel(len(left))(functools.partial(_match_rows, left, right, counts))
  return counts


@numba.njit(cache=True, nogil=True)
def _match_rows(left, right, counts, low, high):
  tile = max(1, (1 << 17) // right.shape[1])  # rows that fit into half a megabyte
  for begin in range(0, len(right), tile):
    part = right[begin : begin + tile]
    for row in range(low, high):
      _add_matches(part, left[row], counts[row, begin : begin + tile])


@numba.njit(cache=True, nogil=True)
def _add_matches(signatures, row, total):
  """total[x] += equal entries of signatures[x] and row."""
  for x in range(len(signatures)):
    count = 0
    for i in range(len(row)):
      count += signatures[x, i] == row[i]
    total[x] += count


@numba.njit(cache=True, nogil=True)
def _grow(signatures, total, outside, members, count):
  """`count` additions; total [m] are equal entries summed over the members, so that means are exact."""
  order, score = np.empty(count, np.int32), np.empty(count)
  for k in range(count):
    best = -1
    for x in range(len(total)):
      if outside[x] and (best < 0 or total[x] > total[best]):
        best = x
    order[k], score[k] = best, total[best] / (members * signatures.shape[1])
    outside[best] = False
    _add_matches(signatures, signatures[best], total)
    members += 1
  return order, score
