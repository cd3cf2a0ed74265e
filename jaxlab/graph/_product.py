"""Host kernels of the sparse product: rows gathered by an entry list, summed in registers."""

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxlab import kernels

_ROWS = 64  # rows of the result an item makes
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

    def element(kind, array, index):
      return builder.load(builder.inttoptr(add(array, mul(index, word(4))), kind.as_pointer()))

    sums = vector.registers([vector.zero()] * vectors_)
    with cgutils.for_range_slice(builder, start, stop, word(1)) as (i, _):
      column = builder.zext(element(ir.IntType(32), columns, i), word)
      entry = builder.zext(element(ir.IntType(32), order, i), word)
      weight = vector.splat(element(ir.FloatType(), values, entry))
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
