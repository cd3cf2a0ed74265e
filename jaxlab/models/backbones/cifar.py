"""ResNet-32, ResNet-110 and VGG-19 for images of 32 x 32, as a list of units that can be trained apart.

    ResNet-n, n = 6 m + 2:  conv3x3 BN ReLU, then 3 m basic blocks of widths 16, 32, 64, He et al. 2016, section 4.2
    block:                  relu(BN conv3x3 relu(BN conv3x3_s x) + x); x is BN conv1x1_s x where size or width changes
    VGG-19:                 16 units conv3x3 BN ReLU, a maximum over 2 x 2 pixels before those that begin a stage
    classifier:             mean over pixels, then a dense layer

A `Backbone` says what the units are, `unit` makes one. Kernels start from a normal distribution of variance
2 / (k k outputs), dense layers from PyTorch's default. Running variances are the biased ones; PyTorch's are n / (n - 1)
of that.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab import checks, interop
from jaxlab.nn.batch_norm import BatchNormAct
from jaxlab.nn.conv import Conv
from jaxlab.nn.initializers import torch_bias, torch_kernel
from jaxlab.nn.module import precision

Kind = Literal["resnet", "vgg"]
_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class Backbone:
  """The units of a network, in order.

  Attributes:
    kind: "resnet", whose first unit is a convolution and whose others are basic blocks, or "vgg", all convolutions.
    widths: channels that each unit puts out.
    strides: of each unit: 1, or 2 where it halves the image.
  """

  kind: Kind
  widths: tuple[int, ...]
  strides: tuple[int, ...]

  def __post_init__(self) -> None:
    checks.choice("kind", self.kind, Kind)
    if not self.widths or min(self.widths) < 1:
      raise ValueError(f"widths: got {self.widths}, expected the channels of at least one unit")
    if len(self.strides) != len(self.widths) or not set(self.strides) <= {1, 2}:
      raise ValueError(f"strides: got {self.strides}, expected 1 or 2 for each of {len(self.widths)} units")

  def __len__(self) -> int:
    return len(self.widths)


def resnet(depth: int, widths: Sequence[int] = (16, 16, 32, 64)) -> Backbone:
  """ResNet of `depth` = 6 m + 2 layers: 1 + 3 m units.

  Args:
    depth: 20, 32, 44, 56, 110, ...
    widths: of the first convolution and of the three stages.
  """
  checks.count("depth", depth, 8)
  if depth % 6 != 2:
    raise ValueError(f"depth: got {depth}, expected 6 m + 2, such as 32 or 110")
  if len(widths) != 4:
    raise ValueError(f"widths: got {tuple(widths)}, expected one for the first convolution and for three stages")
  blocks = (depth - 2) // 6
  return Backbone(
    "resnet",
    (widths[0], *(w for w in widths[1:] for _ in range(blocks))),
    (1, *[1] * blocks, *(2 if i == 0 else 1 for _ in range(2) for i in range(blocks))),
  )


def vgg19(widths: Sequence[int] = (64, 128, 256, 512, 512)) -> Backbone:
  """VGG-19 with batch normalisation: 16 convolutions in five stages, of these widths, and one dense layer."""
  if len(widths) != 5:
    raise ValueError(f"widths: got {tuple(widths)}, expected one for each of five stages")
  sizes = (2, 2, 4, 4, 4)
  return Backbone(
    "vgg",
    tuple(w for w, n in zip(widths, sizes, strict=True) for _ in range(n)),
    tuple(2 if i == 0 and stage else 1 for stage, n in enumerate(sizes) for i in range(n)),
  )


def unit(backbone: Backbone, index: int, **options: Any) -> nn.Module:
  """Unit `index` of a backbone. Options: `dtype`, `param_dtype`, `axis_name`."""
  width, stride = backbone.widths[index], backbone.strides[index]
  if backbone.kind == "resnet" and index == 0:
    return ConvUnit(width, use_bias=False, **options)
  return block(backbone.kind, width, stride, **options)


def block(kind: Kind, width: int, stride: int, **options: Any) -> nn.Module:
  """What a network of this kind repeats, for any number of incoming channels."""
  if kind == "resnet":
    return BasicBlock(width, stride, **options)
  return ConvUnit(width, pool=stride == 2, **options)


class ConvUnit(nn.Module):
  """[maximum over 2 x 2,] conv3x3, BN, ReLU. Images of one pixel have no such maximum: a ValueError.

  Attributes:
    features: channels out.
    pool: whether the maximum is taken first.
    stride: of the convolution.
    use_bias: of the convolution.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  features: int
  pool: bool = False
  stride: int = 1
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b i j f"]:
    """Images to images."""
    if self.pool:
      if min(x.shape[1:3]) < 2:
        raise ValueError(f"images: got {x.shape[1]} x {x.shape[2]} pixels before a maximum over 2 x 2, expected larger")
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = conv(self.features, 3, self.stride, use_bias=self.use_bias, name="conv", **precision(self))(x)
    return BatchNormAct(axis_name=self.axis_name, name="norm", **precision(self))(x, train=train)


