"""The convolutional denoiser of DDPM with scaled long skips.

A pyramid of residual blocks, each told the time, with attention at some sizes. Every map that the encoder makes (the
first convolution's, each block's, each halved one) is one long skip, taken from the deepest on by the decoder's blocks:

    x = ResBlock([x, k_i h_i])

Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, appendix B.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab import checks, interop
from jaxlab.models.scalelong.skips import Scaling, SkipScaling
from jaxlab.nn.attention import multi_head_attention
from jaxlab.nn.conv import Conv
from jaxlab.nn.diffusion import timestep_embedding
from jaxlab.nn.module import check_images, precision

_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
_nothing = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")  # branches start as zero


class ResBlock(nn.Module):
  """x P + Conv(Dropout(SiLU(GN(Conv(SiLU(GN(x))) + SiLU(time) W)))), with P only where the width changes.

  Attributes:
    features: outputs.
    num_groups: of the norms.
    dropout: rate.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int
  num_groups: int
  dropout: float
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], time: Float[Array, "b d"], train: bool) -> Float[Array, "b h w o"]:
    """Args: x, maps; time, embedded; `train` is positional for `nn.remat`. Returns maps."""
    options = precision(self)
    norm = functools.partial(nn.GroupNorm, self.num_groups, epsilon=1e-6, **options)
    conv = functools.partial(Conv, self.features, 3, padding=1, **options)
    h = conv(kernel_init=_init, name="conv1")(nn.silu(norm(name="norm1")(x)))
    h = h + nn.Dense(self.features, kernel_init=_init, name="time", **options)(nn.silu(time))[:, None, None]
    h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(norm(name="norm2")(h)))
    h = conv(kernel_init=_nothing, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, kernel_init=_init, name="shortcut", **options)(x)
    return x + h


class AttentionBlock(nn.Module):
  """x + softmax(q k^T / sqrt(C)) v W over all positions, one head, of the normalised maps. Attributes as `ResBlock`."""

  num_groups: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Args: x, maps. Returns maps of the same shape."""
    options = precision(self)
    channels = x.shape[-1]
    y = nn.GroupNorm(self.num_groups, epsilon=1e-6, name="norm", **options)(x)
    tokens = y.reshape(x.shape[0], -1, channels)
    qkv = (nn.Dense(channels, kernel_init=_init, name=name, **options)(tokens) for name in "qkv")
    attended = multi_head_attention(*qkv, num_heads=1).reshape(x.shape)
    return x + nn.Dense(channels, kernel_init=_nothing, name="proj", **options)(attended)


class UNet(nn.Module):
  """DDPM's UNet with scaled long skips: noisy images and times to predicted noise.

  Attributes:
    in_channels: of the images.
    width: channels of the first level.
    multiples: channels of each level, in units of `width`; each level but the last halves the sides.
    num_blocks: residual blocks of a level on the way down; one more on the way up.
    attention_sizes: heights of maps at which attention follows each block.
    dropout: rate in the residual blocks; training needs a "dropout" key if not 0.
    num_groups: of the norms; divides the channels of every map, also concatenated ones.
    scaling: of the long skips, see the package's docstring.
    kappa: of the "constant" scaling.
    remat: recompute each residual block in the backward pass, for memory.
    dtype: compute dtype. Norms and softmax accumulate in float32.
    param_dtype: parameter dtype.
  """

  in_channels: int = 3
  width: int = 128
  multiples: Sequence[int] = (1, 2, 2, 2)
  num_blocks: int = 2
  attention_sizes: Sequence[int] = (16,)
  dropout: float = 0.0
  num_groups: int = 32
  scaling: Scaling = "none"
  kappa: float = 0.5
  remat: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], timesteps: Float[Array, " b"], *, train: bool = False
  ) -> Float[Array, "b h w c"]:
    """Predicts.

    Args:
      images: noisy; sides are multiples of 2^(levels - 1).
      timesteps: `TIME_SCALE` times t.
      train: drop.

    Returns:
      Predicted noise of the same shape, in `dtype`.

    Raises:
      ValueError: images or times of wrong shape or dtype; attributes that contradict each other.
    """
    self._check(images, timesteps)
    options = precision(self)
    conv: Any = functools.partial(Conv, kernel_size=3, padding=1, kernel_init=_init, **options)
    res_block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock

    time = timestep_embedding(timesteps, self.width, sine_first=True, last_period=True).astype(self.dtype)
    time = nn.Dense(4 * self.width, kernel_init=_init, name="time1", **options)(time)
    time = nn.Dense(4 * self.width, kernel_init=_init, name="time2", **options)(nn.silu(time))

    def block(x: Array, features: int, name: str) -> Array:
      return res_block(features, self.num_groups, self.dropout, name=name, **options)(x, time, train)

    def attend(x: Array, name: str) -> Array:
      return AttentionBlock(self.num_groups, name=name, **options)(x)

    x = conv(self.width, name="conv_in")(images.astype(self.dtype))
    skips = [x]
    levels = list(enumerate(self.width * multiple for multiple in self.multiples))
    for i, features in levels:
      for j in range(self.num_blocks):
        x = block(x, features, f"down{i}_block{j}")
        if x.shape[1] in self.attention_sizes:
          x = attend(x, f"down{i}_attention{j}")
        skips.append(x)
      if i + 1 < len(levels):
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        x = Conv(features, 3, 2, kernel_init=_init, name=f"down{i}_halve", **options)(x)
        skips.append(x)

    x = block(x, x.shape[-1], "mid_block0")
    x = block(attend(x, "mid_attention"), x.shape[-1], "mid_block1")

    scale = SkipScaling(self.scaling, len(skips), self.kappa, name="skips", **options)
    for i, features in reversed(levels):
      for j in range(self.num_blocks + 1):
        level = len(skips) - 1
        x = block(jnp.concatenate([x, scale(skips.pop(), level)], -1), features, f"up{i}_block{j}")
        if x.shape[1] in self.attention_sizes:
          x = attend(x, f"up{i}_attention{j}")
      if i:
        x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        x = conv(features, name=f"up{i}_double")(x)

    x = nn.silu(nn.GroupNorm(self.num_groups, epsilon=1e-6, name="norm_out", **options)(x))
    return Conv(self.in_channels, 3, padding=1, kernel_init=_nothing, name="conv_out", **options)(x)

  def _check(self, images: Array, timesteps: Array) -> None:
    check_images(images, self.in_channels)
    if not self.multiples or min(self.multiples) < 1:
      raise ValueError(f"multiples: got {self.multiples}, expected a positive one for each level")
    checks.count("num_blocks", self.num_blocks)
    checks.rate("dropout", self.dropout)
    side = 2 ** (len(self.multiples) - 1)
    if images.shape[1] % side or images.shape[2] % side:
      raise ValueError(f"images: got {images.shape[1]}x{images.shape[2]} pixels, expected multiples of {side}")
    if timesteps.shape != images.shape[:1]:
      raise ValueError(f"timesteps: got shape {timesteps.shape}, expected one an image, {images.shape[:1]}")
    if self.num_groups < 1 or self.width % self.num_groups:
      raise ValueError(f"num_groups: got {self.num_groups}, expected a divisor of the width, {self.width}")


def ddpm_cifar10(**overrides: Any) -> UNet:
  """DDPM's network for 32x32 images: 35,746,307 parameters, 12 long skips."""
  return UNet(**{"dropout": 0.1, **overrides})


