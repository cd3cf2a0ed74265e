"""Host loops of GraphVite: alias tables, random walks into a pool of blocks, and training of one block."""

from typing import NamedTuple

import numba
import numpy as np

from jaxlab import kernels

WALKS = 100  # at a time, step by step, so that their cache misses overlap
CHUNK = 128  # samples whose negatives are drawn together
AHEAD = 4  # samples between a prefetch and its use
MEASURED = 32  # one chunk in so many adds to the loss

_GOLDEN, _HALF, _LOW = np.uint64(0x9E3779B97F4A7C15), np.uint64(32), np.uint64(0xFFFFFFFF)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


class Walkable(NamedTuple):
  """A graph to walk on: CSR rows with sorted columns. Tables are empty where all weights are equal."""

  starts: np.ndarray  # [N + 1] int64
  receivers: np.ndarray  # [E] int32
  senders: np.ndarray  # [E] int32
  edge_accept: np.ndarray  # [E] float32, alias table over all edges
  edge_alias: np.ndarray  # [E] int32
  accept: np.ndarray  # [E] float32, a table for each row
  alias: np.ndarray  # [E] int32, counted from the row's start


# ----------------------------------------------------------------------------------------------------------- random


@numba.njit(inline="always")
def _bits(seed, counter):
  """64 random bits: SplitMix64 (Steele, Lea and Flood, 2014) at a place of its sequence."""
  z = seed + np.uint64(counter) * _GOLDEN
  z = (z ^ (z >> _S30)) * _FIRST
  z = (z ^ (z >> _S27)) * _SECOND
  return z ^ (z >> _S31)


@numba.njit(inline="always")
def _below(bits, count):
  """A number in [0, count) from the upper half of the bits."""
  return np.int64(((bits >> _HALF) * np.uint64(count)) >> _HALF)


@numba.njit(inline="always")
def _unit(bits):
  """A number in [0, 1] from the lower half."""
  return np.float32(bits & _LOW) * np.float32(2.0**-32)


@numba.njit(inline="always")
def _draw(bits, accept, alias, start, count):
  """From a segment of alias tables, or uniformly if there are none."""
  i = _below(bits, count)
  if len(accept) > 0 and not _unit(bits) < accept[start + i]:
    return np.int64(alias[start + i])
  return i


@numba.njit(cache=True)
def alias_tables(weights, starts):
  """Tables (accept, alias) of a distribution proportional to `weights` in each segment, by Vose's method.

  Entry i of a segment is drawn when i is picked uniformly and kept, with probability accept[i], or is the alias of
  another that was not kept. Aliases count from the segment's start.
  """
  accept, alias = np.ones(len(weights), np.float32), np.zeros(len(weights), np.int32)
  small, large = np.empty(len(weights), np.int64), np.empty(len(weights), np.int64)
  scaled = np.empty(len(weights))
  for segment in range(len(starts) - 1):
    first, count = starts[segment], starts[segment + 1] - starts[segment]
    total = 0.0
    for i in range(count):
      total += weights[first + i]
    few, many = 0, 0
    for i in range(count):
      alias[first + i] = i
      scaled[i] = weights[first + i] * count / total
      if scaled[i] < 1:
        small[few] = i
        few += 1
      else:
        large[many] = i
        many += 1
    while few > 0 and many > 0:
      few -= 1
      i, j = small[few], large[many - 1]
      accept[first + i], alias[first + i] = scaled[i], j
      scaled[j] -= 1 - scaled[i]
      if scaled[j] < 1:
        many -= 1
        small[few] = j
        few += 1
    # What rounding leaves over has probability 1, but for weights of zero.
    for k in range(few):
      if weights[first + small[k]] == 0:
        accept[first + small[k]] = 0
        alias[first + small[k]] = large[0] if many > 0 else alias[first]
  return accept, alias


# ------------------------------------------------------------------------------------------------------------ walks


@numba.njit(inline="always")
def _linked(graph, node, other):
  """Whether there is an edge, by bisection."""
  low, high = graph.starts[node], graph.starts[node + 1]
  while low < high:
    middle = (low + high) >> 1
    if graph.receivers[middle] < other:
      low = middle + 1
    else:
      high = middle
  return low < graph.starts[node + 1] and graph.receivers[low] == other


@numba.njit(nogil=True, cache=True)
def walk(graph, seed, counter, back, away, chains, lengths):
  """Random walks from edges drawn by weight; returns the counter after the random numbers that were used.

  `chains` is [w, L + 1] nodes, `lengths` [w] the steps made, less than L at a dead end. A step is drawn by weight,
  and accepted with probability proportional to `back` (to the node before), 1 (to a neighbour of that node) or `away`.
  """
  count, steps = chains.shape[0], chains.shape[1] - 1
  second_order = back != 1 or away != 1
  highest = max(back, 1.0, away)
  for w in range(count):
    edge = _draw(_bits(seed, counter), graph.edge_accept, graph.edge_alias, 0, len(graph.receivers))
    counter += 1
    chains[w, 0], chains[w, 1], lengths[w] = graph.senders[edge], graph.receivers[edge], 1
  for j in range(2, steps + 1):
    for w in range(count):
      node = chains[w, j - 1]
      first = graph.starts[node]
      degree = graph.starts[node + 1] - first
      if lengths[w] < j - 1 or degree == 0:
        continue
      while True:
        receiver = graph.receivers[first + _draw(_bits(seed, counter), graph.accept, graph.alias, first, degree)]
        counter += 1
        if not second_order:
          break
        before = chains[w, j - 2]
        bias = back if receiver == before else (1.0 if _linked(graph, before, receiver) else away)
        counter += 1
        if _unit(_bits(seed, counter - 1)) * highest < bias:
          break
      chains[w, j], lengths[w] = receiver, j
  return counter


