"""Host kernels of the sparse product: rows gathered by an entry list, summed in registers."""

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxlab import kernels

_ROWS = 64  # rows of the result an item makes
_TOGETHER = 10  # arrays of few columns that an item of `multiply_each` takes
_ENTRIES = 1024  # entries an item of `sample` handles
_word = ir.IntType(64)


@intrinsic(prefer_literal=True)
def _sum_rows(typing, lanes, vectors, full, columns, order, values, start, stop, x, x_row, y, count):
  """y[:count] = sum over start <= i < stop of values[order[i]] * x[columns[i], :count].

  Args:
    lanes: of a vector.
    vectors: how many accumulate together; `count` is at most lanes * vectors.
    full: whether `count` is exactly that.
    columns, order, values, x, x_row, y: addresses, and the size of a row of x, in bytes.
  """
  lanes_, vectors_, full_ = lanes.literal_value, vectors.literal_value, full.literal_value

  def codegen(context, builder, signature, args):
    columns, order, values, start, stop, x, x_row, y, count = args[3:]
    vector = kernels.Vectors(builder, lanes_)
    add, mul, word = builder.add, builder.mul, _word
    masks = [vector.mask(builder.sub(count, word(v * lanes_))) for v in range(vectors_)]
    sums = vector.registers([vector.zero()] * vectors_)
    with cgutils.for_range_slice(builder, start, stop, word(1)) as (i, _):
      column, weight = _entry(builder, vector, columns, order, values, i)
      row = add(x, mul(column, x_row))
      for v in range(vectors_):
        place = add(row, word(v * vector.bytes))
        value = vector.load(place) if full_ else vector.load_masked(place, masks[v])
        builder.store(vector.multiply_add(value, weight, builder.load(sums[v])), sums[v])
    for v in range(vectors_):
      place, total = add(y, word(v * vector.bytes)), builder.load(sums[v])
      if full_:
        vector.store(total, place)
      else:
        vector.store_masked(total, place, masks[v])
    return context.get_dummy_value()

  return types.void(lanes, vectors, full, *[types.int64] * 9), codegen


@intrinsic(prefer_literal=True)
def _sum_row_of_each(typing, lanes, batch, columns, order, values, start, stop, x, x_row, x_step, y, y_step, count):
  """As `_sum_rows` for `batch` arrays x with the same entries, `count` being at most `lanes`.

  An entry is read once for all of them.

  Args:
    x_step, y_step: bytes from one array to the next.
  """
  lanes_, batch_ = lanes.literal_value, batch.literal_value

  def codegen(context, builder, signature, args):
    columns, order, values, start, stop, x, x_row, x_step, y, y_step, count = args[2:]
    vector = kernels.Vectors(builder, lanes_)
    add, mul, word = builder.add, builder.mul, _word
    mask = vector.mask(count)
    steps = [mul(x_step, word(b)) for b in range(batch_)]
    sums = vector.registers([vector.zero()] * batch_)
    with cgutils.for_range_slice(builder, start, stop, word(1)) as (i, _):
      column, weight = _entry(builder, vector, columns, order, values, i)
      row = add(x, mul(column, x_row))
      for step, total in zip(steps, sums, strict=True):
        value = vector.load_masked(add(row, step), mask)
        builder.store(vector.multiply_add(value, weight, builder.load(total)), total)
    for b, total in enumerate(sums):
      vector.store_masked(builder.load(total), add(y, mul(y_step, word(b))), mask)
    return context.get_dummy_value()

  return types.void(lanes, batch, *[types.int64] * 11), codegen


def _entry(builder, vector, columns, order, values, i):
  """Column of entry i, and its weight in every lane."""

  def element(kind, array, index):
    return builder.load(builder.inttoptr(builder.add(array, builder.mul(index, _word(4))), kind.as_pointer()))

  column = builder.zext(element(ir.IntType(32), columns, i), _word)
  entry = builder.zext(element(ir.IntType(32), order, i), _word)
  return column, vector.splat(element(ir.FloatType(), values, entry))


