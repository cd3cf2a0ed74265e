"""Resizing of images and volumes, to the digit as PyTorch does it: `jax.image.resize` has other borders and cubics.

Every kind is linear and separable, y = M_1 x along one axis after the other, so a kind is a function that makes M. Rows
of M have few entries, so on CPU a pixel is the weighted sum of a few others, and its gradient is one by the rows of
M^T; there is no forward-mode derivative then. GPU and TPU multiply by M.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Method = Literal["nearest", "linear", "cubic"]

_CUBIC = -0.75  # PyTorch's a; -0.5 elsewhere
_FEW = 16  # entries of a row up to which a sum is faster than a product with the matrix


def resize(
  x: Float[Array, "b *space c"], size: Sequence[int], method: Method = "linear", *, align_corners: bool = False
) -> Float[Array, "b *out c"]:
  """As `torch.nn.functional.interpolate`, without antialiasing.

  Args:
    x: images [B, H, W, C], or with any other number of spatial axes.
    size: of the spatial axes of the result.
    method: "nearest", "linear" (bilinear, trilinear) or "cubic" (bicubic).
    align_corners: whether the centres of the outer pixels stay outer, or the borders of the image. Not for "nearest".

  Returns:
    In the dtype of `x`, computed in float32.

  Raises:
    ValueError: sizes that do not fit, an unknown method.
  """
  if method not in ("nearest", "linear", "cubic") or (method == "nearest" and align_corners):
    raise ValueError(f"method: got {method!r}, expected 'nearest' (without align_corners), 'linear' or 'cubic'")
  return _apply(x, size, functools.partial(_interpolation, method=method, align_corners=align_corners))


def adaptive_average_pool(x: Float[Array, "b *space c"], size: Sequence[int]) -> Float[Array, "b *out c"]:
  """As `torch.nn.functional.adaptive_avg_pool2d`: pixel i is the mean of floor(i L / l) to ceil((i + 1) L / l) - 1.

  Args:
    x: images [B, H, W, C], or with any other number of spatial axes.
    size: of the spatial axes of the result.

  Returns:
    In the dtype of `x`, computed in float32.

  Raises:
    ValueError: sizes that do not fit.
  """
  return _apply(x, size, _windows)


def _apply(x: Array, size: Sequence[int], make: Callable[[int, int], np.ndarray]) -> Array:
  """Multiplies the spatial axes whose size changes by make(L, l) [l, L], those that shrink first."""
  size = tuple(int(n) for n in size)
  if x.ndim != len(size) + 2 or min((*size, *x.shape[1:-1]), default=0) < 1:
    raise ValueError(f"size: got {size}, expected a positive size for each spatial axis of x, {x.shape}")
  y = x.astype(jnp.float32)
  for axis in sorted(range(len(size)), key=lambda a: size[a] / x.shape[a + 1]):
    if size[axis] != x.shape[axis + 1]:
      y = _along(make(x.shape[axis + 1], size[axis]), y, axis + 1)
  return y.astype(x.dtype)


def _along(matrix: np.ndarray, y: Array, axis: int) -> Array:
  """The matrix times an axis of y."""
  if jax.default_backend() != "cpu" or np.count_nonzero(matrix, 1).max() > _FEW:
    wide = jnp.asarray(matrix, jnp.float32)
    return jnp.moveaxis(jnp.tensordot(wide, y, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis)
  # The gradient is written out, as XLA makes that of a choice of rows a scatter.
  times = jax.custom_vjp(lambda y: _sums(matrix, y, axis))
  times.defvjp(lambda y: (times(y), None), lambda _, g: (_along(matrix.T, g, axis),))
  return times(y)


def _sums(matrix: np.ndarray, y: Array, axis: int) -> Array:
  """The same, entry by entry of the rows."""
  entries = np.count_nonzero(matrix, 1).max()
  places = np.argsort(matrix == 0, 1, kind="stable")[:, :entries]
  weights = np.take_along_axis(matrix, places, 1).astype(np.float32)
  places = np.where(weights == 0, places[:, :1], places)  # rows of fewer entries read one again, at weight 0
  shape = [-1 if a == axis else 1 for a in range(y.ndim)]
  return sum(jnp.take(y, p, axis, mode="clip") * w.reshape(shape) for p, w in zip(places.T, weights.T, strict=True))


@functools.cache
def _interpolation(length: int, size: int, method: Method, align_corners: bool) -> np.ndarray:
  out = np.arange(size, dtype=np.float32)
  if method == "nearest":
    return _taps(length, [(out * np.float32(length / size)).astype(int)], [np.ones(size)])
  if align_corners:
    at = out * np.float32((length - 1) / max(size - 1, 1))
  else:
    at = (out + np.float32(0.5)) * np.float32(length / size) - np.float32(0.5)
  if method == "linear":
    at = np.maximum(at, 0)
    low = np.minimum(np.floor(at).astype(int), length - 1)
    part = at - low
    return _taps(length, [low, low + 1], [1 - part, part])
  low = np.floor(at).astype(int)
  part = at - low
  near = lambda t: ((_CUBIC + 2) * t - (_CUBIC + 3)) * t * t + 1
  far = lambda t: ((_CUBIC * t - 5 * _CUBIC) * t + 8 * _CUBIC) * t - 4 * _CUBIC
  weights = [far(1 + part), near(part), near(1 - part), far(2 - part)]
  return _taps(length, [low - 1, low, low + 1, low + 2], weights)


def _taps(length: int, places: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
  """The matrix that takes sum_k weights_k x[places_k], the border's pixel standing for those beyond it."""
  matrix = np.zeros((len(places[0]), length), np.float32)
  for place, weight in zip(places, weights, strict=True):
    np.add.at(matrix, (np.arange(len(place)), np.clip(place, 0, length - 1)), weight)
  return matrix


@functools.cache
def _windows(length: int, size: int) -> np.ndarray:
  start = np.arange(size) * length // size
  end = -(-(np.arange(1, size + 1) * length) // size)
  inside = (np.arange(length) >= start[:, None]) & (np.arange(length) < end[:, None])
  return inside / (end - start)[:, None]
