"""Sums in registers, the inner loop of host kernels that multiply matrices or convolve:

    sums[t, :] += a[t] * b[:]

over runs of numbers a and vectors b. With `pairs`, what is called a number is two neighbouring bfloat16 ones, whose
products are both added: the processor has an instruction for that, which does twice the work of a float32 one.
"""

import contextlib
import functools

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxlab import kernels

_word = ir.IntType(64)


class _BFloat(ir.Type):
  """LLVM's bfloat, which llvmlite does not have."""

  def _to_string(self):
    return "bfloat"

  def __eq__(self, other):
    return isinstance(other, _BFloat)

  def __hash__(self):
    return hash(_BFloat)


def has_matrices() -> bool:
  """Whether the processor multiplies matrices of bfloat16 numbers, as XLA's products of rows and columns then do."""
  return _has("amx-bf16")


def has_pairs() -> bool:
  """Whether the processor multiplies and adds pairs of bfloat16 numbers faster than float32 ones.

  Intel's have the instruction, but take twice as long for it.
  """
  return _has("avx512bf16") and llvmlite.binding.get_host_cpu_name().startswith("znver")


@functools.cache
def _has(feature):
  return bool(llvmlite.binding.get_host_cpu_features().get(feature))


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
def accumulate(
  typing, tile, vectors, lanes, pairs, y, y_t, x, x_t, a, a_t, b, n0, a_0, b_0, n1, a_1, b_1, n2, a_2, b_2
):
  """y[t] = x[t] + sum of a[t * a_t + i * a_0 + j * a_1 + k * a_2] * b[i * b_0 + j * b_1 + k * b_2] for t < tile.

  The sum is over i < n0, j < n1 and k < n2. Addresses and steps are in bytes; a row of x, y and b is `vectors` vectors.
  """
  tile_, vectors_, lanes_ = tile.literal_value, vectors.literal_value, lanes.literal_value
  pairs_ = pairs.literal_value

  def codegen(context, builder, signature, args):
    y, y_t, x, x_t, a, a_t, b, *loops = args[4:]
    vector, add, mul = kernels.Vectors(builder, lanes_), builder.add, builder.mul
    column = lambda address, v: add(address, _word(vector.bytes * v))
    rows = lambda address, step: [add(address, mul(step, _word(t))) for t in range(tile_)]
    places = vector.registers([vector.load(column(row, v)) for row in rows(x, x_t) for v in range(vectors_)])
    place = kernels.stepped(builder, a_t)
    with contextlib.ExitStack() as nest:
      at, weights = a, b
      for n, a_step, b_step in zip(loops[::3], loops[1::3], loops[2::3], strict=True):
        loop = nest.enter_context(cgutils.for_range(builder, n))
        at, weights = add(at, mul(loop.index, a_step)), add(weights, mul(loop.index, b_step))
      loaded = [vector.load(column(weights, v)) for v in range(vectors_)]
      for t in range(tile_):
        value = vector.splat(builder.load(builder.inttoptr(place(at, t), ir.FloatType().as_pointer())))
        for v in range(vectors_):
          total = builder.load(places[t * vectors_ + v])
          total = _multiply_add(builder, vector, pairs_, value, loaded[v], total)
          builder.store(total, places[t * vectors_ + v])
    for t, row in enumerate(rows(y, y_t)):
      for v in range(vectors_):
        vector.store(builder.load(places[t * vectors_ + v]), column(row, v))
    return context.get_dummy_value()

  return types.void(tile, vectors, lanes, pairs, *[types.int64] * 16), codegen


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


@intrinsic(prefer_literal=True)
def _copy(typing, lanes, pairs, target, source, following):
  """Copies a vector; with `pairs`, makes one of the bfloat16 numbers at two addresses. Addresses are in bytes."""
  lanes_, pairs_ = lanes.literal_value, pairs.literal_value

  def codegen(context, builder, signature, args):
    target, source, following = args[2:]
    vector = kernels.Vectors(builder, lanes_)
    if not pairs_:
      vector.store(vector.load(source), target)
      return context.get_dummy_value()
    narrow, words = ir.VectorType(ir.IntType(16), lanes_), ir.VectorType(ir.IntType(32), lanes_)
    load = lambda at: builder.zext(builder.load(builder.inttoptr(at, narrow.as_pointer()), align=2), words)
    high = builder.shl(load(following), ir.Constant(words, [16] * lanes_))
    vector.store(builder.bitcast(builder.or_(load(source), high), vector.type), target)
    return context.get_dummy_value()

  return types.void(lanes, pairs, types.int64, types.int64, types.int64), codegen


@numba.njit(inline="always")
def pack(lanes, pairs, numbers, at, step, length, count, size, words, place):
  """Writes `count` numbers from `at` on, zeros up to `size`, and the same `step` further on, `length` times in all.

  With `pairs`, a word holds the numbers of one step and of the next.
  """
  done = 0
  if count == size and size % lanes == 0:
    done = length // 2 * 2 if pairs else length
    source, target, number = numbers.ctypes.data, words.ctypes.data + 4 * place, 2 if pairs else 4
    for k in range(0, done, 2 if pairs else 1):
      for q in range(0, size, lanes):
        start = source + number * (at + k * step + q)
        _copy(lanes, pairs, target + 4 * q, start, start + number * step)
      target += 4 * size
  rest = place + (done // 2 if pairs else done) * size
  _pack_rest(numbers, at + done * step, step, length - done, count, size, pairs, words, rest)


@numba.njit
def _pack_rest(numbers, at, step, length, count, size, pairs, words, place):
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


@numba.njit(inline="always")
def pack_panels(lanes, vectors, pairs, numbers, at, step, count, columns, words, panel):
  """`columns` numbers from `at` on, and the same `step` further on, `count` times in all, in panels of whole vectors.

  Panel p begins at word p * panel; it has the columns from p * lanes * vectors on, and zeros where there are no more,
  of one step after the other.
  """
  wide, size = lanes * vectors, 2 if pairs else 4
  whole, even = columns // wide, count // 2 * 2 if pairs else count
  source, ahead = numbers.ctypes.data + size * at, 8 * size * step
  target = words.ctypes.data
  for _ in range(0, even, 2 if pairs else 1):
    # Steps are long, so that the processor does not foresee them.
    for byte in range(0, size * columns, 64):
      kernels.prefetch(source + ahead + byte)
      if pairs:
        kernels.prefetch(source + ahead + size * step + byte)
    for v in range(whole * vectors):
      place = source + size * lanes * v
      _copy(lanes, pairs, target + 4 * (v // vectors * panel + v % vectors * lanes), place, place + size * step)
    source += 2 * size * step if pairs else size * step
    target += 4 * wide
  row = even // 2 if pairs else even
  for p in range(whole):
    place = p * panel + row * wide
    _pack_rest(numbers, at + step * even + p * wide, step, count - even, wide, wide, pairs, words, place)
  if columns > whole * wide:
    rest = columns - whole * wide
    _pack_rest(numbers, at + whole * wide, step, count, rest, wide, pairs, words, whole * panel)
