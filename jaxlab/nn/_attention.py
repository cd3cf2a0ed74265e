"""Host kernels of attention: the weights of a block of queries at a time, which stay in the cache of a core.

XLA's CPU backend writes logits and weights of all queries out, several times over, and multiplies small matrices of
heads slowly. Here an item is a head of an example, or some of its queries; its four or, backward, seven products are
sums in registers (`jaxlab.nn._tiles`). Weights are not kept for the gradient but computed anew, from the logarithm of
their sum:

    p = exp(s q k^T - l),   dv = p^T do,   dp = do v^T,   ds = s p (dp - sum of p dp),   dq = ds k,   dk = ds^T q

With `pairs`, queries, keys and values are bfloat16, and so are weights in the products.
"""

import functools

import numba
import numpy as np
from numba import types

from jaxlab import kernels
from jaxlab.nn import _tiles, softmax

_TILE, _VECTORS = 8, 2  # of the sums in registers
_QUERIES = 64  # of a block
_AHEAD = 8  # tokens
_ITEMS = 8  # of a call, at least, to balance the load


def parts(batch: int, heads: int, queries: int) -> int:
  """Parts into which the queries of a head are cut, items of their own."""
  return max(1, min(-(-_ITEMS // (batch * heads)), -(-queries // _TILE)))


def _numbers(pairs):
  """Types of operands, whose bits are copied, and of results, and how these are written."""
  return (types.uint16, types.uint16, kernels.write_rounded) if pairs else (types.uint32, types.float32, kernels.write)


@functools.cache
def attend(lanes: int, pairs: bool) -> kernels.Kernel:
  """Kernel (q [B, N, C], k [B, M, C], v [B, M, C], scale [1], parts [1]) -> out [B, N, C], logs [B, H, N].

  The latter are of the sums of weights. An item for each of the `parts` of each head.
  """
  number, result, write = _numbers(pairs)
  wide, together = _VECTORS * lanes, 2 if pairs else 1

  @kernels.kernel(f"attention.attend.{lanes}.{pairs}")
  def kernel(item, frame):
    q, k = kernels.operand(frame, 0, number, 3), kernels.operand(frame, 1, number, 3)
    v, scale = kernels.operand(frame, 2, number, 3), kernels.operand(frame, 3, types.float32, 1)
    out, logs = kernels.result(frame, 0, result, 3), kernels.result(frame, 1, types.float32, 3)
    parts = np.int64(kernels.operand(frame, 4, types.int32, 1)[0])
    _, queries, channels = q.shape
    heads, keys = logs.shape[1], k.shape[1]
    b, h, part = item // (heads * parts), item // parts % heads, item % parts
    depth = channels // heads
    words, tokens, panels = _padded(depth, together) // together, _padded(keys, wide), _padded(depth, wide) // wide
    turned = np.zeros(tokens * words, np.uint32)
    _turn(k, b, h * depth, depth, pairs, words, wide, turned)
    steps = tokens // together
    values = np.empty(panels * steps * wide, np.uint32)
    at = b * keys * channels + h * depth
    _tiles.pack_panels(lanes, _VECTORS, pairs, v.reshape(-1), at, channels, keys, depth, values, steps * wide)
    asked = np.zeros(_QUERIES * words, np.uint32)
    scores = np.empty(_QUERIES * tokens, np.float32)
    weights = np.zeros(_QUERIES * tokens, result) if pairs else scores
    answers = np.empty(_QUERIES * panels * wide, np.float32)
    over, broken = np.empty(_QUERIES, np.float32), np.empty(_QUERIES, np.bool_)
    used = (keys + together - 1) // together
    for first in range(queries * part // parts, queries * (part + 1) // parts, _QUERIES):
      count = min(_QUERIES, queries * (part + 1) // parts - first)
      _rows(q, b, first, count, h * depth, depth, pairs, words, asked)
      _products(lanes, pairs, scores, tokens, asked, words, turned, words, words, tokens // wide, count)
      for t in range(count):
        row = scores[t * tokens : t * tokens + keys]
        top, broken[t] = softmax.largest(row)
        total = softmax.exp(row, row, scale[0], scale[0] * top)
        logs[b, h, first + t], over[t] = scale[0] * top + np.log(total), np.float32(1) / total
        if pairs:
          write(row, weights[t * tokens : t * tokens + keys])
      _products(lanes, pairs, answers, panels * wide, weights, steps, values, steps, used, panels, count)
      for t in range(count):
        answer = answers[t * panels * wide : t * panels * wide + depth]
        for c in range(depth):
          answer[c] *= over[t]
        if broken[t]:
          answer[:] = np.uint32(0x7FC00000).view(np.float32)
        write(answer, out[b, first + t, h * depth : (h + 1) * depth])

  return kernel


@functools.cache
def gradient(lanes: int, pairs: bool) -> kernels.Kernel:
  """Kernel (q, k, v, scale, logs, do), named as for `attend`, -> dq, dk, dv. An item for each head."""
  number, result, write = _numbers(pairs)
  wide, together = _VECTORS * lanes, 2 if pairs else 1

  @kernels.kernel(f"attention.gradient.{lanes}.{pairs}")
  def kernel(item, frame):
    q, k = kernels.operand(frame, 0, number, 3), kernels.operand(frame, 1, number, 3)
    v, scale = kernels.operand(frame, 2, number, 3), kernels.operand(frame, 3, types.float32, 1)
    logs, g = kernels.operand(frame, 4, types.float32, 3), kernels.operand(frame, 5, number, 3)
    dq, dk = kernels.result(frame, 0, result, 3), kernels.result(frame, 1, result, 3)
    dv = kernels.result(frame, 2, result, 3)
    _, queries, channels = q.shape
    heads, keys = logs.shape[1], k.shape[1]
    b, h = item // heads, item % heads
    depth = channels // heads
    words, tokens, panels = _padded(depth, together) // together, _padded(keys, wide), _padded(depth, wide) // wide
    keys_turned, values_turned = np.zeros(tokens * words, np.uint32), np.zeros(tokens * words, np.uint32)
    _turn(k, b, h * depth, depth, pairs, words, wide, keys_turned)
    _turn(v, b, h * depth, depth, pairs, words, wide, values_turned)
    steps, at = tokens // together, b * keys * channels + h * depth
    rows = np.empty(panels * steps * wide, np.uint32)
    _tiles.pack_panels(lanes, _VECTORS, pairs, k.reshape(-1), at, channels, keys, depth, rows, steps * wide)
    asked, given = np.zeros(_QUERIES * words, np.uint32), np.zeros(_QUERIES * words, np.uint32)
    asked_rows = np.empty(panels * _QUERIES // together * wide, np.uint32)
    given_rows = np.empty(panels * _QUERIES // together * wide, np.uint32)
    scores, slopes = np.empty(_QUERIES * tokens, np.float32), np.empty(_QUERIES * tokens, np.float32)
    narrow = np.zeros(_QUERIES * tokens, result)
    across = np.zeros(_QUERIES * tokens // together, np.uint32)
    answers = np.empty(_QUERIES * panels * wide, np.float32)
    dkeys, dvalues = np.zeros(tokens * panels * wide, np.float32), np.zeros(tokens * panels * wide, np.float32)
    used, panel = (keys + together - 1) // together, _QUERIES // together * wide
    for first in range(0, queries, _QUERIES):
      count = min(_QUERIES, queries - first)
      length = (count + together - 1) // together
      _rows(q, b, first, count, h * depth, depth, pairs, words, asked)
      _rows(g, b, first, count, h * depth, depth, pairs, words, given)
      at = (b * queries + first) * channels + h * depth
      _tiles.pack_panels(lanes, _VECTORS, pairs, q.reshape(-1), at, channels, count, depth, asked_rows, panel)
      _tiles.pack_panels(lanes, _VECTORS, pairs, g.reshape(-1), at, channels, count, depth, given_rows, panel)
      _products(lanes, pairs, scores, tokens, asked, words, keys_turned, words, words, tokens // wide, count)
      _products(lanes, pairs, slopes, tokens, given, words, values_turned, words, words, tokens // wide, count)
      for t in range(count):
        row, slope = scores[t * tokens : t * tokens + keys], slopes[t * tokens : t * tokens + keys]
        # Divided by their sum once more, as a rounding of the logarithm would not cancel in what follows.
        over, mean = np.float32(1) / softmax.exp(row, row, scale[0], logs[b, h, first + t]), np.float32(0)
        for m in range(keys):
          row[m] *= over
          mean += row[m] * slope[m]
        for m in range(keys):
          slope[m] = scale[0] * row[m] * (slope[m] - mean)
        write(slope, narrow[t * tokens : t * tokens + keys])
      _products(lanes, pairs, answers, panels * wide, narrow, steps, rows, steps, used, panels, count)
      for t in range(count):
        place = t * panels * wide
        write(answers[place : place + depth], dq[b, first + t, h * depth : (h + 1) * depth])
      for sums, weights, right in ((dvalues, scores, given_rows), (dkeys, slopes, asked_rows)):
        _across(weights, tokens, count, pairs, across)
        for m in range(0, keys, _TILE):
          for p in range(panels):
            target = sums.ctypes.data + 4 * (m * panels + p) * wide
            _tiles.accumulate(
              _TILE, _VECTORS, lanes, pairs, target, 4 * panels * wide, target, 4 * panels * wide,
              across.ctypes.data + 4 * m, 4, right.ctypes.data + 4 * p * panel,
              1, 0, 0, 1, 0, 0, length, 4 * tokens, 4 * wide,
            )  # fmt: skip
    for m in range(keys):
      place = m * panels * wide
      write(dkeys[place : place + depth], dk[b, m, h * depth : (h + 1) * depth])
      write(dvalues[place : place + depth], dv[b, m, h * depth : (h + 1) * depth])

  return kernel


@numba.njit(inline="always")
def _padded(count, multiple):
  return (count + multiple - 1) // multiple * multiple


@numba.njit(inline="always")
def _products(lanes, pairs, sums, width, left, step, right, panel, length, panels, count):
  """sums[t, :] = left[t, :length] @ right for `count` rows, and more up to a tile; a row of left is `step` words."""
  wide = _VECTORS * lanes
  zeros = np.zeros(wide, np.float32)
  for p in range(panels):
    for t in range(0, count, _TILE):
      _tiles.accumulate(
        _TILE, _VECTORS, lanes, pairs, sums.ctypes.data + 4 * (t * width + p * wide), 4 * width,
        zeros.ctypes.data, 0, left.ctypes.data + 4 * t * step, 4 * step, right.ctypes.data + 4 * p * panel * wide,
        1, 0, 0, 1, 0, 0, length, 4, 4 * wide,
      )  # fmt: skip


@numba.njit
def _turn(x, b, first, depth, pairs, words, wide, turned):
  """Tokens of a head, in panels of `wide` tokens: word i of token m of panel p at (p * words + i) * wide + m."""
  for m in range(x.shape[1]):
    row = x[b, m]
    _prefetch(x, b, m + _AHEAD, first, depth)
    place = m // wide * words * wide + m % wide
    for i in range(words):
      turned[place + i * wide] = _word(row, first, depth, i, pairs)


@numba.njit
def _rows(x, b, first_row, count, first, depth, pairs, words, target):
  """Words of tokens of a head, row after row."""
  for t in range(count):
    row = x[b, first_row + t]
    _prefetch(x, b, first_row + t + _AHEAD, first, depth)
    for i in range(words):
      target[t * words + i] = _word(row, first, depth, i, pairs)


@numba.njit(inline="always")
def _prefetch(x, b, m, first, depth):
  """Asks for a head's channels of a token to come: tokens are far apart, so the processor does not foresee them."""
  start = x.ctypes.data + x.itemsize * ((b * x.shape[1] + m) * x.shape[2] + first)
  for byte in range(0, x.itemsize * depth, 64):
    kernels.prefetch(start + byte)


@numba.njit(inline="always")
def _word(row, first, depth, i, pairs):
  if not pairs:
    return row[first + i]
  low = np.uint32(row[first + 2 * i])
  return low | (np.uint32(row[first + 2 * i + 1]) << np.uint32(16)) if 2 * i + 1 < depth else low


@numba.njit
def _across(weights, tokens, count, pairs, words):
  """Words of what `count` queries give the same key: with `pairs`, those of two queries."""
  bits = weights.view(np.uint32)
  for t in range(0, count, 2 if pairs else 1):
    row = bits[t * tokens : (t + 1) * tokens]
    if not pairs:
      target = words[t * tokens : (t + 1) * tokens]
      for m in range(tokens):
        target[m] = row[m]
      continue
    target = words[t // 2 * tokens : (t // 2 + 1) * tokens]
    for m in range(tokens):
      target[m] = kernels.rounded(row[m])
    if t + 1 < count:
      following = bits[(t + 1) * tokens : (t + 2) * tokens]
      for m in range(tokens):
        target[m] |= kernels.rounded(following[m]) << np.uint32(16)
