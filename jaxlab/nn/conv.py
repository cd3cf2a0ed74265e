"""Dense, depthwise and grouped pointwise convolution, NHWC, each in the form that is fastest on the backend at hand.

On GPU and TPU they are XLA's own operations. XLA's CPU backend has no fast grouped convolution (jax issue 23713, flax
issue 4207), and dense ones at half the speed of the processor, so there float32 and narrower types run as host kernels
(`jaxlab.nn._depthwise` and `jaxlab.nn._grouped`, in float32, and `jaxlab.nn.volume` on volumes one slice thick).
Gradients are again such convolutions, so they can be differentiated further; forward-mode differentiation is not
available on CPU.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab import kernels
from jaxlab.nn import _depthwise, _grouped, volume


def dense(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "k l c o"],
  bias: Float[Array, " o"] | None = None,
  *,
  stride: int = 1,
  padding: int = 0,
) -> Float[Array, "b i j o"]:
  """Convolution of all channels with all.

  Args:
    x: images.
    kernel: filters, of the dtype of `x`.
    bias: added to every pixel.
    stride: of the output pixels.
    padding: zeros on every side.

  Returns:
    In the dtype of `x`, accumulated in float32; i = (h + 2 padding - k) // stride + 1.

  Raises:
    ValueError: shapes that do not fit together.
  """
  if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[2] != x.shape[3]:
    raise ValueError(f"kernel: got shape {kernel.shape}, expected (k, l, {x.shape[-1]}, outputs) for x of {x.shape}")
  if bias is not None and bias.shape != kernel.shape[3:]:
    raise ValueError(f"bias: got shape {bias.shape}, expected {kernel.shape[3:]}")
  if stride < 1:
    raise ValueError(f"stride: got {stride}, expected a positive integer")
  if padding < 0:
    raise ValueError(f"padding: got {padding}, expected at least 0")
  rows, columns = kernel.shape[:2]
  height, width = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[1:3], (rows, columns), strict=True))
  geometry = (1, stride, stride), (0, padding, padding), (1, height, width)  # of images as volumes one slice thick
  overlapping = max(rows, columns) > stride
  if overlapping and kernels.available(x, kernel):
    y = volume.on_host(x[:, None], kernel[None], *geometry)[:, 0]
  elif (stride > 1 or rows == columns == 1) and jax.default_backend() == "cpu":
    # A product of patches and the kernel: XLA's gradients of such convolutions are many times slower.
    return volume.by_product(x[:, None], kernel[None], *geometry, bias)[:, 0]
  else:
    y = jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), ((padding, padding),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
  return volume.add_bias(y, bias)


def depthwise(
  x: Float[Array, "*b h w c"],
  kernel: Float[Array, "k k 1 c"],
  bias: Float[Array, " c"] | None = None,
  *,
  stride: int = 1,
) -> Float[Array, "*b i j c"]:
  """Depthwise convolution with `k // 2` zeros on every side: one k x k filter a channel.

  Args:
    x: images.
    kernel: filters, k odd, of the dtype of `x`.
    bias: added to every pixel.
    stride: of the output pixels; i = ceil(h / stride).

  Returns:
    In the dtype of `x`, accumulated in float32.

  Raises:
    ValueError: shapes that do not fit together, or an even filter.
  """
  if x.ndim < 3 or kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[-1]):
    raise ValueError(f"kernel: got shape {kernel.shape}, expected (k, k, 1, {x.shape[-1]}) for x of shape {x.shape}")
  k = kernel.shape[0]
  if kernel.shape[1] != k or k % 2 == 0:
    raise ValueError(f"kernel: got {k} x {kernel.shape[1]} filters, expected odd square ones")
  if bias is not None and bias.shape != (x.shape[-1],):
    raise ValueError(f"bias: got shape {bias.shape}, expected ({x.shape[-1]},)")
  if stride < 1:
    raise ValueError(f"stride: got {stride}, expected a positive integer")
  images = x.reshape(-1, *x.shape[-3:])
  if kernels.available(x, kernel):
    # A strided output is a slice of the dense one: still several times faster than XLA's grouped convolution.
    y = _host_depthwise(images, kernel, bias)[:, ::stride, ::stride]
  else:
    y = jax.lax.conv_general_dilated(
      images,
      kernel,
      (stride, stride),
      ((k // 2, k // 2),) * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=x.shape[-1],
    )
    y = volume.add_bias(y, bias)
  return y.reshape(*x.shape[:-3], *y.shape[1:])


def grouped_pointwise(
  x: Float[Array, "*b c"], kernel: Float[Array, "1 1 g o"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*b o"]:
  """1x1 convolution in c / g groups: input channel j * g + i reaches the outputs of group j only.

  Args:
    x: inputs.
    kernel: weights; the o outputs are split evenly over the groups, in order.
    bias: added to every output.

  Returns:
    In the dtype of `x`, accumulated in float32.

  Raises:
    ValueError: shapes that do not fit together.
  """
  if kernel.ndim != 4 or kernel.shape[:2] != (1, 1):
    raise ValueError(f"kernel: got shape {kernel.shape}, expected (1, 1, channels of a group, outputs)")
  size, out = kernel.shape[2:]
  if x.shape[-1] % size or out % (x.shape[-1] // size):
    raise ValueError(
      f"kernel: got shape {kernel.shape}, expected groups of a size that divides {x.shape[-1]} channels, "
      "and outputs that divide evenly over them"
    )
  if bias is not None and bias.shape != (out,):
    raise ValueError(f"bias: got shape {bias.shape}, expected ({out},)")
  if kernels.available(x, kernel):
    wide = [a.astype(jnp.float32) for a in (x.reshape(-1, x.shape[-1]), kernel[0, 0])]
    offset = jnp.zeros(out) if bias is None else bias.astype(jnp.float32)
    return _host_grouped(*wide, offset).astype(x.dtype).reshape(*x.shape[:-1], out)
  groups = x.shape[-1] // size
  y = jnp.einsum(
    "...jg,gjo->...jo",
    x.reshape(*x.shape[:-1], groups, size),
    kernel.reshape(size, groups, out // groups),
    preferred_element_type=jnp.float32,
  )
  y = y.reshape(*x.shape[:-1], out).astype(x.dtype)
  return volume.add_bias(y, bias)


def _host_depthwise(x, kernel, bias):
  channels, dtype = x.shape[-1], x.dtype
  extra = -channels % 8  # the kernels work on vectors of channels
  bias = jnp.zeros(channels) if bias is None else bias
  x, kernel, bias = (
    jnp.pad(a.astype(jnp.float32), [(0, 0)] * (a.ndim - 1) + [(0, extra)]) if extra else a.astype(jnp.float32)
    for a in (x, kernel, bias)
  )
  y = _convolve(x, kernel, bias)
  return (y[..., :channels] if extra else y).astype(dtype)


@jax.custom_vjp
def _convolve(x, kernel, bias):
  k, (_, _, width, channels) = kernel.shape[0], x.shape
  host = _depthwise.convolve(k, _depthwise.tile_for(width, large=k > 5), _depthwise.lanes_for(channels))
  (y,) = kernels.call(
    host, [jax.ShapeDtypeStruct(x.shape, x.dtype)], x, kernel, bias, items=_depthwise.convolve_items(x.shape)
  )
  return y


def _convolve_forward(x, kernel, bias):
  return _convolve(x, kernel, bias), (x, kernel)


def _convolve_backward(saved, g):
  x, kernel = saved
  dx = _convolve(g, kernel[::-1, ::-1], jnp.zeros(x.shape[-1]))
  return dx, *_correlate(x, g, kernel.shape[0])


_convolve.defvjp(_convolve_forward, _convolve_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _correlate(x, g, k):
  """Gradients of weights, sums over pixels of x, shifted by each tap, times g, [k, k, 1, C], and of the bias, [C]."""
  images, height, width, channels = x.shape
  parts = min(16, images * height)
  host = _depthwise.correlate(k, _depthwise.tile_for(width), _depthwise.lanes_for(channels))
  (sums,) = kernels.call(host, [jax.ShapeDtypeStruct((parts, k * k + 1, channels), x.dtype)], x, g, items=parts)
  sums = sums.sum(0)
  return sums[:-1].reshape(k, k, 1, channels), sums[-1]


def _correlate_forward(x, g, k):
  return _correlate(x, g, k), (x, g)


def _correlate_backward(k, saved, cotangents):
  (x, g), (dkernel, dbias) = saved, cotangents
  return _convolve(g, dkernel[::-1, ::-1], jnp.zeros(x.shape[-1])), _convolve(x, dkernel, dbias)


_correlate.defvjp(_correlate_forward, _correlate_backward)


@jax.custom_vjp
def _host_grouped(x, kernel, bias):
  """[P, C] by [g, O], plus [O] -> [P, O]."""
  size, out = kernel.shape[0], kernel.shape[1] * kernel.shape[0] // x.shape[1]
  shape = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), x.dtype)
  return kernels.call(_grouped.product(size, out), [shape], x, kernel, bias, items=_grouped.items(x.shape[0]))[0]


def _host_grouped_forward(x, kernel, bias):
  return _host_grouped(x, kernel, bias), (x, kernel)


def _host_grouped_backward(saved, g):
  x, kernel = saved
  dx = _host_grouped(g, _swap(kernel, x.shape[1] // kernel.shape[0]), jnp.zeros(x.shape[1]))
  return dx, _host_grouped_weights(x, g, kernel.shape[0]), g.sum(0)


_host_grouped.defvjp(_host_grouped_forward, _host_grouped_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _host_grouped_weights(x, g, size):
  parts = min(16, x.shape[0])
  host = _grouped.weights(size, g.shape[1] * size // x.shape[1])
  (sums,) = kernels.call(host, [jax.ShapeDtypeStruct((parts, size, g.shape[1]), x.dtype)], x, g, items=parts)
  return sums.sum(0)


def _host_grouped_weights_forward(x, g, size):
  return _host_grouped_weights(x, g, size), (x, g)


def _host_grouped_weights_backward(size, saved, dkernel):
  x, g = saved
  dx = _host_grouped(g, _swap(dkernel, x.shape[1] // size), jnp.zeros(x.shape[1]))
  return dx, _host_grouped(x, dkernel, jnp.zeros(g.shape[1]))


_host_grouped_weights.defvjp(_host_grouped_weights_forward, _host_grouped_weights_backward)


def _swap(kernel, groups):
  """Inputs and outputs of every group exchanged: [g, groups * o] -> [o, groups * g]."""
  size = kernel.shape[0]
  return kernel.reshape(size, groups, -1).transpose(2, 1, 0).reshape(-1, groups * size)


class Conv(nn.Module):
  """Convolution of all channels with all, with the parameters of `flax.linen.Conv`.

  They are `kernel` [k, k, C, features] and `bias` [features].

  Attributes:
    features: outputs.
    kernel_size: k.
    stride: of the output pixels.
    padding: zeros on every side.
    use_bias: whether there is a bias.
    dtype: compute dtype.
    param_dtype: dtype of the parameters.
    kernel_init: initialiser of the filters.
    bias_init: initialiser of the bias.
  """

  features: int
  kernel_size: int
  stride: int = 1
  padding: int = 0
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: jax.nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j o"]:
    """Images to images, in `dtype`."""
    shape = self.kernel_size, self.kernel_size, x.shape[-1], self.features
    x, kernel, bias = _promoted(self, x, shape, self.bias_init)
    return dense(x, kernel, bias, stride=self.stride, padding=self.padding)


class DepthwiseConv(nn.Module):
  """Depthwise convolution, one k x k filter a channel; parameters `kernel` [k, k, 1, C] and `bias` [C].

  Attributes:
    kernel_size: k, odd; `k // 2` zeros pad every side.
    stride: of the output pixels.
    use_bias: whether there is a bias.
    dtype: compute dtype.
    param_dtype: dtype of the parameters.
    kernel_init: initialiser of the filters.
  """

  kernel_size: int
  stride: int = 1
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b i j c"]:
    """Images to images, in `dtype`."""
    x, kernel, bias = _promoted(self, x, (self.kernel_size, self.kernel_size, 1, x.shape[-1]))
    return depthwise(x, kernel, bias, stride=self.stride)


class GroupedPointwiseConv(nn.Module):
  """1x1 convolution in groups; parameters `kernel` [1, 1, C / groups, features] and `bias` [features].

  Attributes:
    features: outputs over all groups.
    groups: how many groups; divides both C and `features`.
    use_bias: whether there is a bias.
    dtype: compute dtype.
    param_dtype: dtype of the parameters.
    kernel_init: initialiser of the weights.
  """

  features: int
  groups: int
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b o"]:
    """Any leading shape, channels last, in `dtype`."""
    if x.shape[-1] % self.groups or self.features % self.groups:
      raise ValueError(
        f"groups: got {self.groups}, expected a divisor of {x.shape[-1]} channels and {self.features} features"
      )
    x, kernel, bias = _promoted(self, x, (1, 1, x.shape[-1] // self.groups, self.features))
    return grouped_pointwise(x, kernel, bias)


def _promoted(module, x, shape, bias_init=nn.initializers.zeros):
  """Images, the kernel of a layer and its bias if it has one, in the layer's compute dtype."""
  kernel = module.param("kernel", module.kernel_init, shape, module.param_dtype)
  bias = module.param("bias", bias_init, shape[-1:], module.param_dtype) if module.use_bias else None
  return nn.dtypes.promote_dtype(x, kernel, bias, dtype=module.dtype)
