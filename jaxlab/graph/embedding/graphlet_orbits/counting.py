"""The 28 orbit adjacencies of a pair (i, j) from six sums over its common neighbours: formulas, and loops on the host.

With A the adjacency, d degrees, P = A A and T = A * P (triangles on an edge; `*` is elementwise), the six are

    common   P_ij                        common neighbours
    degrees  (A diag(d) A)_ij            their degrees, summed
    near     (T A)_ij                    triangles on their edges to i
    far      (A T)_ij                    triangles on their edges to j
    inner    E_ij                        edges among them
    walks    (A A A)_ij                  walks of three steps (needed on edges only)

Every sum is at most the number of entries of A, that is twice the number of edges: so they are exact in int32 while A
has fewer than 2^31 entries, and in float32 up to 2^24. Products of two of them need more; on the host they are int64.

`linked` and `apart` are plain arithmetic on integers: numba compiles them for scalars, JAX traces them for matrices.
They share a file with the loops, `near` for hops 1 and 2 and `distant` for hop 3, since numba's cache of compiled loops
notices changes of their own file alone. Graphs on the host are rows of neighbours: `starts` [N + 1] int64, `columns`
[2E] int32, sorted in each row.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

OrbitPair = tuple[int, int, int]  # hop, orbit of the row's node, orbit of the column's

HOP_1: tuple[OrbitPair, ...] = (
  (1, 0, 0), (1, 1, 2), (1, 2, 1), (1, 3, 3), (1, 4, 5), (1, 5, 4), (1, 5, 5), (1, 6, 7), (1, 7, 6), (1, 8, 8),
  (1, 9, 11), (1, 11, 9), (1, 10, 10), (1, 10, 11), (1, 11, 10), (1, 12, 13), (1, 13, 12), (1, 13, 13), (1, 14, 14),
)  # fmt: skip
HOP_2: tuple[OrbitPair, ...] = (
  (2, 1, 1), (2, 4, 5), (2, 5, 4), (2, 6, 6), (2, 8, 8), (2, 9, 10), (2, 10, 9), (2, 12, 12),
)  # fmt: skip
HOP_3: tuple[OrbitPair, ...] = ((3, 4, 4),)
ORBIT_PAIRS = HOP_1 + HOP_2 + HOP_3

# Orbits of graphlets G0 to G8.
GRAPHLETS = ((0,), (1, 2), (3,), (4, 5), (6, 7), (8,), (9, 10, 11), (12, 13), (14,))

# No simple path over all nodes of the graphlet joins these two places.
INVISIBLE_TO_PATHS: tuple[OrbitPair, ...] = (
  (1, 1, 2), (1, 2, 1), (1, 4, 5), (1, 5, 4), (1, 5, 5), (1, 6, 7), (1, 7, 6), (1, 9, 11), (1, 11, 9), (1, 10, 10),
  (1, 10, 11), (1, 11, 10), (1, 13, 13), (2, 4, 5), (2, 5, 4), (2, 6, 6), (2, 8, 8),
)  # fmt: skip


class Sums(NamedTuple):
  """Of a pair, or matrices of all pairs: see above."""

  common: Any
  degrees: Any
  near: Any
  far: Any
  inner: Any


class Node(NamedTuple):
  """Of an end of the pair, or of all in a row or column.

  Attributes:
    degree: d.
    triangles: row sum of T, twice the triangles at the node.
    open_paths: paths node - a - b without the edge node - b: the sum over neighbours a of d_a - 1 - T.
  """

  degree: Any
  triangles: Any
  open_paths: Any


def linked(sums, walks, i, j):
  """Entries of `HOP_1` at an edge (i, j), from its `Sums`, walks and two `Node`s."""
  common, degrees, near, far, inner = sums
  only_i, only_j = i.degree - 1 - common, j.degree - 1 - common  # neighbours of i that are none of j, and of j
  a1213, a1312 = far - common - 2 * inner, near - common - 2 * inner
  a88 = walks - i.degree - j.degree + 1 - near - far + 2 * (common + inner)
  a911, a119 = j.triangles // 2 - far + inner, i.triangles // 2 - near + inner
  return (
    common * 0 + 1,  # 1 in the type of the others
    only_j,
    only_i,
    common,
    j.open_paths - (degrees - common - far) - only_i - a88,
    i.open_paths - (degrees - common - near) - only_j - a88,
    only_i * only_j - a88,
    only_j * (only_j - 1) // 2 - a911,
    only_i * (only_i - 1) // 2 - a119,
    a88,
    a911,
    a119,
    degrees - near - far + 2 * inner,
    common * only_j - a1213,
    common * only_i - a1312,
    a1213,
    a1312,
    common * (common - 1) // 2 - inner,
    inner,
  )


def apart(sums, i, j):
  """Entries of `HOP_2` at two nodes (i, j) that have common neighbours and no edge. Arguments as `linked`."""
  common, degrees, near, far, inner = sums
  a88 = common * (common - 1) // 2 - inner
  return (
    common,
    (j.degree - 1) * common - far - 2 * a88,
    (i.degree - 1) * common - near - 2 * a88,
    degrees - 2 * common - near - far + 2 * inner,
    a88,
    far - 2 * inner,
    near - 2 * inner,
    inner,
  )


# --------------------------------------------------------------------------------------------------- loops on the host

LANES = 16  # rows that hop 3 takes at once: one cache line of int32 for each node
COMMON, DEGREES, NEAR, FAR = range(4)

_linked = numba.njit(inline="always")(linked)
_apart = numba.njit(inline="always")(apart)


class Graph(NamedTuple):
  """A graph and what is known of its nodes and edges, read by all threads."""

  starts: np.ndarray  # [N + 1] int64
  columns: np.ndarray  # [2E] int32
  triangles: np.ndarray  # [2E] int32, of each entry: T
  node_triangles: np.ndarray  # [N] int64, row sums of T
  open_paths: np.ndarray  # [N] int64, see `linked`
  two_steps: np.ndarray  # [N] int64, walks of two steps: at least the nodes they reach


class Work(NamedTuple):
  """Scratch of one thread, zero between calls."""

  sums: np.ndarray  # [N, 4] int32: COMMON, DEGREES, NEAR, FAR of the row and every node
  inner: np.ndarray  # [N] int32
  neighbour: np.ndarray  # [N] uint8, of the row's node
  second: np.ndarray  # [N] uint8, neighbour of another one; nodes seen
  found: np.ndarray  # [N] int32
  sources: np.ndarray  # [N, LANES] int32
  reached: np.ndarray  # [N, LANES] int32
  active: np.ndarray  # [N] uint8


def work(n: int) -> Work:
  """Scratch for a graph of n nodes."""
  return Work(
    np.zeros((n, 4), np.int32),
    np.zeros(n, np.int32),
    np.zeros(n, np.uint8),
    np.zeros(n, np.uint8),
    np.empty(n, np.int32),
    np.zeros((n, LANES), np.int32),
    np.zeros((n, LANES), np.int32),
    np.zeros(n, np.uint8),
  )


@numba.njit(cache=True, nogil=True)
def triangles(starts, columns, low, high, result):
  """T of the edges of rows low to high - 1 to nodes of lower degree, in both directions' entries."""
  neighbour = np.zeros(starts.size - 1, np.uint8)
  for i in range(low, high):
    begin, end = starts[i], starts[i + 1]
    for e in range(begin, end):
      neighbour[columns[e]] = 1
    for e in range(begin, end):
      a, shared = columns[e], np.int32(0)
      first, last = starts[a], starts[a + 1]
      if last - first < end - begin or (last - first == end - begin and a < i):
        for f in range(first, last):
          shared += neighbour[columns[f]]
        result[e] = shared
        result[first + np.searchsorted(columns[first:last], i)] = shared
    for e in range(begin, end):
      neighbour[columns[e]] = 0


