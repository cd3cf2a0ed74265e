"""Host kernels of the causal depthwise convolution over tokens: one pass each way, weight gradients included.

Sequences are laid end to end, [T, C]; `segment` [T] numbers them, ascending, and a tap counts where both ends have one
number. Loops over channels compile to vector instructions.
"""

import functools

import numpy as np
from numba import types

from jaxlab import kernels

_TOKENS = 512  # tokens that an item makes


def items(tokens: int) -> int:
  """Items of both kernels."""
  return -(-tokens // _TOKENS)


@functools.cache
def forward(reverse: bool) -> kernels.Kernel:
  """Kernel (x [T, C], w [k, C], bias [C], segment [T]) -> y [T, C], y_t = bias + sum_i w[k - 1 - i] x_{t - i}."""
  sign = 1 if reverse else -1

  @kernels.kernel(f"causal_conv.forward.{reverse}")
  def kernel(item, frame):
    x, w = kernels.operand(frame, 0, types.float32, 2), kernels.operand(frame, 1, types.float32, 2)
    bias, segment = kernels.operand(frame, 2, types.float32, 1), kernels.operand(frame, 3, types.int32, 1)
    y = kernels.result(frame, 0, types.float32, 2)
    tokens, channels = x.shape
    for t in range(item * _TOKENS, min((item + 1) * _TOKENS, tokens)):
      for c in range(channels):
        y[t, c] = bias[c]
      for i in range(w.shape[0]):
        other = t + sign * i
        if 0 <= other < tokens and segment[other] == segment[t]:
          for c in range(channels):
            y[t, c] += w[w.shape[0] - 1 - i, c] * x[other, c]

  return kernel


@functools.cache
def backward(reverse: bool) -> kernels.Kernel:
  """Kernel (x, w, segment, g [T, C]) -> gx [T, C], gw [items, k, C], gbias [items, C], the last two to be summed."""
  sign = 1 if reverse else -1

  @kernels.kernel(f"causal_conv.backward.{reverse}")
  def kernel(item, frame):
    x, w = kernels.operand(frame, 0, types.float32, 2), kernels.operand(frame, 1, types.float32, 2)
    segment, g = kernels.operand(frame, 2, types.int32, 1), kernels.operand(frame, 3, types.float32, 2)
    gx, gw = kernels.result(frame, 0, types.float32, 2), kernels.result(frame, 1, types.float32, 3)
    gbias = kernels.result(frame, 2, types.float32, 2)
    tokens, channels = x.shape
    sums = np.zeros((w.shape[0] + 1, channels), np.float32)
    for t in range(item * _TOKENS, min((item + 1) * _TOKENS, tokens)):
      for c in range(channels):
        gx[t, c] = 0
        sums[w.shape[0], c] += g[t, c]
      for i in range(w.shape[0]):
        tap, before, after = w.shape[0] - 1 - i, t + sign * i, t - sign * i
        if 0 <= before < tokens and segment[before] == segment[t]:
          for c in range(channels):
            sums[tap, c] += g[t, c] * x[before, c]
        if 0 <= after < tokens and segment[after] == segment[t]:
          for c in range(channels):
            gx[t, c] += w[tap, c] * g[after, c]
    for c in range(channels):
      for tap in range(w.shape[0]):
        gw[item, tap, c] = sums[tap, c]
      gbias[item, c] = sums[w.shape[0], c]

  return kernel
