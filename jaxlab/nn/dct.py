"""The discrete cosine transform of images, orthonormal (DCT-II), and its inverse.

    X[u, v] = sum_ij x[i, j] b_u(i) b_v(j),    b_k(i) = s_k cos(pi k (i + 1/2) / n),   s_0 = sqrt(1/n), s_k = sqrt(2/n)

Ahmed, Natarajan and Rao, "Discrete Cosine Transform", IEEE Transactions on Computers, 1974. Separable, so it is two
products with small matrices, fast on every device, and so are its gradients. `scipy.fft.dctn(..., norm="ortho")` is
the same.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.cache
def matrix(size: int) -> Float[np.ndarray, "n n"]:
  """Host. Row k is b_k; rows are orthonormal. In float64.

  Raises:
    ValueError: a size below 1.
  """
  if size < 1:
    raise ValueError(f"size: got {size}, expected at least 1")
  k, i = np.arange(size)[:, None], np.arange(size)
  scale = np.where(k == 0, np.sqrt(1 / size), np.sqrt(2 / size))
  return np.asarray(scale * np.cos(np.pi * k * (i + 0.5) / size))


def basis(frequencies: Sequence[tuple[int, int]], height: int, width: int) -> Float[np.ndarray, "f h w"]:
  """Host. The images b_u(i) b_v(j) of pairs (u, v). In float64.

  Args:
    frequencies: pairs, u below `height` and v below `width`.
    height: pixels.
    width: pixels.

  Raises:
    ValueError: none, or a frequency that the size does not hold.
  """
  pairs = np.asarray(frequencies, int).reshape(-1, 2)
  if not len(pairs) or pairs.min() < 0 or (pairs >= (height, width)).any():
    raise ValueError(f"frequencies: got {frequencies}, expected pairs from 0 below {height} and {width}")
  return matrix(height)[pairs[:, 0], :, None] * matrix(width)[pairs[:, 1], None, :]


def dct_2d(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
  """Coefficients of images: entry (u, v) of each channel. In the dtype of `x`, computed in float32.

  Raises:
    ValueError: fewer than three axes.
  """
  return _both(x, matrix)


def idct_2d(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
  """Images of coefficients, the inverse of `dct_2d`.

  Raises:
    ValueError: fewer than three axes.
  """
  return _both(x, lambda size: matrix(size).T)


def _both(x, make):
  if x.ndim < 3:
    raise ValueError(f"x: got shape {x.shape}, expected [..., height, width, channels]")
  rows, columns = (jnp.asarray(make(n), jnp.float32) for n in x.shape[-3:-1])
  y = jnp.einsum("ui,...ijc,vj->...uvc", rows, x.astype("float32"), columns, precision=jax.lax.Precision.HIGHEST)
  return y.astype(x.dtype)
