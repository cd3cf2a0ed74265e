"""Host kernels of the gated mean: sums stay in registers; arrays with a row for each edge are made only if asked for.

With w = sigmoid(p_i + q_j + e_ij), an edge's gate, the forward kernel sums w m_j and w over the edges into a row. With
a_i the gradient of the mean y_i over its sum of gates, the gradient of an edge's gate before the sigmoid is

    x_ij = a_i (m_j - y_i) w (1 - w) + that of the gate itself, where it is a result

The first backward kernel sums x over the edges into a row for p, the second x and a_i w over those out of a column for
q and m; both compute w again. `_sum_edges` is the inner loop of all three.
"""

import functools

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxlab import kernels, lanes

EPSILON = 1e-6
_ROWS = 32  # rows or columns that an item makes


@intrinsic(prefer_literal=True)
def _sum_edges(typing, mode, flags, start, stop, others, ids, row, count, p, qm, e, y, a, g, out, second):
  """Sums over start <= k < stop for a vector of `count` features. Addresses, but for start, stop, row, count.

  Args:
    mode: "forward", "rows" or "columns".
    flags: 1 if there is an e, plus 2 if the gate before the sigmoid is a result.
    others: int32, the edges' other ends: columns, or for "columns" the rows.
    ids: int32, for "columns" the edges' numbers, which else are k.
    row: bytes of a row of p, y, a, e and g; one of qm is twice that.
    p, qm, e, y, a, g: at the vector's first feature; p, y, a at the own row, or qm at the own column for "columns".
    out: forward: mean; rows: gradient of p; columns: gradient of qm.
    second: forward: sum of gates; rows: gradient of e. The gate of "forward" goes to g.
  """
  mode_, has_e, has_gate = mode.literal_value, bool(flags.literal_value & 1), bool(flags.literal_value & 2)

  def codegen(context, builder, signature, args):
    start, stop, others, ids, row, count, p, qm, e, y, a, g, out, second = args[2:]
    v = lanes.Lanes(builder)
    mask = v.mask(count)
    load, store = lambda place: v.load_masked(place, mask), lambda value, place: v.store_masked(value, place, mask)
    half = lambda place: builder.add(place, row)  # m after q
    by_row = mode_ != "columns"
    own_p = load(p) if by_row else None
    own_q, own_m = (None, None) if by_row else (load(qm), load(half(qm)))
    own_y, own_a = (load(y), load(a)) if mode_ == "rows" else (None, None)
    epsilon = v.constant(EPSILON) if mode_ == "forward" else v.zero()
    first_sum, second_sum = v.registers([v.zero(), epsilon])
    with cgutils.for_range_slice(builder, start, stop, lanes.WORD(1)) as (k, _):
      other = v.integer(others, k)
      edge = k if by_row else v.integer(ids, k)
      if by_row:
        place = v.at(qm, builder.mul(other, row), 2)
        p_i, q_j, m_j, y_i, a_i = own_p, load(place), load(half(place)), own_y, own_a
      else:
        p_i, y_i, a_i = (load(v.at(array, other, row)) for array in (p, y, a))
        q_j, m_j = own_q, own_m
      x = v.add(p_i, q_j)
      if has_e:
        x = v.add(x, load(v.at(e, edge, row)))
      w = v.sigmoid(x)
      if mode_ == "forward":
        if has_gate:
          store(x, v.at(g, edge, row))
        builder.store(v.multiply_add(w, m_j, builder.load(first_sum)), first_sum)
        builder.store(v.add(w, builder.load(second_sum)), second_sum)
      else:
        slope = v.mul(w, builder.fsub(v.constant(1.0), w))
        gradient = v.mul(v.mul(a_i, builder.fsub(m_j, y_i)), slope)
        if has_gate:
          gradient = v.add(gradient, load(v.at(g, edge, row)))
        builder.store(v.add(gradient, builder.load(first_sum)), first_sum)
        if by_row and has_e:
          store(gradient, v.at(second, edge, row))
        if not by_row:
          builder.store(v.multiply_add(a_i, w, builder.load(second_sum)), second_sum)
    first, last = builder.load(first_sum), builder.load(second_sum)
    if mode_ == "forward":
      store(builder.fdiv(first, last), out)
      store(last, second)
    else:
      store(first, out)
      if not by_row:
        store(last, half(out))
    return context.get_dummy_value()

  return types.void(mode, flags, *[types.int64] * 14), codegen


