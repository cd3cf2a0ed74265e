"""U-ViT: a vision transformer over patches and time, whose early blocks hand their tokens to late ones.

    x = [label, time, context, patches] + position
    N times:  x = Block(x), kept as h_i
    x = Block(x)
    N times, from the deepest:  x = Block([x, k_i h_i] W_i + b_i)
    prediction = Conv3x3(unpatchify(LN(x) W + b))

Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023; the network of the official code.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab import checks, interop
from jaxlab.models.scalelong.skips import Scaling, SkipScaling
from jaxlab.nn import transformer
from jaxlab.nn.conv import Conv
from jaxlab.nn.diffusion import timestep_embedding
from jaxlab.nn.initializers import torch_kernel
from jaxlab.nn.layer_norm import LayerNorm
from jaxlab.nn.module import check_images, precision
from jaxlab.nn.product import Dense

TIME_SCALE = 999.0  # what the diffusion time t in [0, 1] is multiplied by for the network

_dense_init = nn.initializers.normal(0.02)


class UViT(nn.Module):
  """U-ViT with scaled long skips: noisy images and times to predicted noise.

  Attributes:
    image_size: side of the images, in pixels (or of the latents).
    patch_size: side of a patch; divides `image_size`.
    in_channels: of the images.
    width: channels of a token.
    depth: blocks without the middle one, even; half as many long skips.
    num_heads: of attention; divides `width`.
    mlp_ratio: hidden width of the MLPs, in units of `width`.
    num_classes: labels, each a token of its own; 0 for a network without labels.
    context_size: tokens of a condition, such as a text; 0 for a network without one.
    context_width: channels of such a token, which a dense layer turns into `width`.
    final_conv: whether a 3x3 convolution of the pixels comes last.
    scaling: of the long skips, see the package's docstring.
    kappa: of the "constant" scaling.
    remat: recompute each block in the backward pass, for memory.
    dtype: compute dtype. Norms and softmax accumulate in float32.
    param_dtype: parameter dtype.
  """

  image_size: int = 32
  patch_size: int = 2
  in_channels: int = 3
  width: int = 512
  depth: int = 12
  num_heads: int = 8
  mlp_ratio: float = 4.0
  num_classes: int = 0
  context_size: int = 0
  context_width: int = 0
  final_conv: bool = True
  scaling: Scaling = "none"
  kappa: float = 0.5
  remat: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b h w c"],
    timesteps: Float[Array, " b"],
    labels: Int[Array, " b"] | None = None,
    context: Float[Array, "b t e"] | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "b h w c"]:
    """Predicts.

    Args:
      images: noisy, of `image_size`.
      timesteps: `TIME_SCALE` times t.
      labels: classes in [0, num_classes); None if there are none.
      context: tokens [B, context_size, context_width], such as CLIP's of a text; None if there are none.
      train: changes nothing, as nothing here is random.

    Returns:
      Predicted noise of the same shape, in `dtype`.

    Raises:
      ValueError: images, times, labels or context of wrong shape or dtype; attributes that contradict each other.
    """
    self._check(images, timesteps, labels, context)
    options = precision(self)
    block = nn.remat(transformer.Block) if self.remat else transformer.Block
    dense: Any = functools.partial(Dense, kernel_init=_dense_init, **options)
    batch, grid, p = images.shape[0], self.image_size // self.patch_size, self.patch_size

    patches = Conv(self.width, p, p, kernel_init=torch_kernel, name="patch_embed", **options)(images)
    tokens = [timestep_embedding(timesteps, self.width)[:, None], patches.reshape(batch, -1, self.width)]
    if context is not None:
      tokens.insert(1, dense(self.width, name="context_embed")(context.astype(self.dtype)))
    if labels is not None:
      init = nn.initializers.normal(1.0)
      embed = nn.Embed(self.num_classes, self.width, embedding_init=init, name="label_embed", **options)
      tokens.insert(0, embed(labels)[:, None])
    x = jnp.concatenate([t.astype(self.dtype) for t in tokens], 1)
    x = x + self.param("position", _dense_init, (1, *x.shape[1:]), self.param_dtype).astype(self.dtype)

    def attend(x: Array, name: str) -> Array:
      return block(self.num_heads, self.mlp_ratio, qkv_bias=False, epsilon=1e-5, name=name, **options)(x)

    num_skips = self.depth // 2
    scale = SkipScaling(self.scaling, num_skips, self.kappa, name="skips", **options)
    skips = []
    for i in range(num_skips):
      x = attend(x, f"in_block{i}")
      skips.append(x)
    x = attend(x, "mid_block")
    for i in reversed(range(num_skips)):
      both = jnp.concatenate([x, scale(skips[i], i)], -1)
      x = dense(self.width, name=f"skip_linear{i}")(both)
      x = attend(x, f"out_block{i}")

    x = LayerNorm(1e-5, name="norm", **options)(x[:, -(grid**2) :])
    x = dense(p * p * self.in_channels, name="decoder")(x)
    x = x.reshape(batch, grid, grid, p, p, self.in_channels).swapaxes(2, 3).reshape(images.shape)
    if not self.final_conv:
      return x
    return Conv(self.in_channels, 3, padding=1, kernel_init=torch_kernel, name="final_conv", **options)(x)

  def _check(self, images: Array, timesteps: Array, labels: Array | None, context: Array | None) -> None:
    check_images(images, self.in_channels)
    if images.shape[1:3] != (self.image_size, self.image_size):
      raise ValueError(f"images: got {images.shape[1]}x{images.shape[2]} pixels, expected a side of {self.image_size}")
    if timesteps.shape != images.shape[:1]:
      raise ValueError(f"timesteps: got shape {timesteps.shape}, expected one an image, {images.shape[:1]}")
    checks.count("patch_size", self.patch_size)
    if self.image_size % self.patch_size:
      raise ValueError(f"patch_size: got {self.patch_size}, expected a divisor of {self.image_size} pixels")
    checks.count("depth", self.depth, 2)
    if self.depth % 2:
      raise ValueError(f"depth: got {self.depth}, expected an even number")
    if (labels is None) != (self.num_classes == 0):
      given = "none" if labels is None else f"shape {labels.shape}"
      raise ValueError(f"labels: got {given}, expected {'none' if labels is not None else 'one an image'}")
    if labels is not None and (labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer)):
      raise ValueError(f"labels: got {labels.dtype} {labels.shape}, expected integers {images.shape[:1]}")
    checks.count("context_size", self.context_size, 0)
    checks.count("context_width", self.context_width, bool(self.context_size), None if self.context_size else 0)
    expected = (*images.shape[:1], self.context_size, self.context_width) if self.context_size else None
    if (None if context is None else context.shape) != expected:
      given = "none" if context is None else f"shape {context.shape}"
      raise ValueError(f"context: got {given}, expected {expected or 'none'}")
    if context is not None and not jnp.issubdtype(context.dtype, jnp.floating):
      raise ValueError(f"context: got dtype {context.dtype}, expected floats")


# The published variants, of ScaleLong's code (cifar10) and U-ViT's (the others).


def cifar10(**overrides: Any) -> UViT:
  """U-ViT-S/2 on 32x32 images: 44,255,328 parameters, and 8,497 a gate."""
  return UViT(**overrides)


def celeba64(**overrides: Any) -> UViT:
  """U-ViT-S/4 on 64x64 images."""
  return UViT(**{"image_size": 64, "patch_size": 4, **overrides})


def imagenet64(**overrides: Any) -> UViT:
  """U-ViT-M/4 on 64x64 images with 1000 labels."""
  shape = {"image_size": 64, "patch_size": 4, "width": 768, "depth": 16, "num_heads": 12}
  return UViT(**{**shape, "num_classes": 1000, **overrides})


def imagenet256(**overrides: Any) -> UViT:
  """U-ViT-L/2 on 32x32 latents of four channels, with 1000 labels and one for none."""
  shape = {"in_channels": 4, "width": 1024, "depth": 20, "num_heads": 16, "final_conv": False}
  return UViT(**{**shape, "num_classes": 1001, **overrides})


def coco256(**overrides: Any) -> UViT:
  """U-ViT-S/2 on 32x32 latents of four channels, with a text of 77 tokens from CLIP: 44,692,644 parameters."""
  return UViT(**{"in_channels": 4, "context_size": 77, "context_width": 768, **overrides})


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Official weights of a `UViT` as flax variables; the variant follows from the names.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  blocks = [int(match[1]) for match in (re.match(r"in_blocks\.(\d+)\.", name) for name in state_dict) if match]
  return interop.variables(
    state_dict,
    weight_table(
      2 * (max(blocks, default=-1) + 1),
      scaling="learned" if "se.layer1.weight" in state_dict else "learned_each" if _gates(state_dict) else "none",
      labels="label_emb.weight" in state_dict,
      context="context_embed.weight" in state_dict,
      final_conv="final_layer.weight" in state_dict,
    ),
  )


def _gates(state_dict: Mapping[str, Any]) -> bool:
  return any(name.startswith("se.") for name in state_dict)


def weight_table(
  depth: int, *, scaling: Scaling = "none", labels: bool = False, context: bool = False, final_conv: bool = True
) -> dict[str, interop.Rule]:
  """Which official tensor is which variable, for `interop.variables` and `interop.state_dict`.

  Args:
    depth: as in `UViT`, as the rest.
    scaling: kind of the skips' multipliers.
    labels: whether the network has labels.
    context: whether it has context tokens.
    final_conv: whether it ends with a convolution.

  Returns:
    Flax path -> rule. Official decoder blocks count from the deepest, these count as the skips do.
  """
  last = depth // 2 - 1
  table = {
    "patch_embed": interop.conv("patch_embed.proj"),
    "position": interop.raw("pos_embed"),
    "norm": interop.norm("norm"),
    "decoder": interop.dense("decoder_pred"),
  }
  names = {"mid_block": "mid_block"}
  for i in range(depth // 2):
    names |= {f"in_block{i}": f"in_blocks.{i}", f"out_block{i}": f"out_blocks.{last - i}"}
    table[f"skip_linear{i}"] = interop.dense(f"out_blocks.{last - i}.skip_linear")
  for path, name in names.items():
    table |= {f"{path}/{part}": rule for part, rule in transformer.weight_table(name, qkv_bias=False).items()}
  gates = {"learned": {"gate": "se"}, "learned_each": {f"gate{i}": f"se.{last - i}" for i in range(depth // 2)}}
  for path, name in gates.get(scaling, {}).items():
    table[f"skips/{path}/squeeze"] = interop.dense(f"{name}.layer1")
    table[f"skips/{path}/excite"] = interop.dense(f"{name}.layer2")
  if labels:
    table["label_embed"] = interop.embed("label_emb")
  if context:
    table["context_embed"] = interop.dense("context_embed")
  if final_conv:
    table["final_conv"] = interop.conv("final_layer")
  return {f"params/{path}": rule for path, rule in table.items()}
