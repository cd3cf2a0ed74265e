"""Convolution and instance norm of volumes, NDHWC, in the form that is fastest on the backend at hand.

On GPU and TPU the convolution is XLA's own. XLA's CPU backend is slow at it, most of all at its gradients, so there
float32 and narrower types run as host kernels (`jaxlab.nn._volume`): bfloat16 in products of pairs where the processor
has them, the rest in float32. Gradients are again such convolutions, so they can be differentiated further;
forward-mode differentiation is not available on CPU.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab import kernels
from jaxlab.nn import _tiles, _volume, product

Triple = tuple[int, int, int]
_PAIRED = 8  # channels from which on packing pairs for the gradient of the filters is worth it
_FEW = 128  # voxels up to which reading the filters is what takes time on CPU


def convolve(
  x: Float[Array, "b d h w c"],
  kernel: Float[Array, "i j k c o"],
  bias: Float[Array, " o"] | None = None,
  *,
  strides: Sequence[int] = (1, 1, 1),
) -> Float[Array, "b p q r o"]:
  """Convolution with half a window of zeros on every side.

  Args:
    x: volumes.
    kernel: filters with odd sides, of the dtype of `x`.
    bias: added to every voxel.
    strides: of the output voxels along depth, height and width.

  Returns:
    In the dtype of `x`, accumulated in float32; p = ceil(d / stride), and so on.

  Raises:
    ValueError: shapes that do not fit together, even windows, strides that are not three positive integers.
  """
  if x.ndim != 5 or kernel.ndim != 5 or kernel.shape[3] != x.shape[4]:
    raise ValueError(f"kernel: got shape {kernel.shape}, expected (i, j, k, {x.shape[-1]}, outputs) for x of {x.shape}")
  if any(side % 2 == 0 for side in kernel.shape[:3]):
    raise ValueError(f"kernel: got a window of {kernel.shape[:3]}, expected odd sides")
  if bias is not None and bias.shape != kernel.shape[4:]:
    raise ValueError(f"bias: got shape {bias.shape}, expected {kernel.shape[4:]}")
  if len(strides) != 3 or min(strides) < 1:
    raise ValueError(f"strides: got {tuple(strides)}, expected three positive integers")
  window, strides = kernel.shape[:3], tuple(int(s) for s in strides)
  before = tuple(side // 2 for side in window)
  if math.prod(window) == 1:
    x = x[:, *(slice(None, None, s) for s in strides)]
    y = jnp.einsum("bdhwc,co->bdhwo", x, kernel[0, 0, 0], preferred_element_type=jnp.float32).astype(x.dtype)
  elif kernels.available(x, kernel):
    y = on_host(x, kernel, strides, before, tuple(-(-n // s) for n, s in zip(x.shape[1:4], strides, strict=True)))
  else:
    padding = [(p, p) for p in before]
    y = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
  return add_bias(y, bias)


def add_bias(y: Float[Array, "*b o"], bias: Float[Array, " o"] | None) -> Float[Array, "*b o"]:
  """y + bias in float32 or wider, in which the bias's gradient is a sum over all places, and in the dtype of `y`."""
  if bias is None:
    return y
  wide = jnp.promote_types(y.dtype, jnp.float32)
  return (y.astype(wide) + bias.astype(wide)).astype(y.dtype)


def on_host(
  x: Float[Array, "b d h w c"],
  kernel: Float[Array, "i j k c o"],
  strides: tuple[int, ...],
  before: tuple[int, ...],
  sides: tuple[int, ...],
) -> Float[Array, "b p q r o"]:
  """The convolution on CPU with any zeros around: y[o] = sum over taps t of x[o * strides + t - before] kernel[t].

  Args:
    x: volumes of float32 or a narrower type.
    kernel: filters.
    strides: of the output voxels.
    before: zeros before each side.
    sides: of the result; where its windows reach beyond x, there are zeros.

  Returns:
    In the dtype of `x`, accumulated in float32.
  """
  dtype = x.dtype
  if not dtype == kernel.dtype == jnp.bfloat16:
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
  few = x.shape[0] * math.prod(sides) <= _FEW
  return (by_product if few else _convolve)(x, kernel, strides, before, sides).astype(dtype)