@numba.njit(cache=True, nogil=True)
def near(graph, work, low, high, with_apart):
  """Rows low to high - 1 of hops 1 and 2: values [19, entries], and starts, columns, values [8, entries] of hop 2."""
  starts, columns, triangles = graph.starts, graph.columns, graph.triangles
  n = starts.size - 1
  sums, inner, neighbour, found = work.sums, work.inner, work.neighbour, work.found
  values = np.empty((len(HOP_1), starts[high] - starts[low]), np.int64)
  room = 0
  if with_apart:
    for i in range(low, high):
      room += min(graph.two_steps[i], n)
  apart_starts, size = np.zeros(high - low + 1, np.int64), 0
  # Pages of this that stay empty are never touched, so they cost nothing.
  apart_columns, apart_values = np.empty(room, np.int32), np.empty((len(HOP_2), room), np.int64)
  for i in range(low, high):
    begin, end = starts[i], starts[i + 1]
    reached = 0
    for e in range(begin, end):
      a, t_ia = columns[e], triangles[e]
      neighbour[a] = 1
      d_a = np.int32(starts[a + 1] - starts[a])
      for f in range(starts[a], starts[a + 1]):
        j = columns[f]
        if sums[j, COMMON] == 0:
          found[reached] = j
          reached += 1
        sums[j, COMMON] += 1
        sums[j, DEGREES] += d_a
        sums[j, NEAR] += t_ia
        sums[j, FAR] += triangles[f]
    if graph.node_triangles[i] > 0:
      _inner(graph, work, i)
    here = _node(graph, i)
    for e in range(begin, end):
      j, walks = columns[e], np.int64(0)
      for f in range(starts[j], starts[j + 1]):
        walks += sums[columns[f], COMMON]
      row = _linked(_sums(work, j), walks, here, _node(graph, j))
      for k in range(len(row)):
        values[k, e - starts[low]] = row[k]
    if with_apart:
      _sort(found, reached, sums[:, COMMON])
      for x in range(reached):
        j = found[x]
        if neighbour[j] == 0 and j != i:
          entry = _apart(_sums(work, j), here, _node(graph, j))
          apart_columns[size] = j
          for k in range(len(entry)):
            apart_values[k, size] = entry[k]
          size += 1
    apart_starts[i - low + 1] = size
    for x in range(reached):
      j = found[x]
      sums[j, COMMON], sums[j, DEGREES], sums[j, NEAR], sums[j, FAR], inner[j] = 0, 0, 0, 0, 0
    for e in range(begin, end):
      neighbour[columns[e]] = 0
  return values, apart_starts, apart_columns[:size], apart_values[:, :size]


