"""A network of given widths and depths, as plain layers of exactly these sizes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxlab import interop
from jaxlab.learning.transformable_search.space import Block, Genotype, Space, check, check_inputs
from jaxlab.models.backbones import cifar
from jaxlab.nn.batch_norm import BatchNormAct
from jaxlab.nn.module import precision


class Kept(NamedTuple):
  """A block that is left.

  Attributes:
    block: the full one.
    widths: channels in, then out of each convolution.
    shortcut: "identity", "conv" or "conv_norm".
  """

  block: Block
  widths: tuple[int, ...]
  shortcut: str


def kept_blocks(space: Space, genotype: Genotype) -> tuple[Kept, ...]:
  """The blocks of a derived network; a stage that is cut hands on the width of its last block."""
  check(space, genotype)
  made, width = [], genotype.widths[0]
  for block in space.layout:
    if block.position > genotype.depths[block.stage]:
      continue
    widths = (width, *genotype.widths[block.first : block.first + len(block.kernels)])
    if block.stride == 2:
      shortcut = "conv"
    elif width != widths[-1]:
      shortcut = "conv" if space.bottleneck else "conv_norm"
    else:
      shortcut = "identity"
    made.append(Kept(block, widths, shortcut))
    width = widths[-1]
  return tuple(made)


class DerivedNetwork(nn.Module):
  """The network of a genotype.

  Attributes:
    space: where it is from.
    genotype: widths and depths.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  space: Space
  genotype: Genotype
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b k"]:
    """Logits.

    Raises:
      ValueError: images that are not floats [B, S, S, C] of the space's size, a genotype of another space.
    """
    options = {**precision(self), "axis_name": self.axis_name}
    check_inputs(self.space, images)
    blocks = kept_blocks(self.space, self.genotype)
    x = images.astype(self.dtype)
    x = cifar.ConvUnit(self.genotype.widths[0], use_bias=False, name="stem", **options)(x, train=train)
    for i, kept in enumerate(blocks):
      x = DerivedBlock(kept, name=f"blocks_{i}", **options)(x, train=train)
    classifier = nn.Dense(
      self.space.num_classes, kernel_init=nn.initializers.normal(0.01), name="classifier", **precision(self)
    )
    return classifier(cifar.average_pool(x))


class DerivedBlock(nn.Module):
  """Convolutions with normalisation, and a shortcut.

  Attributes:
    kept: what it is made of.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  kept: Kept
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w i"], *, train: bool) -> Float[Array, "b u v o"]:
    """Images to images."""
    block, widths = self.kept.block, self.kept.widths
    conv = lambda width, kernel, stride, name: cifar.conv(
      width, kernel, stride, use_bias=False, name=name, **precision(self)
    )
    norm = lambda slope, name: BatchNormAct(slope=slope, axis_name=self.axis_name, name=name, **precision(self))
    h, last = x, len(block.kernels) - 1
    for i, (kernel, stride) in enumerate(zip(block.kernels, block.strides, strict=True)):
      h = conv(widths[i + 1], kernel, stride, f"convs_{i}")(h)
      h = norm(0.0 if i < last else 1.0, f"norms_{i}")(h, train=train)
    if block.stride == 2:
      x = nn.avg_pool(x, (2, 2), (2, 2))
    if self.kept.shortcut != "identity":
      x = conv(widths[-1], 1, 1, "shortcut")(x)
    if self.kept.shortcut == "conv_norm":
      x = norm(1.0, "shortcut_norm")(x, train=train)
    return nn.relu(x + h)


def derived_from_torch(state_dict: Mapping[str, Any], space: Space, genotype: Genotype) -> dict[str, Any]:
  """Variables of a `DerivedNetwork` from the official code's state dict.

  Args:
    state_dict: of `InferCifarResNet`, as tensors or arrays.
    space: the network's.
    genotype: the network's.

  Raises:
    ValueError: tensors that are missing, left over or of another shape.
  """
  rules = cifar.conv_weights("params/stem", "layers.0.conv", "layers.0.bn") | {
    "params/classifier": interop.dense("classifier")
  }
  names = ("conv_1x1", "conv_3x3", "conv_1x4") if space.bottleneck else ("conv_a", "conv_b")
  for i, kept in enumerate(kept_blocks(space, genotype)):
    path, layer = f"params/blocks_{i}", f"layers.{i + 1}"
    for j, name in enumerate(names):
      rules[f"{path}/convs_{j}"] = interop.conv(f"{layer}.{name}.conv", False)
      rules[f"{path}/norms_{j}"] = interop.batch_norm(f"{layer}.{name}.bn")
    if kept.shortcut != "identity":
      rules[f"{path}/shortcut"] = interop.conv(f"{layer}.downsample.conv", False)
    if kept.shortcut == "conv_norm":
      rules[f"{path}/shortcut_norm"] = interop.batch_norm(f"{layer}.downsample.bn")
  return interop.variables(state_dict, rules)
