"""MANIQA: how good a picture looks, from the picture alone, by attention over channels and over windows.

    F = [block 6, 7, 8, 9 of a ViT-B/8]                   tokens of 8x8 pixels, class token dropped
    F = Swin(reduce(TAB(TAB(F))))                         768 channels
    F = Swin(reduce(TAB(TAB(F))))                         384 channels
    score = sum_p f_p g_p / sum_p g_p                     f = ReLU(MLP(F)) scores a patch, g = sigmoid(MLP(F)) weighs it

A transposed attention block (TAB) lets channels attend to channels; the patches are what a channel is described by, so
its weights depend on their number and the size of the images is fixed. A Swin stage is two groups of two blocks of
attention in windows and a convolution, each group added to its input with a factor of 0.8 (alpha).

Yang et al., "MANIQA: Multi-dimension Attention Network for No-Reference Image Quality Assessment", CVPRW 2022,
arXiv:2204.08958.

Differs from the paper: channel attention transposes its result and then reads that memory as if it had not
(`scramble`). The official code does so and its weights were trained so; `scramble=False` is the paper's equation.
Differs from the official code: what it computes and drops (blocks 10 and 11, norm and classifier of the ViT) or has and
never calls (a strided convolution in each Swin stage) is left out: 114,164,578 parameters for its 135,747,530. The last
bias of f starts at 1/2, the middle of the labels, where it draws one about 0: see `score_bias`. The weighted mean is
taken as a softmax, which is the same and has a value where all g underflow. Hidden parts of shifted windows: see
`jaxlab.nn.window_attention`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxlab import checks, interop
from jaxlab.nn import transformer
from jaxlab.nn.attention import multi_head_attention
from jaxlab.nn.conv import Conv
from jaxlab.nn.drop_path import DropPath, linear_rates
from jaxlab.nn.dropout import dropout
from jaxlab.nn.gelu import gelu
from jaxlab.nn.initializers import torch_bias, torch_kernel
from jaxlab.nn.layer_norm import LayerNorm
from jaxlab.nn.module import check_images, precision
from jaxlab.nn.product import Dense
from jaxlab.nn.window_attention import window_attention

_vit_init = nn.initializers.normal(0.02)


def _linear(module: nn.Module, x: Array, features: int, name: str, **changes: Any) -> Array:
  """A dense layer of `module` as PyTorch starts it."""
  init: dict[str, Any] = {"kernel_init": torch_kernel, "bias_init": torch_bias(x.shape[-1]), **changes}
  return Dense(features, name=name, **init, **precision(module))(x)


def _drop(module: nn.Module, x: Array, rate: float, train: bool) -> Array:
  return dropout(module.make_rng("dropout"), x, rate) if train and rate else x


class Backbone(nn.Module):
  """The blocks of a vision transformer up to the last that is used. Attributes as in `MANIQA`."""

  width: int
  num_heads: int
  patch_size: int
  mlp_ratio: float
  taps: Sequence[int]
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, images: Float[Array, "b i j d"]) -> Float[Array, "b t f"]:
    """Args: images. Returns the tapped blocks' outputs beside each other, without class token: F = taps * width."""
    batch, height, width, channels = images.shape
    options, p = precision(self), self.patch_size
    # A convolution whose stride is its size is a product of patches and the kernel.
    patches = images.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
    patches = patches.reshape(batch, -1, p * p * channels)
    x = _linear(self, patches, self.width, "patch_embed")
    token = self.param("class_token", _vit_init, (1, 1, self.width), self.param_dtype)
    position = self.param("position", _vit_init, (1, x.shape[1] + 1, self.width), self.param_dtype)
    x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.width)), x], 1)
    x = x + position.astype(x.dtype)
    kept = {}
    for i in range(max(self.taps) + 1):
      x = transformer.Block(self.num_heads, self.mlp_ratio, name=f"block{i}", **options)(x)
      kept[i] = x[:, 1:]
    return jnp.concatenate([kept[i] for i in self.taps], -1)


