"""Host kernels of the depthwise convolution: register-blocked multiply-adds over vectors of channels.

Two inner loops are written with LLVM vectors, because no compiler keeps the accumulators in registers by itself:
`_convolve_tile` makes a run of `tile` output pixels of one row, `_correlate_row` the k x k weight gradients of one row.
Both read NHWC arrays in place. A tap that falls outside the row reads a vector of zeros instead.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxlab import kernels

_BAND = 8  # output rows an item makes
_INSIDE, _LEFT, _RIGHT, _BOTH = range(4)  # where a run of pixels reaches beyond its row
_word = ir.IntType(64)


def _inside(builder, position, width, address, zeros):
  """`address` where 0 <= position < width, else `zeros`."""
  return builder.select(builder.icmp_unsigned("<", position, width), address, zeros)


@intrinsic(prefer_literal=True)
def _convolve_tile(typing, k, tile, lanes, edge, x, x_row, first, width, w, rows, channels, bias, y, zeros):
  """y[t, :] = bias + sum over rows and kx of x[row, first + t + kx, :] * w[row, kx, :] for t < tile.

  Addresses are in bytes; `x` is that of pixel `first`; `zeros` holds as many zeros as there are channels. Of the
  tile + k - 1 pixels, the first k // 2 lie outside of the row where `edge` is `_LEFT`, the last where it is `_RIGHT`,
  and those that `first` and `width` say where it is `_BOTH`.
  """
  k_, tile_, lanes_, edge_ = k.literal_value, tile.literal_value, lanes.literal_value, edge.literal_value

  def codegen(context, builder, signature, args):
    x, x_row, first, width, w, rows, channels, bias, y, zeros = args[4:]
    vectors = kernels.Vectors(builder, lanes_)
    add, mul = builder.add, builder.mul
    pixel = mul(channels, _word(4))
    step = kernels.stepped(builder, pixel)
    read = range(k_ // 2 if edge_ == _LEFT else 0, tile_ + k_ - 1 - (k_ // 2 if edge_ == _RIGHT else 0))
    with cgutils.for_range(builder, builder.udiv(channels, _word(lanes_))) as block:
      offset = mul(block.index, _word(vectors.bytes))
      sums = vectors.registers([vectors.load(add(bias, offset))] * tile_)
      with cgutils.for_range(builder, rows) as row:
        start = add(add(x, offset), mul(row.index, x_row))
        along = add(add(w, offset), mul(row.index, mul(pixel, _word(k_))))
        weights = [vectors.load(step(along, kx)) for kx in range(k_)]
        totals = [builder.load(place) for place in sums]
        for u in read:
          address = step(start, u)
          if edge_ == _BOTH:
            address = _inside(builder, add(first, _word(u)), width, address, zeros)
          value = vectors.load(address)
          for t in range(max(0, u - k_ + 1), min(u + 1, tile_)):
            totals[t] = vectors.multiply_add(value, weights[u - t], totals[t])
        for total, stored in zip(totals, sums, strict=True):
          builder.store(total, stored)
      for t, total in enumerate(sums):
        vectors.store(builder.load(total), step(add(y, offset), t))
    return context.get_dummy_value()

  word = types.int64
  return types.void(k, tile, lanes, edge, *[word] * 10), codegen


@intrinsic(prefer_literal=True)
def _correlate_row(typing, k, tile, lanes, rows, x, x_row, g, width, channels, offset, sums, bias, zeros):
  """sums[r, kx, :] += sum over j of x[r, j + kx - k // 2, :] * g[j, :] for r < rows, and bias[:] += sum of g[j, :].

  For one vector of channels. Addresses are in bytes and of pixel 0; `offset` is that of the vector inside a pixel,
  `zeros` points at zeros, and where `bias` is 0, g is not summed.
  """
  k_, tile_, lanes_, rows_ = k.literal_value, tile.literal_value, lanes.literal_value, rows.literal_value

  def codegen(context, builder, signature, args):
    x, x_row, g, width, channels, offset, sums, bias, zeros = args[4:]
    vectors = kernels.Vectors(builder, lanes_)
    add, mul = builder.add, builder.mul
    pixel = mul(channels, _word(4))
    summed = builder.icmp_unsigned("!=", bias, _word(0))
    x, g, sums = add(x, offset), add(g, offset), add(sums, offset)
    bias = builder.select(summed, add(bias, offset), zeros)
    addresses = [*(add(sums, mul(pixel, _word(tap))) for tap in range(rows_ * k_)), bias]
    places = vectors.registers([vectors.load(address) for address in addresses])
    tiles = builder.udiv(add(width, _word(tile_ - 1)), _word(tile_))
    with cgutils.for_range(builder, tiles) as loop:
      first = mul(loop.index, _word(tile_))
      gradients = []
      for t in range(tile_):
        position = add(first, _word(t))
        gradients.append(vectors.load(_inside(builder, position, width, add(g, mul(position, pixel)), zeros)))
      with builder.if_then(summed):
        builder.store(functools.reduce(builder.fadd, gradients, builder.load(places[-1])), places[-1])
      for r in range(rows_):
        row = add(x, mul(x_row, _word(r)))
        inputs = []
        for u in range(tile_ + k_ - 1):
          position = add(first, _word(u - k_ // 2))
          inputs.append(vectors.load(_inside(builder, position, width, add(row, mul(position, pixel)), zeros)))
        for kx in range(k_):
          total = builder.load(places[r * k_ + kx])
          for t in range(tile_):
            total = vectors.multiply_add(inputs[t + kx], gradients[t], total)
          builder.store(total, places[r * k_ + kx])
    for address, place in zip(addresses[:-1], places[:-1], strict=True):
      vectors.store(builder.load(place), address)
    with builder.if_then(summed):
      vectors.store(builder.load(places[-1]), bias)
    return context.get_dummy_value()

  word = types.int64
  return types.void(k, tile, lanes, rows, *[word] * 9), codegen


def lanes_for(channels: int) -> int:
  """Channels in a vector, for a multiple of 8 channels."""
  return kernels.max_lanes() if channels % kernels.max_lanes() == 0 else 8


def tile_for(width: int, *, large: bool = False) -> int:
  """Output pixels computed together: as many as the registers hold, wasting few where tiles overlap at the end.

  A tile that reaches both ends of a row has to look where each of its pixels is.

  Args:
    width: pixels of a row.
    large: for the convolution by filters that take longer than memory does, which longer tiles would make wait.
  """
  most = (14 if large else 8) if kernels.max_lanes() == 16 else 6
  cost = lambda tile: -(-width // tile) * (tile + 2) * (1.25 if tile == width else 1)
  return min(range(1, min(most, width) + 1), key=cost)


@functools.cache
def convolve(k: int, tile: int, lanes: int) -> kernels.Kernel:
  """Kernel (x [N, H, W, C], w [k, k, 1, C], bias [C]) -> y [N, H, W, C]; an item is `_BAND` rows of an image."""

  @kernels.kernel(f"depthwise.convolve.{k}.{tile}.{lanes}")
  def kernel(item, frame):
    x, w = kernels.operand(frame, 0, types.float32, 4), kernels.operand(frame, 1, types.float32, 4)
    bias, y = kernels.operand(frame, 2, types.float32, 1), kernels.result(frame, 0, types.float32, 4)
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    pixel, row, pad = 4 * channels, 4 * channels * width, k // 2
    bands = (height + _BAND - 1) // _BAND
    n, top = item // bands, item % bands * _BAND
    zeros = np.zeros(channels, np.float32)
    for i in range(top, min(top + _BAND, height)):
      start, stop = max(0, pad - i), min(k, height + pad - i)
      weights = w.ctypes.data + 4 * channels * k * start
      for j in range(0, width, tile):
        j = min(j, width - tile)
        source = x.ctypes.data + row * (n * height + i + start - pad) + pixel * (j - pad)
        target = y.ctypes.data + row * (n * height + i) + pixel * j
        fits = j + tile + pad <= width
        if j >= pad and fits:
          _convolve_tile(
            k, tile, lanes, _INSIDE, source, row, j - pad, width, weights, stop - start, channels, bias.ctypes.data,
            target, zeros.ctypes.data,
          )  # fmt: skip
        elif j == 0 and fits:
          _convolve_tile(
            k, tile, lanes, _LEFT, source, row, j - pad, width, weights, stop - start, channels, bias.ctypes.data,
            target, zeros.ctypes.data,
          )  # fmt: skip
        elif j >= pad and j == width - tile:
          _convolve_tile(
            k, tile, lanes, _RIGHT, source, row, j - pad, width, weights, stop - start, channels, bias.ctypes.data,
            target, zeros.ctypes.data,
          )  # fmt: skip
        else:
          _convolve_tile(
            k, tile, lanes, _BOTH, source, row, j - pad, width, weights, stop - start, channels, bias.ctypes.data,
            target, zeros.ctypes.data,
          )  # fmt: skip

  return kernel


def convolve_items(shape: tuple[int, ...]) -> int:
  """Items of `convolve` for images of shape [N, H, W, C]."""
  return shape[0] * -(-shape[1] // _BAND)


@functools.cache
def correlate(k: int, tile: int, lanes: int) -> kernels.Kernel:
  """Kernel (x, g [N, H, W, C]) -> partial gradients [items, k * k + 1, C]; an item is a run of image rows.

  The last row is that of the bias, the sum of g.
  """
  group = {3: 3, 5: 2}.get(k, 1)  # kernel rows whose sums fit into the registers together

  @kernels.kernel(f"depthwise.correlate.{k}.{tile}.{lanes}")
  def kernel(item, frame):
    x, g = kernels.operand(frame, 0, types.float32, 4), kernels.operand(frame, 1, types.float32, 4)
    sums = kernels.result(frame, 0, types.float32, 3)
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    row, pad = 4 * channels * width, k // 2
    zeros = np.zeros(channels, np.float32)
    sums[item] = 0
    target = sums.ctypes.data + 4 * channels * (k * k + 1) * item
    total, items = x.shape[0] * height, sums.shape[0]
    for r in range(total * item // items, total * (item + 1) // items):
      i = r % height
      start, stop = max(0, pad - i), min(k, height + pad - i)
      for c in range(0, 4 * channels, 4 * lanes):
        ky, bias = start, target + 4 * channels * k * k
        while ky < stop:
          source = x.ctypes.data + row * (r + ky - pad)
          gradient = g.ctypes.data + row * r
          out = target + 4 * channels * k * ky
          if group > 1 and ky + group <= stop:
            _correlate_row(
              k, tile, lanes, group, source, row, gradient, width, channels, c, out, bias, zeros.ctypes.data
            )  # fmt: skip
            ky += group
          else:
            _correlate_row(k, tile, lanes, 1, source, row, gradient, width, channels, c, out, bias, zeros.ctypes.data)
            ky += 1
          bias = 0  # g counts once

  return kernel
