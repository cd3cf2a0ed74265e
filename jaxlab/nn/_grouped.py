"""Host kernels of the grouped 1x1 convolution: many tiny matrix products, side by side in the channels."""

import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from jaxlab import kernels

_BLOCK = 64  # rows of x an item handles
_TOGETHER = 4  # rows that share the weights in registers
_word = ir.IntType(64)


def items(rows: int) -> int:
  """Items of `product`."""
  return -(-rows // _BLOCK)


@intrinsic(prefer_literal=True)
def _multiply_group(typing, size, out, rows, x, x_row, w, w_row, bias, y, y_row):
  """y[r, :out] = bias[:out] + sum over i < size of x[r, i] * w[i, :out] for r < rows; addresses and rows in bytes."""
  size_, out_, rows_ = size.literal_value, out.literal_value, rows.literal_value

  def codegen(context, builder, signature, args):
    x, x_row, w, w_row, bias, y, y_row = args[3:]
    vector, add, mul = kernels.Vectors(builder, out_), builder.add, builder.mul
    weights = [vector.load(add(w, mul(w_row, _word(i)))) for i in range(size_)]
    offset = vector.load(bias)
    for r in range(rows_):
      source, total = add(x, mul(x_row, _word(r))), offset
      for i in range(size_):
        place = builder.inttoptr(add(source, _word(4 * i)), ir.FloatType().as_pointer())
        total = vector.multiply_add(vector.splat(builder.load(place)), weights[i], total)
      vector.store(total, add(y, mul(y_row, _word(r))))
    return context.get_dummy_value()

  return types.void(size, out, rows, *[types.int64] * 7), codegen


@functools.cache
def product(size: int, out: int) -> kernels.Kernel:
  """Kernel (x [P, J * size], w [size, J * out], bias [J * out]) -> y [P, J * out].

  y[p, j] = x[p, j] @ w[:, j] + bias[j] for each group j.
  """

  @kernels.kernel(f"grouped.product.{size}.{out}")
  def kernel(item, frame):
    x, w = kernels.operand(frame, 0, types.float32, 2), kernels.operand(frame, 1, types.float32, 2)
    bias, y = kernels.operand(frame, 2, types.float32, 1), kernels.result(frame, 0, types.float32, 2)
    groups, p, stop = x.shape[1] // size, item * _BLOCK, min((item + 1) * _BLOCK, x.shape[0])
    x_row, y_row = 4 * x.shape[1], 4 * y.shape[1]
    while p < stop:
      source, target = x.ctypes.data + x_row * p, y.ctypes.data + y_row * p
      together = p + _TOGETHER <= stop
      for j in range(groups):
        a, b, c = source + 4 * size * j, w.ctypes.data + 4 * out * j, target + 4 * out * j
        o = bias.ctypes.data + 4 * out * j
        if together:
          _multiply_group(size, out, _TOGETHER, a, x_row, b, y_row, o, c, y_row)
        else:
          _multiply_group(size, out, 1, a, x_row, b, y_row, o, c, y_row)
      p += _TOGETHER if together else 1

  return kernel


@functools.cache
def weights(size: int, out: int) -> kernels.Kernel:
  """Kernel (x [P, J * size], g [P, J * out]) -> partial weight gradients [items, size, J * out]."""

  @kernels.kernel(f"grouped.weights.{size}.{out}")
  def kernel(item, frame):
    x, g = kernels.operand(frame, 0, types.float32, 2), kernels.operand(frame, 1, types.float32, 2)
    sums = kernels.result(frame, 0, types.float32, 3)
    sums[item] = 0
    rows, parts = x.shape[0], sums.shape[0]
    for p in range(rows * item // parts, rows * (item + 1) // parts):
      for j in range(x.shape[1] // size):
        for i in range(size):
          value = x[p, j * size + i]
          for q in range(out):
            sums[item, i, j * out + q] += value * g[p, j * out + q]

  return kernel