@numba.njit(inline="always")
def _sums(work, j):
  sums = work.sums
  return Sums(
    np.int64(sums[j, COMMON]), np.int64(sums[j, DEGREES]), np.int64(sums[j, NEAR]), np.int64(sums[j, FAR]),
    np.int64(work.inner[j]),
  )  # fmt: skip


@numba.njit(inline="always")
def _node(graph, i):
  return Node(graph.starts[i + 1] - graph.starts[i], graph.node_triangles[i], graph.open_paths[i])


@numba.njit(cache=True, nogil=True)
def _inner(graph, work, i):
  """E_ij of every j: each edge a - b among the neighbours of i counts for the common neighbours of a and b."""
  starts, columns = graph.starts, graph.columns
  neighbour, second, inner = work.neighbour, work.second, work.inner
  for e in range(starts[i], starts[i + 1]):
    if graph.triangles[e] == 0:
      continue
    a = columns[e]
    d_a = starts[a + 1] - starts[a]
    for f in range(starts[a], starts[a + 1]):
      second[columns[f]] = 1
    for f in range(starts[a], starts[a + 1]):
      b = columns[f]
      d_b = starts[b + 1] - starts[b]
      # Of two ends the one with fewer neighbours is listed, against the other's marks.
      if neighbour[b] and (d_b < d_a or (d_b == d_a and b < a)):
        for g in range(starts[b], starts[b + 1]):
          inner[columns[g]] += second[columns[g]]
    for f in range(starts[a], starts[a + 1]):
      second[columns[f]] = 0


