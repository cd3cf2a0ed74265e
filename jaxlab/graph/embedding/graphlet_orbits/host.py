"""Orbit adjacencies by blocks of rows, on the host: exact in int64, in parallel, in the memory of a few blocks.

A block takes sum_i sum_{a in N(i)} d_a steps for hops 1 and 2, min(d_a, d_b) more for every triangle (i, a, b), and for
hop 3 sum_{a at distance 2 of i} d_a, of which 16 rows at a time share one pass.
"""

import concurrent.futures
import dataclasses
import functools
import queue
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Int32, Int64

from jaxlab import checks
from jaxlab.graph.embedding.graphlet_orbits import counting
from jaxlab.graph.embedding.graphlet_orbits.counting import ORBIT_PAIRS, OrbitPair

_PLACES = {pair: k for pairs in (counting.HOP_1, counting.HOP_2, counting.HOP_3) for k, pair in enumerate(pairs)}


class Entries(NamedTuple):
  """All matrices of one hop on their common pattern: edges, pairs two steps apart, or ends of paths of four.

  Attributes:
    starts: of rows.
    columns: sorted in each row.
    values: of `HOP_1`, `HOP_2` or `HOP_3`, in that order; some may be 0.
  """

  starts: Int64[np.ndarray, " rows+1"]
  columns: Int32[np.ndarray, " entries"]
  values: Int64[np.ndarray, "pairs entries"]


@dataclasses.dataclass(frozen=True)
class Block:
  """Rows `first` to `last - 1` of orbit adjacencies of N nodes.

  Attributes:
    first: row.
    last: row after the last.
    num_nodes: N.
    hops: hop -> entries; those hops that were asked for.
  """

  first: int
  last: int
  num_nodes: int
  hops: dict[int, Entries]

  def matrix(self, pair: OrbitPair) -> scipy.sparse.csr_array:
    """[last - first, N] int64 without stored zeros; row r is node `first + r`."""
    if pair not in _PLACES or pair[0] not in self.hops:
      held = [p for p in ORBIT_PAIRS if p[0] in self.hops]
      raise ValueError(f"pair: got {pair!r}, expected one of {held}")
    return _matrix([self], pair)


def stream(
  graph: scipy.sparse.csr_array,
  pairs: Iterable[OrbitPair] = ORBIT_PAIRS,
  *,
  rows: int = 64,
  threads: int | None = None,
) -> Iterator[Block]:
  """Host. The rows of orbit adjacencies from the first to the last, in blocks.

  At most 2 blocks for each thread are held at a time. Cheapest without hop 3, cheaper still with hop 1 alone.

  Args:
    graph: [N, N] symmetric, no self-loops, as `common_neighbors.adjacency` makes one; entries are edges, whatever
      their weights.
    pairs: what is wanted; a block holds all pairs of their hops.
    rows: of a block.
    threads: default all cores there are.

  Returns:
    An iterator of blocks.

  Raises:
    ValueError: a graph of another form (directed, loops, 2^31 entries), an unknown pair, an option out of range.
  """
  hops = {pair[0] for pair in _check_pairs(pairs)}
  rows = checks.count("rows", rows, 1)
  starts, columns = _check_graph(graph)
  return _blocks(starts, columns, hops, rows, checks.threads(threads))


def orbit_adjacencies(
  graph: scipy.sparse.csr_array, pairs: Iterable[OrbitPair] = ORBIT_PAIRS, *, threads: int | None = None
) -> dict[OrbitPair, scipy.sparse.csr_array]:
  """Host. Whole orbit adjacencies [N, N] int64, without stored zeros. Arguments as `stream`.

  (3, 4, 4) is close to dense on most networks of a few thousand nodes, where hops are few: 12 bytes an entry.
  """
  pairs, threads = _check_pairs(pairs), checks.threads(threads)
  blocks = list(stream(graph, pairs, threads=threads))
  largest_first = sorted(pairs, reverse=True)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    made = dict(zip(largest_first, pool.map(functools.partial(_matrix, blocks), largest_first), strict=True))
  return {pair: made[pair] for pair in pairs}


def _matrix(blocks: list[Block], pair: OrbitPair) -> scipy.sparse.csr_array:
  """Rows of all blocks, without zeros."""
  parts = [block.hops[pair[0]] for block in blocks]
  place, n = _PLACES[pair], blocks[0].num_nodes
  total = sum(counting.count_entries(part.values[place]) for part in parts)
  index = np.int32 if total < 2**31 else np.int64
  starts = np.zeros(blocks[-1].last - blocks[0].first + 1, index)
  columns, values = np.empty(total, index), np.empty(total, np.int64)
  for block, part in zip(blocks, parts, strict=True):
    at = block.first - blocks[0].first
    rows = starts[at + 1 : at + 1 + block.last - block.first]
    counting.copy_entries(part.starts, part.columns, part.values[place], starts[at], rows, columns, values)
  matrix = scipy.sparse.csr_array((values, columns, starts), shape=(starts.size - 1, n))
  matrix.has_sorted_indices = matrix.has_canonical_format = True
  return matrix


