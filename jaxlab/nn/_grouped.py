"""Host kernels of the grouped 1x1 convolution: many tiny matrix products, side by side in the channels."""

import functools

from numba import types

from jaxlab import kernels

_BLOCK = 64  # rows of x an item handles


def items(rows: int) -> int:
  """Items of `product`."""
  return -(-rows // _BLOCK)


@functools.cache
def product(size: int, out: int) -> kernels.Kernel:
  """Kernel (x [P, J * size], w [size, J * out]) -> y [P, J * out], y[p, j] = x[p, j] @ w[:, j] for each group j."""

  @kernels.kernel(f"grouped.product.{size}.{out}")
  def kernel(item, frame):
    x, w = kernels.operand(frame, 0, types.float32, 2), kernels.operand(frame, 1, types.float32, 2)
    y = kernels.result(frame, 0, types.float32, 2)
    for p in range(item * _BLOCK, min((item + 1) * _BLOCK, x.shape[0])):
      for j in range(x.shape[1] // size):
        for q in range(out):
          total = types.float32(0)
          for i in range(size):
            total += x[p, j * size + i] * w[i, j * out + q]
          y[p, j * out + q] = total

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