def items(batch: int, rows: int) -> int:
  """Items of each kernel that makes so many rows."""
  return batch * -(-rows // _ROWS)


# Shapes: starts [R + 1] and columns [E] list the edges by row; p [S, R, F], qm [S, C, 2 F] holds q and m, e [S, E, F].
# `has_e` and `has_gate` tell whether e and the gates count; arrays that do not are [S, 0, F].


@functools.cache
def forward(has_e: bool, has_gate: bool) -> kernels.Kernel:
  """Kernel (starts, columns, p, qm, e) -> mean [S, R, F], sum of gates plus epsilon [S, R, F], p + q + e [S, E, F]."""
  flags = has_e + 2 * has_gate

  @kernels.kernel(f"gated.forward.{has_e}.{has_gate}")
  def kernel(item, frame):
    starts, columns = kernels.operand(frame, 0, types.int32, 1), kernels.operand(frame, 1, types.int32, 1)
    p, qm = kernels.operand(frame, 2, types.float32, 3), kernels.operand(frame, 3, types.float32, 3)
    e, mean = kernels.operand(frame, 4, types.float32, 3), kernels.result(frame, 0, types.float32, 3)
    total, gate = kernels.result(frame, 1, types.float32, 3), kernels.result(frame, 2, types.float32, 3)
    rows, width = p.shape[1], p.shape[2]
    blocks = (rows + _ROWS - 1) // _ROWS
    s, first = item // blocks, item % blocks * _ROWS
    for r in range(first, min(first + _ROWS, rows)):
      for f in range(0, width, lanes.LANES):
        own = 4 * ((s * rows + r) * width + f)
        _sum_edges(
          "forward", flags, starts[r], starts[r + 1], columns.ctypes.data, 0, 4 * width, width - f,
          p.ctypes.data + own, qm.ctypes.data + 4 * (s * qm.shape[1] * 2 * width + f),
          e.ctypes.data + 4 * (s * e.shape[1] * width + f), 0, 0,
          gate.ctypes.data + 4 * (s * gate.shape[1] * width + f), mean.ctypes.data + own, total.ctypes.data + own,
        )  # fmt: skip

  return kernel


@functools.cache
def backward_rows(has_e: bool, has_gate: bool) -> kernels.Kernel:
  """Kernel (starts, columns, p, qm, e, mean, a, ggate) -> gp [S, R, F], ge [S, E, F].

  a is the mean's gradient over the sum of gates, ggate [S, E, F] the gradient of p + q + e where that is a result.
  """
  flags = has_e + 2 * has_gate

  @kernels.kernel(f"gated.backward_rows.{has_e}.{has_gate}")
  def kernel(item, frame):
    starts, columns = kernels.operand(frame, 0, types.int32, 1), kernels.operand(frame, 1, types.int32, 1)
    p, qm = kernels.operand(frame, 2, types.float32, 3), kernels.operand(frame, 3, types.float32, 3)
    e, mean = kernels.operand(frame, 4, types.float32, 3), kernels.operand(frame, 5, types.float32, 3)
    a, ggate = kernels.operand(frame, 6, types.float32, 3), kernels.operand(frame, 7, types.float32, 3)
    gp, ge = kernels.result(frame, 0, types.float32, 3), kernels.result(frame, 1, types.float32, 3)
    rows, width = p.shape[1], p.shape[2]
    blocks = (rows + _ROWS - 1) // _ROWS
    s, first = item // blocks, item % blocks * _ROWS
    for r in range(first, min(first + _ROWS, rows)):
      for f in range(0, width, lanes.LANES):
        own, edge = 4 * ((s * rows + r) * width + f), 4 * (s * columns.shape[0] * width + f)
        _sum_edges(
          "rows", flags, starts[r], starts[r + 1], columns.ctypes.data, 0, 4 * width, width - f, p.ctypes.data + own,
          qm.ctypes.data + 4 * (s * qm.shape[1] * 2 * width + f), e.ctypes.data + edge, mean.ctypes.data + own,
          a.ctypes.data + own, ggate.ctypes.data + edge, gp.ctypes.data + own, ge.ctypes.data + edge,
        )  # fmt: skip

  return kernel


@functools.cache
def backward_columns(has_e: bool, has_gate: bool) -> kernels.Kernel:
  """Kernel (transpose starts [C + 1], rows and order [E], p, qm, e, mean, a, ggate) -> gqm [S, C, 2 F]."""
  flags = has_e + 2 * has_gate

  @kernels.kernel(f"gated.backward_columns.{has_e}.{has_gate}")
  def kernel(item, frame):
    starts, rows = kernels.operand(frame, 0, types.int32, 1), kernels.operand(frame, 1, types.int32, 1)
    order, p = kernels.operand(frame, 2, types.int32, 1), kernels.operand(frame, 3, types.float32, 3)
    qm, e = kernels.operand(frame, 4, types.float32, 3), kernels.operand(frame, 5, types.float32, 3)
    mean, a = kernels.operand(frame, 6, types.float32, 3), kernels.operand(frame, 7, types.float32, 3)
    ggate, gqm = kernels.operand(frame, 8, types.float32, 3), kernels.result(frame, 0, types.float32, 3)
    columns, width = qm.shape[1], p.shape[2]
    blocks = (columns + _ROWS - 1) // _ROWS
    s, first = item // blocks, item % blocks * _ROWS
    for c in range(first, min(first + _ROWS, columns)):
      for f in range(0, width, lanes.LANES):
        own, edge = 4 * ((s * columns + c) * 2 * width + f), 4 * (s * rows.shape[0] * width + f)
        row = 4 * (s * p.shape[1] * width + f)
        _sum_edges(
          "columns", flags, starts[c], starts[c + 1], rows.ctypes.data, order.ctypes.data, 4 * width, width - f,
          p.ctypes.data + row, qm.ctypes.data + own, e.ctypes.data + edge, mean.ctypes.data + row,
          a.ctypes.data + row, ggate.ctypes.data + edge, gqm.ctypes.data + own, 0,
        )  # fmt: skip

  return kernel
