"""Host loops of HNSW: search, insertion and update on the arrays of an index. See `hnsw` for what they compute."""

from typing import NamedTuple

import numba
import numpy as np

from jaxlab import kernels

ENTRY, TOP, COUNT = 0, 1, 2  # places in `head`: entry point, its level, number of points
AHEAD = 256  # bytes of a vector that are asked for in advance; the processor guesses the rest


class Graph(NamedTuple):
  """Arrays of an index, written in place; rows of links end with -1 where they are not full."""

  vectors: np.ndarray  # [N, d] float32
  links: np.ndarray  # [N, 2M] int32, layer 0
  upper: np.ndarray  # [U, M] int32, layers 1 and above
  first_upper: np.ndarray  # [N] int32, row of layer 1; layer l has the row l - 1 after it
  levels: np.ndarray  # [N] int8
  deleted: np.ndarray  # [N] bool
  head: np.ndarray  # [3] int64


class Work(NamedTuple):
  """Scratch of one thread: who was seen in which search, two heaps, chosen neighbours, and counted distances."""

  seen: np.ndarray  # [N] int32
  clock: np.ndarray  # [2] int64: number of the search, distances evaluated
  near_d: np.ndarray  # min-heap of nodes to expand
  near: np.ndarray
  far_d: np.ndarray  # max-heap of the best found
  far: np.ndarray
  chosen: np.ndarray
  chosen_d: np.ndarray
  pool: np.ndarray
  pool_d: np.ndarray
  fresh: np.ndarray  # neighbours of one node that this search had not seen


def work(capacity: int, ef: int, links: int) -> Work:
  """Scratch for searches up to width `ef` where a node has at most `links` links."""
  wide = max(ef, links) + 2
  return Work(
    np.zeros(capacity, np.int32),
    np.zeros(2, np.int64),
    np.empty(capacity + 2, np.float32),
    np.empty(capacity + 2, np.int32),
    np.empty(wide, np.float32),
    np.empty(wide, np.int32),
    np.empty(wide, np.int32),
    np.empty(wide, np.float32),
    np.empty(wide, np.int32),
    np.empty(wide, np.float32),
    np.empty(links, np.int32),
  )


@numba.njit(fastmath=True, inline="always")
def _distance(inner, a, b):
  """Squared Euclidean distance, or 1 - <a, b>."""
  total = np.float32(0)
  if inner:
    for k in range(len(a)):
      total += a[k] * b[k]
    return np.float32(1) - total
  for k in range(len(a)):
    difference = a[k] - b[k]
    total += difference * difference
  return total


@numba.njit(inline="always")
def _row(graph, node, layer):
  if layer == 0:
    return graph.links[node]
  return graph.upper[graph.first_upper[node] + layer - 1]


# Binary heaps: `sign` 1 keeps the smallest at the root, -1 the largest.


@numba.njit(inline="always")
def _push(keys, items, size, key, item, sign):
  i = size
  while i > 0:
    parent = (i - 1) >> 1
    if sign * keys[parent] <= sign * key:
      break
    keys[i], items[i] = keys[parent], items[parent]
    i = parent
  keys[i], items[i] = key, item


@numba.njit(inline="always")
def _pop(keys, items, size, sign):
  """Removes the root of a heap of `size`."""
  last = size - 1
  key, item = keys[last], items[last]
  i = 0
  while True:
    child = 2 * i + 1
    if child >= last:
      break
    if child + 1 < last and sign * keys[child + 1] < sign * keys[child]:
      child += 1
    if sign * key <= sign * keys[child]:
      break
    keys[i], items[i] = keys[child], items[child]
    i = child
  keys[i], items[i] = key, item


@numba.njit(nogil=True, fastmath=True)
def _search_layer(graph, work, inner, query, entry, entry_d, layer, ef, hidden):
  """Beam search; returns how many of at most `ef` nodes are in the max-heap `work.far`.

  Nodes in `hidden` (no array of the graph's length: none is) are walked through, not found.
  """
  work.clock[0] += 1
  now = np.int32(work.clock[0])
  seen, fresh, any_hidden = work.seen, work.fresh, len(hidden) > 0
  near_d, near, far_d, far = work.near_d, work.near, work.far_d, work.far
  waiting, found = 0, 0
  bound = np.float32(np.inf)
  if not any_hidden or not hidden[entry]:
    _push(far_d, far, found, entry_d, entry, -1)
    found += 1
    bound = entry_d
  _push(near_d, near, waiting, entry_d, entry, 1)
  waiting += 1
  seen[entry] = now
  evaluated = 0
  size = 4 * graph.vectors.shape[1]
  base = graph.vectors.ctypes.data
  while waiting > 0:
    if near_d[0] > bound and found == ef:
      break
    node = near[0]
    _pop(near_d, near, waiting, 1)
    waiting -= 1
    row = _row(graph, node, layer)
    count = 0
    for j in range(len(row)):
      other = row[j]
      if other < 0:
        break
      if seen[other] != now:
        seen[other] = now
        fresh[count] = other
        count += 1
        for place in range(0, min(size, AHEAD), 64):
          kernels.prefetch(base + size * other + place)
    evaluated += count
    for j in range(count):
      other = fresh[j]
      d = _distance(inner, query, graph.vectors[other])
      if found < ef or d < bound:
        _push(near_d, near, waiting, d, other, 1)
        waiting += 1
        kernels.prefetch(graph.links.ctypes.data + 4 * graph.links.shape[1] * near[0])
        if not any_hidden or not hidden[other]:
          _push(far_d, far, found, d, other, -1)
          found += 1
          if found > ef:
            _pop(far_d, far, found, -1)
            found -= 1
        if found > 0:
          bound = far_d[0]
  work.clock[1] += evaluated
  return found


