"""Layer normalisation in one pass over memory each way.

XLA's CPU backend writes out several arrays of the size of x in each direction, and sums over rows, as the gradients of
scale and bias need, slowly. With x^ = (x - mean) / std and y = x^ scale + bias,

    dx = (g scale - mean(g scale) - x^ mean(g scale x^)) / std,   dscale = sum g x^,   dbias = sum g

are one host kernel. On GPU and TPU the plain form below is XLA's to fuse. Forward-mode differentiation is not available
on CPU.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numba import types

from jaxlab import kernels

_ITEMS = 16  # of a call: each adds the gradients of scale and bias of its rows


def layer_norm(
  x: Float[Array, "*rows c"],
  scale: Float[Array, " c"],
  bias: Float[Array, " c"],
  *,
  epsilon: float = 1e-5,
  dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "*rows c"]:
  """Rows of mean 0 and variance 1 times a scale, plus a bias.

  Args:
    x: rows.
    scale: a factor a channel.
    bias: an offset a channel.
    epsilon: added to the (biased) variance.
    dtype: of the result; None for that of `x`.

  Returns:
    Same shape, computed in float32.

  Raises:
    ValueError: scale or bias that does not fit `x`.
  """
  for name, value in (("scale", scale), ("bias", bias)):
    if value.shape != x.shape[-1:]:
      raise ValueError(f"{name}: got shape {value.shape}, expected {x.shape[-1:]} for x of shape {x.shape}")
  dtype = jnp.dtype(dtype or x.dtype)
  if x.size and kernels.reads(x, jax.ShapeDtypeStruct(x.shape, dtype)) and kernels.available(scale, bias):
    rows = x.reshape(-1, x.shape[-1])
    y, _ = _normalize(rows, scale.astype(jnp.float32), bias.astype(jnp.float32), float(epsilon), dtype)
    return y.reshape(x.shape)
  return _plain(x, scale, bias, epsilon).astype(dtype)


def _plain(x, scale, bias, epsilon):
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = wide - wide.mean(-1, keepdims=True)
  return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(x, scale, bias, epsilon, dtype):
  """The result, and means and 1 / std of the rows, which pass no gradient: `_gradient` counts their part in."""
  results = [jax.ShapeDtypeStruct(x.shape, dtype), jax.ShapeDtypeStruct((x.shape[0], 2), jnp.float32)]
  kernel, items = _rows(x.dtype == jnp.bfloat16, dtype == jnp.bfloat16), _items(x)
  return tuple(kernels.call(kernel, results, x, scale, bias, jnp.float32(epsilon)[None], items=items))


def _forward(x, scale, bias, epsilon, dtype):
  y, moments = _normalize(x, scale, bias, epsilon, dtype)
  return (y, moments), (x, scale, moments)


def _backward(epsilon, dtype, saved, cotangents):
  x, scale, moments = saved
  return _gradient(x, scale, moments, cotangents[0], epsilon)


_normalize.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gradient(x, scale, moments, g, epsilon):
  """Gradients by x, scale and bias; `moments` are functions of x and are not differentiated by themselves."""
  items = _items(x)
  sums = jax.ShapeDtypeStruct((items, 2, x.shape[1]), jnp.float32)
  kernel = _rows_gradient(x.dtype == jnp.bfloat16, g.dtype == jnp.bfloat16)
  results = [jax.ShapeDtypeStruct(x.shape, x.dtype), sums]
  dx, parts = kernels.call(kernel, results, x, scale, moments, g, items=items)
  dscale, dbias = kernels.added(parts)
  return dx, dscale, dbias


def _gradient_forward(x, scale, moments, g, epsilon):
  return _gradient(x, scale, moments, g, epsilon), (x, scale, moments, g)


def _gradient_backward(epsilon, saved, cotangents):
  x, scale, moments, g = saved

  def plain(x, scale, g):
    y, back = jax.vjp(functools.partial(_plain, epsilon=epsilon), x, scale, jnp.zeros_like(scale))
    return back(g.astype(y.dtype))

  dx, dscale, dg = jax.vjp(plain, x, scale, g)[1](cotangents)
  return dx, dscale, jnp.zeros_like(moments), dg


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _items(x: Array) -> int:
  return min(_ITEMS, x.shape[0])


@functools.cache
def _rows(narrow: bool, narrow_result: bool) -> kernels.Kernel:
  """Kernel (x [N, C], scale [C], bias [C], epsilon [1]) -> y [N, C], means and 1 / std [N, 2]."""
  (dtype, read, _), (result, _, made) = kernels.numbers(narrow), kernels.numbers(narrow_result)

  @kernels.kernel(f"layer_norm.rows.{narrow}.{narrow_result}")
  def kernel(item, frame):
    x, scale = kernels.operand(frame, 0, dtype, 2), kernels.operand(frame, 1, types.float32, 1)
    bias, epsilon = kernels.operand(frame, 2, types.float32, 1), kernels.operand(frame, 3, types.float32, 1)
    y, moments = kernels.result(frame, 0, result, 2), kernels.result(frame, 1, types.float32, 2)
    rows, channels = x.shape
    items, row, n = min(_ITEMS, rows), np.empty(channels, np.float32), np.float32(channels)
    for i in range(rows * item // items, rows * (item + 1) // items):
      total, squares = np.float32(0), np.float32(0)
      for c in range(channels):
        row[c] = read(x[i, c])
        total += row[c]
      mean = total / n
      for c in range(channels):
        row[c] -= mean
        squares += row[c] * row[c]
      over = np.float32(1) / np.sqrt(squares / n + epsilon[0])
      for c in range(channels):
        y[i, c] = made(row[c] * over * scale[c] + bias[c])
      moments[i, 0], moments[i, 1] = mean, over

  return kernel


@functools.cache
def _rows_gradient(narrow: bool, narrow_result: bool) -> kernels.Kernel:
  """Kernel (x [N, C], scale [C], moments [N, 2], g [N, C]) -> dx [N, C], parts of dscale and dbias [items, 2, C]."""
  (dtype, read, made), (result, read_g, _) = kernels.numbers(narrow), kernels.numbers(narrow_result)

  @kernels.kernel(f"layer_norm.gradient.{narrow}.{narrow_result}")
  def kernel(item, frame):
    x, scale = kernels.operand(frame, 0, dtype, 2), kernels.operand(frame, 1, types.float32, 1)
    moments, g = kernels.operand(frame, 2, types.float32, 2), kernels.operand(frame, 3, result, 2)
    dx, sums = kernels.result(frame, 0, dtype, 2), kernels.result(frame, 1, types.float32, 3)
    rows, channels = x.shape
    items, n = min(_ITEMS, rows), np.float32(channels)
    row, scaled = np.empty(channels, np.float32), np.empty(channels, np.float32)
    dscale, dbias = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    for i in range(rows * item // items, rows * (item + 1) // items):
      mean, over = moments[i, 0], moments[i, 1]
      total, along = np.float32(0), np.float32(0)
      for c in range(channels):
        row[c] = (read(x[i, c]) - mean) * over
        value = read_g(g[i, c])
        dscale[c] += value * row[c]
        dbias[c] += value
        scaled[c] = value * scale[c]
        total += scaled[c]
        along += scaled[c] * row[c]
      total, along = total / n, along / n
      for c in range(channels):
        dx[i, c] = made(over * (scaled[c] - total - row[c] * along))
    kernels.write(dscale, sums[item, 0])
    kernels.write(dbias, sums[item, 1])

  return kernel


class LayerNorm(nn.Module):
  """Layer normalisation; parameters `scale` and `bias` [C], as `flax.linen.LayerNorm`.

  Attributes:
    epsilon: added to the variance.
    dtype: dtype of the result; None for that of inputs and parameters. It is computed in float32.
    param_dtype: dtype of the parameters.
  """

  epsilon: float = 1e-5
  dtype: jax.typing.DTypeLike | None = None
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*rows c"]) -> Float[Array, "*rows c"]:
    """Args: x, channels last. Returns the same shape, in `dtype`."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
    dtype = self.dtype or jnp.result_type(x, scale, bias)
    return layer_norm(x, scale, bias, epsilon=self.epsilon, dtype=dtype)
