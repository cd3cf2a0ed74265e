"""Host kernels of the 3-D convolution: register-blocked products of patches and filters, without forming the patches.

Volumes have zeros around them, so that the window of an output voxel along a row is one run of kw * C numbers: they
come with them, or an item copies what it reads and puts zeros around that. Both the convolution and the gradient of its
filters are then sums of

    sums[t, :] += a[t] * b[:]

over such runs: for the convolution, t are voxels of a row, a their inputs and b filters; for the gradient, t are places
of the window, a their inputs at one voxel and b the gradient there. `_accumulate` keeps the sums in registers.

With `pairs`, what is called a number here is two neighbouring bfloat16 channels, whose products are both added: the
processor has an instruction for that, which does twice the work of a float32 one.
"""

import contextlib
import functools
import math
from collections.abc import Sequence

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxlab import kernels

_NEAR = 96 * 1024  # numbers of the volume that an item reads, if it can do with so few: they stay in its core's cache
_PIECE = 128  # numbers of a window that are summed in registers without a stop
FEW_CHANNELS = 64  # whose numbers are near each other in memory
_PLACES = 32  # of a window that are copied together for the gradient
_ITEMS = 16  # of a call, at least, to balance the load
# Positions in the plan that an operation hands its kernel.
_STRIDES, _BLOCK, _WINDOW, _BEFORE, _FRAMED, _GROUPS = 0, 3, 5, 8, 11, 12

_word = ir.IntType(64)


class _BFloat(ir.Type):
  """LLVM's bfloat, which llvmlite does not have."""

  def _to_string(self):
    return "bfloat"

  def __eq__(self, other):
    return isinstance(other, _BFloat)

  def __hash__(self):
    return hash(_BFloat)


@functools.cache
def has_pairs() -> bool:
  """Whether the processor multiplies and adds pairs of bfloat16 numbers."""
  return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))


def _multiply_add(builder, vector, pairs, a, b, total):
  """a * b + total; with `pairs`, of both halves of each number."""
  if not pairs:
    return vector.multiply_add(a, b, total)
  halves = ir.VectorType(_BFloat(), 2 * vector.lanes)
  kind = ir.FunctionType(vector.type, [vector.type, halves, halves])
  name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * vector.lanes}"
  function = cgutils.get_or_insert_function(builder.module, kind, name)
  return builder.call(function, [total, builder.bitcast(a, halves), builder.bitcast(b, halves)])