@numba.njit(nogil=True, fastmath=True)
def _greedy(graph, work, inner, query, entry, entry_d, layer):
  """The nearest node that always going to the nearest neighbour finds, and its distance."""
  moved = True
  while moved:
    moved = False
    row = _row(graph, entry, layer)
    for j in range(len(row)):
      other = row[j]
      if other < 0:
        break
      d = _distance(inner, query, graph.vectors[other])
      work.clock[1] += 1
      if d < entry_d:
        entry, entry_d, moved = other, d, True
  return entry, entry_d


@numba.njit(nogil=True, fastmath=True)
def _select(graph, work, inner, diverse, count, most):
  """Of the max-heap `work.far` those nearer to the query than to any node chosen before, or all, nearest first.

  They are put into `work.chosen`; returns how many. Keeps all if there are fewer than `most`.
  """
  order, order_d, chosen, chosen_d = work.pool, work.pool_d, work.chosen, work.chosen_d
  for i in range(count - 1, -1, -1):  # heap sort: ascending
    order[i], order_d[i] = work.far[0], work.far_d[0]
    _pop(work.far_d, work.far, i + 1, -1)
  if count < most:
    for i in range(count):
      chosen[i], chosen_d[i] = order[i], order_d[i]
    return count
  kept = 0
  for i in range(count):
    if kept == most:
      break
    good = True
    for j in range(kept if diverse else 0):
      if _distance(inner, graph.vectors[order[i]], graph.vectors[chosen[j]]) < order_d[i]:
        good = False
        break
    if good:
      chosen[kept], chosen_d[kept] = order[i], order_d[i]
      kept += 1
  return kept


@numba.njit(nogil=True, inline="always")
def _lock(locks, node):
  if len(locks):
    address = locks.ctypes.data + 8 * node
    while kernels.fetch_add(address, 1) != 0:
      kernels.fetch_add(address, -1)


@numba.njit(nogil=True, inline="always")
def _unlock(locks, node):
  if len(locks):
    kernels.fetch_add(locks.ctypes.data + 8 * node, -1)


@numba.njit(nogil=True)
def _connect(graph, work, inner, diverse, node, found, layer, links, locks, update):
  """Links `node` to a choice of the nodes in `work.far` and these back to it; returns the nearest of them."""
  kept = _select(graph, work, inner, diverse, found, links)
  neighbours = work.chosen[:kept].copy()
  distances = work.chosen_d[:kept].copy()
  row = _row(graph, node, layer)
  _lock(locks, node)
  # Other threads may have come by upper layers and linked themselves here: their links go behind.
  early = row[:0].copy() if update else row[row >= 0]
  for i in range(kept):
    row[i] = neighbours[kept - 1 - i]  # farthest first
  size = kept
  for other in early:
    if size < len(row) and not (neighbours == other).any():
      row[size] = other
      size += 1
  row[size:] = -1
  _unlock(locks, node)
  for i in range(kept - 1, -1, -1):
    other = neighbours[i]
    back = _row(graph, other, layer)
    cap = len(back)
    _lock(locks, other)
    size, present = 0, False
    while size < cap and back[size] >= 0:
      present |= back[size] == node
      size += 1
    if update and present:
      pass
    elif size < cap:
      back[size] = node
    else:
      work.far_d[0], work.far[0] = distances[i], node
      for j in range(size):
        d = _distance(inner, graph.vectors[other], graph.vectors[back[j]])
        _push(work.far_d, work.far, j + 1, d, back[j], -1)
      again = _select(graph, work, inner, diverse, size + 1, cap)
      for j in range(again):
        back[j] = work.chosen[again - 1 - j]
      back[again:] = -1
    _unlock(locks, other)
  return neighbours[0], distances[0]


