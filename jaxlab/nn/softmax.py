"""Softmax over the last axis, in one pass over memory each way.

XLA's CPU backend passes over the logits several times. There softmax of long rows is a host kernel, which takes half
the time, and so is its gradient,

    p = exp(x) / sum of exp(x),   dx = p (g - sum of p g);

elsewhere this is `jax.nn.softmax`. Forward-mode differentiation is not available on CPU.
"""

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float
from numba import types
from numba.extending import register_jitable

from jaxlab import kernels

_VALUES = 1 << 15  # that an item computes, about
_LONG = 128  # logits of a row from which on the kernel is faster: what is left over by vectors, it does one by one


def softmax(x: Float[Array, "*rows m"]) -> Float[Array, "*rows m"]:
  """exp(x) / sum of exp(x), over the last axis.

  Args:
    x: logits.

  Returns:
    Same shape and dtype. In long rows on CPU a probability is 1e-38 at least, that of a logit of -infinity too.
  """
  if x.size and x.shape[-1] >= _LONG and x.dtype == jnp.float32 and kernels.available():
    return _softmax(x.reshape(-1, x.shape[-1])).reshape(x.shape)
  return jax.nn.softmax(x)


@jax.custom_vjp
def _softmax(x):
  return _call(_rows, x)


def _forward(x):
  p = _softmax(x)
  return p, p


def _backward(p, g):
  return (_gradient(p, g),)


_softmax.defvjp(_forward, _backward)


@jax.custom_vjp
def _gradient(p, g):
  return _call(_rows_gradient, p, g)


def _gradient_backward(saved, cotangent):
  plain = lambda p, g: p * (g - (p * g).sum(-1, keepdims=True))
  return jax.vjp(plain, *saved)[1](cotangent)


_gradient.defvjp(lambda p, g: (_gradient(p, g), (p, g)), _gradient_backward)


def _call(kernel, *arrays):
  """Rows [R, M] to rows; more of them under `vmap`, in one call."""

  @jax.custom_batching.custom_vmap
  def run(*arrays):
    shape = arrays[0].shape
    return kernels.call(kernel, [jax.ShapeDtypeStruct(shape, jnp.float32)], *arrays, items=_items(*shape))[0]

  @run.def_vmap
  def _(size, batched, *arrays):
    rows = (a if new else jnp.broadcast_to(a, (size, *a.shape)) for a, new in zip(arrays, batched, strict=True))
    y = _call(kernel, *(a.reshape(-1, a.shape[-1]) for a in rows))
    return y.reshape(size, -1, y.shape[-1]), True

  return run(*arrays)


@register_jitable
def _items(rows, length):
  """Runs into which so many rows are cut."""
  return max(1, min(rows, rows * length // _VALUES))


@numba.njit(inline="always")
def largest(row):
  """Inside a kernel: the largest logit, and whether there is no softmax: of NaN, of infinity, of -infinity alone.

  Both by bits: of these LLVM makes vector instructions, and it takes numbers of kernels to be finite. Bits of floats
  order as whole numbers do once those of negative ones are turned.
  """
  bits, top, low = row.view(np.int32), np.int32(-0x80000000), np.int32(0x7FFFFFFF)
  for m in range(len(row)):
    order = bits[m] ^ ((bits[m] >> np.int32(31)) & np.int32(0x7FFFFFFF))
    top, low = max(top, order), min(low, order)
  found = np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
  infinity = np.int32(0x7F800000)
  return found, top >= infinity or top <= ~infinity or low < ~infinity


@numba.njit(inline="always")
def exp(row, target, scale, shift):
  """Inside a kernel: writes exp(scale * row - shift), and returns the sum."""
  total = np.float32(0)
  for m in range(len(row)):
    target[m] = kernels.exp(scale * row[m] - shift)
    total += target[m]
  return total


@kernels.kernel("softmax.rows")
def _rows(item, frame):
  """Kernel x [R, M] -> p [R, M]; an item is a run of rows."""
  x, p = kernels.operand(frame, 0, types.float32, 2), kernels.result(frame, 0, types.float32, 2)
  rows, items = x.shape[0], _items(*x.shape)
  for i in range(rows * item // items, rows * (item + 1) // items):
    top, broken = largest(x[i])
    over = np.float32(1) / exp(x[i], p[i], np.float32(1), top)
    if broken:
      over = np.uint32(0x7FC00000).view(np.float32)
    for m in range(x.shape[1]):
      p[i, m] *= over


@kernels.kernel("softmax.gradient")
def _rows_gradient(item, frame):
  """Kernel (p [R, M], g [R, M]) -> dx [R, M]; an item is a run of rows."""
  p, g = kernels.operand(frame, 0, types.float32, 2), kernels.operand(frame, 1, types.float32, 2)
  dx = kernels.result(frame, 0, types.float32, 2)
  rows, items = p.shape[0], _items(*p.shape)
  for i in range(rows * item // items, rows * (item + 1) // items):
    along = np.float32(0)
    for m in range(p.shape[1]):
      along += p[i, m] * g[i, m]
    for m in range(p.shape[1]):
      dx[i, m] = p[i, m] * (g[i, m] - along)
