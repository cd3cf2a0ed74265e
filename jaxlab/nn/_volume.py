"""Host kernels of the 3-D convolution: register-blocked products of patches and filters, without forming the patches.

An item copies the part of the volume that it needs into scratch memory, with the zeros around it, so that the window
of an output voxel along a row is one run of kw * C numbers. Both the convolution and the gradient of its filters are
then sums of

    sums[t, :] += a[t] * b[:]

over such runs: for the convolution, t are voxels of a row, a their inputs and b filters; for the gradient, t are places
of the window, a their inputs at one voxel and b the gradient there. `_accumulate` keeps the sums in registers.
"""

import functools
import math
from collections.abc import Sequence

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxlab import kernels

_SCRATCH = 96 * 1024  # numbers of the volume that an item copies, if it can do with so few
_TOGETHER = 128  # input channels up to which the rows of a filter are summed in registers without a stop
_ITEMS = 16  # of a call, at least, to balance the load
# Positions in the plan that an operation hands its kernel.
_STRIDES, _BEFORE, _BLOCK, _WINDOW, _GROUPS = 0, 3, 6, 8, 11

_word = ir.IntType(64)


@intrinsic(prefer_literal=True)
def _accumulate(typing, tile, vectors, lanes, y, y_t, a, a_t, b, n1, a_1, b_1, n2, a_2, b_2):
  """y[t, :] += sum over i < n1, j < n2 of a[t * a_t + i * a_1 + j * a_2] * b[i * b_1 + j * b_2 + :] for t < tile.

  Addresses and steps are in bytes; a row of y and of b is `vectors` vectors.
  """
  tile_, vectors_, lanes_ = tile.literal_value, vectors.literal_value, lanes.literal_value

  def codegen(context, builder, signature, args):
    y, y_t, a, a_t, b, n1, a_1, b_1, n2, a_2, b_2 = args[3:]
    vector, add, mul = kernels.Vectors(builder, lanes_), builder.add, builder.mul
    column = lambda address, v: add(address, _word(vector.bytes * v))
    rows = [add(y, mul(y_t, _word(t))) for t in range(tile_)]
    places = vector.registers([vector.load(column(row, v)) for row in rows for v in range(vectors_)])
    # Four addresses are one register and multiples of the step: the processor adds these itself.
    two, three = mul(a_t, _word(2)), mul(a_t, _word(3))
    with cgutils.for_range(builder, n1) as outer:
      first_a, first_b = add(a, mul(outer.index, a_1)), add(b, mul(outer.index, b_1))
      with cgutils.for_range(builder, n2) as inner:
        at, weights = add(first_a, mul(inner.index, a_2)), add(first_b, mul(inner.index, b_2))
        loaded = [vector.load(column(weights, v)) for v in range(vectors_)]
        for t in range(tile_):
          base = at if t < 4 else add(at, mul(a_t, _word(t // 4 * 4)))
          place = base if t % 4 == 0 else add(base, (a_t, two, three)[t % 4 - 1])
          value = vector.splat(builder.load(builder.inttoptr(place, ir.FloatType().as_pointer())))
          for v in range(vectors_):
            total = builder.load(places[t * vectors_ + v])
            builder.store(vector.multiply_add(value, loaded[v], total), places[t * vectors_ + v])
    for t, row in enumerate(rows):
      for v in range(vectors_):
        vector.store(builder.load(places[t * vectors_ + v]), column(row, v))
    return context.get_dummy_value()

  return types.void(tile, vectors, lanes, *[types.int64] * 11), codegen


def lanes_for(channels: int) -> int:
  """Width of a vector for so many outputs."""
  return kernels.max_lanes() if channels > 8 else 8


def vectors_for(channels: int) -> int:
  """Vectors of outputs computed together, for a multiple of `lanes_for` outputs."""
  count = channels // lanes_for(channels)
  return 2 if count % 2 == 0 else 3 if count % 3 == 0 else 1


def tile_for(length: int, vectors: int) -> int:
  """How many of `length` are computed together: as many as the registers hold, wasting few at the end."""
  registers = 24 if kernels.max_lanes() == 16 else 12
  tiles = [tile for tile in (16, 8, 4) if tile * vectors <= registers] or [2]
  return min(tiles, key=lambda tile: -(-length // tile) * (tile + 1))


def plan(
  shape: Sequence[int],
  window: Sequence[int],
  out: Sequence[int],
  strides: Sequence[int],
  before: Sequence[int],
  *,
  channels: int,
  sums: bool,
) -> tuple[np.ndarray, int]:
  """How a call is cut into items.

  Args:
    shape: of the volumes [N, D, H, W, C].
    window: sides of the filters.
    out: sides of the result.
    strides: of its voxels.
    before: zeros before each side (negative: voxels skipped).
    channels: outputs, a multiple of `lanes_for`.
    sums: whether items add into a part each, which should then be few, instead of writing voxels of their own.

  Returns:
    The kernel's plan, and its items.
  """
  block = [out[0], out[1]]  # depth and height of the voxels of an item

  def scratch() -> int:
    sides = [(n - 1) * s + k for n, s, k in zip((*block, out[2]), strides, window, strict=True)]
    return math.prod(sides) * shape[4]

  while scratch() > _SCRATCH and max(block) > 1:
    axis = 0 if block[0] > 1 else 1
    block[axis] = -(-block[axis] // 2)
  blocks = shape[0] * -(-out[0] // block[0]) * -(-out[1] // block[1])
  chunks = channels // (lanes_for(channels) * vectors_for(channels))
  if sums:
    groups, parts = chunks, min(blocks, max(1, _ITEMS // chunks))
  else:
    groups, parts = min(chunks, -(-_ITEMS // blocks)), blocks
  return np.array([*strides, *before, *block, *window, groups, parts], np.int32), groups * parts


@functools.cache
def convolve(tile: int, vectors: int, lanes: int) -> kernels.Kernel:
  """Kernel (x [N, D, H, W, C], w [kd, kh, kw * C, O], plan) -> y [N, d, h, w, O]."""

  @kernels.kernel(f"volume.convolve.{tile}.{vectors}.{lanes}")
  def kernel(item, frame):
    x, w = kernels.operand(frame, 0, types.float32, 5), kernels.operand(frame, 1, types.float32, 4)
    plan, y = kernels.operand(frame, 2, types.int32, 1), kernels.result(frame, 0, types.float32, 5)
    channels, out, width = x.shape[4], y.shape[4], y.shape[3]
    sd, sh, sw = np.int64(plan[_STRIDES]), np.int64(plan[_STRIDES + 1]), np.int64(plan[_STRIDES + 2])
    kd, kh, kw = np.int64(plan[_WINDOW]), np.int64(plan[_WINDOW + 1]), np.int64(plan[_WINDOW + 2])
    depth, height, groups = np.int64(plan[_BLOCK]), np.int64(plan[_BLOCK + 1]), np.int64(plan[_GROUPS])
    block, group = item // groups, item % groups
    high, deep = (y.shape[2] + height - 1) // height, (y.shape[1] + depth - 1) // depth
    n, d0, h0 = block // (high * deep), block // high % deep * depth, block % high * height
    depth, height = min(depth, y.shape[1] - d0), min(height, y.shape[2] - h0)
    # The inputs of these voxels, with zeros where they lie outside; rows are filled up to whole tiles.
    tiled = (width + tile - 1) // tile * tile
    rows, row, run = (height - 1) * sh + kh, ((tiled - 1) * sw + kw) * channels, kw * channels
    scratch = np.empty(((depth - 1) * sd + kd) * rows * row, np.float32)
    _copy(
      x, n, d0 * sd - np.int64(plan[_BEFORE]),
      h0 * sh - np.int64(plan[_BEFORE + 1]), -np.int64(plan[_BEFORE + 2]) * channels, rows, row, scratch,
    )  # fmt: skip
    wide = vectors * lanes
    together = kh if channels <= _TOGETHER else 1
    packed, sums = np.empty(together * run * wide, np.float32), np.empty(depth * height * tiled * wide, np.float32)
    chunks = out // wide
    for chunk in range(chunks * group // groups, chunks * (group + 1) // groups):
      first = chunk * wide
      for p in range(len(sums)):
        sums[p] = 0
      for a in range(kd):
        for b in range(0, kh, together):
          place = 0
          for c in range(together):
            for r in range(run):
              for v in range(wide):
                packed[place + v] = w[a, b + c, r, first + v]
              place += wide
          target = sums.ctypes.data
          for i in range(depth):
            for j in range(height):
              source = scratch.ctypes.data + 4 * row * ((i * sd + a) * rows + j * sh + b)
              for _ in range(0, width, tile):
                _accumulate(
                  tile, vectors, lanes, target, 4 * wide, source, 4 * sw * channels, packed.ctypes.data,
                  together, 4 * row, 4 * run * wide, run, 4, 4 * wide,
                )  # fmt: skip
                source += 4 * tile * sw * channels
                target += 4 * tile * wide
      for i in range(depth):
        for j in range(height):
          place = (i * height + j) * tiled * wide
          for k in range(width):
            for v in range(wide):
              y[n, d0 + i, h0 + j, k, first + v] = sums[place + v]
            place += wide

  return kernel


@functools.cache
def correlate(tile: int, vectors: int, lanes: int) -> kernels.Kernel:
  """Kernel (x [N, D, H, W, C], g [N, d, h, w, O], plan) -> gradients of the filters [parts, kd, kh, kw * C, O].

  Each part is that of some of the voxels: their sum is wanted.
  """

  @kernels.kernel(f"volume.correlate.{tile}.{vectors}.{lanes}")
  def kernel(item, frame):
    x, g = kernels.operand(frame, 0, types.float32, 5), kernels.operand(frame, 1, types.float32, 5)
    plan, y = kernels.operand(frame, 2, types.int32, 1), kernels.result(frame, 0, types.float32, 5)
    channels, width = x.shape[4], g.shape[3]
    sd, sh, sw = np.int64(plan[_STRIDES]), np.int64(plan[_STRIDES + 1]), np.int64(plan[_STRIDES + 2])
    kd, kh, kw = np.int64(plan[_WINDOW]), np.int64(plan[_WINDOW + 1]), np.int64(plan[_WINDOW + 2])
    most_deep, most_high, groups = np.int64(plan[_BLOCK]), np.int64(plan[_BLOCK + 1]), np.int64(plan[_GROUPS])
    parts, part, group = y.shape[0], item // groups, item % groups
    high, deep = (g.shape[2] + most_high - 1) // most_high, (g.shape[1] + most_deep - 1) // most_deep
    blocks, wide = x.shape[0] * deep * high, vectors * lanes
    first, run, row = group * wide, kw * channels, ((width - 1) * sw + kw) * channels
    tiled = (run + tile - 1) // tile * tile  # places of the window, and some behind it whose sums are of no use
    scratch = np.empty(((most_deep - 1) * sd + kd) * ((most_high - 1) * sh + kh) * row + tile, np.float32)
    packed = np.empty(most_deep * most_high * width * wide, np.float32)
    sums = np.zeros(kd * kh * tiled * wide, np.float32)
    for block in range(blocks * part // parts, blocks * (part + 1) // parts):
      n, d0, h0 = block // (high * deep), block // high % deep * most_deep, block % high * most_high
      depth, height = min(most_deep, g.shape[1] - d0), min(most_high, g.shape[2] - h0)
      rows = (height - 1) * sh + kh
      used = ((depth - 1) * sd + kd) * rows * row
      _copy(
        x, n, d0 * sd - np.int64(plan[_BEFORE]),
        h0 * sh - np.int64(plan[_BEFORE + 1]), -np.int64(plan[_BEFORE + 2]) * channels, rows, row, scratch[:used],
      )  # fmt: skip
      for p in range(used, used + tile):
        scratch[p] = 0
      place = 0
      for i in range(depth):
        for j in range(height):
          for k in range(width):
            for v in range(wide):
              packed[place + v] = g[n, d0 + i, h0 + j, k, first + v]
            place += wide
      for i in range(depth):
        gradients, target = packed.ctypes.data + 4 * wide * width * height * i, sums.ctypes.data
        for a in range(kd):
          for b in range(kh):
            source = scratch.ctypes.data + 4 * row * ((i * sd + a) * rows + b)
            for _ in range(0, run, tile):
              _accumulate(
                tile, vectors, lanes, target, 4 * wide, source, 4, gradients,
                height, 4 * row * sh, 4 * wide * width, width, 4 * sw * channels, 4 * wide,
              )  # fmt: skip
              source += 4 * tile
              target += 4 * tile * wide
    for a in range(kd):
      for b in range(kh):
        for r in range(run):
          place = ((a * kh + b) * tiled + r) * wide
          for v in range(wide):
            y[part, a, b, r, first + v] = sums[place + v]

  return kernel


@numba.njit(cache=True)
def _copy(x, n, d, h, w, rows, row, scratch):
  """Numbers of volume n from (d, h, w) on, `rows` rows of `row` numbers a slice; zeros outside. w counts numbers."""
  slices, height, length = x.shape[1], x.shape[2], x.shape[3] * x.shape[4]
  source = x.reshape(-1)
  left, right = min(max(-w, 0), row), min(row, length - w)
  for line in range(len(scratch) // row):
    i, j, place = d + line // rows, h + line % rows, line * row
    if 0 <= i < slices and 0 <= j < height and right > left:
      start = ((n * slices + i) * height + j) * length + w
      for p in range(left):
        scratch[place + p] = 0
      for p in range(left, right):
        scratch[place + p] = source[start + p]
      for p in range(max(left, right), row):
        scratch[place + p] = 0
    else:
      for p in range(row):
        scratch[place + p] = 0
