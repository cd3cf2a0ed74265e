"""Dropout whose random bits are cheap: counter-based, four entries a block, drawn again in the backward pass.

Bits dominate dropout on CPU. Here entry i of n reads 16 bits of the Threefry-2x32 block number i mod ceil(n / 4)
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), half as many blocks as `jax.random.bits` takes;
the gradient draws the same bits again, so no mask is kept. On CPU a host kernel does both, elsewhere XLA does: the same
entries are dropped everywhere.
"""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float, Key, UInt32
from numba import types
from numba.extending import register_jitable

from jaxlab import checks, kernels

_BLOCKS = 4096  # Threefry blocks an item of the host kernel draws
_word = types.uint32


def dropout(
  key: Key[Array, ""], x: Float[Array, "*shape"], rate: float, *, relu: bool = False
) -> Float[Array, "*shape"]:
  """Inverted dropout: each entry is zero with probability `rate`, else scaled to keep the mean.

  Args:
    key: of this draw.
    x: any shape.
    rate: in [0, 1), rounded to a multiple of 2^-16; the scale is that of the rounded rate, so the mean is exact.
    relu: of max(x, 0), in one pass; its gradient draws no bits, as the result says where it is not zero.

  Raises:
    ValueError: on another rate.
  """
  checks.rate("rate", rate)
  threshold = max(round((1 - rate) * 2**16), 1)
  words = jax.random.bits(key, (2,), "uint32")
  return _drop(threshold, relu, words, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _drop(threshold: int, relu: bool, words: UInt32[Array, "2"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  if x.dtype == jnp.float32 and kernels.available():
    return _host(relu)(jnp.uint32(threshold), words[None], jnp.atleast_1d(x)[None])[0].reshape(x.shape)
  return device(threshold, words, (jnp.maximum(x, 0) if relu else x).reshape(-1)).reshape(x.shape)


def _forward(threshold, relu, words, x):
  y = _drop(threshold, relu, words, x)
  return y, (words, y if relu else None)


def _backward(threshold, relu, saved, g):
  words, y = saved
  none = np.zeros(words.shape, jax.dtypes.float0)
  if relu:
    return none, jnp.where(y > 0, g * _scale(threshold, g.dtype), 0)
  return none, _drop(threshold, False, words, g)


_drop.defvjp(_forward, _backward)


def device(threshold: int, words: UInt32[Array, "2"], x: Float[Array, " n"]) -> Float[Array, " n"]:
  """The XLA form: keeps the entries whose 16 bits are below `threshold`."""
  blocks = -(-x.size // 4)
  counters = jnp.concatenate([jnp.arange(blocks, dtype="uint32"), jnp.zeros(blocks, "uint32")])
  bits = jax.extend.random.threefry_2x32(words, counters).reshape(2, 1, blocks)
  halves = (bits >> jnp.array([0, 16], "uint32")[:, None]) & 0xFFFF
  keep = (halves < threshold).reshape(-1)[: x.size]
  return jnp.where(keep, x * _scale(threshold, x.dtype), 0)


def _scale(threshold, dtype):
  return jnp.asarray(2**16 / threshold, dtype)


@functools.cache
def _host(relu):
  @jax.custom_batching.custom_vmap
  def host(threshold, words, x):
    """[K, 2], [S, ...] -> [S, ...]; one of them may be alone for all of the other."""
    count, blocks = max(len(words), len(x)), -(-math.prod(x.shape[1:]) // 4)
    items = count * -(-blocks // _BLOCKS)
    shape = jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)
    return kernels.call(_kernel(relu), [shape], threshold[None], words, x, items=items)[0]

  @host.def_vmap
  def _(size, batched, threshold, words, x):
    y = host(threshold, *kernels.folded(size, batched[1:], words, x))
    return y.reshape(size, -1, *y.shape[1:]), True

  return host


@numba.njit(inline="always")
def _rounds(a, b, turns):
  """Four rounds; add, rotate, exclusive or."""
  for turn in turns:
    a = _word(a + b)
    b = _word(_word(_word(b << _word(turn)) | _word(b >> _word(32 - turn))) ^ a)
  return a, b


@numba.njit(inline="always")
def _threefry(key, other, count):
  """The block of words that (key, other) makes of (count, 0): twenty rounds, a part of the key added every four."""
  third = _word(_word(key ^ other) ^ _word(0x1BD11BDA))
  a, b = _rounds(_word(count + key), other, (13, 15, 26, 6))
  a, b = _rounds(_word(a + other), _word(b + _word(third + _word(1))), (17, 29, 16, 24))
  a, b = _rounds(_word(a + third), _word(b + _word(key + _word(2))), (13, 15, 26, 6))
  a, b = _rounds(_word(a + key), _word(b + _word(other + _word(3))), (17, 29, 16, 24))
  a, b = _rounds(_word(a + other), _word(b + _word(third + _word(4))), (13, 15, 26, 6))
  return _word(a + third), _word(b + _word(key + _word(5)))


@register_jitable
def _positive(x):
  """max(x, 0), where what is not a number stays so: of x's bits, since kernels may take all floats for numbers."""
  negative = _word(np.float32(x).view(np.uint32) - _word(0x80000000)) <= _word(0x7F800000)
  return types.float32(0) if negative else x


@functools.cache
def _kernel(relu: bool) -> kernels.Kernel:
  """Kernel (threshold [1], words [K, 2], x [T, N]) -> y [S, N]; K and T are S, or 1."""
  positive = _positive if relu else kernels.same

  @kernels.kernel(f"dropout.{relu}")
  def kernel(item, frame):
    threshold = kernels.operand(frame, 0, _word, 1)[0]
    words, x = kernels.operand(frame, 1, _word, 2), kernels.operand(frame, 2, types.float32, 2)
    y = kernels.result(frame, 0, types.float32, 2)
    n = y.shape[1]
    blocks = (n + 3) // 4
    groups = (blocks + _BLOCKS - 1) // _BLOCKS
    s, first = item // groups, item % groups * _BLOCKS
    last = min(first + _BLOCKS, blocks)
    k, t = s if words.shape[0] > 1 else 0, s if x.shape[0] > 1 else 0
    key, other = words[k, 0], words[k, 1]
    scale, zero = types.float32(65536 / threshold), types.float32(0)
    low, sixteen = _word(0xFFFF), _word(16)
    whole = max(first, min(last, n - 3 * blocks))  # blocks before this one have all four entries
    x0, y0 = x[t, first:whole], y[s, first:whole]
    x1, y1 = x[t, first + blocks : whole + blocks], y[s, first + blocks : whole + blocks]
    x2, y2 = x[t, first + 2 * blocks : whole + 2 * blocks], y[s, first + 2 * blocks : whole + 2 * blocks]
    x3, y3 = x[t, first + 3 * blocks : whole + 3 * blocks], y[s, first + 3 * blocks : whole + 3 * blocks]
    for c in range(types.uint64(whole - first)):  # unsigned: an index that may be negative keeps LLVM from vectors
      a, b = _threefry(key, other, _word(_word(first) + _word(c)))
      y0[c] = positive(x0[c]) * scale if _word(a & low) < threshold else zero
      y1[c] = positive(x1[c]) * scale if _word(a >> sixteen) < threshold else zero
      y2[c] = positive(x2[c]) * scale if _word(b & low) < threshold else zero
      y3[c] = positive(x3[c]) * scale if _word(b >> sixteen) < threshold else zero
    for c in range(whole, last):
      a, b = _threefry(key, other, _word(c))
      halves = (_word(a & low), _word(a >> sixteen), _word(b & low), _word(b >> sixteen))
      for j in range(4):
        i = c + j * blocks
        if i < n:
          y[s, i] = positive(x[t, i]) * scale if halves[j] < threshold else zero

  return kernel