@numba.njit(nogil=True)
def _descend_and_connect(graph, work, inner, diverse, links, ef, node, level, locks, update):
  """Finds neighbours for `node` on its layers and links them."""
  hidden = graph.deleted if graph.deleted.any() else graph.deleted[:0]
  entry, top = graph.head[ENTRY], graph.head[TOP]
  query = graph.vectors[node]
  current, d = entry, _distance(inner, query, graph.vectors[entry])
  for layer in range(top, level, -1):
    current, d = _greedy(graph, work, inner, query, current, d, layer)
  for layer in range(min(level, top), -1, -1):
    d = _distance(inner, query, graph.vectors[current])
    found = _search_layer(graph, work, inner, query, current, d, layer, ef, hidden)
    if update:
      found = _without(work, found, node)
      if found == 0:
        continue
    if len(hidden) and hidden[entry]:
      _push(work.far_d, work.far, found, _distance(inner, query, graph.vectors[entry]), entry, -1)
      found += 1
      if found > ef:
        _pop(work.far_d, work.far, found, -1)
        found -= 1
    current, d = _connect(graph, work, inner, diverse, node, found, layer, links, locks, update)


@numba.njit(nogil=True)
def _without(work, found, node):
  """Removes a node from the max-heap `work.far`, if it is there."""
  kept = 0
  for i in range(found):
    work.pool[i], work.pool_d[i] = work.far[i], work.far_d[i]
  for i in range(found):
    if work.pool[i] != node:
      _push(work.far_d, work.far, kept, work.pool_d[i], work.pool[i], -1)
      kept += 1
  return kept


@numba.njit(nogil=True, cache=True)
def insert(graph, work, inner, diverse, links, ef, first, last, locks, counter):
  """Inserts the nodes that a shared counter hands out, from `first` to before `last`; vectors and levels are set.

  With `locks` several threads may run this at once: a row is written by one at a time, and read by any.
  """
  while True:
    node = first + kernels.fetch_add(counter.ctypes.data, 1)
    if node >= last:
      break
    level = np.int64(graph.levels[node])
    if graph.head[ENTRY] < 0:
      graph.head[ENTRY], graph.head[TOP] = node, level
      continue
    rises = level > graph.head[TOP]
    if rises:
      _lock(locks, graph.vectors.shape[0])
      rises = level > graph.head[TOP]
      if not rises:
        _unlock(locks, graph.vectors.shape[0])
    _descend_and_connect(graph, work, inner, diverse, links, ef, node, level, locks, False)
    if rises:
      graph.head[ENTRY], graph.head[TOP] = node, level
      _unlock(locks, graph.vectors.shape[0])


@numba.njit(nogil=True, cache=True)
def update(graph, work, inner, diverse, links, ef, node, locks):
  """Repairs the graph around a node whose vector was replaced."""
  if graph.head[ENTRY] == node and graph.head[COUNT] == 1:
    return
  level = np.int64(graph.levels[node])
  for layer in range(level + 1):
    own = _row(graph, node, layer)
    size = 0
    while size < len(own) and own[size] >= 0:
      size += 1
    if size == 0:
      continue
    around = own[:size].copy()
    work.clock[0] += 1
    now = np.int32(work.clock[0])
    candidates = np.empty(1 + size * (1 + len(own)), np.int32)
    candidates[0], count = node, 1
    work.seen[node] = now
    for one in around:
      if work.seen[one] != now:
        work.seen[one] = now
        candidates[count] = one
        count += 1
      for two in _row(graph, one, layer):
        if two < 0:
          break
        if work.seen[two] != now:
          work.seen[two] = now
          candidates[count] = two
          count += 1
    for one in around:
      keep, held = min(ef, count - 1), 0
      for other in candidates[:count]:
        if other == one:
          continue
        d = _distance(inner, graph.vectors[one], graph.vectors[other])
        if held < keep:
          _push(work.far_d, work.far, held, d, other, -1)
          held += 1
        elif d < work.far_d[0]:
          _pop(work.far_d, work.far, held, -1)
          _push(work.far_d, work.far, held - 1, d, other, -1)
      row = _row(graph, one, layer)
      kept = _select(graph, work, inner, diverse, held, len(row))
      for j in range(kept):
        row[j] = work.chosen[kept - 1 - j]
      row[kept:] = -1
  _descend_and_connect(graph, work, inner, diverse, links, ef, node, level, locks, True)


@numba.njit(nogil=True, cache=True)
def search(graph, work, inner, queries, ef, hidden, nodes, distances, counter):
  """Fills rows of `nodes` and `distances` [Q, k], nearest first, for the queries that a shared counter hands out."""
  k = nodes.shape[1]
  while True:
    i = kernels.fetch_add(counter.ctypes.data, 1)
    if i >= len(queries):
      break
    query = queries[i]
    current = graph.head[ENTRY]
    d = _distance(inner, query, graph.vectors[current])
    work.clock[1] += 1
    for layer in range(graph.head[TOP], 0, -1):
      current, d = _greedy(graph, work, inner, query, current, d, layer)
    found = _search_layer(graph, work, inner, query, current, d, 0, ef, hidden)
    while found > k:
      _pop(work.far_d, work.far, found, -1)
      found -= 1
    for j in range(found - 1, -1, -1):
      nodes[i, j], distances[i, j] = work.far[0], work.far_d[0]
      _pop(work.far_d, work.far, j + 1, -1)
    nodes[i, found:] = -1
    distances[i, found:] = np.inf
