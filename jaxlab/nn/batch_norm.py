"""Batch normalisation and (leaky) ReLU of rows in as few passes as there can be, and the maximum over groups of rows.

In networks of points the rows of a layer outgrow the caches, so that passes over memory cost as much as products do.
XLA's gradient of a batch normalisation makes a dozen; written out, with z = (x - mean) / std * scale + bias,
y = act(z) and gz = g act'(z), it needs two:

    dbias = sum gz,   dscale = sum gz x^,   dx = scale / std * (gz - dbias / n - x^ dscale / n)

Normalisation and activation are monotone, so a maximum over groups may be taken before them. Then gz has a row a group,
and one pass over x is left in each direction. On CPU host kernels make the sums and the maxima in one pass, elsewhere
XLA does.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numba import types

from jaxlab import kernels

_ROWS = 2048  # that an item of a kernel reads


class BatchNormAct(nn.Module):
  """act(batch_norm(x)), and for groups of rows its maximum over each.

  Parameters and statistics are those of `nn.BatchNorm`. Attributes:
    slope: of the activation below zero.
    pool: take the maximum over the axis before the last.
    momentum: of the running statistics.
    epsilon: added to the variance.
    dtype: of the result. Statistics and their gradients are float32.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  slope: float = 0.0
  pool: bool = False
  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "*rows c"], *, train: bool) -> Float[Array, "*rows c"]:
    """Args: x, rows; groups of rows [..., k, C] if they are pooled. Returns the rows, or one a group [..., C]."""
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype).astype(jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype).astype(jnp.float32)
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
    var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
    group = x.shape[-2] if self.pool else 1
    rows = x.reshape(-1, group, channels)
    if not train:
      a = scale * jax.lax.rsqrt(var.value + self.epsilon)
      sign = jnp.where(scale < 0, -1, 1).astype(x.dtype)
      top = (rows * sign).max(1) * sign if self.pool else rows[:, 0]
      y = _act(top * a + (bias - mean.value * a), self.slope)
    else:
      axis = None if self.is_initializing() else self.axis_name
      y, moments = normalize(rows, scale, bias, self.slope, self.epsilon, axis)
      if not self.is_initializing():
        for kept, new in zip((mean, var), moments, strict=True):
          kept.value = self.momentum * kept.value + (1 - self.momentum) * new
    return y.astype(self.dtype).reshape(*x.shape[: -1 - self.pool], channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
  x: Float[Array, "m k c"],
  scale: Float[Array, " c"],
  bias: Float[Array, " c"],
  slope: float = 0.0,
  epsilon: float = 1e-5,
  axis_name: str | None = None,
) -> tuple[Float[Array, "m c"], Float[Array, "2 c"]]:
  """max over k of act(batch_norm(x)), by the statistics of x.

  Args:
    x: groups of rows, float32 or bfloat16.
    scale: float32, of either sign.
    bias: float32.
    slope: of the activation below zero.
    epsilon: added to the variance.
    axis_name: pmap axis over which statistics are averaged.

  Returns:
    The maxima in x's dtype, and mean and (biased) variance, through which no gradient passes.
  """
  return _forward(x, scale, bias, slope, epsilon, axis_name)[0]


def _forward(x: Array, scale: Array, bias: Array, slope: float, epsilon: float, axis_name: str | None) -> Any:
  top, place, sums = _moments(x, scale)
  moments = sums / (x.shape[0] * x.shape[1])
  if axis_name is not None:
    moments = jax.lax.pmean(moments, axis_name)
  mean, var = moments[0], jnp.maximum(moments[1] - moments[0] ** 2, 0)
  a = scale * jax.lax.rsqrt(var + epsilon)
  y = _act(top * a + (bias - mean * a), slope).astype(x.dtype)
  return (y, jnp.stack([mean, var])), (x, top, place, scale, bias, mean, var)


def _backward(slope: float, epsilon: float, axis_name: str | None, kept: Any, cotangents: Any) -> tuple[Array, ...]:
  x, top, place, scale, bias, mean, var = kept
  g = cotangents[0]
  groups, size, channels = x.shape
  std = jax.lax.rsqrt(var + epsilon)
  a = scale * std
  b = bias - mean * a
  if size == 1 and kernels.reads(x):
    kernel = _gradient(x.dtype == jnp.bfloat16, slope)
    sums = kernels.call(kernel, [_partial(groups, channels)], x[:, 0], g, a, b, items=_items(groups))[0]
    dbias, weighted = sums.sum(0)
  else:
    gz = _slopes(top * a + b, slope) * g.astype(jnp.float32)
    dbias, weighted = gz.sum(0), (gz * top).sum(0)
  dscale = (weighted - mean * dbias) * std
  shared = jnp.stack([dbias, dscale]) / (groups * size)
  if axis_name is not None:
    shared = jax.lax.pmean(shared, axis_name)
  gz = _slopes(top * a + b, slope) * g  # once more: cheaper than a pass to read it back
  chosen = gz[:, None] if place is None else jnp.where(jnp.arange(size)[:, None] == place[:, None], gz[:, None], 0)
  slant = shared[1] * std
  dx = a * chosen - a * slant * x + a * (slant * mean - shared[0])
  return dx.astype(x.dtype), dscale, dbias


normalize.defvjp(_forward, _backward)


def _act(z: Array, slope: float) -> Array:
  return jnp.where(z > 0, z, slope * z)


def _slopes(z: Array, slope: float) -> Array:
  return jnp.where(z > 0, jnp.float32(1), jnp.float32(slope))


