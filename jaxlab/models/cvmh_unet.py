"""CVMH-UNet: a U-shaped network of scans and convolutions whose skips weigh channels by their frequencies.

    Block:   u = LN(x);  a, z = split(u W_in);  s = LN(CS2D(SiLU(DWConv(a))));  g = (s * SiLU(z)) W_out
             x + DropPath(g * ECA(g) + BN(Conv1x1(ReLU(BN(DWConv(u))))))
    CS2D:    four selective scans, along rows, columns and both diagonals, summed (`nn.scan_2d`)
    Fusion:  x = e + d;  G = sum of conv(mean_f m), conv(mean_f max m), conv(mean_f min m), m = x * (DCT basis image f)
             w = sigmoid(G + pointwise(x));  y = w e + (1 - w) d;  ReLU(BN(Conv1x1([y, x])))

Cao, Liu, Wu et al., "Remote Sensing Image Segmentation Using Vision Mamba and Multi-Scale Multi-Frequency Feature
Fusion", arXiv:2410.05624, and in its final form Remote Sensing 17(8):1390, 2025. Paper's terms: HVSSBlock (CVSSBlock
in the preprint) is `Block`, MFMSBlock is `Fusion`, e and d are encoder's and decoder's maps.

There is no official code. What the abstracts and section list state is followed; the rest is a reconstruction from what
the paper builds on: the frame (embedding, merging, expansion, widths) is that of VM-UNet (Ruan, Li and Xiang, 2024),
`ECA` that of ECA-Net, the 16 frequency pairs those of MADGNet and FcaNet, the pointwise branch and soft selection those
of attentional feature fusion. `vm_unet` is VM-UNet itself, to which the official weights of that network apply.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxlab import checks, interop
from jaxlab.nn import dct
from jaxlab.nn.conv import Conv, DepthwiseConv
from jaxlab.nn.drop_path import DropPath, linear_rates
from jaxlab.nn.initializers import torch_kernel
from jaxlab.nn.layer_norm import LayerNorm
from jaxlab.nn.module import check_images, precision
from jaxlab.nn.product import Dense
from jaxlab.nn.resize import adaptive_average_pool
from jaxlab.nn.scan_2d import CS2D, SS2D, Direction, SelectiveScan2D

FREQUENCIES = (
  (0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0),
  (5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2),
)  # fmt: skip
"""The pairs (u, v) of a 7 x 7 map that `Fusion` looks at, the most useful first."""

Skip = Literal["fusion", "add", "add_before"]

_dense_init = nn.initializers.truncated_normal(0.02)


class ECA(nn.Module):
  """Convolution over channels that stands in for a dense layer: k taps, k growing with the logarithm of the channels.

  Wang et al., "ECA-Net", arXiv:1910.03151, equation 12.

  Attributes:
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, v: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Args: v, statistics of channels. Returns as many, before the sigmoid."""
    conv = nn.Conv(1, (taps(v.shape[-1]),), use_bias=False, kernel_init=torch_kernel, name="conv", **precision(self))
    return conv(v[..., None])[..., 0]


def taps(channels: int) -> int:
  """k of `ECA`: |log2(channels) / 2 + 1 / 2|, cut to a whole number, and one more if that is even."""
  k = int(abs((math.log2(channels) + 1) / 2))
  return k if k % 2 else k + 1


class Block(nn.Module):
  """HVSSBlock: a gated scan of the whole image beside a convolution of the neighbourhood.

  Attributes:
    directions: in which the image is scanned.
    state_size: N, states of a channel.
    expand: E, channels of the scan, in units of those of the maps.
    local: whether there is the convolution branch.
    channel_attention: whether `ECA` weighs the channels of the scan's branch.
    residual: whether the maps are added to the result; False is an ablation.
    drop_path: rate of both branches together.
    dtype: compute dtype; the scan runs in float32.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  directions: tuple[Direction, ...] = CS2D
  state_size: int = 16
  expand: int = 2
  local: bool = True
  channel_attention: bool = True
  residual: bool = True
  drop_path: float = 0.0
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
    """Args: x, maps. `train` is positional for `nn.remat`. Returns maps of the same shape."""
    options, channels = precision(self), x.shape[-1]
    inner = self.expand * channels
    dense: Any = functools.partial(Dense, use_bias=False, kernel_init=_dense_init, **options)
    conv: Any = functools.partial(DepthwiseConv, 3, kernel_init=torch_kernel, **options)
    norm = functools.partial(LayerNorm, 1e-5, **options)

    u = norm(name="norm")(x)
    a, z = jnp.split(dense(2 * inner, name="in_proj")(u), 2, -1)
    a = nn.silu(conv(name="conv")(a))
    s = SelectiveScan2D(self.state_size, -(-channels // 16), self.directions, name="scan", **options)(a)
    out = dense(channels, name="out_proj")(norm(name="scan_norm")(s) * nn.silu(z))
    if self.channel_attention:
      pooled = out.astype("float32").mean((1, 2), keepdims=True).astype(out.dtype)
      out = out * nn.sigmoid(ECA(name="attention", **options)(pooled))
    if self.local:
      lo = nn.relu(_norm(self, train, "local_norm1")(conv(use_bias=False, name="local_conv")(u)))
      out = out + _norm(self, train, "local_norm2")(dense(channels, name="local_proj")(lo))
    out = DropPath(self.drop_path)(out, train=train)
    return x + out if self.residual else out


class Fusion(nn.Module):
  """MFMSBlock: chooses between a map of the encoder and one of the decoder, pixel by pixel and channel by channel.

  Attributes:
    pool_size: side of the map whose frequencies are taken, a multiple of 7, by which the frequencies are multiplied.
    frequencies: how many pairs of `FREQUENCIES`; 1 leaves plain averages, an ablation.
    pointwise: whether each pixel has a say of its own; False is an ablation.
    attention: "conv" for `ECA`, "dense" for two dense layers with a quarter of the channels between, an ablation.
    dtype: compute dtype; frequencies are taken in float32.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  pool_size: int
  frequencies: int = len(FREQUENCIES)
  pointwise: bool = True
  attention: Literal["conv", "dense"] = "conv"
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, encoded: Float[Array, "b h w c"], decoded: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b h w c"]:
    """Maps of one shape to one more.

    Raises:
      ValueError: maps that differ in shape, attributes out of range.
    """
    if encoded.shape != decoded.shape:
      raise ValueError(f"decoded: got shape {decoded.shape}, expected that of encoded, {encoded.shape}")
    checks.choice("attention", self.attention, ("conv", "dense"))
    options, channels = precision(self), encoded.shape[-1]
    dense: Any = functools.partial(Dense, use_bias=False, kernel_init=_dense_init, **options)
    few = max(channels // 4, 1)

    x = encoded + decoded
    pooled = adaptive_average_pool(x.astype("float32"), (self.pool_size, self.pool_size))
    statistics = frequency_statistics(pooled, self.frequencies).astype(self.dtype)
    if self.attention == "conv":
      weigh: Any = ECA(name="frequency_conv", **options)
    else:
      weigh = nn.Sequential([dense(few, name="frequency_dense1"), nn.relu, dense(channels, name="frequency_dense2")])
    weight = weigh(statistics).sum(1)[:, None, None]
    if self.pointwise:
      lo = nn.relu(_norm(self, train, "point_norm1")(dense(few, name="point1")(x)))
      weight = weight + _norm(self, train, "point_norm2")(dense(channels, name="point2")(lo))
    weight = nn.sigmoid(weight)
    self.sow("intermediates", "weight", weight)
    y = weight * encoded + (1 - weight) * decoded
    out = dense(channels, name="join")(jnp.concatenate([y, x], -1))
    return nn.relu(_norm(self, train, "join_norm")(out))


def frequency_statistics(x: Float[Array, "b s s c"], frequencies: int = len(FREQUENCIES)) -> Float[Array, "b 3 c"]:
  """Mean, maximum and minimum over the pixels of x * (basis image of the DCT), averaged over frequencies.

  The mean is the coefficient of the orthonormal DCT-II over s^2; that of (0, 0) is the average over s.

  Args:
    x: maps, s a multiple of 7; the pair (u, v) of `FREQUENCIES` is the frequency (u s / 7, v s / 7).
    frequencies: how many pairs.

  Raises:
    ValueError: a side that is no multiple of 7, or a number of frequencies that there are not.
  """
  side = x.shape[1]
  if x.shape[1] != x.shape[2] or side % 7:
    raise ValueError(f"pool_size: got {x.shape[1:3]}, expected a square with sides that are multiples of 7")
  if not 1 <= frequencies <= len(FREQUENCIES):
    raise ValueError(f"frequencies: got {frequencies}, expected 1 to {len(FREQUENCIES)}")
  pairs = [(u * side // 7, v * side // 7) for u, v in FREQUENCIES[:frequencies]]
  images = jnp.asarray(dct.basis(pairs, side, side), jnp.float32)
  mean = jnp.einsum("bijc,ij->bc", x, images.mean(0)) / side**2

  @jax.checkpoint  # one product at a time, in the backward pass too
  def extremes(total: tuple[Array, Array], image: Array) -> tuple[tuple[Array, Array], None]:
    m = x * image[..., None]
    return (total[0] + m.max((1, 2)), total[1] + m.min((1, 2))), None

  (largest, smallest), _ = jax.lax.scan(extremes, (jnp.zeros_like(mean), jnp.zeros_like(mean)), images)
  return jnp.stack([mean, largest / frequencies, smallest / frequencies], 1)


class CVMHUNet(nn.Module):
  """Images to a class for each pixel.

  Attributes:
    num_classes: K.
    in_channels: channels of the images.
    widths: channels of each stage, at strides 4, 8, 16 and so on; the first a multiple of 4.
    encoder_depths: blocks of each stage.
    decoder_depths: blocks of each stage on the way up, the deepest first; 0 for none.
    pool_sizes: of the fusion at each stage but the deepest, multiples of 7; of no use to other skips.
    skip: "fusion", or "add" for a sum in its place, an ablation. "add_before" adds what enters the encoder's stage of
      a resolution before the decoder leaves it: VM-UNet's way.
    directions: in which images are scanned.
    state_size: N, states of a channel of a scan.
    local: see `Block`; False is an ablation.
    channel_attention: see `Block`.
    residual: see `Block`.
    frequencies: see `Fusion`.
    pointwise: see `Fusion`.
    attention: see `Fusion`.
    drop_path: rate of the deepest blocks, in [0, 1); rates fall linearly to 0 at the first and the last. Training needs
      a "dropout" key if not 0.
    remat: recompute each block in the backward pass, for memory.
    dtype: compute dtype. Norms, scans and frequencies accumulate in float32.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  num_classes: int = 6
  in_channels: int = 3
  widths: Sequence[int] = (96, 192, 384, 768)
  encoder_depths: Sequence[int] = (2, 2, 2, 2)
  decoder_depths: Sequence[int] = (2, 2, 2, 2)
  pool_sizes: Sequence[int] = (56, 28, 14)
  skip: Skip = "fusion"
  directions: tuple[Direction, ...] = CS2D
  state_size: int = 16
  local: bool = True
  channel_attention: bool = True
  residual: bool = True
  frequencies: int = len(FREQUENCIES)
  pointwise: bool = True
  attention: Literal["conv", "dense"] = "conv"
  drop_path: float = 0.2
  remat: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h w k"]:
    """Segments images.

    Args:
      images: floats, normalised by the caller. Sides that are not multiples of 4 * 2^(stages - 1), 32 for four stages,
        are padded to such by their last pixels, below and on the right, and the logits there are cut off.
      train: use batch statistics (mutable collection "batch_stats") and drop paths.

    Returns:
      Logits [B, H, W, num_classes], in `dtype`.

    Raises:
      ValueError: images of wrong rank, dtype, channels or size; attributes that contradict each other.
    """
    self._check(images)
    options, stages = precision(self), len(self.widths)
    height, width = images.shape[1:3]
    dense: Any = functools.partial(Dense, use_bias=False, kernel_init=_dense_init, **options)
    norm = functools.partial(LayerNorm, 1e-5, **options)
    block: Any = functools.partial(
      nn.remat(Block, static_argnums=(2,)) if self.remat else Block,
      self.directions, self.state_size, local=self.local, channel_attention=self.channel_attention,
      residual=self.residual, axis_name=self.axis_name, **options,
    )  # fmt: skip

    unit = 2 ** (stages + 1)
    x = images.astype(self.dtype)
    if height % unit or width % unit:
      x = jnp.pad(x, ((0, 0), (0, -height % unit), (0, -width % unit), (0, 0)), mode="edge")
    x = Conv(self.widths[0], 4, 4, kernel_init=torch_kernel, name="embed", **options)(x)
    x = norm(name="embed_norm")(x)
    entered, left = [], []
    for i, rates in enumerate(linear_rates(self.drop_path, self.encoder_depths)):
      if i:
        x = norm(name=f"merge{i + 1}_norm")(_squares_to_channels(x))
        x = dense(self.widths[i], name=f"merge{i + 1}")(x)
      entered.append(x)
      for j, rate in enumerate(rates):
        x = block(drop_path=rate, name=f"encoder{i + 1}_block{j}")(x, train)
      left.append(x)

    rising = linear_rates(self.drop_path, self.decoder_depths[::-1])
    for i in reversed(range(stages)):
      if i < stages - 1:
        if self.skip == "add_before":
          x = x + entered[i + 1]
        x = _channels_to_squares(dense(4 * self.widths[i], name=f"expand{i + 1}")(x), 2)
        x = norm(name=f"expand{i + 1}_norm")(x)
        if self.skip == "add":
          x = x + left[i]
        if self.skip == "fusion":
          fusion = Fusion(
            self.pool_sizes[i], self.frequencies, self.pointwise, self.attention, axis_name=self.axis_name,
            name=f"fusion{i + 1}", **options,
          )  # fmt: skip
          x = fusion(left[i], x, train=train)
      for j, rate in enumerate(rising[i][::-1]):
        x = block(drop_path=rate, name=f"decoder{i + 1}_block{j}")(x, train)
    x = _channels_to_squares(dense(4 * self.widths[0], name="final")(x), 4)
    x = norm(name="final_norm")(x)
    logits = dense(self.num_classes, use_bias=True, name="head")(x)
    return logits[:, :height, :width]

  def _check(self, images: Array) -> None:
    check_images(images, self.in_channels)
    if min(images.shape[1:3]) < 1:
      raise ValueError(f"images: got {images.shape[1]}x{images.shape[2]} pixels, expected at least one")
    stages = len(self.widths)
    for name in ("encoder_depths", "decoder_depths"):
      depths, least = getattr(self, name), 1 if name == "encoder_depths" else 0
      if len(depths) != stages or min(depths, default=least) < least:
        raise ValueError(f"{name}: got {depths}, expected one of at least {least} for each of {stages} stages")
    if self.skip == "fusion" and len(self.pool_sizes) < stages - 1:
      raise ValueError(f"pool_sizes: got {self.pool_sizes}, expected one for each of {stages} stages but the last")
    if not stages or self.widths[0] % 4 or min(self.widths) < 1:
      raise ValueError(f"widths: got {self.widths}, expected channels of each stage, the first a multiple of 4")
    checks.choice("skip", self.skip, Skip)
    checks.count("num_classes", self.num_classes)
    checks.count("state_size", self.state_size)
    checks.rate("drop_path", self.drop_path)


def _norm(module: Any, train: bool, name: str) -> nn.BatchNorm:
  return nn.BatchNorm(
    not train, momentum=0.9, epsilon=1e-5, axis_name=module.axis_name, name=name, **precision(module)
  )  # fmt: skip


def _squares_to_channels(x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
  """2 x 2 pixels as channels, the pixel below before the one on the right."""
  return jnp.concatenate([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)


def _channels_to_squares(x: Float[Array, "b h w d"], side: int) -> Float[Array, "b i j c"]:
  """Channels (row, column, c) as side x side pixels."""
  batch, height, width, _ = x.shape
  x = x.reshape(batch, height, width, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, height * side, width * side, -1)


def vm_unet(num_classes: int = 6, **changes: Any) -> CVMHUNet:
  """VM-UNet: scans along rows and columns, no local branch, no attention, sums for skips; 27,427,686 parameters.

  Args:
    num_classes: K.
    **changes: fields of the network.
  """
  plain: dict[str, Any] = {"directions": SS2D, "local": False, "channel_attention": False, "skip": "add_before"}
  return CVMHUNet(num_classes, **{"decoder_depths": (2, 2, 2, 1), **plain, **changes})


def cross_entropy_and_dice(
  logits: Float[Array, "b h w k"], labels: Int[Array, "b h w"], valid: Bool[Array, "b h w"] | None = None
) -> Float[Array, ""]:
  """The loss of training: mean cross entropy plus one minus the mean Dice coefficient of the classes.

    dice_k = (2 sum p_k y_k + 1) / (sum p_k + sum y_k + 1),   sums over the pixels of the batch

  Args:
    logits: of any floating dtype, of at least 2 classes, as the softmax of one is constant.
    labels: classes, whole numbers; those of pixels that do not count are not looked at.
    valid: which pixels count; None for all.

  Returns:
    In float32.

  Raises:
    ValueError: shapes or dtypes that do not fit, fewer than 2 classes.
  """
  if logits.ndim != 4 or logits.shape[-1] < 2:
    raise ValueError(f"logits: got shape {logits.shape}, expected [batch, height, width, classes], at least 2 classes")
  if labels.shape != logits.shape[:-1]:
    raise ValueError(f"labels: got shape {labels.shape}, expected {logits.shape[:-1]} for logits {logits.shape}")
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels: got dtype {labels.dtype}, expected whole numbers")
  if valid is not None and (valid.shape != labels.shape or valid.dtype != bool):
    raise ValueError(f"valid: got {valid.dtype} of shape {valid.shape}, expected bool of the labels' {labels.shape}")
  logits = logits.astype("float32")
  valid = jnp.ones(labels.shape, bool) if valid is None else valid
  labels = jnp.where(valid, labels, 0)
  weight = valid.astype("float32")
  entropy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
  y = jax.nn.one_hot(labels, logits.shape[-1]) * weight[..., None]
  p = jax.nn.softmax(logits) * weight[..., None]
  both, either = (p * y).sum((0, 1, 2)), (p + y).sum((0, 1, 2))
  dice = (2 * both + 1) / (either + 1)
  return (weight * entropy).sum() / jnp.maximum(weight.sum(), 1) + 1 - dice.mean()


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Official weights of VM-UNet, of its class `VMUNet` or of the `VSSM` in it, as variables of `vm_unet`.

  Args:
    state_dict: official names -> NumPy arrays or tensors.

  Returns:
    {"params"}.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  prefix = "vmunet." if any(name.startswith("vmunet.") for name in state_dict) else ""
  blocks = [re.fullmatch(prefix + r"(layers|layers_up)\.(\d+)\.blocks\.(\d+)\.ln_1\.weight", n) for n in state_dict]
  found = [(m[1], int(m[2]), int(m[3])) for m in blocks if m]
  stages = 1 + max((stage for _, stage, _ in found), default=0)
  table: dict[str, interop.Rule] = {
    "embed": interop.conv(f"{prefix}patch_embed.proj"),
    "embed_norm": interop.norm(f"{prefix}patch_embed.norm"),
    "final": interop.dense(f"{prefix}final_up.expand", bias=False),
    "final_norm": interop.norm(f"{prefix}final_up.norm"),
    "head": interop.dense(f"{prefix}final_conv", spatial=2),
  }
  for i in range(1, stages):
    down, up = f"{prefix}layers.{i - 1}.downsample", f"{prefix}layers_up.{i}.upsample"
    table |= {
      f"merge{i + 1}_norm": interop.norm(f"{down}.norm"),
      f"merge{i + 1}": interop.dense(f"{down}.reduction", bias=False),
      f"expand{stages - i}": interop.dense(f"{up}.expand", bias=False),
      f"expand{stages - i}_norm": interop.norm(f"{up}.norm"),
    }
  for side, stage, j in found:
    path = f"encoder{stage + 1}_block{j}" if side == "layers" else f"decoder{stages - stage}_block{j}"
    table |= {f"{path}/{key}": rule for key, rule in _block_table(f"{prefix}{side}.{stage}.blocks.{j}").items()}
  return interop.variables(state_dict, {f"params/{path}": rule for path, rule in table.items()})


def _block_table(name: str) -> dict[str, interop.Rule]:
  mixer, swap = f"{name}.self_attention", lambda a: a.swapaxes(1, 2)
  return {
    "norm": interop.norm(f"{name}.ln_1"),
    "in_proj": interop.dense(f"{mixer}.in_proj", bias=False),
    "conv": interop.conv(f"{mixer}.conv2d"),
    "scan/x_proj": interop.raw(f"{mixer}.x_proj_weight", swap, swap),
    "scan/dt_proj": interop.raw(f"{mixer}.dt_projs_weight", swap, swap),
    "scan/dt_bias": interop.raw(f"{mixer}.dt_projs_bias"),
    "scan/A_log": interop.raw(
      f"{mixer}.A_logs", lambda a: a.reshape(4, -1, a.shape[1]), lambda a: a.reshape(-1, a.shape[2])
    ),
    "scan/D": interop.raw(f"{mixer}.Ds", lambda d: d.reshape(4, -1), lambda d: d.reshape(-1)),
    "scan_norm": interop.norm(f"{mixer}.out_norm"),
    "out_proj": interop.dense(f"{mixer}.out_proj", bias=False),
  }
