"""Host loops over rows of orbit adjacencies: `near` for hops 1 and 2, `distant` for hop 3. See `formulas` for the sums.

Graphs are rows of neighbours: `starts` [N + 1] int64, `columns` [2E] int32 sorted in each row.
"""

from typing import NamedTuple

import numba
import numpy as np

from jaxlab.graph.embedding.graphlet_orbits import formulas

LANES = 16  # rows that hop 3 takes at once: one cache line of int32 for each node
COMMON, DEGREES, NEAR, FAR = range(4)

_linked = numba.njit(inline="always")(formulas.linked)
_apart = numba.njit(inline="always")(formulas.apart)


class Graph(NamedTuple):
  """A graph and what is known of its nodes and edges, read by all threads."""

  starts: np.ndarray  # [N + 1] int64
  columns: np.ndarray  # [2E] int32
  triangles: np.ndarray  # [2E] int32, of each entry: T
  node_triangles: np.ndarray  # [N] int64, row sums of T
  open_paths: np.ndarray  # [N] int64, see `formulas.linked`
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
  """T of the entries of rows low to high - 1."""
  neighbour = np.zeros(starts.size - 1, np.uint8)
  for i in range(low, high):
    begin, end = starts[i], starts[i + 1]
    for e in range(begin, end):
      neighbour[columns[e]] = 1
    for e in range(begin, end):
      a, shared = columns[e], np.int32(0)
      for f in range(starts[a], starts[a + 1]):
        shared += neighbour[columns[f]]
      result[e] = shared
    for e in range(begin, end):
      neighbour[columns[e]] = 0


@numba.njit(cache=True, nogil=True)
def near(graph, work, low, high, with_apart):
  """Rows low to high - 1 of hops 1 and 2: values [19, entries], and starts, columns, values [8, entries] of hop 2."""
  starts, columns, triangles = graph.starts, graph.columns, graph.triangles
  n = starts.size - 1
  sums, inner, neighbour, found = work.sums, work.inner, work.neighbour, work.found
  values = np.empty((len(formulas.HOP_1), starts[high] - starts[low]), np.int64)
  room = 0
  if with_apart:
    for i in range(low, high):
      room += min(graph.two_steps[i], n)
  apart_starts, size = np.zeros(high - low + 1, np.int64), 0
  # Pages of this that stay empty are never touched, so they cost nothing.
  apart_columns, apart_values = np.empty(room, np.int32), np.empty((len(formulas.HOP_2), room), np.int64)
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
    d_i = end - begin
    for e in range(begin, end):
      j, walks = columns[e], np.int64(0)
      for f in range(starts[j], starts[j + 1]):
        walks += sums[columns[f], COMMON]
      row = _linked(
        np.int64(triangles[e]), np.int64(sums[j, DEGREES]), np.int64(sums[j, NEAR]), np.int64(sums[j, FAR]), np.int64(inner[j]),
        walks, d_i, starts[j + 1] - starts[j], graph.node_triangles[i], graph.node_triangles[j], graph.open_paths[i],
        graph.open_paths[j],
      )  # fmt: skip
      for k in range(len(row)):
        values[k, e - starts[low]] = row[k]
    if with_apart:
      _sort(found, reached, sums[:, COMMON])
      for x in range(reached):
        j = found[x]
        if neighbour[j] == 0 and j != i:
          entry = _apart(
            np.int64(sums[j, COMMON]), np.int64(sums[j, DEGREES]), np.int64(sums[j, NEAR]), np.int64(sums[j, FAR]),
            np.int64(inner[j]), d_i, starts[j + 1] - starts[j],
          )  # fmt: skip
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
    found[:count] = np.sort(found[:count])
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
  starts, columns, n = graph.starts, graph.columns, graph.starts.size - 1
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
def positive(starts, columns, values):
  """The entries that are not zero."""
  count = 0
  for x in range(values.size):
    count += values[x] != 0
  kept_starts, kept_columns, kept = np.zeros(starts.size, np.int64), np.empty(count, np.int32), np.empty(count, np.int64)
  count = 0
  for r in range(starts.size - 1):
    for x in range(starts[r], starts[r + 1]):
      if values[x] != 0:
        kept_columns[count], kept[count] = columns[x], values[x]
        count += 1
    kept_starts[r + 1] = count
  return kept_starts, kept_columns, kept


@numba.njit(cache=True, nogil=True)
def row_sums(starts, values):
  """Sum of each row, for every set of values: [K, rows]."""
  result = np.zeros((values.shape[0], starts.size - 1), np.int64)
  for k in range(values.shape[0]):
    for r in range(starts.size - 1):
      for x in range(starts[r], starts[r + 1]):
        result[k, r] += values[k, x]
  return result