def multiply_items(batch: int, rows: int) -> int:
  """Items of `multiply`."""
  return batch * -(-rows // _ROWS)


@functools.cache
def multiply(lanes: int) -> kernels.Kernel:
  """Kernel (starts [R + 1], columns [E], order [E], values [V, E], x [S, C, F]) -> y [S, R, F], V being 1 or S.

  y[s, r] = sum over starts[r] <= i < starts[r + 1] of values[s, order[i]] * x[s, columns[i]].
  """

  @kernels.kernel(f"product.multiply.{lanes}")
  def kernel(item, frame):
    starts, columns = kernels.operand(frame, 0, types.int32, 1), kernels.operand(frame, 1, types.int32, 1)
    order, values = kernels.operand(frame, 2, types.int32, 1), kernels.operand(frame, 3, types.float32, 2)
    x, y = kernels.operand(frame, 4, types.float32, 3), kernels.result(frame, 0, types.float32, 3)
    rows, width = y.shape[1], y.shape[2]
    blocks = (rows + _ROWS - 1) // _ROWS
    s, first = item // blocks, item % blocks * _ROWS
    weights = values.ctypes.data + (4 * values.shape[1] * s if values.shape[0] > 1 else 0)
    entries, sources = order.ctypes.data, columns.ctypes.data
    for r in range(first, min(first + _ROWS, rows)):
      start, stop = types.int64(starts[r]), types.int64(starts[r + 1])
      f = 0
      while f < width:
        source = x.ctypes.data + 4 * (s * x.shape[1] * width + f)
        target = y.ctypes.data + 4 * ((s * rows + r) * width + f)
        if f + 4 * lanes <= width:
          _sum_rows(lanes, 4, True, sources, entries, weights, start, stop, source, 4 * width, target, width - f)
          f += 4 * lanes
        elif f + lanes < width:
          _sum_rows(lanes, 4, False, sources, entries, weights, start, stop, source, 4 * width, target, width - f)
          f += 4 * lanes
        else:
          _sum_rows(lanes, 1, False, sources, entries, weights, start, stop, source, 4 * width, target, width - f)
          f += lanes

  return kernel


def multiply_each_items(batch: int, rows: int) -> int:
  """Items of `multiply_each`."""
  return -(-batch // _TOGETHER) * -(-rows // _ROWS)


@functools.cache
def multiply_each(lanes: int) -> kernels.Kernel:
  """As `multiply` for many x of few columns: values [1, E], x [S, C, F] with F at most `lanes`."""

  @kernels.kernel(f"product.multiply_each.{lanes}")
  def kernel(item, frame):
    starts, columns = kernels.operand(frame, 0, types.int32, 1), kernels.operand(frame, 1, types.int32, 1)
    order, values = kernels.operand(frame, 2, types.int32, 1), kernels.operand(frame, 3, types.float32, 2)
    x, y = kernels.operand(frame, 4, types.float32, 3), kernels.result(frame, 0, types.float32, 3)
    batch, rows, width = y.shape
    blocks = (rows + _ROWS - 1) // _ROWS
    low, first = item // blocks * _TOGETHER, item % blocks * _ROWS
    high = min(low + _TOGETHER, batch)
    weights, entries, sources = values.ctypes.data, order.ctypes.data, columns.ctypes.data
    row, x_step, y_step = 4 * width, 4 * width * x.shape[1], 4 * width * rows
    for r in range(first, min(first + _ROWS, rows)):
      start, stop = types.int64(starts[r]), types.int64(starts[r + 1])
      s = low
      while s < high:
        source, target = x.ctypes.data + x_step * s, y.ctypes.data + y_step * s + row * r
        if s + 5 <= high:
          _sum_row_of_each(lanes, 5, sources, entries, weights, start, stop, source, row, x_step, target, y_step, width)
          s += 5
        else:
          _sum_row_of_each(lanes, 1, sources, entries, weights, start, stop, source, row, x_step, target, y_step, width)
          s += 1

  return kernel


def sample_items(batch: int, entries: int) -> int:
  """Items of `sample`."""
  return batch * -(-entries // _ENTRIES)


@kernels.kernel("product.sample")
def sample(item, frame):
  """Kernel (rows [E], columns [E], g [S, R, F], x [S, C, F]) -> [S, E]: dot products of g[s, row] and x[s, column]."""
  rows, columns = kernels.operand(frame, 0, types.int32, 1), kernels.operand(frame, 1, types.int32, 1)
  g, x = kernels.operand(frame, 2, types.float32, 3), kernels.operand(frame, 3, types.float32, 3)
  out = kernels.result(frame, 0, types.float32, 2)
  blocks = (rows.shape[0] + _ENTRIES - 1) // _ENTRIES
  s, first = item // blocks, item % blocks * _ENTRIES
  for e in range(first, min(first + _ENTRIES, rows.shape[0])):
    total = types.float32(0)
    for f in range(x.shape[2]):
      total += g[s, rows[e], f] * x[s, columns[e], f]
    out[s, e] = total