def from_ddpm(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Weights of DDPM's network, under the names of its PyTorch port `pesser/pytorch_diffusion`, as flax variables.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  names = list(state_dict)
  for name, tensor in state_dict.items():
    match = re.fullmatch(r"(down\.\d+\.block\.0)\.conv1\.weight", name)
    if match and np.shape(tensor)[:1] != np.shape(tensor)[1:2]:  # a block that changes the width has a shortcut
      names.append(f"{match[1]}.nin_shortcut.weight")
  return interop.variables(state_dict, ddpm_weight_table(names))


def ddpm_weight_table(names: Iterable[str]) -> dict[str, interop.Rule]:
  """Which of the port's tensors is which variable, for `interop.variables` and `interop.state_dict`.

  Args:
    names: of the tensors. The highest level and the highest block among them say how many of each there are, in all
      levels; one attention says that all blocks of its level have one; shortcuts on the way down are those named. The
      port knows no gates.

  Returns:
    Flax path -> rule, for every module of the network, whether or not it is among the names.
  """
  names = set(names)
  found = [match.groups() for name in names if (match := re.match(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.", name))]
  num_levels = max((int(level) for _, level, _, _ in found), default=0) + 1
  num_blocks = max((int(block) + (way == "down") for way, _, _, block in found), default=1)  # one more on the way up
  attended = {int(level) for _, level, kind, _ in found if kind == "attn"}

  table = {"time1": interop.dense("temb.dense.0"), "time2": interop.dense("temb.dense.1")}
  table |= {"conv_in": interop.conv("conv_in"), "conv_out": interop.conv("conv_out")}
  table["norm_out"] = interop.norm("norm_out")
  blocks = {"mid.block_1": "mid_block0", "mid.block_2": "mid_block1"}
  attentions = {"mid.attn_1": "mid_attention"}
  for i in range(num_levels):
    for way, count in (("down", num_blocks), ("up", num_blocks + 1)):
      blocks |= {f"{way}.{i}.block.{j}": f"{way}{i}_block{j}" for j in range(count)}
      if i in attended:
        attentions |= {f"{way}.{i}.attn.{j}": f"{way}{i}_attention{j}" for j in range(count)}
    if i + 1 < num_levels:
      table[f"down{i}_halve"] = interop.conv(f"down.{i}.downsample.conv")
      table[f"up{i + 1}_double"] = interop.conv(f"up.{i + 1}.upsample.conv")
  for name, path in blocks.items():
    table |= {f"{path}/norm{j}": interop.norm(f"{name}.norm{j}") for j in (1, 2)}
    table |= {f"{path}/conv{j}": interop.conv(f"{name}.conv{j}") for j in (1, 2)}
    table[f"{path}/time"] = interop.dense(f"{name}.temb_proj")
    if name.startswith("up.") or f"{name}.nin_shortcut.weight" in names:
      table[f"{path}/shortcut"] = interop.dense(f"{name}.nin_shortcut", spatial=2)
  for name, path in attentions.items():
    table[f"{path}/norm"] = interop.norm(f"{name}.norm")
    table |= {f"{path}/{part}": interop.dense(f"{name}.{part}", spatial=2) for part in "qkv"}
    table[f"{path}/proj"] = interop.dense(f"{name}.proj_out", spatial=2)
  return {f"params/{path}": rule for path, rule in table.items()}