class BasicBlock(nn.Module):
  """Two convolutions and a shortcut. Attributes as `ConvUnit`'s."""

  features: int
  stride: int = 1
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b i j f"]:
    """Images to images."""
    convolve = lambda size, stride, name: conv(
      self.features, size, stride, use_bias=False, name=name, **precision(self)
    )
    norm = lambda name, slope: BatchNormAct(slope=slope, axis_name=self.axis_name, name=name, **precision(self))
    y = norm("norm1", 0.0)(convolve(3, self.stride, "conv1")(x), train=train)
    y = norm("norm2", 1.0)(convolve(3, 1, "conv2")(y), train=train)
    if self.stride != 1 or x.shape[-1] != self.features:
      x = norm("shortcut_norm", 1.0)(convolve(1, self.stride, "shortcut")(x), train=train)
    return nn.relu(y + x)


def conv(features: int, size: int, stride: int = 1, **options: Any) -> nn.Module:
  """Convolution with `size // 2` zeros on every side, as PyTorch pads."""
  return Conv(features, size, stride, padding=size // 2, kernel_init=_INIT, **options)


def linear(features: int, inputs: int, **options: Any) -> nn.Dense:
  """A dense layer of `inputs` channels whose weights and biases start uniform in +-1 / sqrt(inputs)."""
  return nn.Dense(features, kernel_init=torch_kernel, bias_init=torch_bias(inputs), **options)


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
  """Mean over pixels, accumulated in float32."""
  return jnp.mean(x, (1, 2), dtype=jnp.float32).astype(x.dtype)


def conv_weights(path: str, conv_name: str, norm_name: str, bias: bool = False) -> dict[str, interop.Rule]:
  """Conversion of a `ConvUnit` from two PyTorch layers."""
  return {f"{path}/conv": interop.conv(conv_name, bias), f"{path}/norm": interop.batch_norm(norm_name)}


def block_weights(path: str, prefix: str, shortcut: bool) -> dict[str, interop.Rule]:
  """Conversion of a `BasicBlock` from torchvision's names below `prefix`."""
  rules = {}
  for i in (1, 2):
    rules[f"{path}/conv{i}"] = interop.conv(f"{prefix}.conv{i}", False)
    rules[f"{path}/norm{i}"] = interop.batch_norm(f"{prefix}.bn{i}")
  if shortcut:
    rules[f"{path}/shortcut"] = interop.conv(f"{prefix}.downsample.0", False)
    rules[f"{path}/shortcut_norm"] = interop.batch_norm(f"{prefix}.downsample.1")
  return rules


def resnet_weights(backbone: Backbone, path: str) -> dict[str, interop.Rule]:
  """Conversion of a ResNet's units, named `<path>_0`, ..., from `conv1`, `bn1` and `layer1.0`, ..."""
  rules, blocks = conv_weights(f"{path}_0", "conv1", "bn1"), (len(backbone) - 1) // 3
  for i in range(1, len(backbone)):
    changes = backbone.strides[i] != 1 or backbone.widths[i] != backbone.widths[i - 1]
    rules |= block_weights(f"{path}_{i}", f"layer{(i - 1) // blocks + 1}.{(i - 1) % blocks}", changes)
  return rules
