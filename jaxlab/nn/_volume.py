"""Host kernels of the 3-D convolution: register-blocked products of patches and filters, without forming the patches.

Volumes have zeros around them, so that the window of an output voxel along a row is one run of kw * C numbers: they
come with them, or an item copies what it reads and puts zeros around that. Both the convolution and the gradient of its
filters are then sums of

    sums[t, :] += a[t] * b[:]

over such runs: for the convolution, t are voxels of a row, a their inputs and b filters; for the gradient, t are places
of the window, a their inputs at one voxel and b the gradient there. `_tiles.accumulate` keeps the sums in registers.

With `pairs`, what is called a number here is two neighbouring bfloat16 channels, whose products are both added: the
processor has an instruction for that, which does twice the work of a float32 one.
"""

import functools
import math
from collections.abc import Sequence

import numba
import numpy as np
from numba import types

from jaxlab import kernels
from jaxlab.nn import _tiles

_NEAR = 96 * 1024  # numbers of the volume that an item reads, if it can do with so few: they stay in its core's cache
_PIECE = 128  # numbers of a window that are summed in registers without a stop
_FEW_CHANNELS = 64  # whose numbers are near each other in memory
_ROWS = 128  # of filters that an item of `filters` turns, an even number
_PLACES = 32  # of a window that are copied together for the gradient
_ITEMS = 16  # of a call, at least, to balance the load
# Positions in the plan that an operation hands its kernel.
_STRIDES, _BLOCK, _WINDOW, _BEFORE, _FRAMED, _GROUPS = 0, 3, 5, 8, 11, 12