def _items(rows: int) -> int:
  return -(-rows // _ROWS)


def _partial(rows: int, channels: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((_items(rows), 2, channels), jnp.float32)


def _moments(
  x: Float[Array, "m k c"], scale: Float[Array, " c"]
) -> tuple[Float[Array, "m c"], Int[Array, "m c"] | None, Float[Array, "2 c"]]:
  """Per group and channel the entry that will be the largest, and its place; sums of x and x^2."""
  groups, size, channels = x.shape
  if kernels.reads(x):
    narrow = x.dtype == jnp.bfloat16
    if size == 1:
      sums = kernels.call(_sums(narrow), [_partial(groups, channels)], x[:, 0], items=_items(groups))[0]
      return x[:, 0], None, sums.sum(0)
    items = _items(groups * size)
    results = [jax.ShapeDtypeStruct((groups, channels), d) for d in (jnp.float32, jnp.int32)]
    results.append(_partial(groups * size, channels))
    top, place, sums = kernels.call(_maxima(narrow), results, x, scale, items=items)
    return top, place, sums.sum(0)
  return moments_device(x, scale)


def moments_device(
  x: Float[Array, "m k c"], scale: Float[Array, " c"]
) -> tuple[Float[Array, "m c"], Int[Array, "m c"] | None, Float[Array, "2 c"]]:
  """The XLA form of the kernels."""
  wide = x.astype(jnp.float32)
  sums = jnp.stack([wide.sum((0, 1)), (wide * wide).sum((0, 1))])
  if x.shape[1] == 1:
    return x[:, 0], None, sums
  sign = jnp.where(scale < 0, -1, 1).astype(x.dtype)
  signed = x * sign
  top = signed.max(1)
  count = jnp.arange(x.shape[1], dtype=jnp.int32)[:, None]
  place = jnp.where(signed == top[:, None], count, x.shape[1]).min(1)  # the first; `argmax` is slow on CPU
  return top * sign, place, sums


@functools.cache
def _sums(narrow: bool) -> kernels.Kernel:
  """Kernel x [N, C] -> sums of x and x^2 [items, 2, C]; an item adds some rows."""
  dtype, read, _ = kernels.numbers(narrow)

  @kernels.kernel(f"batch_norm.sums.{narrow}")
  def kernel(item, frame):
    x, sums = kernels.operand(frame, 0, dtype, 2), kernels.result(frame, 0, types.float32, 3)
    rows, channels = x.shape
    first, second = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    for i in range(item * _ROWS, min((item + 1) * _ROWS, rows)):
      for c in range(channels):
        value = read(x[i, c])
        first[c] += value
        second[c] += value * value
    kernels.write(first, sums[item, 0])
    kernels.write(second, sums[item, 1])

  return kernel


@functools.cache
def _gradient(narrow: bool, slope: float) -> kernels.Kernel:
  """Kernel (x [N, C], g [N, C], a [C], b [C]) -> sums of gz and gz x [items, 2, C], gz = g act'(a x + b)."""
  dtype, read, _ = kernels.numbers(narrow)
  low = np.float32(slope)

  @kernels.kernel(f"batch_norm.gradient.{narrow}.{slope}")
  def kernel(item, frame):
    x, g = kernels.operand(frame, 0, dtype, 2), kernels.operand(frame, 1, dtype, 2)
    a, b = kernels.operand(frame, 2, types.float32, 1), kernels.operand(frame, 3, types.float32, 1)
    sums = kernels.result(frame, 0, types.float32, 3)
    rows, channels = x.shape
    first, second = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    for i in range(item * _ROWS, min((item + 1) * _ROWS, rows)):
      for c in range(channels):
        value, gz = read(x[i, c]), read(g[i, c])
        gz = gz if a[c] * value + b[c] > 0 else low * gz
        first[c] += gz
        second[c] += gz * value
    kernels.write(first, sums[item, 0])
    kernels.write(second, sums[item, 1])

  return kernel


@functools.cache
def _maxima(narrow: bool) -> kernels.Kernel:
  """Kernel (x [M, K, C], scale [C]) -> top [M, C], place [M, C], sums of x and x^2 [items, 2, C]."""
  dtype, read, _ = kernels.numbers(narrow)

  @kernels.kernel(f"batch_norm.maxima.{narrow}")
  def kernel(item, frame):
    x, scale = kernels.operand(frame, 0, dtype, 3), kernels.operand(frame, 1, types.float32, 1)
    top, place = kernels.result(frame, 0, types.float32, 2), kernels.result(frame, 1, types.int32, 2)
    sums = kernels.result(frame, 2, types.float32, 3)
    groups, size, channels = x.shape
    items = sums.shape[0]
    first, second = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    sign, best, where = np.empty(channels, np.float32), np.empty(channels, np.float32), np.empty(channels, np.int32)
    for c in range(channels):
      sign[c] = -1 if scale[c] < 0 else 1
    for m in range(item * groups // items, (item + 1) * groups // items):
      for c in range(channels):
        best[c], where[c] = types.float32(-3.4e38), 0
      for k in range(size):
        for c in range(channels):
          value = read(x[m, k, c])
          first[c] += value
          second[c] += value * value
          signed = value * sign[c]
          better = signed > best[c]
          best[c] = signed if better else best[c]
          where[c] = types.int32(k) if better else where[c]
      for c in range(channels):
        top[m, c], place[m, c] = best[c] * sign[c], where[c]
    kernels.write(first, sums[item, 0])
    kernels.write(second, sums[item, 1])

  return kernel