@numba.njit(nogil=True, cache=True)
def fill(graph, place, pool, begin, end, base, step, length, back, away, seed, limit):
  """Walks until every block has its samples `begin` to `end`; returns how many pairs that took, -1 if over `limit`.

  `pool` is [P, P, Q, 2]: local (head, tail) by tail part and head part; `place` is [N, 2]: part and local index.
  """
  parts, share = pool.shape[0], np.uint32(pool.shape[2] // base)
  filled = np.full((parts, parts), begin, np.uint32)
  chains, lengths = np.empty((WALKS, length + 1), np.int32), np.empty(WALKS, np.int64)
  waiting, counter, drawn = parts * parts, 0, 0
  stop, divisor = np.uint32(end), np.uint32(base)
  while waiting > 0:
    if drawn > limit:
      return -1
    counter = walk(graph, seed, counter, back, away, chains, lengths)
    for w in range(WALKS):
      for j in range(lengths[w]):
        head_part, head = place[chains[w, j], 0], place[chains[w, j], 1]
        for k in range(j + 1, min(j + step, lengths[w]) + 1):
          tail_part, tail = place[chains[w, k], 0], place[chains[w, k], 1]
          drawn += 1
          number = filled[tail_part, head_part]
          if number < stop:
            slot = number if divisor == 1 else number % divisor * share + number // divisor
            pool[tail_part, head_part, slot, 0] = head
            pool[tail_part, head_part, slot, 1] = tail
            filled[tail_part, head_part] = number + np.uint32(1)
            if number + np.uint32(1) == stop:
              waiting -= 1
  return drawn


# --------------------------------------------------------------------------------------------------------- training


@numba.njit(nogil=True, fastmath=True, error_model="numpy", cache=True)
def train(vertex, context, pairs, negatives, lr, negative_weight, weight_decay, measure):
  """Trains on samples one after the other, in place; returns the sum of their losses (0 unless `measure`)."""
  dim, count, num_negatives = vertex.shape[1], pairs.shape[0], negatives.shape[1]
  real = vertex.dtype.type
  one, zero = real(1), real(0)
  rates = real(lr), real(lr * negative_weight)
  decays = real(lr * weight_decay), real(lr * negative_weight * weight_decay)
  loss = 0.0
  row_bytes = dim * vertex.itemsize
  vertex_base, context_base = vertex.ctypes.data, context.ctypes.data
  for i in range(count):
    if i + AHEAD < count:
      for place in range(0, row_bytes, 64):
        kernels.prefetch(vertex_base + row_bytes * pairs[i + AHEAD, 0] + place)
        kernels.prefetch(context_base + row_bytes * pairs[i + AHEAD, 1] + place)
      for k in range(num_negatives):
        for place in range(0, row_bytes, 64):
          kernels.prefetch(context_base + row_bytes * negatives[i + AHEAD, k] + place)
    v = vertex[pairs[i, 0]]
    for k in range(num_negatives + 1):
      positive = k == num_negatives
      c = context[pairs[i, 1]] if positive else context[negatives[i, k]]
      logit = zero
      for d in range(dim):
        logit += v[d] * c[d]
      p = one / (one + np.exp(-logit))
      if measure:
        loss -= np.log(p + real(1e-15)) if positive else negative_weight * np.log(one - p + real(1e-15))
      step = rates[0] * (p - one) if positive else rates[1] * p
      keep = one - (decays[0] if positive else decays[1])
      for d in range(dim):
        a, b = v[d], c[d]
        v[d] = keep * a - step * b
        c[d] = keep * b - step * a
  return loss / (1 + num_negatives * negative_weight)


@numba.njit(nogil=True, error_model="numpy", cache=True)
def train_block(
  vertex, context, pairs, accept, alias, seed, num_negatives, lr, first, stride, batch, total, weight, decay
):
  """Trains on a block with negatives from its tail part, in place; returns (sum of losses, samples it is over).

  Sample j is number first + j * stride of `total`; the learning rate falls with every `batch` of these numbers.
  """
  count, rows = pairs.shape[0], context.shape[0]
  negatives = np.empty((CHUNK, num_negatives), np.int32)
  loss, measured, start = 0.0, 0, 0
  while start < count:
    stop = min(start + CHUNK, count)
    for j in range(start, stop):
      for k in range(num_negatives):
        negatives[j - start, k] = _draw(_bits(seed, j * num_negatives + k), accept, alias, 0, rows)
    rate = lr * max(1.0 - (first + start * stride) // batch * batch / total, 1e-4)
    measure = start // CHUNK % MEASURED == 0
    loss += train(vertex, context, pairs[start:stop], negatives, rate, weight, decay, measure)
    measured += (stop - start) * measure
    start = stop
  return loss, measured