@intrinsic(prefer_literal=True)
def _accumulate(typing, tile, vectors, lanes, pairs, y, y_t, a, a_t, b, n0, a_0, b_0, n1, a_1, b_1, n2, a_2, b_2):
  """y[t, :] += sum of a[t * a_t + i * a_0 + j * a_1 + k * a_2] * b[i * b_0 + j * b_1 + k * b_2 + :] for t < tile.

  The sum is over i < n0, j < n1 and k < n2. Addresses and steps are in bytes; a row of y and of b is `vectors` vectors.
  """
  tile_, vectors_, lanes_ = tile.literal_value, vectors.literal_value, lanes.literal_value
  pairs_ = pairs.literal_value

  def codegen(context, builder, signature, args):
    y, y_t, a, a_t, b, *loops = args[4:]
    vector, add, mul = kernels.Vectors(builder, lanes_), builder.add, builder.mul
    column = lambda address, v: add(address, _word(vector.bytes * v))
    rows = [add(y, mul(y_t, _word(t))) for t in range(tile_)]
    places = vector.registers([vector.load(column(row, v)) for row in rows for v in range(vectors_)])
    # Four addresses are one register and multiples of the step: the processor adds these itself.
    two, three = mul(a_t, _word(2)), mul(a_t, _word(3))
    with contextlib.ExitStack() as nest:
      at, weights = a, b
      for n, a_step, b_step in zip(loops[::3], loops[1::3], loops[2::3], strict=True):
        loop = nest.enter_context(cgutils.for_range(builder, n))
        at, weights = add(at, mul(loop.index, a_step)), add(weights, mul(loop.index, b_step))
      loaded = [vector.load(column(weights, v)) for v in range(vectors_)]
      for t in range(tile_):
        base = at if t < 4 else add(at, mul(a_t, _word(t // 4 * 4)))
        place = base if t % 4 == 0 else add(base, (a_t, two, three)[t % 4 - 1])
        value = vector.splat(builder.load(builder.inttoptr(place, ir.FloatType().as_pointer())))
        for v in range(vectors_):
          total = builder.load(places[t * vectors_ + v])
          total = _multiply_add(builder, vector, pairs_, value, loaded[v], total)
          builder.store(total, places[t * vectors_ + v])
    for t, row in enumerate(rows):
      for v in range(vectors_):
        vector.store(builder.load(places[t * vectors_ + v]), column(row, v))
    return context.get_dummy_value()

  return types.void(tile, vectors, lanes, pairs, *[types.int64] * 14), codegen


def lanes_for(channels: int) -> int:
  """Width of a vector for so many outputs."""
  return kernels.max_lanes() if channels > 8 else 8


def vectors_for(channels: int, most: int) -> int:
  """Vectors of outputs computed together, at most `most` or 4, for a multiple of `lanes_for` outputs."""
  count = channels // lanes_for(channels)
  return next(vectors for vectors in (4, 2, 3, 1) if vectors <= most and count % vectors == 0)


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


@functools.cache
def convolve(tile: int, vectors: int, lanes: int, pairs: bool) -> kernels.Kernel:
  """Kernel (x [N, D, H, W, C], w [O / wide, kd, kh, kw * C, wide], plan) -> y [N, d, h, w, O], wide = vectors * lanes.

  With `pairs`, x and y are bfloat16. Voxel (i, j, k) of y is that of the window that begins at (i, j, k) * strides of x
  with its zeros; rows of an x that comes with them reach as far as whole tiles of y do. x may have more channels than
  the filters: they are passed over.
  """
  number, size, write = (types.uint16, 2, _write_rounded) if pairs else (types.float32, 4, _write)

  @kernels.kernel(f"volume.convolve.{tile}.{vectors}.{lanes}.{pairs}")
  def kernel(item, frame):
    x, w = kernels.operand(frame, 0, number, 5), kernels.operand(frame, 1, types.uint32, 5)
    plan, y = kernels.operand(frame, 2, types.int32, 1), kernels.result(frame, 0, number, 5)
    width = y.shape[3]
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
    # together, so that a piece of the filters does.
    lines = depth * height
    together = 1 if kd == deep_together and kh == high_together and stretches == 1 and run <= _PIECE else lines
    sums = np.empty(together * tiled * wide, np.float32)
    for chunk in range(chunks * group // groups, chunks * (group + 1) // groups):
      for first in range(0, lines, together):
        for p in range(len(sums)):
          sums[p] = 0
        for a in range(0, kd, deep_together):
          for b in range(0, kh, high_together):
            for s in range(stretches):
              for r in range(0, length, _PIECE):
                piece = min(_PIECE, length - r)
                weights = w.ctypes.data + 4 * wide * (((chunk * kd + a) * kh + b) * run + s * length + r)
                target = sums.ctypes.data
                for line in range(first, first + together):
                  i, j = line // height, line % height
                  place = corner + plane * (i * sd + a) + row * (j * sh + b) + s * step
                  source = numbers.ctypes.data + size * place + 4 * r
                  for _ in range(0, width, tile):
                    _accumulate(
                      tile, vectors, lanes, pairs, target, 4 * wide, source, size * sw * step, weights,
                      deep_together, size * plane, 4 * kh * run * wide,
                      high_together, size * row, 4 * run * wide, piece, 4, 4 * wide,
                    )  # fmt: skip
                    source += size * tile * sw * step
                    target += 4 * tile * wide
        for line in range(together):
          i, j, place = (first + line) // height, (first + line) % height, line * tiled * wide
          for k in range(width):
            write(sums[place : place + wide], y[n, d0 + i, h0 + j, k, chunk * wide : (chunk + 1) * wide])
            place += wide

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
    direct = not pairs and x.shape[4] <= FEW_CHANNELS and run == tiled
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
          _pack(g.reshape(-1), at, out, width, wide, wide, pairs, gradients, (i * height + j) * columns * wide)
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
              _pack(numbers, at, column, width, count, size, pairs, inputs, i * through + j * down)
        # Lines that follow each other are one loop.
        lines, length = (1, height * columns) if down == columns * across and sh == 1 else (height, columns)
        for a in range(kd):
          for b in range(kh):
            target = sums.ctypes.data + 4 * wide * ((a * kh + b) * tiled + p)
            first_input = source + 4 * (a * through + b * down)
            for _ in range(0, size, tile):
              _accumulate(
                tile, vectors, lanes, pairs, target, 4 * wide, first_input, 4, gradients.ctypes.data,
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


@numba.njit(inline="always")
def _write(sums, target):
  for v in range(len(sums)):
    target[v] = sums[v]


@numba.njit(inline="always")
def _write_rounded(sums, target):
  """float32 to the nearest bfloat16, ties to even; no infinity is made of what is not a number."""
  bits = sums.view(np.uint32)
  for v in range(len(bits)):
    word = bits[v]
    rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    unordered = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    target[v] = types.uint16(0x7FC0) if unordered else types.uint16(rounded)


@numba.njit(cache=True)
def _pack(numbers, at, step, length, count, size, pairs, words, place):
  """Writes `count` numbers from `at` on, zeros up to `size`, and the same `step` further on, `length` times in all.

  With `pairs`, a word holds the numbers of one step and of the next.
  """
  for k in range(0, length, 2 if pairs else 1):
    # Loops over slices from 0 on become vector instructions.
    target, source = words[place : place + size], numbers[at : at + count]
    if pairs and k + 1 < length:
      following = numbers[at + step : at + step + count]
      for q in range(count):
        target[q] = np.uint32(source[q]) | (np.uint32(following[q]) << np.uint32(16))
    else:
      for q in range(count):
        target[q] = source[q]
    for q in range(count, size):
      target[q] = 0
    place += size
    at += 2 * step if pairs else step


@numba.njit(cache=True)
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
