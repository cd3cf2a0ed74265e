"""Depthwise and grouped pointwise convolution, NHWC."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def depthwise(
  x: Float[Array, "b h w c"], kernel: Float[Array, "k l 1 c"], *, stride: int = 1
) -> Float[Array, "b i j c"]:
  """Depthwise convolution with zero padding `k // 2` on every side."""
  k, l = kernel.shape[:2]
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((k // 2, k // 2), (l // 2, l // 2)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


def grouped_pointwise(x: Float[Array, "*b c"], kernel: Float[Array, "1 1 g o"]) -> Float[Array, "*b o"]:
  """1x1 convolution in groups: input channel `j * g + i` reaches the outputs of group `j` only."""
  g, out = kernel.shape[-2:]
  groups = x.shape[-1] // g
  x = x.reshape(*x.shape[:-1], groups, g)
  y = jnp.einsum("...jg,gjo->...jo", x, kernel.reshape(g, groups, out // groups))
  return y.reshape(*y.shape[:-2], out)


class DepthwiseConv(nn.Module):
  """Depthwise convolution, one k x k filter a channel; parameters `kernel` [k, k, 1, C] and `bias` [C]."""

  kernel_size: int
  stride: int = 1
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    k, c = self.kernel_size, x.shape[-1]
    kernel = self.param("kernel", self.kernel_init, (k, k, 1, c), self.param_dtype)
    y = depthwise(x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride)
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (c,), self.param_dtype).astype(self.dtype)
    return y


class GroupedPointwiseConv(nn.Module):
  """1x1 convolution in groups; parameters `kernel` [1, 1, C/groups, features] and `bias` [features]."""

  features: int
  groups: int
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b o"]:
    shape = (1, 1, x.shape[-1] // self.groups, self.features)
    kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
    y = grouped_pointwise(x.astype(self.dtype), kernel.astype(self.dtype))
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
    return y
