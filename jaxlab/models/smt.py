"""SMT: convolutional modulation at several scales in early stages, attention in late ones.

A pyramid of four stages at strides 4, 8, 16 and 32. Every block is

    x = x + DropPath(g1 * Mixer(LN(x)))
    x = x + DropPath(g2 * MLP(LN(x)))

and stages differ in the mixer: scale-aware modulation in stages 1 and 2, modulation and self-attention in turn in
stage 3, self-attention in stage 4 (the "evolutionary hybrid network"). No position is encoded anywhere, so images of
any height and width from 3 pixels on work, as in the official code: the stem halves twice, rounding up and then down,
and each later stage halves rounding up. Sides that divide by 32 need no rounding.

Lin et al., "Scale-Aware Modulation Meet Transformer", ICCV 2023, arXiv:2307.08579. Paper's terms: MHMC is the row of
depthwise convolutions in `ScaleAwareModulation`, SAA its grouped mix, EHN the default of `SMT.mixers`.

Differs from the paper: SMT-S has 22.55M parameters as in the official code, not the 20.5M of the paper's table.
Differs from the official code: maps stay [B, H, W, C] throughout instead of being flattened and restored; the running
variance of batch normalisation is the biased one (flax).
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab import checks, interop
from jaxlab.nn.attention import multi_head_attention
from jaxlab.nn.conv import Conv, DepthwiseConv, GroupedPointwiseConv
from jaxlab.nn.drop_path import DropPath, linear_rates
from jaxlab.nn.gelu import gelu
from jaxlab.nn.layer_norm import LayerNorm
from jaxlab.nn.module import check_images, precision
from jaxlab.nn.product import Dense

Mixer = Literal["modulation", "attention", "alternate"]
HYBRID: tuple[Mixer, ...] = ("modulation", "modulation", "alternate", "attention")

# The official truncation at +-2 lies a hundred standard deviations out.
_dense_init = nn.initializers.normal(0.02)


def _conv_init(groups: int = 1) -> jax.nn.initializers.Initializer:
  """Normal with variance 2 / (k * k * out / groups)."""
  return nn.initializers.variance_scaling(2.0 * groups, "fan_out", "normal")


class ScaleAwareModulation(nn.Module):
  """Multiplies a projection of the input by weights computed from its surroundings at several scales.

      v = x W_v,   s = x W_s
      z = interleave_k(DWConv_k(s_k))            s_k: k-th quarter of the channels, under a kernel of its own size
      m = GELU(BN(z grouped W_mix)) W_fuse       a group is the same channel of every quarter
      out = (m * v) W_proj

  The modulation m is sown into "intermediates" as "modulation".

  Attributes:
    kernel_sizes: one head each; their number divides C.
    expand: width of the mix, in units of C.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  kernel_sizes: Sequence[int] = (3, 5, 7, 9)
  expand: int = 2
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h w c"]:
    """Args: x, maps. Returns maps of the same shape. Raises ValueError if the heads do not divide the channels."""
    channels, heads = x.shape[-1], len(self.kernel_sizes)
    if channels % heads:
      raise ValueError(f"widths: got {channels}, expected a multiple of the {heads} modulation heads")
    options = precision(self)
    dense = functools.partial(Dense, channels, kernel_init=_dense_init, **options)
    local = functools.partial(DepthwiseConv, kernel_init=_conv_init(channels // heads), **options)

    value = dense(name="v")(x)
    scales = jnp.split(dense(name="s")(x), heads, axis=-1)  # channel = head * (C / heads) + t ...
    scales = [
      local(kernel_size=k, name=f"local_conv_{k}x{k}")(s) for k, s in zip(self.kernel_sizes, scales, strict=True)
    ]
    mixed = jnp.stack(scales, axis=-1).reshape(x.shape)  # ... becomes channel = t * heads + head

    width, groups = self.expand * channels, channels // heads
    mix = GroupedPointwiseConv(width, groups, kernel_init=_conv_init(groups), name="mix", **options)
    norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name, name="mix_norm", **options)
    fuse = Dense(channels, kernel_init=_conv_init(), name="fuse", **options)
    modulation = fuse(gelu(norm(mix(mixed))))
    self.sow("intermediates", "modulation", modulation)
    return dense(name="proj")(modulation * value)


class LocalAttention(nn.Module):
  """Self-attention over all positions, plus a 3x3 depthwise convolution of the values.

      q = x W_q,   [k, v] = x W_kv
      out = (softmax(q k^T / sqrt(head_dim)) v + DWConv(v)) W_proj

  Attributes:
    head_dim: channels of a head; divides C.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  head_dim: int = 32
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Args: x, maps. Returns maps of the same shape. Raises ValueError if `head_dim` does not divide the channels."""
    batch, _, _, channels = x.shape
    if channels % self.head_dim:
      raise ValueError(f"widths: got {channels}, expected a multiple of head_dim, {self.head_dim}")
    options = precision(self)
    dense = functools.partial(Dense, kernel_init=_dense_init, **options)

    query = dense(features=channels, name="q")(x)
    key, value = jnp.split(dense(features=2 * channels, name="kv")(x), 2, axis=-1)
    local = DepthwiseConv(3, kernel_init=_conv_init(channels), name="local_conv", **options)(value)
    tokens = (y.reshape(batch, -1, channels) for y in (query, key, value))
    attended = multi_head_attention(*tokens, num_heads=channels // self.head_dim).reshape(x.shape)
    return dense(features=channels, name="proj")(attended + local)


class Mlp(nn.Module):
  """Two dense layers; between them GELU(u + DWConv(u)), which lets neighbours speak.

  Attributes:
    ratio: hidden width, in units of C.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  ratio: float
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Args: x, maps. Returns maps of the same shape."""
    options = precision(self)
    channels, hidden = x.shape[-1], int(x.shape[-1] * self.ratio)
    u = Dense(hidden, kernel_init=_dense_init, name="fc1", **options)(x)
    u = gelu(u + DepthwiseConv(3, kernel_init=_conv_init(hidden), name="local_conv", **options)(u))
    return Dense(channels, kernel_init=_dense_init, name="fc2", **options)(u)


class Block(nn.Module):
  """A mixer and an MLP, each a pre-norm residual branch. Attributes as in `SMT`."""

  mixer: Literal["modulation", "attention"]
  mlp_ratio: float
  head_dim: int = 32
  drop_path: float = 0.0
  layer_scale: float | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
    """Args: x, maps. `train` is positional for `nn.remat`. Returns maps of the same shape."""
    options = precision(self)

    def add(branch: Array, number: int) -> Array:
      if self.layer_scale is not None:
        scale = nn.initializers.constant(self.layer_scale)
        branch = branch * self.param(f"scale{number}", scale, x.shape[-1:], self.param_dtype).astype(self.dtype)
      return x + DropPath(self.drop_path)(branch, train=train)

    y = LayerNorm(1e-6, name="norm1", **options)(x)
    if self.mixer == "modulation":
      x = add(ScaleAwareModulation(axis_name=self.axis_name, name="mixer", **options)(y, train=train), 1)
    else:
      x = add(LocalAttention(self.head_dim, name="mixer", **options)(y), 1)
    y = LayerNorm(1e-6, name="norm2", **options)(x)
    return add(Mlp(self.mlp_ratio, name="mlp", **options)(y), 2)


class Stem(nn.Module):
  """Image to maps at stride 4: convolution, batch norm, ReLU, convolution, layer norm. Attributes as in `SMT`."""

  width: int
  kernel_size: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images: Float[Array, "b i j d"], *, train: bool = False) -> Float[Array, "b h w c"]:
    """Args: images. Returns maps of a quarter of the sides."""
    options = precision(self)
    conv = functools.partial(Conv, self.width, stride=2, kernel_init=_conv_init(), **options)
    x = conv(kernel_size=self.kernel_size, padding=self.kernel_size // 2, use_bias=False, name="conv1")(images)
    x = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name, name="norm1", **options)(x)
    x = conv(kernel_size=2, name="conv2")(nn.relu(x))
    return LayerNorm(1e-5, name="norm2", **options)(x)


class SMT(nn.Module):
  """Scale-aware modulation transformer: class logits, or a pyramid of maps for detection and segmentation.

  Attributes:
    num_classes: outputs.
    in_channels: channels of the images.
    widths: channels of each stage; multiples of 4 where modulation runs and of `head_dim` where attention does.
    depths: blocks of each stage.
    mixers: per stage "modulation", "attention", or "alternate" (modulation in even blocks, from 0; attention in odd).
    mlp_ratios: hidden width of the MLP of each stage, in units of its channels.
    head_dim: channels of an attention head.
    stem_kernel: side of the first convolution, odd.
    drop_path: rate of the last block, in [0, 1); rates grow linearly from 0. Training needs a "dropout" key if not 0.
    layer_scale: initial value of the learned scales of the residual branches; None for no scales.
    remat: recompute each block in the backward pass, for memory.
    dtype: compute dtype. Norms and softmax accumulate in float32.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  num_classes: int = 1000
  in_channels: int = 3
  widths: Sequence[int] = (64, 128, 256, 512)
  depths: Sequence[int] = (2, 2, 8, 1)
  mixers: Sequence[Mixer] = HYBRID
  mlp_ratios: Sequence[float] = (4, 4, 4, 2)
  head_dim: int = 32
  stem_kernel: int = 3
  drop_path: float = 0.0
  layer_scale: float | None = None
  remat: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False, features: bool = False
  ) -> Float[Array, "b k"] | tuple[Float[Array, "b i j d"], ...]:
    """Classifies images.

    Args:
      images: floats, normalised by the caller; sides from 3 pixels on.
      train: use batch statistics (mutable collection "batch_stats") and drop paths.
      features: return the normalised maps of all stages, strides 4, 8, 16 and 32, instead of logits.

    Returns:
      Logits [B, num_classes], or a tuple of maps [B, h, w, width]; in `dtype`.

    Raises:
      ValueError: images of wrong rank, dtype, size or channels; attributes that contradict each other.
    """
    self._check(images)
    options = precision(self)
    block: Any = functools.partial(
      nn.remat(Block, static_argnums=(2,)) if self.remat else Block,
      head_dim=self.head_dim,
      layer_scale=self.layer_scale,
      axis_name=self.axis_name,
      **options,
    )
    conv = functools.partial(Conv, kernel_size=3, stride=2, padding=1, kernel_init=_conv_init(), **options)

    maps = []
    x = images.astype(self.dtype)
    rates = linear_rates(self.drop_path, self.depths)
    for i, (width, mixer, ratio) in enumerate(zip(self.widths, self.mixers, self.mlp_ratios, strict=True)):
      stage = f"stage{i + 1}"
      if i == 0:
        x = Stem(width, self.stem_kernel, axis_name=self.axis_name, name="stem", **options)(x, train=train)
      else:
        x = LayerNorm(1e-5, name=f"{stage}_embed_norm", **options)(conv(features=width, name=f"{stage}_embed")(x))
      for j, rate in enumerate(rates[i]):
        x = block(_mixer(mixer, j), ratio, drop_path=rate, name=f"{stage}_block{j}")(x, train)
      x = LayerNorm(1e-6, name=f"{stage}_norm", **options)(x)
      maps.append(x)
    if features:
      return tuple(maps)
    return Dense(self.num_classes, kernel_init=_dense_init, name="head", **options)(x.mean((1, 2)))

  def _check(self, images: Array) -> None:
    check_images(images, self.in_channels)
    if min(images.shape[1:3]) < 3:
      raise ValueError(f"images: got {images.shape[1]}x{images.shape[2]} pixels, expected at least 3x3")
    if self.num_classes < 1:
      raise ValueError(f"num_classes: got {self.num_classes}, expected at least 1")
    if not self.widths:
      raise ValueError("widths: got none, expected one a stage")
    for name in ("depths", "mixers", "mlp_ratios"):
      if len(getattr(self, name)) != len(self.widths):
        raise ValueError(f"{name}: got {getattr(self, name)}, expected one a stage, {len(self.widths)}")
    if min(self.depths) < 1:
      raise ValueError(f"depths: got {self.depths}, expected at least one block a stage")
    if self.stem_kernel < 1 or self.stem_kernel % 2 == 0:
      raise ValueError(f"stem_kernel: got {self.stem_kernel}, expected an odd number")
    checks.rate("drop_path", self.drop_path)


def _mixer(kind: Mixer, block: int) -> Literal["modulation", "attention"]:
  if kind == "alternate":
    return "attention" if block % 2 else "modulation"
  if kind not in ("modulation", "attention"):
    raise ValueError(f"mixers: got {kind!r}, expected 'modulation', 'attention' or 'alternate'")
  return kind


# The published variants (paper, table 2, and the official configurations). Drop paths are those of ImageNet-1k.


def tiny(num_classes: int = 1000, **overrides: Any) -> SMT:
  """SMT-T, 11,506,536 parameters."""
  return SMT(**{"num_classes": num_classes, "drop_path": 0.1, **overrides})


def small(num_classes: int = 1000, **overrides: Any) -> SMT:
  """SMT-S, 22,550,952 parameters."""
  return SMT(**{"num_classes": num_classes, "depths": (3, 4, 18, 2), "drop_path": 0.2, **overrides})


def base(num_classes: int = 1000, **overrides: Any) -> SMT:
  """SMT-B, 32,037,352 parameters."""
  shape = {"depths": (4, 6, 28, 2), "mlp_ratios": (8, 6, 4, 2), "stem_kernel": 7}
  return SMT(**{"num_classes": num_classes, **shape, "drop_path": 0.3, **overrides})


def large(num_classes: int = 1000, **overrides: Any) -> SMT:
  """SMT-L, 80,620,264 parameters, of which 30,720 are layer scales. On ImageNet-22k its drop path is 0.1."""
  shape = {"widths": (96, 192, 384, 768), "head_dim": 48, "depths": (4, 6, 28, 4), "mlp_ratios": (8, 6, 4, 2)}
  return SMT(
    **{"num_classes": num_classes, **shape, "stem_kernel": 7, "layer_scale": 1e-4, "drop_path": 0.4, **overrides}
  )


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Official weights (`interop.load("smt_tiny.pth", key="model")`) as flax variables.

  Args:
    state_dict: official names -> NumPy arrays or tensors, of any variant. Of a detector or segmenter
      (`key="state_dict"`), which has names that begin with "backbone.", only these are read.

  Returns:
    {"params", "batch_stats"} for the variant that the names belong to. A backbone without a classifier has no "head":
    call the network with `features=True`.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  backbone = {name.removeprefix("backbone."): w for name, w in state_dict.items() if name.startswith("backbone.")}
  # Detectors trained with the first release of the code have another name for the convolution of the values.
  state_dict = {name.replace(".attn.dw_conv.", ".attn.local_conv."): w for name, w in (backbone or state_dict).items()}
  blocks = [re.match(r"block(\d+)\.(\d+)\.", name) for name in state_dict]
  depths = [0] * 4
  for stage, block in (map(int, match.groups()) for match in blocks if match):
    if 1 <= stage <= 4:  # anything else is reported as unused
      depths[stage - 1] = max(depths[stage - 1], block + 1)
  layer_scale = any(name.endswith(".gamma_1") for name in state_dict)
  head = any(name.startswith("head.") for name in state_dict)
  return interop.variables(state_dict, weight_table(depths, layer_scale=layer_scale, head=head))


def weight_table(
  depths: Sequence[int], *, mixers: Iterable[Mixer] = HYBRID, layer_scale: bool = False, head: bool = True
) -> dict[str, interop.Rule]:
  """Which official tensor is which variable, for `interop.variables` and `interop.state_dict`.

  Args:
    depths: as in `SMT`.
    mixers: as in `SMT`; the official code knows the default only.
    layer_scale: whether the blocks have scales.
    head: whether there is a classifier.

  Returns:
    Flax path -> rule.
  """
  table = {
    "stem/conv1": interop.conv("patch_embed1.conv.0", bias=False),
    "stem/norm1": interop.batch_norm("patch_embed1.conv.1"),
    "stem/conv2": interop.conv("patch_embed1.conv.3"),
    "stem/norm2": interop.norm("patch_embed1.norm"),
  }
  if head:
    table["head"] = interop.dense("head")
  for i, (depth, mixer) in enumerate(zip(depths, mixers, strict=True), start=1):
    table[f"stage{i}_norm"] = interop.norm(f"norm{i}")
    if i > 1:
      table[f"stage{i}_embed"] = interop.conv(f"patch_embed{i}.proj")
      table[f"stage{i}_embed_norm"] = interop.norm(f"patch_embed{i}.norm")
    for j in range(depth):
      block = _block_table(f"block{i}.{j}", _mixer(mixer, j), layer_scale)
      table |= {f"stage{i}_block{j}/{path}": rule for path, rule in block.items()}
  return {f"params/{path}": rule for path, rule in table.items()}


def _block_table(name: str, mixer: Literal["modulation", "attention"], layer_scale: bool) -> dict[str, interop.Rule]:
  table = {
    "norm1": interop.norm(f"{name}.norm1"),
    "norm2": interop.norm(f"{name}.norm2"),
    "mlp/fc1": interop.dense(f"{name}.mlp.fc1"),
    "mlp/local_conv": interop.conv(f"{name}.mlp.dwconv.dwconv"),
    "mlp/fc2": interop.dense(f"{name}.mlp.fc2"),
    "mixer/proj": interop.dense(f"{name}.attn.proj"),
  }
  if layer_scale:
    table |= {f"scale{n}": interop.raw(f"{name}.gamma_{n}") for n in (1, 2)}
  if mixer == "attention":
    return table | {
      "mixer/q": interop.dense(f"{name}.attn.q"),
      "mixer/kv": interop.dense(f"{name}.attn.kv"),
      "mixer/local_conv": interop.conv(f"{name}.attn.local_conv"),
    }
  return table | {
    "mixer/v": interop.dense(f"{name}.attn.v"),
    "mixer/s": interop.dense(f"{name}.attn.s"),
    **{f"mixer/local_conv_{k}x{k}": interop.conv(f"{name}.attn.local_conv_{k // 2}") for k in (3, 5, 7, 9)},
    "mixer/mix": interop.conv(f"{name}.attn.proj0"),
    "mixer/mix_norm": interop.batch_norm(f"{name}.attn.bn"),
    "mixer/fuse": interop.dense(f"{name}.attn.proj1", spatial=2),
  }