def _blocks(starts: np.ndarray, columns: np.ndarray, hops: set[int], rows: int, threads: int) -> Iterator[Block]:
  """Every block, in order; at most two for each thread are made or in the making at a time."""
  n = starts.size - 1
  bounds = [(low, min(low + rows, n)) for low in range(0, n, rows)]
  threads = min(threads, len(bounds))
  scratch: queue.SimpleQueue[counting.Work] = queue.SimpleQueue()
  for _ in range(threads):
    scratch.put(counting.work(n))

  def block(low, high):
    work = scratch.get()
    try:
      return _block(known, work, low, high, hops)
    finally:
      scratch.put(work)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    known = _known(starts, columns, pool)
    running: deque[concurrent.futures.Future] = deque()
    try:
      for bound in bounds:
        running.append(pool.submit(block, *bound))
        if len(running) == 2 * threads:
          yield running.popleft().result()
      while running:
        yield running.popleft().result()
    finally:  # also where the caller stops early
      for task in running:
        task.cancel()


def _known(starts: np.ndarray, columns: np.ndarray, pool: concurrent.futures.Executor) -> counting.Graph:
  """What the rows need to know of others."""
  triangles = np.empty(columns.size, np.int32)
  bounds = np.linspace(0, starts.size - 1, 65).astype(int)
  list(pool.map(lambda low, high: counting.triangles(starts, columns, low, high, triangles), bounds[:-1], bounds[1:]))
  degree = np.diff(starts)
  sums = functools.partial(counting.row_sums, starts)
  node_triangles, two_steps = sums(np.stack([triangles, degree[columns]]).astype(np.int64))
  return counting.Graph(starts, columns, triangles, node_triangles, two_steps - degree - node_triangles, two_steps)


def _block(graph: counting.Graph, work: counting.Work, low: int, high: int, hops: set[int]) -> Block:
  values, apart_starts, apart_columns, apart = counting.near(graph, work, low, high, max(hops) > 1)
  begin, end = graph.starts[low], graph.starts[high]
  made = {
    1: Entries(graph.starts[low : high + 1] - begin, graph.columns[begin:end], values),
    2: Entries(apart_starts, apart_columns, apart),
  }
  if 3 in hops:
    common, paws = (apart[_PLACES[pair]] for pair in ((2, 1, 1), (2, 9, 10)))
    parts = [
      counting.distant(
        graph, work, at, min(at + counting.LANES, high), apart_starts, apart_columns, common, paws, at - low
      )
      for at in range(low, high, counting.LANES)
    ]
    counts = np.concatenate([np.diff(part[0]) for part in parts])
    made[3] = Entries(
      np.append(0, np.cumsum(counts)),
      np.concatenate([part[1] for part in parts]),
      np.concatenate([part[2] for part in parts])[None],
    )
  return Block(low, high, graph.starts.size - 1, {hop: made[hop] for hop in sorted(hops)})


def _check_pairs(pairs: Iterable[OrbitPair]) -> list[OrbitPair]:
  pairs = list(pairs)
  unknown = [pair for pair in pairs if pair not in _PLACES]
  if unknown or not pairs:
    raise ValueError(f"pairs: got {unknown or 'none'}, expected some of ORBIT_PAIRS, as (hop, orbit, orbit)")
  return pairs


def _check_graph(graph: Any) -> tuple[np.ndarray, np.ndarray]:
  """Row starts and sorted columns."""
  if not scipy.sparse.issparse(graph) or graph.ndim != 2 or graph.shape[0] != graph.shape[1] or not graph.shape[0]:
    what = getattr(graph, "shape", graph)
    raise ValueError(f"graph: got a {type(graph).__name__} of {what}, expected a sparse [N, N], N at least 1")
  if graph.nnz >= 2**31:
    raise ValueError(f"graph: got {graph.nnz} entries, expected fewer than 2^31, where sums of int32 are exact")
  n, rows = graph.shape[0], graph.tocsr()
  pattern = scipy.sparse.csr_array((np.ones(graph.nnz, np.int8), rows.indices, rows.indptr), (n, n))
  pattern = pattern.copy()
  pattern.sum_duplicates()
  if pattern.nnz < graph.nnz:
    raise ValueError(f"graph: got {graph.nnz - pattern.nnz} entries twice, expected each edge once in each direction")
  if not np.all(rows.data):
    raise ValueError("graph: got stored zeros, expected an entry for each edge alone")
  if pattern.diagonal().any():
    raise ValueError(f"graph: got {np.count_nonzero(pattern.diagonal())} self-loops, expected none")
  other = pattern.T.tocsr()
  other.sort_indices()
  if not (np.array_equal(other.indptr, pattern.indptr) and np.array_equal(other.indices, pattern.indices)):
    raise ValueError("graph: got edges in one direction alone, expected a symmetric matrix")
  return pattern.indptr.astype(np.int64), pattern.indices.astype(np.int32)