def by_product(
  x: Float[Array, "b d h w c"],
  kernel: Float[Array, "i j k c o"],
  strides: Sequence[int],
  before: Sequence[int],
  sides: Sequence[int],
  bias: Float[Array, " o"] | None = None,
) -> Float[Array, "b p q r o"]:
  """What `on_host` computes, plus a bias, as one product of the windows and the filters, on any backend."""
  window = kernel.shape[:3]
  x = _framed(x, strides, before, window, sides)
  last = [(n - 1) * s + 1 for n, s in zip(sides, strides, strict=True)]
  taps = [
    x[(slice(None), *(slice(t, t + n, s) for t, n, s in zip(tap, last, strides, strict=True)))]
    for tap in itertools.product(*map(range, window))
  ]
  windows = jnp.concatenate(taps, -1)
  return product.dense(windows, kernel.reshape(-1, kernel.shape[4]), bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x, kernel, strides, before, sides):
  """y[o] = sum over taps t of x[o * strides + t - before] kernel[t], for `sides` voxels o.

  In float32, or in bfloat16 where pairs of it are summed.
  """
  window, out = kernel.shape[:3], kernel.shape[4]
  if x.shape[4] % 2 or not _tiles.has_pairs():
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
  pairs, kernel = x.dtype == jnp.bfloat16, _padded(kernel, out)
  channels = kernel.shape[4]
  lanes, vectors = _tiles.lanes_for(channels), _tiles.vectors_for(channels, 4)
  tile, wide = _tiles.tile_for(sides[2], vectors), lanes * vectors
  words = x.shape[4] // 2 if pairs else x.shape[4]  # of four bytes, that a voxel takes
  copied = _copied(window)
  if not copied:
    x = _framed(x, strides, before, window, (*sides[:2], -(-sides[2] // tile) * tile))
  plan, items = _volume.plan(
    (*x.shape[:4], words), window, sides, strides, before if copied else None, chunks=channels // wide, sums=False
  )
  if not copied and words % 256 == 0:  # rows of voxels at such steps would share few lines of the cache
    x = jnp.pad(x, [(0, 0)] * 4 + [(0, 64 // x.dtype.itemsize)])
  result = jax.ShapeDtypeStruct((x.shape[0], *sides, channels), x.dtype)
  shape = channels // wide, *window[:2], window[2] * words, wide
  rows = kernel.reshape(-1, channels)
  (filters,) = kernels.call(
    _volume.filters(vectors, lanes, pairs),
    [jax.ShapeDtypeStruct(shape, jnp.uint32)],
    rows,
    items=_volume.filter_items(len(rows)),
  )
  host = _volume.convolve(tile, vectors, lanes, pairs)
  (y,) = kernels.call(host, [result], x, filters, jnp.asarray(plan), items=items)
  return y[..., :out]


def _convolve_forward(x, kernel, strides, before, sides):
  return _convolve(x, kernel, strides, before, sides), (x, kernel)


def _convolve_backward(strides, before, sides, saved, g):
  x, kernel = saved
  g = g.astype(x.dtype)
  dx = _transposed(g, kernel, strides, before, x.shape[1:4])
  dkernel = _correlate(x, g, strides, before, kernel.shape[:3])
  return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _copied(window):
  """Whether items put zeros around what they read: cheap for images, whose items share few rows, not for volumes."""
  return window[0] == 1


def _framed(x, strides, before, window, sides):
  """x with zeros around it, or cut: the windows of `sides` voxels that lie `strides` apart."""
  whole = [(n - 1) * s + k for n, s, k in zip(sides, strides, window, strict=True)]
  after = [n - p - m for n, p, m in zip(whole, before, x.shape[1:4], strict=True)]
  return jax.lax.pad(
    x, jnp.zeros((), x.dtype), [(0, 0, 0), *((p, q, 0) for p, q in zip(before, after, strict=True)), (0, 0, 0)]
  )


def _transposed(g, kernel, strides, before, sides):
  """The gradient of `_convolve` by x, of `sides`.

  Voxel s * q + r of x meets only the taps t with s * o = s * q + r + before - t for a whole o, so the voxels of each
  remainder r are a convolution of g of their own, by every s-th tap in reverse.
  """
  turned = jnp.swapaxes(kernel, 3, 4)

  def along(axis, r):
    s, p, k = strides[axis], before[axis], kernel.shape[axis]
    first = (r + p) % s
    last = first + (k - 1 - first) // s * s  # below `first` if no tap meets these voxels
    return first, last, s, (last - r - p) // s, -(-(sides[axis] - r) // s)

  def part(remainders):
    taps = [along(axis, r) for axis, r in enumerate(remainders)]
    shape = tuple(count for *_, count in taps)
    if any(last < first for first, last, *_ in taps):
      return jnp.zeros((g.shape[0], *shape, kernel.shape[3]), g.dtype)
    chosen = turned[tuple(slice(first, last + 1, s) for first, last, s, *_ in taps)][::-1, ::-1, ::-1]
    return _convolve(g, chosen, (1, 1, 1), tuple(lead for *_, lead, _ in taps), shape).astype(g.dtype)

  if tuple(strides) == (1, 1, 1):
    return part((0, 0, 0))
  whole = [-(-n // s) for n, s in zip(sides, strides, strict=True)]

  def filled(remainders):
    y = part(remainders)
    return jnp.pad(y, ((0, 0), *((0, n - m) for n, m in zip(whole, y.shape[1:4], strict=True)), (0, 0)))

  parts = jnp.stack([filled(r) for r in itertools.product(*map(range, strides))])
  parts = parts.reshape(*strides, g.shape[0], *whole, -1).transpose(3, 4, 0, 5, 1, 6, 2, 7)
  full = parts.reshape(g.shape[0], *(n * s for n, s in zip(whole, strides, strict=True)), -1)
  return full[:, : sides[0], : sides[1], : sides[2]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _correlate(x, g, strides, before, window):
  """The gradient of `_convolve` by its kernel: sum over o of x[o * strides + t - before] g[o] for each tap t."""
  inputs, out = x.shape[4], g.shape[4]
  if inputs < _PAIRED or not _tiles.has_pairs():
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
  pairs, g = x.dtype == jnp.bfloat16, _padded(g, out)
  channels = g.shape[4]
  lanes, vectors = _tiles.lanes_for(channels), _tiles.vectors_for(channels, 2)
  copied, chunks = _copied(window), channels // (lanes * vectors)
  if not copied:
    x = _framed(x, strides, before, window, g.shape[1:4])
  plan, items = _volume.plan(
    x.shape, window, g.shape[1:4], strides, before if copied else None, chunks=chunks, sums=True
  )
  result = jax.ShapeDtypeStruct((int(plan[-1]), *window[:2], window[2] * inputs, channels), jnp.float32)
  host = _volume.correlate(_tiles.tile_for(window[2] * inputs, vectors), vectors, lanes, pairs)
  (sums,) = kernels.call(host, [result], x, g, jnp.asarray(plan), items=items)
  return kernels.added(sums)[..., :out].reshape(*window, inputs, out)


def _correlate_forward(x, g, strides, before, window):
  return _correlate(x, g, strides, before, window), (x, g)


def _correlate_backward(strides, before, window, saved, dkernel):
  x, g = saved
  dkernel = dkernel.astype(x.dtype)
  dx = _transposed(g, dkernel, strides, before, x.shape[1:4])
  return dx.astype(x.dtype), _convolve(x, dkernel, strides, before, g.shape[1:4]).astype(g.dtype)


_correlate.defvjp(_correlate_forward, _correlate_backward)


def _padded(x, channels):
  """Zeros behind the last axis, up to whole vectors."""
  extra = -channels % _tiles.lanes_for(channels)
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)]) if extra else x


def fan_in_normal(gain: float = 1.0) -> jax.nn.initializers.Initializer:
  """Normal with variance gain / (k * k * k * inputs): for 2 that of He et al., for 1 that of LeCun.

  Drawn flat and then shaped, which gives the same numbers: XLA's CPU backend compiles random arrays of five axes ten
  times as long.
  """

  def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
    flat = jax.random.normal(key, (math.prod(shape),), dtype) * math.sqrt(gain / math.prod(shape[:-1]))
    return flat.reshape(shape, out_sharding=out_sharding)

  return init


class Conv3D(nn.Module):
  """Convolution of volumes; parameters `kernel` [k, k, k, C, features] and `bias` [features], as `flax.linen.Conv`.

  Attributes:
    features: outputs.
    kernel_size: k, odd; `k // 2` zeros pad every side.
    strides: of the output voxels.
    dtype: compute dtype.
    param_dtype: dtype of the parameters.
    kernel_init: initialiser of the filters.
  """

  features: int
  kernel_size: int = 3
  strides: Triple = (1, 1, 1)
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = fan_in_normal()

  @nn.compact
  def __call__(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b p q r o"]:
    """Volumes to volumes, in `dtype`."""
    window = (self.kernel_size,) * 3
    kernel = self.param("kernel", self.kernel_init, (*window, x.shape[-1], self.features), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return convolve(x, kernel, bias, strides=self.strides)


class InstanceNorm(nn.Module):
  """Norm over the voxels of each volume and channel, then a scale and an offset a channel, then a leaky ReLU.

      y = (x - mean) / sqrt(var + epsilon) * scale + bias,   where y < 0 times negative_slope

  Mean and biased variance are those of the volume at hand, in training and evaluation alike, in float32.

  Attributes:
    epsilon: added to the variance.
    negative_slope: of the leaky ReLU; 1 for none.
    dtype: dtype of the result.
    param_dtype: dtype of the parameters `scale` and `bias`.
  """

  epsilon: float = 1e-5
  negative_slope: float = 1.0
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b d h w c"]:
    """Volumes to volumes, in `dtype`."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
    wide = x.astype(jnp.float32)
    mean = wide.mean((1, 2, 3), keepdims=True)
    var = jnp.square(wide - mean).mean((1, 2, 3), keepdims=True)
    y = (wide - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale.astype(jnp.float32)) + bias.astype(jnp.float32)
    if self.negative_slope != 1:
      y = jnp.where(y >= 0, y, self.negative_slope * y)
    return y.astype(self.dtype)