class TransposedAttention(nn.Module):
  """TAB: channels are the tokens of a single head, and patches their coordinates.

      q, k, v = x W + b                       W [T, T]
      out = softmax(q k^T / sqrt(T)) v        [C, T]
      x = x + Dropout(out)

  Attributes:
    rate: of the dropout.
    scramble: True for the official code's out: transposed to [T, C], and that memory read as [C, T].
    dtype: compute dtype; the softmax is in float32.
    param_dtype: parameter dtype.
  """

  rate: float = 0.1
  scramble: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b c t"], *, train: bool = False) -> Float[Array, "b c t"]:
    """Args: x, channels by patches; train, drop. Returns the same shape."""
    # One product for all three: XLA's CPU backend would join three with that of the attention, at a third of the speed.
    query, key, value = jnp.split(_linear(self, x, 3 * x.shape[-1], "qkv"), 3, axis=-1)
    out = multi_head_attention(query, key, value, num_heads=1)
    if self.scramble:
      out = out.swapaxes(1, 2).reshape(x.shape)
    return x + _drop(self, out, self.rate, train)


class SwinBlock(nn.Module):
  """Attention in windows and an MLP, each a pre-norm residual branch.

  Attributes:
    num_heads: divides C.
    window: side of the windows; divides the sides of the map.
    shift: of the windows.
    mlp_width: hidden width of the MLP.
    drop_path: rate at which a sample loses a branch.
    dtype: compute dtype; norms and softmax accumulate in float32.
    param_dtype: parameter dtype.
  """

  num_heads: int
  window: int
  shift: int
  mlp_width: int
  drop_path: float
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h w c"]:
    """Args: x, maps; train, drop paths. Returns maps of the same shape."""
    options, channels = precision(self), x.shape[-1]
    y = LayerNorm(1e-5, name="norm1", **options)(x)
    query, key, value = jnp.split(_linear(self, y, 3 * channels, "qkv"), 3, axis=-1)
    shape = ((2 * self.window - 1) ** 2, self.num_heads)
    table = self.param("relative_bias", nn.initializers.normal(0.02), shape, self.param_dtype)
    y = window_attention(
      query, key, value, window=self.window, num_heads=self.num_heads, shift=self.shift, table=table.astype(y.dtype)
    )
    x = x + DropPath(self.drop_path)(_linear(self, y, channels, "proj"), train=train)
    y = LayerNorm(1e-5, name="norm2", **options)(x)
    y = _linear(self, gelu(_linear(self, y, self.mlp_width, "fc1")), channels, "fc2")
    return x + DropPath(self.drop_path)(y, train=train)