@numba.njit(cache=True, nogil=True)
def _sort(found, count, marks):
  """Sorts the first entries of `found`, which are the nodes with a mark."""
  if 16 * count < marks.size:
    for x, j in enumerate(np.sort(found[:count])):  # assigned as an array, numba compiles for seconds
      found[x] = j
  else:
    count = 0
    for j in range(marks.size):
      if marks[j] != 0:
        found[count] = j
        count += 1


@numba.njit(cache=True, nogil=True)
def distant(graph, work, low, high, apart_starts, apart_columns, common, paws, offset):
  """Rows low to high - 1 of hop 3, at most LANES of them: B A - R without edges, with B = [2;1,1] and R = [2;9,10].

  Args:
    graph: the graph.
    work: scratch.
    low: first row.
    high: row after the last.
    apart_starts: of hop 2, for rows from `low - offset` on.
    apart_columns: likewise.
    common: B, likewise.
    paws: R, likewise.
    offset: rows of hop 2 before `low`.

  Returns:
    Starts, columns and values.
  """
  starts, columns = graph.starts, graph.columns
  sources, reached, active, seen, found = work.sources, work.reached, work.active, work.second, work.found
  rows, count = high - low, 0
  for r in range(rows):
    for x in range(apart_starts[offset + r], apart_starts[offset + r + 1]):
      a = apart_columns[x]
      sources[a, r] = common[x]
      if active[a] == 0:
        active[a] = 1
        found[count] = a
        count += 1
  _sort(found, count, active)
  middle = found[:count].copy()
  count = 0
  for a in middle:
    for e in range(starts[a], starts[a + 1]):
      j = columns[e]
      if seen[j] == 0:
        seen[j] = 1
        found[count] = j
        count += 1
      for r in range(LANES):
        reached[j, r] += sources[a, r]
    active[a] = 0
    for r in range(LANES):
      sources[a, r] = 0
  _sort(found, count, seen)
  for r in range(rows):
    for e in range(starts[low + r], starts[low + r + 1]):
      reached[columns[e], r] = 0
    for x in range(apart_starts[offset + r], apart_starts[offset + r + 1]):
      reached[apart_columns[x], r] -= paws[x]
  places = np.zeros(rows + 1, np.int64)
  for x in range(count):
    j = found[x]
    for r in range(rows):
      places[r + 1] += reached[j, r] != 0
  for r in range(rows):
    places[r + 1] += places[r]
  distant_starts = places.copy()
  distant_columns, values = np.empty(places[rows], np.int32), np.empty(places[rows], np.int64)
  for x in range(count):
    j = found[x]
    seen[j] = 0
    for r in range(rows):
      if reached[j, r] != 0:
        distant_columns[places[r]], values[places[r]] = j, reached[j, r]
        places[r] += 1
        reached[j, r] = 0
  return distant_starts, distant_columns, values


@numba.njit(cache=True, nogil=True)
def count_entries(values):
  """How many are not zero."""
  count = 0
  for value in values:
    count += value != 0
  return count


@numba.njit(cache=True, nogil=True)
def copy_entries(starts, columns, values, at, to_starts, to_columns, to_values):
  """Writes the entries that are not zero from place `at` on, and where rows end."""
  for r in range(starts.size - 1):
    for x in range(starts[r], starts[r + 1]):
      if values[x] != 0:
        to_columns[at], to_values[at] = columns[x], values[x]
        at += 1
    to_starts[r] = at


@numba.njit(cache=True, nogil=True)
def row_sums(starts, values):
  """Sum of each row, for every set of values: [K, rows]."""
  result = np.zeros((values.shape[0], starts.size - 1), np.int64)
  for k in range(values.shape[0]):
    for r in range(starts.size - 1):
      for x in range(starts[r], starts[r + 1]):
        result[k, r] += values[k, x]
  return result
