"""Host kernels of the gradient of a dense layer's weights: the product of a transposed matrix and another.

XLA's CPU backend computes it at half the speed of a product of rows and columns in float32, and at a quarter in
bfloat16. Here items take blocks of rows, put the numbers that are used together next to each other, and add their outer
products to sums that stay in registers (`jaxlab.nn._tiles`).
"""

import functools

import numpy as np
from numba import types

from jaxlab import kernels
from jaxlab.nn import _tiles

_TILE, _VECTORS = 8, 2  # of the sums in registers
_ROWS = 192  # packed at a time, or pairs of them: with the columns of a tile they stay in the nearest cache
_LEAST = 32  # inputs or outputs of a part
_SUMS = 1 << 16  # that an item keeps
_ITEMS = 8  # of a call, to balance the load
_SIDE = 32  # of the squares that a transpose is made of


def plan(count: int, rows: int, inputs: int, outputs: int) -> tuple[np.ndarray, int]:
  """How each of `count` products is cut: parts of rows, of inputs and of outputs. And how many items there are.

  Parts of rows are packed once but their sums have to be added; parts of inputs or outputs are packed several times.
  """
  wanted = -(-_ITEMS // count)
  parts = max(1, min(wanted, rows * (inputs + outputs) // (4 * inputs * outputs)))
  down = across = 1
  while parts * down * across < wanted or inputs * outputs > _SUMS * down * across:
    if max(inputs // down, outputs // across) < _LEAST:
      break
    if inputs // down > outputs // across:
      down *= 2
    else:
      across *= 2
  return np.array([parts, down, across], np.int32), count * parts * down * across


@functools.cache
def outer(lanes: int, pairs: bool) -> kernels.Kernel:
  """Kernel (x [S, N, C], g [S, N, O], plan) -> x^T g [parts, S, C, O] and sums of g's rows [parts, S, O].

  x and g are float32, or with `pairs` bfloat16; one of them may be alone for all S of the other. Each part is that of
  some of the rows: their sum is wanted.
  """
  number = types.uint16 if pairs else types.uint32
  together, wide = 2 if pairs else 1, _VECTORS * lanes

  @kernels.kernel(f"product.outer.{lanes}.{pairs}")
  def kernel(item, frame):
    x, g = kernels.operand(frame, 0, number, 3), kernels.operand(frame, 1, number, 3)
    plan, y = kernels.operand(frame, 2, types.int32, 1), kernels.result(frame, 0, types.float32, 4)
    total = kernels.result(frame, 1, types.float32, 3)
    parts, down, across = np.int64(plan[0]), np.int64(plan[1]), np.int64(plan[2])
    part, i, j = item // (down * across) % parts, item // across % down, item % across
    s = item // (parts * down * across)
    rows, inputs, outputs = x.shape[1], x.shape[2], g.shape[2]
    x_start = s * rows * inputs if x.shape[0] > 1 else 0
    g_start = s * rows * outputs if g.shape[0] > 1 else 0
    # Borders lie on whole tiles.
    pieces, panels = (inputs + lanes - 1) // lanes, (outputs + wide - 1) // wide
    c0, c1 = lanes * (pieces * i // down), min(inputs, lanes * (pieces * (i + 1) // down))
    o0, o1 = wide * (panels * j // across), min(outputs, wide * (panels * (j + 1) // across))
    pieces, panels = (c1 - c0 + lanes - 1) // lanes, (o1 - o0 + wide - 1) // wide
    left = np.empty(pieces * _ROWS * lanes, np.uint32)
    right = np.empty(panels * _ROWS * wide, np.uint32)
    sums = np.zeros(panels * pieces * lanes * wide, np.float32)
    added, one = np.zeros(panels * wide, np.float32), np.array([0x3F803F80 if pairs else 0x3F800000], np.uint32)
    row, stop = rows * part // parts, rows * (part + 1) // parts
    while row < stop:
      count = min(together * _ROWS, stop - row)
      length = (count + together - 1) // together
      at = g_start + row * outputs + o0
      _tiles.pack_panels(lanes, _VECTORS, pairs, g.reshape(-1), at, outputs, count, o1 - o0, right, _ROWS * wide)
      at = x_start + row * inputs + c0
      _tiles.pack_panels(lanes, 1, pairs, x.reshape(-1), at, inputs, count, c1 - c0, left, _ROWS * lanes)
      target = sums.ctypes.data
      for p in range(panels):
        weights = right.ctypes.data + 4 * p * _ROWS * wide
        if i == 0:
          _tiles.accumulate(
            1, _VECTORS, lanes, pairs, added.ctypes.data + 4 * p * wide, 0, added.ctypes.data + 4 * p * wide, 0,
            one.ctypes.data, 0, weights, 1, 0, 0, 1, 0, 0, length, 0, 4 * wide,
          )  # fmt: skip
        for q in range(pieces):
          source = left.ctypes.data + 4 * q * _ROWS * lanes
          for _ in range(0, lanes, _TILE):
            _tiles.accumulate(
              _TILE, _VECTORS, lanes, pairs, target, 4 * wide, target, 4 * wide, source, 4, weights,
              1, 0, 0, 1, 0, 0, length, 4 * lanes, 4 * wide,
            )  # fmt: skip
            source += 4 * _TILE
            target += 4 * _TILE * wide
      row += count
    for p in range(panels):
      at, size = o0 + p * wide, min(wide, o1 - o0 - p * wide)
      for c in range(c1 - c0):
        place = (p * pieces * lanes + c) * wide
        kernels.write(sums[place : place + size], y[part, s, c0 + c, at : at + size])
    if i == 0:
      kernels.write(added[: o1 - o0], total[part, s, o0:o1])

  return kernel


def turned_items(count: int, columns: int) -> int:
  """Items of `turned`."""
  return count * -(-columns // _SIDE)


@kernels.kernel("product.turned")
def turned(item, frame):
  """Kernel x [S, N, C] -> transposes [S, C, N], of bfloat16 numbers."""
  x, y = kernels.operand(frame, 0, types.uint16, 3), kernels.result(frame, 0, types.uint16, 3)
  _, rows, columns = x.shape
  stripes = (columns + _SIDE - 1) // _SIDE
  s, first = item // stripes, item % stripes * _SIDE
  for row in range(0, rows, _SIDE):
    last = min(row + _SIDE, rows)
    for column in range(first, min(first + _SIDE, columns)):
      source, target = x[s, row:last, column], y[s, column, row:last]
      for i in range(last - row):
        target[i] = source[i]