class SwinStage(nn.Module):
  """Groups of Swin blocks and a convolution, each scaled and added to what it was given.

      x = Dropout(x)
      x = x + scale * ReLU(Conv3x3(blocks(x)))          for each group

  Every second block of a group has its windows shifted by half their side, unless the map is one window.

  Attributes:
    depths: blocks of each group.
    num_heads: of each group.
    window: side of the windows, at most that of the map.
    mlp_width: hidden width of the MLPs.
    scale: alpha.
    rate: of the dropout.
    drop_path: rate of the last block; rates grow linearly from 0.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  depths: Sequence[int] = (2, 2)
  num_heads: Sequence[int] = (4, 4)
  window: int = 4
  mlp_width: int = 768
  scale: float = 0.8
  rate: float = 0.1
  drop_path: float = 0.1
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h w c"]:
    """Args: x, maps; train, drop. Returns maps of the same shape."""
    options, channels = precision(self), x.shape[-1]
    window = min(self.window, *x.shape[1:3])
    x = _drop(self, x, self.rate, train)
    for i, rates in enumerate(linear_rates(self.drop_path, self.depths)):
      y = x
      for j, rate in enumerate(rates):
        shift = window // 2 if j % 2 and min(x.shape[1:3]) > window else 0
        block = SwinBlock(self.num_heads[i], window, shift, self.mlp_width, rate, name=f"group{i}_block{j}", **options)
        y = block(y, train=train)
      init: dict[str, Any] = {"kernel_init": torch_kernel, "bias_init": torch_bias(9 * channels)}
      conv = Conv(channels, 3, padding=1, name=f"group{i}_conv", **init, **options)
      x = x + self.scale * nn.relu(conv(y))
    return x


class MANIQA(nn.Module):
  """Images to scores.

  Attributes:
    image_size: side S of the images.
    patch_size: side of the patches; divides S.
    in_channels: channels of the images.
    width: D, channels of the backbone and of the first stage; the second has half.
    num_heads: of the backbone.
    mlp_ratio: hidden width of the backbone's MLPs, in units of D.
    taps: blocks of the backbone that are used, from 0.
    num_tab: channel attentions before each stage; 0 for an ablation.
    depths: blocks of each group of a stage; () for an ablation without stages.
    stage_heads: attention heads of each group.
    window: side of the windows of attention, in patches.
    mlp_width: hidden width of the stages' MLPs.
    scale: alpha of the stages.
    dropout: rate after channel attention, before a stage and inside f and g. Training needs a "dropout" key if not 0.
    drop_path: rate of a stage's last block, in [0, 1).
    scramble: whether channel attention writes its result as the official code does.
    score_bias: where the last bias of f starts. f ends in a ReLU and patches start alike, so with the official start,
      about 0, many networks give every image the score 0 and have no gradient at all.
    dtype: compute dtype. Norms, softmax and the weighted mean accumulate in float32.
    param_dtype: parameter dtype.
  """

  image_size: int = 224
  patch_size: int = 8
  in_channels: int = 3
  width: int = 768
  num_heads: int = 12
  mlp_ratio: float = 4.0
  taps: Sequence[int] = (6, 7, 8, 9)
  num_tab: int = 2
  depths: Sequence[int] = (2, 2)
  stage_heads: Sequence[int] = (4, 4)
  window: int = 4
  mlp_width: int = 768
  scale: float = 0.8
  dropout: float = 0.1
  drop_path: float = 0.1
  scramble: bool = True
  score_bias: float = 0.5
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, images: Float[Array, "b s s d"], *, train: bool = False, patches: bool = False
  ) -> Float[Array, " b"] | tuple[Float[Array, "b h w"], Float[Array, "b h w"]]:
    """Scores images.

    Args:
      images: floats in [-1, 1], (x / 255 - 0.5) / 0.5, of side `image_size`.
      train: use dropout and drop paths.
      patches: return f and g of every patch instead of their weighted mean.

    Returns:
      Scores [B], from 0 on, higher is better; or scores and weights of the patches [B, h, w]. In `dtype`.

    Raises:
      ValueError: images of wrong rank, dtype, size or channels; attributes that contradict each other.
    """
    self._check(images)
    options = precision(self)
    batch, side = images.shape[0], self.image_size // self.patch_size

    taps = tuple(self.taps)
    backbone = Backbone(self.width, self.num_heads, self.patch_size, self.mlp_ratio, taps, name="backbone", **options)
    x = backbone(images.astype(self.dtype))
    for stage, width in (("a", self.width), ("b", self.width // 2)):
      x = x.swapaxes(1, 2)
      for i in range(self.num_tab):
        x = TransposedAttention(self.dropout, self.scramble, name=f"tab_{stage}{i}", **options)(x, train=train)
      x = _linear(self, x.swapaxes(1, 2), width, f"reduce_{stage}").reshape(batch, side, side, width)
      x = SwinStage(
        self.depths, self.stage_heads, self.window, self.mlp_width, self.scale, self.dropout, self.drop_path,
        name=f"stage_{stage}", **options,
      )(x, train=train)  # fmt: skip
      x = x.reshape(batch, -1, width)

    def branch(name: str, **changes: Any) -> Array:
      hidden = nn.relu(_linear(self, x, width, f"{name}_hidden"))
      return _linear(self, _drop(self, hidden, self.dropout, train), 1, name, **changes)[..., 0]

    score = nn.relu(branch("score", bias_init=nn.initializers.constant(self.score_bias)))
    logit = branch("weight")
    if patches:
      return score.reshape(batch, side, side), nn.sigmoid(logit).reshape(batch, side, side)
    return weighted_mean(score, logit)

  def _check(self, images: Array) -> None:
    check_images(images, self.in_channels)
    checks.count("image_size", self.image_size)
    if self.patch_size < 1 or self.image_size % self.patch_size:
      raise ValueError(f"patch_size: got {self.patch_size}, expected a divisor of image_size, {self.image_size}")
    if images.shape[1:3] != (self.image_size, self.image_size):
      size = f"{images.shape[1]}x{images.shape[2]}"
      raise ValueError(f"images: got {size} pixels, expected image_size, {self.image_size}, squared")
    if self.num_heads < 1 or self.width % 2 or self.width % self.num_heads:
      raise ValueError(f"width: got {self.width}, expected a multiple of 2 and of {self.num_heads} heads")
    if not self.taps or min(self.taps) < 0:
      raise ValueError(f"taps: got {self.taps}, expected numbers of blocks, from 0")
    checks.count("num_tab", self.num_tab, 0)
    if len(self.stage_heads) != len(self.depths):
      raise ValueError(f"stage_heads: got {self.stage_heads}, expected one a group, {len(self.depths)}")
    side = self.image_size // self.patch_size
    if self.depths and (self.window < 1 or side % min(self.window, side)):
      raise ValueError(f"window: got {self.window}, expected a divisor of the {side} patches of a side")
    checks.rate("dropout", self.dropout)
    checks.rate("drop_path", self.drop_path)


def weighted_mean(score: Float[Array, "b t"], logit: Float[Array, "b t"]) -> Float[Array, " b"]:
  """sum_p f_p g_p / sum_p g_p with g = sigmoid(logit), whose weights are a softmax of log g.

  Args:
    score: f, of patches.
    logit: of the patches' weights.

  Returns:
    A convex combination of each row's scores, summed in float32, in their dtype.
  """
  weight = jax.nn.softmax(jax.nn.log_sigmoid(logit.astype(jnp.float32)))
  return jnp.sum(weight * score, -1).astype(score.dtype)


# The ensembles of the official code: a picture's score is the mean of its crops'.


def random_crops(
  key: Key[Array, ""], image: Float[Array, "h w c"], size: int, count: int = 20
) -> Float[Array, "n s s c"]:
  """Squares at uniform places, the last row and column of which the official code leaves out.

  Args:
    key: of the places.
    image: sides of at least `size`.
    size: S.
    count: N; 20 for a picture in the official code.

  Raises:
    ValueError: an image that is too small, no crops.
  """
  _check_crop(image, size)
  checks.count("count", count)
  high = jnp.array([image.shape[0] - size + 1, image.shape[1] - size + 1])
  places = jax.random.randint(key, (count, 2), 0, high)
  return jax.vmap(lambda at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (size, size, image.shape[2])))(places)


def five_crops(image: Float[Array, "h w c"], size: int) -> Float[Array, "5 s s c"]:
  """The corners, row by row, and the centre: what is scored while training. Arguments as `random_crops`."""
  _check_crop(image, size)
  down, right = image.shape[0] - size, image.shape[1] - size
  middle = image.shape[0] // 2 - size // 2, image.shape[1] // 2 - size // 2
  places = [(0, 0), (0, right), (down, 0), (down, right), middle]
  return jnp.stack([image[y : y + size, x : x + size] for y, x in places])


def ensemble_score(
  score: Callable[[Float[Array, "n s s c"]], Float[Array, " n"]],
  image: Float[Array, "h w c"],
  key: Key[Array, ""],
  *,
  size: int = 224,
  count: int = 20,
) -> Float[Array, ""]:
  """Score of a picture of any size: the mean over random crops.

  Args:
    score: crops -> scores, such as `jax.jit(functools.partial(model.apply, variables))`.
    image: floats in [-1, 1], sides of at least `size`.
    key: of the crops' places.
    size: of the crops, the model's `image_size`.
    count: crops.

  Returns:
    The mean, in float32.

  Raises:
    ValueError: an image that is too small, no crops.
  """
  return score(random_crops(key, image, size, count)).astype(jnp.float32).mean()


def _check_crop(image: Array, size: int) -> None:
  checks.count("size", size)
  if image.ndim != 3 or min(image.shape[:2]) < size:
    raise ValueError(f"image: got shape {image.shape}, expected [H, W, C] with sides of at least {size}")


def base(**overrides: Any) -> MANIQA:
  """The published network: ViT-B/8 on 224 pixels, 114,164,578 parameters, all of them used."""
  return MANIQA(**overrides)


# Official tensors that have no part in the score, see the module.
_UNUSED = ("vit.blocks.1[01].*", "vit.norm.*", "vit.head.*", "*.downsample.*")
_BUFFERS = ("*.attn_mask", "*.relative_position_index")


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Official weights (`interop.load("ckpt_koniq10k.pt")`) as flax variables; those without a part in the score go.

  Args:
    state_dict: official names -> NumPy arrays or tensors, of any width.

  Returns:
    {"params"}.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  tabs = {match[1] for name in state_dict if (match := re.match(r"tablock1\.(\d+)\.", name))}
  pattern = re.compile(r"swintransformer1\.layers\.(\d+)\.blocks\.(\d+)\.")
  blocks = {(match[1], match[2]) for name in state_dict if (match := pattern.match(name))}
  table = {f"backbone/{path}": rule for path, rule in _backbone_table("vit.").items()}
  together: dict[str, list[str]] = {}
  for n, stage in enumerate("ab", start=1):
    for i in sorted(tabs):
      name = f"tablock{n}.{i}.c_"
      table[f"tab_{stage}{i}/qkv"] = interop.dense(f"{name}qkv")
      together |= {f"{name}qkv.{kind}": [f"{name}{part}.{kind}" for part in "qkv"] for kind in ("weight", "bias")}
    table[f"reduce_{stage}"] = interop.dense(f"conv{n}", spatial=2)
    for i, j in sorted(blocks):
      layer, path = f"swintransformer{n}.layers.{i}", f"stage_{stage}/group{i}"
      block, name = f"{path}_block{j}", f"{layer}.blocks.{j}"
      table |= {
        f"{path}_conv": interop.conv(f"{layer}.conv"),
        f"{block}/norm1": interop.norm(f"{name}.norm1"),
        f"{block}/relative_bias": interop.raw(f"{name}.attn.relative_position_bias_table"),
        f"{block}/qkv": interop.dense(f"{name}.attn.qkv"),
        f"{block}/proj": interop.dense(f"{name}.attn.proj"),
        f"{block}/norm2": interop.norm(f"{name}.norm2"),
        f"{block}/fc1": interop.dense(f"{name}.mlp.fc1"),
        f"{block}/fc2": interop.dense(f"{name}.mlp.fc2"),
      }
  for name in ("score", "weight"):
    table |= {f"{name}_hidden": interop.dense(f"fc_{name}.0"), name: interop.dense(f"fc_{name}.3")}
  rules = {f"params/{path}": rule for path, rule in table.items()}
  return interop.variables(interop.joined(state_dict, together), rules, ignore=[*_UNUSED, *_BUFFERS])


def backbone_from_timm(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """timm's `vit_base_patch8_224` (`interop.load("model.safetensors")`), to take the place of `params["backbone"]`.

  Args:
    state_dict: timm's names -> arrays; blocks 10 and 11, norm and classifier are left out.

  Returns:
    Parameters of `Backbone`.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  rules = {f"params/{path}": rule for path, rule in _backbone_table("").items()}
  ignore = [pattern.removeprefix("vit.") for pattern in _UNUSED[:3]]
  return interop.variables(state_dict, rules, ignore=ignore)["params"]


def _backbone_table(prefix: str) -> dict[str, interop.Rule]:
  patches = interop.Leaf(
    f"{prefix}patch_embed.proj.weight",
    "kernel",
    to_flax=lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),
    to_torch=lambda k: k.reshape(math.isqrt(k.shape[0] // 3), -1, 3, k.shape[1]).transpose(3, 2, 0, 1),
    axes=(4,),
  )
  table: dict[str, interop.Rule] = {
    "patch_embed": (patches, interop.Leaf(f"{prefix}patch_embed.proj.bias", "bias", axes=(1,))),
    "class_token": interop.raw(f"{prefix}cls_token"),
    "position": interop.raw(f"{prefix}pos_embed"),
  }
  for i in range(10):
    block = transformer.weight_table(f"{prefix}blocks.{i}")
    table |= {f"block{i}/{path}": rule for path, rule in block.items()}
  return table