def plan(
  shape: Sequence[int],
  window: Sequence[int],
  out: Sequence[int],
  strides: Sequence[int],
  before: Sequence[int] | None,
  *,
  chunks: int,
  sums: bool,
) -> tuple[np.ndarray, int]:
  """How a call is cut into items.

  Args:
    shape: of the volumes [N, D, H, W, C], in numbers of four bytes.
    window: sides of the filters.
    out: sides of the result.
    strides: of its voxels.
    before: zeros before each side that the volumes do not have yet; None if they come with all.
    chunks: parts of the outputs that are computed one after the other.
    sums: whether items add into a part each, which should then be few, instead of writing voxels of their own.

  Returns:
    The kernel's plan, and its items.
  """
  block = [out[0], out[1]]  # depth and height of the voxels of an item

  def near() -> int:
    sides = [(n - 1) * s + k for n, s, k in zip((*block, out[2]), strides, window, strict=True)]
    return math.prod(sides) * shape[4]

  while near() > _NEAR and max(block) > 1:
    axis = 0 if block[0] > 1 else 1
    block[axis] = -(-block[axis] // 2)
  blocks = shape[0] * -(-out[0] // block[0]) * -(-out[1] // block[1])
  if sums:
    groups, parts = chunks, min(blocks, max(1, _ITEMS // 2 // chunks))
  else:
    groups, parts = min(chunks, -(-_ITEMS // blocks)), blocks
  framed = before is None
  return np.array([*strides, *block, *window, *(before or (0, 0, 0)), framed, groups, parts], np.int32), groups * parts


def filter_items(rows: int) -> int:
  """Items of `filters`."""
  return -(-rows // _ROWS)


@functools.cache
def filters(vectors: int, lanes: int, pairs: bool) -> kernels.Kernel:
  """Kernel w [kd * kh * kw * C, O] -> words, as `convolve` reads them: the outputs in panels, one after the other.

  XLA's CPU backend turns arrays at a few GB/s.
  """
  number, together = (types.uint16, 2) if pairs else (types.uint32, 1)

  @kernels.kernel(f"volume.filters.{vectors}.{lanes}.{pairs}")
  def kernel(item, frame):
    w, words = kernels.operand(frame, 0, number, 2), kernels.result(frame, 0, types.uint32, 1)
    rows, out = w.shape
    wide, first = vectors * lanes, item * _ROWS
    panel, count = rows // together * wide, min(_ROWS, rows - first)
    place = words[first // together * wide :]
    _tiles.pack_panels(lanes, vectors, pairs, w.reshape(-1), first * out, out, count, out, place, panel)

  return kernel


@functools.cache
def convolve(tile: int, vectors: int, lanes: int, pairs: bool) -> kernels.Kernel:
  """Kernel (x [N, D, H, W, C], w [O / wide, kd, kh, kw * C, wide], plan) -> y [N, d, h, w, O], wide = vectors * lanes.

  With `pairs`, x and y are bfloat16. Voxel (i, j, k) of y is that of the window that begins at (i, j, k) * strides of x
  with its zeros; rows of an x that comes with them reach as far as whole tiles of y do. x may have more channels than
  the filters: they are passed over.
  """
  number, size, write = (types.uint16, 2, kernels.write_rounded) if pairs else (types.float32, 4, kernels.write)

  @kernels.kernel(f"volume.convolve.{tile}.{vectors}.{lanes}.{pairs}")
  def kernel(item, frame):
    x, w = kernels.operand(frame, 0, number, 5), kernels.operand(frame, 1, types.uint32, 5)
    plan, y = kernels.operand(frame, 2, types.int32, 1), kernels.result(frame, 0, number, 5)
    width, out, flat = y.shape[3], y.shape[4], y.reshape(-1)
    sd, sh, sw = np.int64(plan[_STRIDES]), np.int64(plan[_STRIDES + 1]), np.int64(plan[_STRIDES + 2])
    kd, kh, kw = np.int64(plan[_WINDOW]), np.int64(plan[_WINDOW + 1]), np.int64(plan[_WINDOW + 2])
    depth, height, groups = np.int64(plan[_BLOCK]), np.int64(plan[_BLOCK + 1]), np.int64(plan[_GROUPS])
    block, group = item // groups, item % groups
    high, deep = (y.shape[2] + height - 1) // height, (y.shape[1] + depth - 1) // depth
    n, d0, h0 = block // (high * deep), block // high % deep * depth, block % high * height
    depth, height = min(depth, y.shape[1] - d0), min(height, y.shape[2] - h0)
    chunks, run, wide = w.shape[0], w.shape[3], vectors * lanes
    tiled = (width + tile - 1) // tile * tile
    numbers, corner, plane, row, step = _with_zeros(
      x, n, d0 * sd, h0 * sh, plan, (depth - 1) * sd + kd, (height - 1) * sh + kh, (tiled - 1) * sw + kw, 64 // size
    )
    # The window along a row is one stretch of x, or one a voxel where x has more channels.
    stretches, length = (1, run) if 4 * run == size * kw * step else (kw, run // kw)
    high_together = kh if run <= _PIECE else 1
    deep_together = kd if kh * run <= _PIECE else 1
    # Rows are done one by one if their windows are summed without a stop, so that sums stay in the nearest cache; else
    # together, so that a piece of the filters does. Of the former, sums can leave the registers for the result, where
    # the last tile of a row may come over the one before.
    lines, whole = depth * height, kd == deep_together and kh == high_together and stretches == 1 and run <= _PIECE
    together, direct = 1 if whole else lines, not pairs and whole and width >= tile
    sums, zeros = np.empty(together * tiled * wide, np.float32), np.zeros(wide, np.float32)
    for chunk in range(chunks * group // groups, chunks * (group + 1) // groups):
      for first in range(0, lines, together):
        for p in range(0 if direct else len(sums)):
          sums[p] = 0
        for a in range(0, kd, deep_together):
          for b in range(0, kh, high_together):
            for s in range(stretches):
              for r in range(0, length, _PIECE):
                piece = min(_PIECE, length - r)
                weights = w.ctypes.data + 4 * wide * (((chunk * kd + a) * kh + b) * run + s * length + r)
                for line in range(first, first + together):
                  i, j = line // height, line % height
                  place = corner + plane * (i * sd + a) + row * (j * sh + b) + s * step
                  source = numbers.ctypes.data + size * place + 4 * r
                  target, pixel = sums.ctypes.data + 4 * (line - first) * tiled * wide, 4 * wide
                  if direct:
                    at = ((n * y.shape[1] + d0 + i) * y.shape[2] + h0 + j) * width * out + chunk * wide
                    target, pixel = y.ctypes.data + 4 * at, 4 * out
                  for k in range(0, width, tile):
                    k = min(k, width - tile) if direct else k
                    begun, step_begun = (zeros.ctypes.data, 0) if direct else (target + pixel * k, pixel)
                    _tiles.accumulate(
                      tile, vectors, lanes, pairs, target + pixel * k, pixel, begun, step_begun,
                      source + size * k * sw * step, size * sw * step, weights,
                      deep_together, size * plane, 4 * kh * run * wide,
                      high_together, size * row, 4 * run * wide, piece, 4, 4 * wide,
                    )  # fmt: skip
        for line in range(0 if direct else together):
          i, j, place = (first + line) // height, (first + line) % height, line * tiled * wide
          at = ((n * y.shape[1] + d0 + i) * y.shape[2] + h0 + j) * width * out + chunk * wide
          # Voxels of few outputs are written together: a call for each would take as long as its sums.
          span = width * wide if wide == out else wide
          for _ in range(0, width * wide, span):
            write(sums[place : place + span], flat[at : at + span])
            place += span
            at += out

  return kernel


@functools.cache
def correlate(tile: int, vectors: int, lanes: int, pairs: bool) -> kernels.Kernel:
  """Kernel (x [N, D, H, W, C], g [N, d, h, w, O], plan) -> gradients of the filters [parts, kd, kh, kw * C, O].

  Each part is that of some of the voxels: their sum is wanted. x and g are float32, or with `pairs` bfloat16, whose
  numbers at neighbouring voxels are summed together. x with its zeros begins and ends with the windows.
  """
  number = types.uint16 if pairs else types.uint32
  together = 2 if pairs else 1

  @kernels.kernel(f"volume.correlate.{tile}.{vectors}.{lanes}.{pairs}")
  def kernel(item, frame):
    x, g = kernels.operand(frame, 0, number, 5), kernels.operand(frame, 1, number, 5)
    plan, y = kernels.operand(frame, 2, types.int32, 1), kernels.result(frame, 0, types.float32, 5)
    width, out = g.shape[3], g.shape[4]
    sd, sh, sw = np.int64(plan[_STRIDES]), np.int64(plan[_STRIDES + 1]), np.int64(plan[_STRIDES + 2])
    kd, kh, kw = np.int64(plan[_WINDOW]), np.int64(plan[_WINDOW + 1]), np.int64(plan[_WINDOW + 2])
    most_deep, most_high, groups = np.int64(plan[_BLOCK]), np.int64(plan[_BLOCK + 1]), np.int64(plan[_GROUPS])
    parts, part, group = y.shape[0], item // groups, item % groups
    high, deep = (g.shape[2] + most_high - 1) // most_high, (g.shape[1] + most_deep - 1) // most_deep
    blocks, wide, column = x.shape[0] * deep * high, vectors * lanes, sw * x.shape[4]
    first, run, columns = group * wide, kw * x.shape[4], (width + together - 1) // together
    tiled = (run + tile - 1) // tile * tile  # places of the window, and some behind it whose sums are of no use
    # Voxels of few channels are read where they are; of others, the numbers that are used together are copied together.
    direct = not pairs and x.shape[4] <= _FEW_CHANNELS and run == tiled
    piece = tiled if direct else min(tiled, _PLACES // tile * tile)
    rows = (most_high - 1) * sh + kh
    inputs = np.empty(0 if direct else ((most_deep - 1) * sd + kd) * rows * columns * piece, np.uint32)
    gradients = np.empty(most_deep * most_high * columns * wide, np.uint32)
    sums = np.zeros(kd * kh * tiled * wide, np.float32)
    for block in range(blocks * part // parts, blocks * (part + 1) // parts):
      n, d0, h0 = block // (high * deep), block // high % deep * most_deep, block % high * most_high
      depth, height = min(most_deep, g.shape[1] - d0), min(most_high, g.shape[2] - h0)
      for i in range(depth):
        for j in range(height):
          at = ((n * g.shape[1] + d0 + i) * g.shape[2] + h0 + j) * width * out + first
          place = (i * height + j) * columns * wide
          _tiles.pack(lanes, pairs, g.reshape(-1), at, out, width, wide, wide, gradients, place)
      numbers, corner, plane, line, _ = _with_zeros(
        x, n, d0 * sd, h0 * sh, plan, (depth - 1) * sd + kd, (height - 1) * sh + kh, (width - 1) * sw + kw, 0
      )
      for p in range(0, tiled, piece):
        size = min(piece, tiled - p)
        if direct:
          source, across, down, through = numbers.ctypes.data + 4 * corner, column, line, plane
        else:
          source, across, down, through = inputs.ctypes.data, size, columns * size, columns * size * rows
          for i in range((depth - 1) * sd + kd):
            for j in range((height - 1) * sh + kh):
              at, count = corner + p + plane * i + line * j, min(size, run - p)
              _tiles.pack(lanes, pairs, numbers, at, column, width, count, size, inputs, i * through + j * down)
        # Lines that follow each other are one loop.
        lines, length = (1, height * columns) if down == columns * across and sh == 1 else (height, columns)
        for a in range(kd):
          for b in range(kh):
            target = sums.ctypes.data + 4 * wide * ((a * kh + b) * tiled + p)
            first_input = source + 4 * (a * through + b * down)
            for _ in range(0, size, tile):
              _tiles.accumulate(
                tile, vectors, lanes, pairs, target, 4 * wide, target, 4 * wide, first_input, 4, gradients.ctypes.data,
                depth, 4 * through * sd, 4 * wide * columns * height,
                lines, 4 * down * sh, 4 * wide * columns, length, 4 * across, 4 * wide,
              )  # fmt: skip
              first_input += 4 * tile
              target += 4 * tile * wide
    for a in range(kd):
      for b in range(kh):
        for r in range(run):
          place = ((a * kh + b) * tiled + r) * wide
          for v in range(wide):
            y[part, a, b, r, first + v] = sums[place + v]

  return kernel


@numba.njit
def _with_zeros(x, n, d0, h0, plan, deep, high, columns, extra):
  """The `deep` x `high` x `columns` voxels of volume n from (d0, h0, 0) on, counted with the zeros before it.

  Returns numbers, the place of the first voxel in them, and the steps to the next plane, row and voxel: x itself, or a
  copy with zeros around it, in which voxels that would share few lines of the cache are `extra` numbers further apart.
  """
  _, depth, height, width, channels = x.shape
  flat = x.reshape(-1)
  if plan[_FRAMED]:
    row = width * channels
    return flat, row * ((n * depth + d0) * height + h0), row * height, row, channels
  d0, h0, w0 = d0 - plan[_BEFORE], h0 - plan[_BEFORE + 1], -np.int64(plan[_BEFORE + 2])
  step = channels + extra if extra > 0 and channels % (16 * extra) == 0 else channels
  row = columns * step
  copy = np.empty(deep * high * row, x.dtype)
  first, last = max(0, -w0), min(columns, width - w0)  # columns that x has
  for i in range(deep):
    for j in range(high):
      target = copy[(i * high + j) * row : (i * high + j + 1) * row]
      d, h = d0 + i, h0 + j
      if d < 0 or d >= depth or h < 0 or h >= height or last <= first:
        for q in range(row):
          target[q] = 0
        continue
      for q in range(first * step):
        target[q] = 0
      for q in range(last * step, row):
        target[q] = 0
      at = (((n * depth + d) * height + h) * width + w0 + first) * channels
      together = last - first if step == channels else 1
      for k in range(first, last, together):
        place, source = target[k * step : k * step + together * channels], flat[at : at + together * channels]
        for q in range(together * channels):
          place[q] = source[q]
        at += together * channels
  return copy, 0, high * row, row, step
