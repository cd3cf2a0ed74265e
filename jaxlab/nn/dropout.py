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

from jaxlab import checks, kernels

_BLOCKS = 4096  # Threefry blocks an item of the host kernel draws
_word = types.uint32


def dropout(key: Key[Array, ""], x: Float[Array, "*shape"], rate: float) -> Float[Array, "*shape"]:
  """Inverted dropout: each entry is zero with probability `rate`, else scaled to keep the mean.

  Args:
    key: of this draw.
    x: any shape.
    rate: in [0, 1), rounded to a multiple of 2^-16; the scale is that of the rounded rate, so the mean is exact.

  Raises:
    ValueError: on another rate.
  """
  checks.rate("rate", rate)
  threshold = max(round((1 - rate) * 2**16), 1)
  words = jax.random.bits(key, (2,), "uint32")
  return _drop(threshold, words, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _drop(threshold: int, words: UInt32[Array, "2"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  if x.dtype == jnp.float32 and kernels.available():
    return _host(jnp.uint32(threshold), words[None], jnp.atleast_1d(x)[None])[0].reshape(x.shape)
  return device(threshold, words, x.reshape(-1)).reshape(x.shape)


_drop.defvjp(
  lambda threshold, words, x: (_drop(threshold, words, x), words),
  lambda threshold, words, g: (np.zeros(words.shape, jax.dtypes.float0), _drop(threshold, words, g)),
)


def device(threshold: int, words: UInt32[Array, "2"], x: Float[Array, " n"]) -> Float[Array, " n"]:
  """The XLA form: keeps the entries whose 16 bits are below `threshold`."""
  blocks = -(-x.size // 4)
  counters = jnp.concatenate([jnp.arange(blocks, dtype="uint32"), jnp.zeros(blocks, "uint32")])
  bits = jax.extend.random.threefry_2x32(words, counters).reshape(2, 1, blocks)
  halves = (bits >> jnp.array([0, 16], "uint32")[:, None]) & 0xFFFF
  keep = (halves < threshold).reshape(-1)[: x.size]
  return jnp.where(keep, x * jnp.asarray(2**16 / threshold, x.dtype), 0)


@jax.custom_batching.custom_vmap
def _host(threshold, words, x):
  """[K, 2], [S, ...] -> [S, ...], K being 1 or S."""
  blocks = -(-math.prod(x.shape[1:]) // 4)
  items = x.shape[0] * -(-blocks // _BLOCKS)
  return kernels.call(_kernel, [jax.ShapeDtypeStruct(x.shape, x.dtype)], threshold[None], words, x, items=items)[0]


@_host.def_vmap
def _(size, batched, threshold, words, x):
  if not batched[2]:
    x = jnp.broadcast_to(x, (size, *x.shape))
  inner = x.shape[1]
  if batched[1]:
    words = jnp.broadcast_to(words, (size, inner, 2)).reshape(-1, 2)
  elif words.shape[0] > 1:
    words = jnp.tile(words, (size, 1))
  y = _host(threshold, words, x.reshape(-1, *x.shape[2:]))
  return y.reshape(x.shape), True


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


@kernels.kernel("dropout")
def _kernel(item, frame):
  """(threshold [1], words [K, 2], x [S, N]) -> y [S, N]."""
  threshold = kernels.operand(frame, 0, _word, 1)[0]
  words, x = kernels.operand(frame, 1, _word, 2), kernels.operand(frame, 2, types.float32, 2)
  y = kernels.result(frame, 0, types.float32, 2)
  n = x.shape[1]
  blocks = (n + 3) // 4
  groups = (blocks + _BLOCKS - 1) // _BLOCKS
  s, first = item // groups, item % groups * _BLOCKS
  last = min(first + _BLOCKS, blocks)
  k = s if words.shape[0] > 1 else 0
  key, other = words[k, 0], words[k, 1]
  scale, zero = types.float32(65536 / threshold), types.float32(0)
  low, sixteen = _word(0xFFFF), _word(16)
  whole = max(first, min(last, n - 3 * blocks))  # blocks before this one have all four entries
  x0, y0 = x[s, first:whole], y[s, first:whole]
  x1, y1 = x[s, first + blocks : whole + blocks], y[s, first + blocks : whole + blocks]
  x2, y2 = x[s, first + 2 * blocks : whole + 2 * blocks], y[s, first + 2 * blocks : whole + 2 * blocks]
  x3, y3 = x[s, first + 3 * blocks : whole + 3 * blocks], y[s, first + 3 * blocks : whole + 3 * blocks]
  for c in range(types.uint64(whole - first)):  # unsigned: an index that may be negative keeps LLVM from vectors
    a, b = _threefry(key, other, _word(_word(first) + _word(c)))
    y0[c] = x0[c] * scale if _word(a & low) < threshold else zero
    y1[c] = x1[c] * scale if _word(a >> sixteen) < threshold else zero
    y2[c] = x2[c] * scale if _word(b & low) < threshold else zero
    y3[c] = x3[c] * scale if _word(b >> sixteen) < threshold else zero
  for c in range(whole, last):
    a, b = _threefry(key, other, _word(c))
    halves = (_word(a & low), _word(a >> sixteen), _word(b & low), _word(b >> sixteen))
    for j in range(4):
      i = c + j * blocks
      if i < n:
        y[s, i] = x[s, i] * scale if halves[j] < threshold else zero
